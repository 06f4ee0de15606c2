"""Pictures of a source: embeddings found beside its texts, or files to be embedded."""

import fnmatch
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float16, Float32, Int

from vixml_jax.data import mapped_rows
from vixml_jax.data.images import safe_pickle
from vixml_jax.data.sources.raw import ItemImages
from vixml_jax.data.store import ranges
from vixml_jax.errors import InputError

_BLOCK = 1 << 22  # Values held at a time.
_MOST_PICTURES = 100  # Of an item in a map; a broken one must not ask for all memory.


class RawImages(NamedTuple):
    """Up to i pictures of each item, and which of them there are."""

    embeddings: Float[np.ndarray, "n i v"]
    present: Bool[np.ndarray, "n i"]
    path: str  # For messages.

    @property
    def width(self) -> int:
        return self.embeddings.shape[2]

    def offsets(self, rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, " r+1"]:
        """Where the pictures of each of the rows begin among all of them."""
        counts = self.present[rows].sum(axis=1, dtype=np.int64)
        return np.concatenate([[0], np.cumsum(counts)])

    def read(self, rows: Int[np.ndarray, " r"]) -> Iterator[Float16[np.ndarray, "k v"]]:
        """The pictures of the rows in order, those that there are, a block at a time.

        Raises:
          InputError: If one is not finite in float16.
        """
        step = max(1, _BLOCK // max(1, self.embeddings[0].size))
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            present = self.present[block]
            values = self.embeddings[block][present]
            mapped_rows.release(self.embeddings)
            owners = np.repeat(block, present.sum(axis=1))
            yield _to_float16(values, owners, self.path, ", or False for the row in has_image")


def _to_float16(
    values: Float[np.ndarray, "k v"], rows: Int[np.ndarray, " k"], path: str, way_out: str = ""
) -> Float16[np.ndarray, "k v"]:
    """The values in float16; refuses those that are not finite there, by the number of the row."""
    with np.errstate(over="ignore"):
        values = np.asarray(values).astype(np.float16, copy=False)
    fine = np.isfinite(values).all(axis=1)
    if not fine.all():
        raise InputError(
            f"{path}, row {rows[int(np.argmin(fine))]} (from 0): not finite in float16; expected "
            f"numbers within 65504{way_out}"
        )
    return values


def read_images(directory: str, prefix: str, count: int) -> "RawImages | FileImages | None":
    """The embeddings `{prefix}_image_embeddings.npy`, [n, v] or [n, i, v], memory-mapped.

    `{prefix}_has_image.npy`, bool [n] or [n, i], says which pictures there are; without it, those
    that are not all zero. Where there are no such files, `read_vixml_images` looks for its own.

    Args:
      directory: Where the files are.
      prefix: trn, tst or lbl.
      count: Items that there should be.

    Raises:
      InputError: If the files do not fit the items or each other.
    """
    path = os.path.join(directory, f"{prefix}_image_embeddings.npy")
    mask_path = os.path.join(directory, f"{prefix}_has_image.npy")
    if not os.path.exists(path):
        if os.path.exists(mask_path):
            raise InputError(f"{path}: not found, but {os.path.basename(mask_path)} is there")
        return read_vixml_images(directory, prefix, count)
    embeddings = _load(path)
    shape = embeddings.shape
    if embeddings.dtype.kind != "f" or embeddings.ndim not in (2, 3):
        raise InputError(
            f"{path}: {embeddings.dtype} {shape}, expected floating point [items, width] or "
            "[items, pictures, width]"
        )
    if shape[0] != count:
        raise InputError(
            f"{path}: {shape[0]} rows, but there are {count} texts in {prefix}.raw.txt"
        )
    if 0 in shape:
        raise InputError(f"{path}: empty ({shape}); expected embeddings, or no such file")
    embeddings = embeddings.reshape(count, -1, shape[-1])
    if not os.path.exists(mask_path):
        return RawImages(embeddings, _nonzero(embeddings), path)
    mask = _load(mask_path)
    if mask.dtype != bool or mask.shape not in ((count,), shape[:-1]):
        raise InputError(
            f"{mask_path}: {mask.dtype} {mask.shape}, expected bool {(count,)} or {shape[:-1]} as "
            f"{os.path.basename(path)} has it"
        )
    present = np.broadcast_to(mask.reshape(count, -1), embeddings.shape[:2])
    return RawImages(embeddings, present, path)


def check_widths(images: Mapping[str, ItemImages | None], directory: str) -> None:
    """Refuses embeddings of unequal width.

    Raises:
      InputError: If any two differ.
    """
    widths = {os.path.basename(raw.path): raw.width for raw in images.values() if raw is not None}
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise InputError(f"{directory}: embeddings of unequal width ({found}); expected one width")


def _load(path: str) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # Of a broken header, numpy raises whatever Python's parser does.
        said = " ".join(str(error).split())
        raise InputError(f"{path}: not a whole .npy file ({said})") from None


def _nonzero(embeddings: Float[np.ndarray, "n i v"]) -> Bool[np.ndarray, "n i"]:
    step = max(1, _BLOCK // embeddings[0].size)
    found = []
    for start in range(0, len(embeddings), step):
        found.append((embeddings[start : start + step] != 0).any(axis=2))
        mapped_rows.release(embeddings)
    return np.concatenate(found)


class FileImages(NamedTuple):
    """Up to i pictures of each item, as rows of a table of embeddings."""

    rows: Int[np.ndarray, "n i"]  # -1 = there is none.
    vectors: Float[np.ndarray, "m v"]
    path: str  # For messages.

    @property
    def width(self) -> int:
        return self.vectors.shape[1]

    def offsets(self, rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, " r+1"]:
        """Where the pictures of each of the rows begin among all of them."""
        counts = (self.rows[rows] >= 0).sum(axis=1, dtype=np.int64)
        return np.concatenate([[0], np.cumsum(counts)])

    def read(self, rows: Int[np.ndarray, " r"]) -> Iterator[Float16[np.ndarray, "k v"]]:
        """The pictures of the rows in order, those that there are, a block at a time.

        Raises:
          InputError: If one is not finite in float16.
        """
        step = max(1, _BLOCK // max(1, self.rows.shape[1] * self.width))
        for start in range(0, len(rows), step):
            found = self.rows[rows[start : start + step]].reshape(-1)
            found = found[found >= 0]
            values = self.vectors[found]
            mapped_rows.release(self.vectors)
            yield _to_float16(values, found, self.path)


def read_vixml_images(directory: str, prefix: str, count: int) -> FileImages | None:
    """The embeddings that ViXML's authors publish, memory-mapped, and the map of items to them.

    `{prefix}_embs_imgs_3_1152_siglip2.npy` has a row for each picture, float32 [m, v];
    `{prefix}_imgs_384_3_map.npy` is an array of objects with the rows of each item, a list of them
    or -1 where it has no picture. (The numbers in the names may be others.)

    Args:
      directory: Where the files are.
      prefix: trn, tst or lbl.
      count: Items that there should be.

    Raises:
      InputError: If the files do not fit the items or each other, or the map holds anything but
        integers.
    """
    patterns = (f"{prefix}_embs_imgs_*_siglip2.npy", f"{prefix}_imgs_*_map.npy")
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    found = [fnmatch.filter(names, pattern) for pattern in patterns]
    if not any(found):
        return None
    for pattern, matches in zip(patterns, found, strict=True):
        if len(matches) != 1:
            raise InputError(
                f"{os.path.join(directory, pattern)}: found {', '.join(matches) or 'none'}, "
                f"expected one such file ({' and '.join(patterns)} go together)"
            )
    path, map_path = (os.path.join(directory, matches[0]) for matches in found)
    vectors = _load(path)
    if vectors.dtype.kind != "f" or vectors.ndim != 2 or not vectors.shape[1]:
        raise InputError(
            f"{path}: {vectors.dtype} {vectors.shape}, expected floating point [pictures, width]"
        )
    return FileImages(_read_map(map_path, len(vectors), prefix, count), vectors, path)


def _read_map(path: str, num_pictures: int, prefix: str, count: int) -> Int[np.ndarray, "n i"]:
    """The rows of each item's pictures, -1 after the last."""
    objects = safe_pickle.load_object_array(path)
    if len(objects) != count:
        raise InputError(
            f"{path}: {len(objects)} items, but there are {count} texts in {prefix}.raw.txt"
        )
    listed = [(value,) if isinstance(value, int) else value for value in objects]
    lengths = np.fromiter(map(len, listed), np.int64, count)
    if lengths.max(initial=0) > _MOST_PICTURES:
        raise InputError(
            f"{path}, item {np.argmax(lengths)} (from 0): {lengths.max()} pictures, expected "
            f"{_MOST_PICTURES} at most"
        )
    rows = np.fromiter(itertools.chain.from_iterable(listed), np.int64, int(lengths.sum()))
    items = np.repeat(np.arange(count), lengths)
    wrong = (rows < -1) | (rows >= num_pictures)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise InputError(
            f"{path}, item {items[at]} (from 0): row {rows[at]}, expected one below {num_pictures} "
            "as there are embeddings, or -1 for no picture"
        )
    rows, items = rows[rows >= 0], items[rows >= 0]
    counts = np.bincount(items, minlength=count)
    table = np.full((count, max(1, counts.max())), -1, np.int64)
    table[items, ranges(np.zeros_like(counts), counts)] = rows
    return table


def read_paths(directory: str, prefix: str, count: int) -> list[list[str]] | None:
    """The image files `{prefix}_images.txt` names: a line an item, paths with tabs between.

    Args:
      directory: Where the file is, and what its paths are relative to.
      prefix: trn, tst or lbl.
      count: Items that there should be.

    Returns:
      The paths of each item, none for an empty line; None where there is no such file.

    Raises:
      InputError: If the file does not have a line for each item.
    """
    path = os.path.join(directory, f"{prefix}_images.txt")
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: paths that are not UTF-8 ({error})") from None
    if lines and not lines[-1]:
        lines.pop()
    if len(lines) != count:
        raise InputError(
            f"{path}: {len(lines)} lines, but there are {count} texts in {prefix}.raw.txt; "
            "expected a line an item, empty where it has no picture"
        )
    return [[os.path.join(directory, name) for name in line.split("\t") if name] for line in lines]


class RaggedImages(NamedTuple):
    """Pictures of items one after the other."""

    vectors: Float16[np.ndarray, "m v"]
    at: Int[np.ndarray, " n+1"]  # Where each item's begin.
    path: str  # For messages.

    @property
    def width(self) -> int:
        return self.vectors.shape[1]

    def offsets(self, rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, " r+1"]:
        """Where the pictures of each of the rows begin among all of them."""
        return np.concatenate([[0], np.cumsum(self.at[rows + 1] - self.at[rows])])

    def read(self, rows: Int[np.ndarray, " r"]) -> Iterator[Float16[np.ndarray, "k v"]]:
        """The pictures of the rows in order, a block at a time."""
        taken = ranges(self.at[rows], self.at[rows + 1] - self.at[rows])
        step = max(1, _BLOCK // self.width)
        for start in range(0, len(taken), step):
            values = np.asarray(self.vectors[taken[start : start + step]])
            mapped_rows.release(self.vectors)
            yield values


class ImageProcessor(NamedTuple):
    """What a vision model wants its pixels to be, as its checkpoint says."""

    height: int
    width: int
    resample: int  # As Pillow numbers its filters.
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_processor(path: str) -> ImageProcessor:
    """Reads preprocessor_config.json, the image processor of a Hugging Face checkpoint.

    Raises:
      InputError: If there is no such file, or it asks for what is not done here.
    """
    try:
        with open(path, encoding="utf-8") as file:
            about = json.load(file)
    except FileNotFoundError:
        raise InputError(f"{path}: not found; expected it beside the vision model") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not about.get(name, True):
            raise InputError(f"{path}: {name} is false, expected true")
    if about.get("do_center_crop"):
        raise InputError(f"{path}: do_center_crop is true, expected false")
    size = about.get("size", {})
    if not {"height", "width"} <= set(size):
        raise InputError(f"{path}: size is {size}, expected height and width")
    return ImageProcessor(
        size["height"],
        size["width"],
        about.get("resample", 3),
        about.get("rescale_factor", 1 / 255),
        tuple(about.get("image_mean", (0.5, 0.5, 0.5))),
        tuple(about.get("image_std", (0.5, 0.5, 0.5))),
    )


def load_pixels(
    path: str, processor: ImageProcessor, *, keep_aspect: bool = False
) -> Float32[np.ndarray, "height width 3"]:
    """The pixels of an image file as the vision model wants them.

    Args:
      path: Of the file, in any format that Pillow reads.
      processor: Size and scale.
      keep_aspect: Shrink the picture into the frame and fill up with white, as the paper does,
        rather than stretch it.

    Raises:
      OSError, ValueError: If the file is missing or broken.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except OSError:
        raise
    except Exception as error:  # Of broken files and of bombs, Pillow raises anything.
        raise ValueError(f"{type(error).__name__}: {error}") from None
    frame = (processor.width, processor.height)
    if keep_aspect:
        share = min(frame[0] / picture.width, frame[1] / picture.height)
        size = tuple(max(1, round(side * share)) for side in picture.size)
        small = picture.resize(size, Image.Resampling.LANCZOS)
        picture = Image.new("RGB", frame, (255, 255, 255))
        picture.paste(small, ((frame[0] - size[0]) // 2, (frame[1] - size[1]) // 2))
    else:
        picture = picture.resize(frame, processor.resample)
    pixels = np.asarray(picture, np.float32) * np.float32(processor.scale)
    return (pixels - np.float32(processor.mean)) / np.float32(processor.std)


class EmbeddingStore:
    """Embeddings of image files by their content, float16, appended as they are made.

    A directory of `vectors.f16` (rows), `digests.txt` (SHA-256 of the file behind each row, a line
    a row) and `about.json` (the model). What a stop leaves half written is cut off at the next
    start, so that the work goes on where it stopped.
    """

    def __init__(self, directory: str, *, width: int, about: Mapping[str, Any]):
        """Opens or makes the directory.

        Raises:
          InputError: If it holds embeddings of another model.
        """
        os.makedirs(directory, exist_ok=True)
        self._width = width
        self._vectors = os.path.join(directory, "vectors.f16")
        self._digests = os.path.join(directory, "digests.txt")
        path = os.path.join(directory, "about.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
            if found != dict(about):
                raise InputError(
                    f"{path}: embeddings of another model or of other settings ({found}, not "
                    f"{dict(about)}); remove {directory} to make them anew"
                )
        else:
            with open(path + ".tmp", "w", encoding="utf-8") as file:
                json.dump(dict(about), file, indent=2)
            os.replace(path + ".tmp", path)
        for name in (self._vectors, self._digests):
            open(name, "ab").close()
        with open(self._digests, encoding="ascii") as file:
            digests = file.read().split("\n")[:-1]  # After the last newline is half a line.
        digests = digests[: os.path.getsize(self._vectors) // (2 * width)]
        os.truncate(self._vectors, len(digests) * 2 * width)
        os.truncate(self._digests, len(digests) * 65)
        self.row_of = {digest: row for row, digest in enumerate(digests)}

    def add(self, digests: Sequence[str], vectors: Float[np.ndarray, "k v"]) -> None:
        """Appends the vectors of files not there yet."""
        with open(self._vectors, "ab") as file:
            file.write(np.ascontiguousarray(vectors, np.float16).tobytes())
            file.flush()
            os.fsync(file.fileno())
        with open(self._digests, "a", encoding="ascii") as file:
            file.write("".join(digest + "\n" for digest in digests))
        first = len(self.row_of)
        self.row_of |= {digest: first + i for i, digest in enumerate(digests)}

    def vectors(self) -> Float16[np.ndarray, "m v"]:
        """All rows, memory-mapped."""
        if not self.row_of:
            return np.zeros((0, self._width), np.float16)
        return np.memmap(self._vectors, np.float16, "r", shape=(len(self.row_of), self._width))


def digest(path: str) -> str | None:
    """SHA-256 of a file's content; None if it cannot be read, as a pipe or a device."""
    if not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None
