"""Image files: pixels match `transformers`, and image processors that are refused."""

import json

import jax
import numpy as np
import pytest
import transformers
from PIL import Image

from vixml_jax.data.images import image_files
from vixml_jax.errors import InputError

SIZE = 16


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """The image processor of `transformers`, and the path of its file."""
    path = tmp_path_factory.mktemp("processor")
    processor = transformers.SiglipImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor.save_pretrained(path)
    return processor, str(path / "preprocessor_config.json")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_pixels_match_transformers(mode, processor, tmp_path):
    hf_processor, path = processor
    values = np.random.default_rng(3).integers(0, 256, (11, 23, 4), dtype=np.uint8)
    image = Image.fromarray(values, "RGBA").convert(mode)
    image.save(tmp_path / "x.png")
    if image.has_transparency_data:  # It is white, where `transformers` drops it.
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    expected = hf_processor(image.convert("RGB"), return_tensors="np")
    processor = image_files.read_processor(path)
    pixels = image_files.load_pixels(str(tmp_path / "x.png"), processor)
    assert pixels.dtype == np.uint8
    for normalized in (  # On the host, and within a program.
        image_files.normalize(pixels, processor),
        jax.jit(lambda pixels: image_files.normalize(pixels, processor))(pixels),
    ):
        assert normalized.dtype == np.float32
        np.testing.assert_allclose(
            normalized, expected["pixel_values"][0].transpose(1, 2, 0), atol=1e-6
        )


def test_aspect_is_kept_with_white_padding(processor, tmp_path):
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "x.png")
    pixels = image_files.load_pixels(
        str(tmp_path / "x.png"), image_files.read_processor(processor[1]), keep_aspect=True
    )
    expected = np.full((SIZE, SIZE, 3), 255, np.uint8)
    expected[4:12, :, 1:] = 0  # Red.
    np.testing.assert_array_equal(pixels, expected)


def test_defaults_of_missing_fields(tmp_path):
    path = tmp_path / "preprocessor_config.json"
    config = {"size": {"height": 8, "width": 6}, "do_center_crop": None, "feature_size": 3}
    path.write_text(json.dumps(config))
    half = (0.5, 0.5, 0.5)
    assert image_files.read_processor(str(path)) == (8, 6, 3, 1 / 255, half, half)


@pytest.mark.parametrize("changes,fault", [
    ({"do_resize": False}, "do_resize is False, expected True"),
    ({"do_normalize": None}, "do_normalize is False, expected True"),
    ({"do_center_crop": True}, "do_center_crop is True, expected False"),
    ({"size": {"shortest_edge": 224}}, "missing required field `height`"),
    ({"size": 224}, "Expected `object`, got `int` - at `$.size`"),
    ({"image_mean": [0.5]}, "at `$.image_mean`"),
])  # fmt: skip
def test_other_image_processors_are_refused(tmp_path, changes, fault):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({"size": {"height": 8, "width": 8}} | changes))
    with pytest.raises(InputError) as caught:
        image_files.read_processor(str(path))
    assert str(caught.value).startswith(f"{path}: ") and fault in str(caught.value)
