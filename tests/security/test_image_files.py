"""Hostile and damaged image files: each is read, or is the fault of its row in one line."""

import io
import json
import pathlib
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vixml_jax.data.images import image_files, image_reader
from vixml_jax.data.images.image_files import ImageProcessor

ROOT = pathlib.Path(__file__).parents[2]
SMALL = ImageProcessor(32, 48, 3, 1 / 255, (0.5,) * 3, (0.5,) * 3)


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(rng, mode, size=(40, 30)):
    """A random image of any mode."""
    width, height = size
    if mode == "P":
        image = Image.fromarray(rng.integers(0, 256, (height, width), "uint8")).convert("P")
        image.putpalette(rng.integers(0, 256, 768, "uint8").tobytes())
        return image
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, (height, width)).astype(bool))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 1 << 16, (height, width), "uint16"))
    if mode == "F":
        return Image.fromarray(rng.random((height, width), "float32"))
    depth = len(Image.new(mode, (1, 1)).getbands())
    values = rng.integers(0, 256, (height, width, depth), "uint8")
    return Image.frombytes(mode, size, values.tobytes())


def valid_files(rng):
    """A file of each format and mode that Pillow writes here."""
    frames = [noise(rng, "RGB") for _ in range(3)]
    moving = {"save_all": True, "append_images": frames[1:], "duration": 20}
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 1000, zip=True)
    exif = Image.Exif()
    exif[274] = int(rng.integers(1, 9))
    files = {
        "png": saved(noise(rng, "RGBA"), "PNG", pnginfo=text),
        "png of 16 bits": saved(noise(rng, "I;16"), "PNG"),
        "png with a palette": saved(noise(rng, "P"), "PNG", transparency=7),
        "png of 1 bit": saved(noise(rng, "1"), "PNG"),
        "apng": saved(frames[0], "PNG", **moving),
        "jpeg": saved(noise(rng, "RGB"), "JPEG", exif=exif),
        "grey jpeg": saved(noise(rng, "L"), "JPEG"),
        "jpeg of inks": saved(noise(rng, "CMYK"), "JPEG"),
        "progressive jpeg": saved(noise(rng, "RGB"), "JPEG", progressive=True),
        "jpeg with a profile": saved(noise(rng, "RGB"), "JPEG", icc_profile=rng.bytes(1 << 18)),
        "gif": saved(noise(rng, "P"), "GIF", transparency=3, comment=b"x" * 500),
        "moving gif": saved(frames[0], "GIF", **moving),
        "bmp": saved(noise(rng, "RGB"), "BMP"),
        "tiff": saved(noise(rng, "RGB"), "TIFF", compression="tiff_lzw"),
        "tiff of floats": saved(noise(rng, "F"), "TIFF"),
        "tiff of inks": saved(noise(rng, "CMYK"), "TIFF", compression="tiff_deflate"),
        "ppm": saved(noise(rng, "RGB"), "PPM"),
        "tga": saved(noise(rng, "RGBA"), "TGA", compression="tga_rle"),
        "pcx": saved(noise(rng, "P"), "PCX"),
        "sgi": saved(noise(rng, "RGB"), "SGI"),
    }
    for name, form in (("webp", "WEBP"), ("jpeg 2000", "JPEG2000"), ("avif", "AVIF")):
        if form in image_reader._formats():
            files[name] = saved(noise(rng, "RGB"), form)
    if "webp" in files:
        files["moving webp"] = saved(frames[0], "WEBP", **moving)
    return files


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, pixels, *chunks, depth=8, kind=0):
    """A PNG whose header may lie."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def gif(width, height, before=b""):
    start = b"GIF89a" + struct.pack("<HH", width, height) + b"\x80\0\0" + bytes(6)
    image = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\0"
    return start + before + image + b";"


def scans_of(count):
    """A progressive JPEG whose last scan is there many times."""
    good = saved(Image.new("RGB", (1024, 1024)), "JPEG", progressive=True)
    start = good.rindex(b"\xff\xda")
    return good[:start] + good[start:-2] * count + b"\xff\xd9"


ZEROS = zlib.compress(bytes(1 << 24), 9)
HOSTILE = {
    "4 gigapixels": png(65535, 65535, ZEROS),
    "2 gigapixels in a line": png(1 << 31, 1, ZEROS),
    "a strip of 8 million": png(1, 1 << 23, zlib.compress(bytes(1 << 24))),
    "a line of 8 million": png(1 << 23, 1, zlib.compress(bytes((1 << 23) + 1))),
    "a header of more than there is": png(5000, 5000, zlib.compress(bytes(100))),
    "no pixels": png(0, 10, ZEROS),
    "a depth of 3": png(10, 10, ZEROS, depth=3),
    "a text of a gigabyte": png(
        4, 4, zlib.compress(bytes(20)), chunk(b"zTXt", b"a\0\0" + ZEROS * 64)
    ),
    "a profile of 16 MiB": png(4, 4, zlib.compress(bytes(20)), chunk(b"iCCP", b"a\0\0" + ZEROS)),
    "an animation of a billion frames": png(
        4, 4, zlib.compress(bytes(20)), chunk(b"acTL", struct.pack(">II", 1 << 30, 0))
    ),
    "gif of 4 gigapixels": gif(65535, 65535),
    "gif with a comment of 8 MiB": gif(4, 4, b"!\xfe" + (b"\xff" + b"x" * 255) * 32_768 + b"\0"),
    "gif with many comments": gif(4, 4, b"!\xfe\x01x\0" * 400_000),
    "bmp of 4 gigapixels": b"BM" + struct.pack(
        "<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 65535, 65535, 1, 24, 0, 0, 0, 0, 0, 0
    ),
    "ppm of many pixels": b"P6 99999999 99999999 255\n",
    "tga of many pixels": struct.pack(
        "<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, 65535, 65535, 24, 0
    ),
    "webp of 268 megapixels": b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack(
        "<I", 10
    ) + bytes(4) + b"\xfe\x3f\0\xfe\x3f\0" + b"VP8L\0\0\0\0",
    "progressive jpeg of 10,000 scans": scans_of(10_000),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file\n",
    "a font": b"\x00\x01\x00\x00" * 20,
    "an icon": b"\0\0\1\0\1\0" + struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, 99, 22) + bytes(99),
    "nothing": b"",
}  # fmt: skip


def outcome(content):
    """The pixels of an image, or its fault; nothing else may happen."""
    try:
        pixels = image_files.load_pixels(content, SMALL, keep_aspect=bool(len(content) % 2))
    except (OSError, ValueError) as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 400, message
        return message
    assert pixels.shape == (32, 48, 3) and np.isfinite(pixels).all()
    return pixels


WORKER = """
import json, resource, sys, time
import numpy as np
from tests.security import test_image_files as tests
tests.outcome(tests.png(9, 9, b""))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, content in tests.HOSTILE.items():
    start = time.process_time()
    found = tests.outcome(content)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = [name, found if isinstance(found, str) else None, (peak - before) // 1024,
           time.process_time() - start]
    print(json.dumps(row), flush=True)
