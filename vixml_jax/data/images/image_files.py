"""Image files named by a source: their paths, and their pixels for a vision model."""

import os
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from jaxtyping import UInt8

from vixml_jax.data.images import image_reader
from vixml_jax.data.images.image_reader import ImageSource
from vixml_jax.errors import InputError
from vixml_jax.storage import json_files, regular_files


def read_paths(directory: str, prefix: str, count: int) -> list[list[str]] | None:
    """Paths of the image files of each item, from `{prefix}_images.txt`.

    The file has a line for each item, with tabs between the paths of its images.

    Args:
      directory: Directory of the file; relative paths in it are relative to this directory.
      prefix: trn, val, tst or lbl.
      count: Expected number of items.

    Returns:
      The paths of each item, an empty list for an empty line; None if there is no such file.

    Raises:
      InputError: If the file does not have a line for each item, or is not UTF-8.
    """
    path = os.path.join(directory, f"{prefix}_images.txt")
    if not os.path.exists(path):
        return None
    regular_files.check(path)
    try:
        with regular_files.open_binary(path) as file:
            lines = file.read().decode().replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: paths are not UTF-8 ({error})") from None
    if lines and not lines[-1]:
        lines.pop()
    if len(lines) != count:
        raise InputError(
            f"{path}: found {len(lines)} lines, expected {count}, as many as texts in "
            f"{prefix}.raw.txt; write a line for each item, empty if it has no image"
        )
    return [[os.path.join(directory, name) for name in line.split("\t") if name] for line in lines]


class ImageProcessor(NamedTuple):
    """How a vision model expects its input, from the checkpoint.

    Attributes:
      height, width: Size of the image, in pixels.
      resample: Number of the Pillow filter that resizes images.
      scale: Factor from bytes to values.
      mean, std: Subtracted from the scaled values, and dividing them, for each channel.
    """

    height: int
    width: int
    resample: int | None
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_Pixels = Annotated[int, msgspec.Meta(ge=1, le=1 << 13)]
_Mean = Annotated[float, msgspec.Meta(ge=-256, le=256)]  # Of bytes, if they are not scaled.
_Std = Annotated[float, msgspec.Meta(ge=1e-3, le=256)]


class _Size(msgspec.Struct):
    height: _Pixels
    width: _Pixels


class _ProcessorConfig(msgspec.Struct):
    """The fields of preprocessor_config.json that are used, with the defaults of SigLIP."""

    size: _Size
    do_resize: bool | None = True
    do_rescale: bool | None = True
    do_normalize: bool | None = True
    do_center_crop: bool | None = False
    resample: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = 3
    rescale_factor: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1 / 255
    image_mean: tuple[_Mean, _Mean, _Mean] = (0.5, 0.5, 0.5)
    image_std: tuple[_Std, _Std, _Std] = (0.5, 0.5, 0.5)


def read_processor(path: str) -> ImageProcessor:
    """Reads preprocessor_config.json, the image processor of a Hugging Face checkpoint.

    Raises:
      InputError: If there is no such file, or it asks for steps that are not supported.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path}: not found; expected it in the directory of the vision model")
    config = json_files.read(path, _ProcessorConfig, "expected the processor of a SigLIP model")
    for name, expected in (
        ("do_resize", True),
        ("do_rescale", True),
        ("do_normalize", True),
        ("do_center_crop", False),
    ):
        if bool(getattr(config, name)) != expected:
            raise InputError(f"{path}: {name} is {not expected}, expected {expected}")
    return ImageProcessor(
        config.size.height,
        config.size.width,
        config.resample,
        config.rescale_factor,
        config.image_mean,
        config.image_std,
    )


def load_pixels(
    source: ImageSource, processor: ImageProcessor, *, keep_aspect: bool = False
) -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of an image, at the size that the vision model expects; see `normalize`.

    Pillow resizes bytes to bytes, as the image processors of `transformers` do.

    Args:
      source: An image file or its content; see `image_reader.read`.
      processor: Size and filter.
      keep_aspect: Shrink the image to fit and pad it with white, as the paper does, instead of
        stretching it.

    Raises:
      OSError, ValueError: If the file is missing or broken.
    """
    from PIL import Image

    image = image_reader.read(source)
    frame = (processor.width, processor.height)
    if keep_aspect:
        factor = min(frame[0] / image.width, frame[1] / image.height)
        size = tuple(max(1, round(side * factor)) for side in image.size)
        small = image.resize(size, Image.Resampling.LANCZOS)
        image = Image.new("RGB", frame, (255, 255, 255))
        image.paste(small, ((frame[0] - size[0]) // 2, (frame[1] - size[1]) // 2))
    else:
        image = image.resize(frame, processor.resample)
    return np.asarray(image)


def normalize(pixels: Any, processor: ImageProcessor) -> Any:
    """The values that the vision model reads, float32, of bytes; also within a program of JAX.

    Args:
      pixels: Of one or several images, [..., height, width, 3].
      processor: Scale, mean and standard deviation.
    """
    values = pixels.astype(np.float32) * np.float32(processor.scale)
    return (values - np.float32(processor.mean)) / np.float32(processor.std)
