"""Image embeddings of items: found beside the texts of a source, or made from image files."""

import fnmatch
import itertools
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float16, Int

from vixml_jax.data import mapped_rows
from vixml_jax.data.images import safe_pickle
from vixml_jax.data.sources.raw import ItemImages
from vixml_jax.data.store import ranges
from vixml_jax.errors import InputError
from vixml_jax.storage import npy_files

_BLOCK = 1 << 22  # Values read at a time.
_MAX_IMAGES = 100  # Images of an item; a damaged map must not ask for all memory.


class RawImages(NamedTuple):
    """Up to i images of each item, and a mask of those that exist."""

    embeddings: Float[np.ndarray, "n i v"]
    present: Bool[np.ndarray, "n i"]
    path: str  # For messages.

    @property
    def width(self) -> int:
        return self.embeddings.shape[2]

    def offsets(self, rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, " r+1"]:
        """Where the images of each row begin among the images of all `rows`."""
        counts = self.present[rows].sum(axis=1, dtype=np.int64)
        return np.concatenate([[0], np.cumsum(counts)])

    def read(self, rows: Int[np.ndarray, " r"]) -> Iterator[Float16[np.ndarray, "k v"]]:
        """Yields the existing images of the rows in order, a block at a time.

        Raises:
          InputError: If an embedding is not finite in float16.
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
    values: Float[np.ndarray, "k v"], rows: Int[np.ndarray, " k"], path: str, remedy: str = ""
) -> Float16[np.ndarray, "k v"]:
    """The values in float16.

    Args:
      values: Embeddings.
      rows: Their rows in the file, for the message.
      path: Path of the file, for the message.
      remedy: End of the message.

    Raises:
      InputError: If a value is not finite in float16.
    """
    with np.errstate(over="ignore"):
        values = np.asarray(values).astype(np.float16, copy=False)
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise InputError(
            f"{path}, row {rows[int(np.argmin(finite))]} (from 0): not finite in float16; expected "
            f"numbers from -65504 to 65504{remedy}"
        )
    return values


def read_images(directory: str, prefix: str, count: int) -> "RawImages | FileImages | None":
    """The embeddings in `{prefix}_image_embeddings.npy`, [n, v] or [n, i, v], memory-mapped.

    `{prefix}_has_image.npy`, bool [n] or [n, i], says which images exist; without it, an image
    exists if its embedding is not all zero. Without the first file, ViXML's own files are looked
    for; see `read_vixml_images`.

    Args:
      directory: Directory of the files.
      prefix: trn, val, tst or lbl.
      count: Expected number of items.

    Returns:
      The images; None if there are no such files.

    Raises:
      InputError: If the files do not fit the items or each other.
    """
    path = os.path.join(directory, f"{prefix}_image_embeddings.npy")
    mask_path = os.path.join(directory, f"{prefix}_has_image.npy")
    if not os.path.exists(path):
        if os.path.exists(mask_path):
            raise InputError(f"{path}: not found, but {os.path.basename(mask_path)} exists")
        return read_vixml_images(directory, prefix, count)
    embeddings = _load(path)
    shape = embeddings.shape
    if embeddings.dtype.kind != "f" or embeddings.ndim not in (2, 3):
        raise InputError(
            f"{path}: found {embeddings.dtype} {shape}, expected floating point [items, width] or "
            "[items, images, width]"
        )
    if shape[0] != count:
        raise InputError(
            f"{path}: found {shape[0]} rows, expected {count}, as many as texts in {prefix}.raw.txt"
        )
    if 0 in shape:
        raise InputError(f"{path}: empty ({shape}); expected embeddings, or no such file")
    embeddings = embeddings.reshape(count, -1, shape[-1])
    if not os.path.exists(mask_path):
        return RawImages(embeddings, _nonzero(embeddings), path)
    mask = _load(mask_path)
    if mask.dtype != bool or mask.shape not in ((count,), shape[:-1]):
        raise InputError(
            f"{mask_path}: found {mask.dtype} {mask.shape}, expected bool {(count,)} or "
            f"{shape[:-1]} as in {os.path.basename(path)}"
        )
    present = np.broadcast_to(mask.reshape(count, -1), embeddings.shape[:2])
    return RawImages(embeddings, present, path)


def check_widths(images: Mapping[str, ItemImages | None], directory: str) -> None:
    """Checks that all embeddings have the same width; named images have none yet.

    Args:
      images: The images of each split and of the labels.
      directory: The source, for the message.

    Raises:
      InputError: If two widths differ.
    """
    widths = {os.path.basename(raw.path): raw.width for raw in images.values() if raw and raw.width}
    if len(set(widths.values())) > 1:
        listed = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise InputError(f"{directory}: embeddings of unequal width ({listed}); expected one width")


def _load(path: str) -> np.ndarray:
    return npy_files.open_mapped(path, "write it again with numpy.save", any_order=True)


def _nonzero(embeddings: Float[np.ndarray, "n i v"]) -> Bool[np.ndarray, "n i"]:
    """Whether each embedding has a value other than zero."""
    step = max(1, _BLOCK // embeddings[0].size)
    blocks = []
    for start in range(0, len(embeddings), step):
        blocks.append((embeddings[start : start + step] != 0).any(axis=2))
        mapped_rows.release(embeddings)
    return np.concatenate(blocks)


class FileImages(NamedTuple):
    """Up to i images of each item, as rows of a table of embeddings."""

    rows: Int[np.ndarray, "n i"]  # -1 = no image.
    vectors: Float[np.ndarray, "m v"]
    path: str  # For messages.

    @property
    def width(self) -> int:
        return self.vectors.shape[1]

    def offsets(self, rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, " r+1"]:
        """Where the images of each row begin among the images of all `rows`."""
        counts = (self.rows[rows] >= 0).sum(axis=1, dtype=np.int64)
        return np.concatenate([[0], np.cumsum(counts)])

    def read(self, rows: Int[np.ndarray, " r"]) -> Iterator[Float16[np.ndarray, "k v"]]:
        """Yields the existing images of the rows in order, a block at a time.

        Raises:
          InputError: If an embedding is not finite in float16.
        """
        step = max(1, _BLOCK // max(1, self.rows.shape[1] * self.width))
        for start in range(0, len(rows), step):
            table_rows = self.rows[rows[start : start + step]].reshape(-1)
            table_rows = table_rows[table_rows >= 0]
            values = self.vectors[table_rows]
            mapped_rows.release(self.vectors)
            yield _to_float16(values, table_rows, self.path)


def read_vixml_images(directory: str, prefix: str, count: int) -> FileImages | None:
    """The embeddings that ViXML's authors publish, memory-mapped, and the map of items to them.

    `{prefix}_embs_imgs_3_1152_siglip2.npy` has a row for each image, float32 [m, v];
    `{prefix}_imgs_384_3_map.npy` is an array of objects: for each item the list of its rows, or -1
    if it has no image. The numbers in the names may be others.

    Args:
      directory: Directory of the files.
      prefix: trn, val, tst or lbl.
      count: Expected number of items.

    Returns:
      The images; None if there are no such files.

    Raises:
      InputError: If the files do not fit the items or each other, or the map holds anything but
        integers.
    """
    patterns = (f"{prefix}_embs_imgs_*_siglip2.npy", f"{prefix}_imgs_*_map.npy")
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    matches_of = [fnmatch.filter(names, pattern) for pattern in patterns]
    if not any(matches_of):
        return None
    for pattern, matches in zip(patterns, matches_of, strict=True):
        if len(matches) != 1:
            raise InputError(
                f"{os.path.join(directory, pattern)}: found {', '.join(matches) or 'none'}, "
                f"expected one such file ({' and '.join(patterns)} go together)"
            )
    path, map_path = (os.path.join(directory, matches[0]) for matches in matches_of)
    vectors = _load(path)
    if vectors.dtype.kind != "f" or vectors.ndim != 2 or not vectors.shape[1]:
        raise InputError(
            f"{path}: found {vectors.dtype} {vectors.shape}, expected floating point "
            "[images, width]"
        )
    return FileImages(_read_map(map_path, len(vectors), prefix, count), vectors, path)


def _read_map(path: str, num_images: int, prefix: str, count: int) -> Int[np.ndarray, "n i"]:
    """The rows of each item's images, padded with -1."""
    objects = safe_pickle.load_object_array(path)
    if len(objects) != count:
        raise InputError(
            f"{path}: found {len(objects)} items, expected {count}, as many as texts in "
            f"{prefix}.raw.txt"
        )
    lists = [(value,) if isinstance(value, int) else value for value in objects]
    lengths = np.fromiter(map(len, lists), np.int64, count)
    if lengths.max(initial=0) > _MAX_IMAGES:
        raise InputError(
            f"{path}, item {np.argmax(lengths)} (from 0): found {lengths.max()} images, expected "
            f"at most {_MAX_IMAGES}"
        )
    rows = np.fromiter(itertools.chain.from_iterable(lists), np.int64, int(lengths.sum()))
    items = np.repeat(np.arange(count), lengths)
    wrong = (rows < -1) | (rows >= num_images)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise InputError(
            f"{path}, item {items[first]} (from 0): found row {rows[first]}, expected one below "
            f"{num_images}, the number of embeddings, or -1 for no image"
        )
    rows, items = rows[rows >= 0], items[rows >= 0]
    counts = np.bincount(items, minlength=count)
    table = np.full((count, max(1, counts.max())), -1, np.int64)
    table[items, ranges(np.zeros_like(counts), counts)] = rows
    return table


class RaggedImages(NamedTuple):
    """Images of all items, one item after the other."""

    vectors: Float16[np.ndarray, "m v"]
    at: Int[np.ndarray, " n+1"]  # Where the images of each item begin.
    path: str  # For messages.

    @property
    def width(self) -> int:
        return self.vectors.shape[1]

    def offsets(self, rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, " r+1"]:
        """Where the images of each row begin among the images of all `rows`."""
        return np.concatenate([[0], np.cumsum(self.at[rows + 1] - self.at[rows])])

    def read(self, rows: Int[np.ndarray, " r"]) -> Iterator[Float16[np.ndarray, "k v"]]:
        """Yields the images of the rows in order, a block at a time."""
        taken = ranges(self.at[rows], self.at[rows + 1] - self.at[rows])
        step = max(1, _BLOCK // self.width)
        for start in range(0, len(taken), step):
            values = np.asarray(self.vectors[taken[start : start + step]])
            mapped_rows.release(self.vectors)
            yield values