"""


def test_hostile_files_take_neither_memory_nor_time():
    done = subprocess.run(
        [sys.executable, "-c", WORKER], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == list(HOSTILE)
    for name, fault, peak, seconds in rows:
        assert fault or name == "an animation of a billion frames", name
        assert peak < 250 and seconds < 5, (name, fault, peak, seconds)


def test_valid_files_are_read():
    rng = np.random.default_rng()
    files = valid_files(rng)
    assert len(files) >= 20
    for name, content in files.items():
        found = outcome(content)
        assert not isinstance(found, str), (name, found)
    strip = png(1, 1_000_000, zlib.compress(bytes(2_000_000)))
    assert not isinstance(outcome(strip), str)


@pytest.mark.parametrize("count", [3, 2000])
def test_of_many_frames_only_the_first_is_decoded(count):
    first, *others = (Image.new("RGB", (16, 16), (n % 256, 9, 9)) for n in range(count))
    for form in ("GIF", "PNG"):
        content = saved(first, form, save_all=True, append_images=others, duration=20)
        start = time.process_time()
        image = image_reader.read(content)
        assert time.process_time() - start < 1
        assert image.size == (16, 16) and image.getpixel((3, 3))[0] < 20


def mutated(rng, content):
    """A file with bytes flipped, cut out or repeated, or a number changed to a large one."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(data))) if rng.random() < 0.5 else int(
            rng.integers(min(len(data), 200))
        )  # fmt: skip
        kind = rng.integers(6)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = rng.integers(256)
        elif kind == 2:
            del data[at : at + int(rng.integers(1, 50))]
        elif kind == 3:
            data[at:at] = data[at : at + int(rng.integers(1, 500))]
        elif kind == 4:
            form = str(rng.choice([">I", "<I", ">H", "<H"]))
            size = struct.calcsize(form)
            value = int(
                rng.choice([0, 1, 0x7FFF, 0xFFFF, *([0x7FFFFFFF, 0xFFFFFFFF] * (size > 2))])
            )
            data[at : at + size] = struct.pack(form, value)
        else:
            del data[at + 20 :]
        if not data:
            break
    return bytes(data)


def test_damaged_files_are_read_or_refused():
    rng = np.random.default_rng()
    counts = {"read": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in valid_files(rng).values():
            for _ in range(25):
                found = outcome(mutated(rng, content))
                counts["refused" if isinstance(found, str) else "read"] += 1
    assert min(counts.values()) > 30, counts


def test_a_bad_file_stops_no_other(tmp_path):
    """Files on the disk, in threads: faults stay with their files."""
    rng = np.random.default_rng()
    files = {f"{n}.img": content for n, content in enumerate(valid_files(rng).values())}
    bad = {f"bad{n}": HOSTILE[name] for n, name in enumerate(("a font", "no pixels", "nothing"))}
    for name, content in (files | bad).items():
        (tmp_path / name).write_bytes(content)
    found = {}

    def read(name):
        found[name] = outcome(str(tmp_path / name))

    threads = [threading.Thread(target=read, args=(name,)) for name in files | bad | {"gone": b""}]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name for name, value in found.items() if isinstance(value, str)} == {*bad, "gone"}
