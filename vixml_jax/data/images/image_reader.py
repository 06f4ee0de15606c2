"""Reads an image file as a person sees it: upright, in colour, on white where it is transparent."""

import base64
import contextlib
import functools
import hashlib
import io
import os
import threading
import urllib.parse
import warnings
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.storage import regular_files

if TYPE_CHECKING:
    from PIL import Image

# An image as a source gives it: the path or URL of a file, or the content of a file.
ImageSource = str | bytes

# Formats of pixels, by their names in Pillow. Those that need another program (EPS needs
# Ghostscript) or a plug-in to be decoded are left out, and icons (ICO, ICNS), which contain images
# of other sizes than they say.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "PSD", "QOI",
    "SGI", "SUN", "TGA", "TIFF", "WEBP",
)  # fmt: skip
# Increased when images are read differently: embeddings of other versions are not used.
VERSION = 2  # 1 ignored orientation and transparency, and clipped images of more than 8 bits.
# Larger images are refused before they are decoded. Models look at less than a hundredth of it, and
# decoding takes up to 24 bytes a pixel.
MAX_PIXELS = 1 << 25
# JPEG is decoded at a half, a quarter or an eighth of its size where that is needed.
MAX_JPEG_PIXELS = 89_478_485  # Pillow warns of more.
_ALONE = 1 << 24  # Pixels of images of which one is decoded at a time.
_one_at_a_time = threading.Lock()
# Memory to shrink an image grows with its sides, whatever its pixels: 48 bytes for each of a side.
MAX_SIDE = 1 << 20
_MAX_COMMENTS = 1 << 20  # Bytes of a GIF before its first image.
_MAX_SCANNED = 1 << 33  # Scans of a progressive JPEG times its pixels; usual are ten scans.
_SCAN = b"\xff\xda"  # Begins a scan of a JPEG.
MAX_BYTES = 1 << 29  # Of a file.
_SIXTEEN_BITS = 65535
# Formats whose integers, which Pillow reads with 32 bits, have 16.
_FORMATS_OF_16_BITS = ("JPEG2000", "PNG", "PPM")
# First bytes of files that are often taken for images, or cannot be read here, and what to do.
_OTHER_FILES = (
    (b"version https://git-lfs", "a pointer of git-lfs; git lfs pull downloads the image"),
    (b"<svg", "SVG, a drawing without pixels; convert it to PNG"),
    (b"%!PS", "PostScript; convert it to PNG"),
    (b"%PDF", "PDF; convert it to PNG"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
_SHOWN_URL = 80  # Characters of a data: URL in a message.


def read(source: ImageSource) -> "Image.Image":
    """The image as RGB with 8 bits, of a file or of its content.

    The image is turned upright as its EXIF orientation says, like `transformers.image_utils` does.
    Transparent pixels are blended with white. Images of 16 bits are scaled to 8. Integers of 32
    bits and floating-point numbers have no defined range: see `_to_8_bits`. Of several images or
    frames in a file, the first is read.

    Args:
      source: Path of a file, or its content.

    Raises:
      OSError, ValueError: If the file is missing, broken, too large or not an image. The message
        is one line.
    """
    from PIL import Image

    try:
        with _opened(source) as file, _open_image(file) as image:
            _shrink(image)
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise ValueError(
                    f"{image.width:,} x {image.height:,} pixels, expected at most {MAX_PIXELS:,} "
                    "in all; scale it down"
                )
            if max(image.size) > MAX_SIDE:
                raise ValueError(
                    f"{image.width:,} x {image.height:,} pixels, expected sides of at most "
                    f"{MAX_SIDE:,}; cut it into pieces"
                )
            _check_scans(image, file)
            with _one_at_a_time if pixels > _ALONE else contextlib.nullcontext():
                image.load()
                _turn_upright(image)
                upright = _to_rgb(image, image.format or "")
            upright.info = {}  # Else a colour profile would be saved with a thumbnail.
            return upright
    except Image.UnidentifiedImageError:
        raise ValueError(f"cannot identify the image: {_kind_of(source)}") from None
    except OSError as error:
        raise OSError(_one_line(error)) from None
    except ValueError as error:
        raise ValueError(_one_line(error)) from None
    except Exception as error:  # Pillow raises anything for broken files.
        raise ValueError(f"{type(error).__name__}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _open_image(file: BinaryIO) -> "Image.Image":
    """The image of a file, whose pixels are not decoded yet.

    Raises:
      ValueError: If it is a GIF with long comments, which Pillow copies for each of their blocks.
    """
    from PIL import Image

    if file.read(4) == b"GIF8" and _comment_bytes(file) > _MAX_COMMENTS:
        raise ValueError(f"comments of more than {_MAX_COMMENTS:,} bytes; remove them")
    file.seek(0)
    return Image.open(file, formats=_formats())


def _comment_bytes(file: BinaryIO) -> int:
    """Bytes of comments and other extensions of a GIF before its first image, as far as is asked.

    https://www.w3.org/Graphics/GIF/spec-gif89a.txt
    """
    file.seek(10)
    flags = file.read(1)[:1]
    table = 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 128 else 0
    start = file.seek(13 + table)
    while file.tell() - start <= _MAX_COMMENTS:
        mark = file.read(1)
        if mark == b"!":
            file.read(1)
            while file.tell() - start <= _MAX_COMMENTS and (size := file.read(1)) > b"\0":
                file.read(size[0])
        elif mark in (b",", b";", b""):  # An image, or the end. Pillow skips what is none of them.
            break
    return file.tell() - start


def _check_scans(image: "Image.Image", file: BinaryIO) -> None:
    """Refuses a progressive JPEG of very many scans, each of which goes through all pixels.

    Raises:
      ValueError: If it is one.
    """
    if not image.info.get("progressive"):
        return
    at = file.tell()
    file.seek(0)
    scans = sum(block.count(_SCAN) for block in iter(functools.partial(file.read, 1 << 20), b""))
    file.seek(at)
    if scans * image.width * image.height > _MAX_SCANNED:
        raise ValueError(
            f"{scans:,} scans of {image.width:,} x {image.height:,} pixels; expected a few; save "
            "it again"
        )


def _opened(source: ImageSource) -> BinaryIO:
    """A file open for reading, or one in memory.

    Raises:
      OSError: If it is not a regular file, or cannot be read; the message does not name it.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not os.path.exists(source):
        raise OSError("cannot be read: no such file")
    try:
        return regular_files.open_binary(source, max_bytes=MAX_BYTES)
    except InputError as error:
        raise OSError(f"cannot be read: {str(error).removeprefix(f'{source}: ')}") from None


def _shrink(image: "Image.Image") -> None:
    """Lets a large JPEG be decoded at a fraction of its size.

    A progressive one is not, since its decoder keeps numbers for all pixels.
    """
    size, pixels = image.size, image.width * image.height
    if image.format not in ("JPEG", "MPO") or image.info.get("progressive"):
        return
    if MAX_PIXELS < pixels <= MAX_JPEG_PIXELS:
        factor = next(factor for factor in (2, 4, 8) if pixels <= MAX_PIXELS * factor**2)
        image.draft(None, (size[0] // factor, size[1] // factor))


def _turn_upright(image: "Image.Image") -> None:
    """Turns an image as its EXIF orientation says."""
    from PIL import ImageOps

    # Damaged EXIF data raise anything, and say nothing about rotation.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats of `FORMATS` that this build of Pillow has."""
    from PIL import Image

    # What Pillow notices of a damaged image either is an error, or does not matter.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_rgb(image: "Image.Image", file_format: str) -> "Image.Image":
    """The image in RGB with 8 bits, on white."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float32)
        key = image.info.get("transparency")  # The grey value that is transparent.
        grey = _to_8_bits(values, image.mode, file_format)
        if isinstance(key, int):
            grey[values == key] = 255
        return Image.fromarray(grey).convert("RGB")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _to_8_bits(values: np.ndarray, mode: str, file_format: str) -> np.ndarray:
    """Grey values of more than 8 bits, scaled to 0 to 255.

    Values of 16 bits are divided by 257. Other numbers are scaled from the smallest of the ranges
    0 to 1 (floating point only), 0 to 255 and 0 to 65535 that has all of them; where none has, from
    their minimum to their maximum. A value that is not a number counts as the minimum.

    Args:
      values: Grey values, float32.
      mode: Mode of the image in Pillow: I;16 and its byte orders, I or F.
      file_format: Format of the file, by its name in Pillow.
    """
    finite = np.isfinite(values)
    low = float(values.min(where=finite, initial=np.inf))
    high = float(values.max(where=finite, initial=-np.inf))
    if low > high:  # No finite value.
        low = high = 0.0
    if mode.startswith("I;16") or (mode == "I" and file_format in _FORMATS_OF_16_BITS):
        ranges = (_SIXTEEN_BITS,)
    else:
        ranges = (*((1,) if mode == "F" else ()), 255, _SIXTEEN_BITS)
    top = next((top for top in ranges if 0 <= low and high <= top), None)
    bottom, width = (low, high - low) if top is None else (0.0, float(top))
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return np.rint((values - bottom) * (255 / max(width, 1e-30))).astype(np.uint8)


def _kind_of(source: ImageSource) -> str:
    """What a file that is not an image is, from its first bytes."""
    try:
        with _opened(source) as file:
            head = file.read(1024)
    except OSError as error:
        return str(error)
    if not head:
        return "the file is empty"
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        return "HEIC, which phones write; convert it to JPEG"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"<?xml") and b"<svg" in text:
        text = b"<svg"
    kinds = (kind for start, kind in _OTHER_FILES if text.startswith(start.lower()))
    return next(kinds, f"it begins with {head[:8]!r}; expected JPEG, PNG, WebP or the like")


def digest(source: ImageSource) -> str:
    """SHA-256 of the content of a file.

    Raises:
      OSError: If it is not a regular file, or cannot be read; the message is one line.
    """
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    if "://" in source:
        raise OSError("cannot be read: expected a path, or an http or https URL")
    with _opened(source) as file:
        try:
            return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise OSError(f"cannot be read: {error.strerror or error}") from None


def describe(source: ImageSource) -> str:
    """A short name of an image, for messages."""
    if isinstance(source, str):
        return source
    return f"of {len(source):,} bytes, SHA-256 {digest(source)[:12]}"


def decode_base64(text: str) -> bytes:
    """The content of base64 text, which may have line ends.

    Raises:
      ValueError: If it is not base64.
    """
    return base64.b64decode("".join(text.split()), validate=True)


def decode_data_url(url: str) -> bytes:
    """The content of a data: URL (RFC 2397).

    Raises:
      ValueError: If it is not one, or its content is not base64 although it says so.
    """
    header, comma, data = url.partition(",")
    if not comma:
        raise ValueError(f"{url[:_SHOWN_URL]!r} has no comma, expected data:image/png;base64,...")
    if header.lower().endswith(";base64"):
        return decode_base64(urllib.parse.unquote(data))
    return urllib.parse.unquote_to_bytes(data)
