"""Images are read upright, on white, and in 8 bits, beside `transformers` and NumPy."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from vixml_jax.data.images import image_reader

ORIENTATION = 0x0112


@pytest.fixture
def rng():
    return np.random.default_rng()


def read(source):
    image = image_reader.read(source if isinstance(source, bytes) else str(source))
    assert image.mode == "RGB"
    return np.asarray(image)


def on_white(rgba):
    """Oracle of transparency, in float64."""
    alpha = rgba[..., 3:].astype(np.float64) / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_transformers(orientation, extension, rng, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"x.{extension}"
    image = Image.fromarray(rng.integers(0, 256, (5, 3, 3), np.uint8)).resize((24, 40))
    image.save(path, exif=exif)
    found = read(path)
    np.testing.assert_array_equal(found, np.asarray(load_image(str(path))))
    assert found.shape == ((40, 24, 3) if orientation <= 4 else (24, 40, 3))
    if extension == "png":  # Of which the pixels are known: 6 is a quarter turn clockwise.
        turns = {1: 0, 3: 2, 6: 3, 8: 1}
        if orientation in turns:
            np.testing.assert_array_equal(found, np.rot90(np.asarray(image), turns[orientation]))


@pytest.mark.parametrize("exif", [b"Exif\0\0MM", b"Exif\0\0II*\0\xff\xff\xff\xff", b"x" * 20])
def test_damaged_exif_data_do_not_lose_the_image(exif, rng, tmp_path):
    pixels = rng.integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "x.png"), pixels)


@pytest.mark.parametrize("mode,extension", [
    ("RGB", "png"), ("RGB", "bmp"), ("RGB", "qoi"), ("RGB", "jp2"), ("L", "png"), ("L", "jpg"),
    ("1", "png"), ("1", "tif"), ("P", "png"), ("P", "gif"), ("P", "bmp"), ("CMYK", "jpg"),
    ("CMYK", "tif"), ("YCbCr", "tif"), ("YCbCr", "jpg"), ("RGB", "ppm"), ("RGB", "tga"),
])  # fmt: skip
def test_opaque_images_are_those_of_transformers(mode, extension, rng, tmp_path):
    path = tmp_path / f"x.{extension}"
    Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)).convert(mode).save(path)
    np.testing.assert_array_equal(read(path), np.asarray(load_image(str(path))))


@pytest.mark.parametrize("extension,options", [
    ("png", {}), ("webp", {"lossless": True, "exact": True}), ("tif", {}), ("tga", {}),
])  # fmt: skip
def test_transparency_is_white(extension, options, rng, tmp_path):
    rgba = rng.integers(0, 256, (9, 13, 4), np.uint8)
    rgba[:3, :, 3], rgba[3:6, :, 3] = 0, 255
    path = tmp_path / f"x.{extension}"
    Image.fromarray(rgba).save(path, **options)
    np.testing.assert_allclose(read(path), on_white(rgba), atol=1)
    assert (read(path)[:3] == 255).all()
    np.testing.assert_array_equal(read(path)[3:6], rgba[3:6, :, :3])


def test_transparency_of_grey_images(rng, tmp_path):
    grey_alpha = rng.integers(0, 256, (9, 13, 2), np.uint8)
    Image.fromarray(grey_alpha, "LA").save(tmp_path / "x.png")
    rgba = grey_alpha[..., [0, 0, 0, 1]]
    np.testing.assert_allclose(read(tmp_path / "x.png"), on_white(rgba), atol=1)


def test_transparency_of_palettes(rng, tmp_path):
    indices = rng.integers(0, 4, (9, 13), np.uint8)
    palette = rng.integers(0, 250, (4, 3), np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(palette.tobytes())
    alphas = np.array([0, 80, 200, 255], np.uint8)
    image.save(tmp_path / "x.png", transparency=alphas.tobytes())
    rgba = np.concatenate([palette, alphas[:, None]], axis=1)[indices]
    np.testing.assert_allclose(read(tmp_path / "x.png"), on_white(rgba), atol=1)
    image.save(tmp_path / "x.gif", transparency=2)
    expected = np.where(indices[..., None] == 2, 255, palette[indices])
    np.testing.assert_array_equal(read(tmp_path / "x.gif"), expected)


def test_transparent_colours(tmp_path):
    rgb = np.array([[[10, 20, 30], [10, 20, 31]]], np.uint8)
    Image.fromarray(rgb).save(tmp_path / "x.png", transparency=(10, 20, 30))
    assert read(tmp_path / "x.png").tolist() == [[[255] * 3, [10, 20, 31]]]
    Image.fromarray(rgb[..., 2]).save(tmp_path / "l.png", transparency=30)
    assert read(tmp_path / "l.png")[..., 0].tolist() == [[255, 31]]
    sixteen = np.array([[3000, 30000]], np.uint16)
    Image.fromarray(sixteen).save(tmp_path / "i.png", transparency=3000)
    assert read(tmp_path / "i.png")[..., 0].tolist() == [[255, round(30000 / 257)]]


@pytest.mark.parametrize("extension", ["png", "tif", "pgm", "jp2"])
@pytest.mark.parametrize("top", [65535, 900])  # A dark image stays dark.
def test_images_of_16_bits_are_scaled(extension, top, rng, tmp_path):
    values = rng.integers(0, top + 1, (9, 13), np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{extension}")
    found = read(tmp_path / f"x.{extension}")
    np.testing.assert_array_equal(found, np.rint(values / 257)[..., None].repeat(3, axis=2))


def test_big_endian_images_of_16_bits(rng, tmp_path):
    values = rng.integers(0, 65536, (9, 13), np.uint16)
    image = Image.frombytes("I;16B", (13, 9), values.astype(">u2").tobytes())
    image.save(tmp_path / "x.tif")
    np.testing.assert_array_equal(read(tmp_path / "x.tif")[..., 1], np.rint(values / 257))


@pytest.mark.parametrize("dtype,low,high,bottom,top", [
    (np.float32, 0, 1, 0, 1),
    (np.float32, 0.2, 0.4, 0, 1),
    (np.float32, 0, 255, 0, 255),
    (np.float32, 0, 65535, 0, 65535),
    (np.float32, -3, 5, None, None),  # No usual range: from the minimum to the maximum.
    (np.float32, 0, 1e30, None, None),
    (np.int32, 0, 255, 0, 255),
    (np.int32, 0, 65535, 0, 65535),
    (np.int32, -1000, 2_000_000_000, None, None),
])  # fmt: skip
def test_other_numbers_are_scaled_by_their_range(dtype, low, high, bottom, top, rng, tmp_path):
    values = rng.uniform(low, high, (9, 13)).astype(dtype)
    values[0, :2] = low, high
    bottom, top = (low, high) if top is None else (bottom, top)
    Image.fromarray(values).save(tmp_path / "x.tif")
    expected = (values.astype(np.float64) - bottom) / (top - bottom) * 255
    np.testing.assert_allclose(read(tmp_path / "x.tif")[..., 0], expected, atol=0.501)


def test_values_that_are_not_numbers(tmp_path):
    values = np.array([[np.nan, 0.5, 1.0, np.inf, -np.inf]], np.float32)
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert read(tmp_path / "x.tif")[..., 0].tolist() == [[128, 128, 255, 255, 128]]
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "y.tif")
    assert (read(tmp_path / "y.tif") == 0).all()


@pytest.mark.parametrize("extension", ["gif", "png", "webp", "tif"])
def test_the_first_frame_of_several_is_read(extension, tmp_path):
    red, blue = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))
    path = tmp_path / f"x.{extension}"
    red.save(path, save_all=True, append_images=[blue], **{"webp": {"lossless": True}}.get(
        extension, {}))  # fmt: skip
    assert (read(path) == (255, 0, 0)).all()


def test_content_is_read_like_a_file(rng, tmp_path):
    Image.fromarray(rng.integers(0, 256, (9, 13, 4), np.uint8)).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    np.testing.assert_array_equal(read(content), read(tmp_path / "x.png"))
    assert image_reader.digest(content) == image_reader.digest(str(tmp_path / "x.png"))
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    assert image_reader.decode_data_url(url) == content
    assert image_reader.decode_data_url("data:,a%20b") == b"a b"
    for wrong in ("data:image/png;base64", "data:image/png;base64,a$b="):
        with pytest.raises(ValueError):
            image_reader.decode_data_url(wrong)


def as_bytes(image, name, **options):
    out = io.BytesIO()
    image.save(out, name, **options)
    return out.getvalue()


def test_size_is_checked_before_decoding(monkeypatch):
    content = as_bytes(Image.new("RGB", (50, 41)), "PNG")
    monkeypatch.setattr(image_reader, "MAX_PIXELS", 50 * 41)
    assert read(content).shape == (41, 50, 3)
    monkeypatch.setattr(image_reader, "MAX_PIXELS", 50 * 41 - 1)
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(ValueError, match=r"^50 x 41 pixels, expected at most 2,049 in all"):
        image_reader.read(content)


@pytest.mark.parametrize("content,reason", [
    (b"", "the file is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull downloads the image"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG, a drawing without pixels; convert it"),
    (b"<?xml version='1.0'?>\n<svg/>", "SVG, a drawing without pixels; convert it to PNG"),
    (b"\n<!DOCTYPE html><html>", "an HTML page"),
    (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, which phones write; convert it to JPEG"),
    (b"%PDF-1.7", "PDF; convert it to PNG"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "PostScript; convert it to PNG"),
    (b"plain", "it begins with b'plain'; expected JPEG, PNG, WebP or the like"),
])  # fmt: skip
def test_files_that_are_no_images(content, reason, tmp_path):
    (tmp_path / "x.png").write_bytes(content)
    for source in (content, str(tmp_path / "x.png")):
        with pytest.raises(ValueError) as caught:
            image_reader.read(source)
        assert str(caught.value).startswith("cannot identify the image: ")
        assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name,mode,options", [
    ("PNG", "RGBA", {}), ("JPEG", "RGB", {}), ("GIF", "P", {}), ("TIFF", "L", {}),
    ("WEBP", "RGB", {}), ("PNG", "I;16", {}), ("TIFF", "F", {"compression": "tiff_lzw"}),
])  # fmt: skip
def test_damaged_files_are_refused_or_read(name, mode, options, rng):
    """Cut and changed files raise what callers catch, and nothing else."""
    noise = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
    image = noise.convert("L").convert(mode) if mode in ("I;16", "F") else noise.convert(mode)
    content = as_bytes(image, name, **options)
    for _ in range(30):
        with pytest.raises((OSError, ValueError)):
            image_reader.read(content[: int(rng.integers(0, len(content) // 2))])
        damaged = np.frombuffer(content, np.uint8).copy()
        damaged[rng.integers(0, len(damaged), 3)] = rng.integers(0, 256, 3)
        try:
            image_reader.read(damaged.tobytes())
        except (OSError, ValueError):
            pass


def test_digest_says_why_a_file_cannot_be_read(tmp_path):
    for name, reason in (
        ("gone.png", "no such file"), ("", "not a regular file"),
        ("s3://bucket/x.png", "expected a path, or an http or https URL"),
    ):  # fmt: skip
        with pytest.raises(OSError, match=f"cannot be read: {reason}"):
            image_reader.digest(name if "://" in name else str(tmp_path / name))
