"""Image embeddings of a source: found beside its texts, checked, and handed on ragged."""

import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float16, Int

from vixml_jax.errors import InputError

_BLOCK = 1 << 22  # Values held at a time.


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
            with np.errstate(over="ignore"):
                values = self.embeddings[block][self.present[block]].astype(np.float16)
            fine = np.isfinite(values).all(axis=1)
            if not fine.all():
                owner = np.repeat(block, self.present[block].sum(axis=1))[int(np.argmin(fine))]
                raise InputError(
                    f"{self.path}, row {owner} (from 0): not finite in float16; expected numbers "
                    "within 65504, or False for the row in has_image"
                )
            yield values


def read_images(directory: str, prefix: str, count: int) -> RawImages | None:
    """The embeddings `{prefix}_image_embeddings.npy`, [n, v] or [n, i, v], memory-mapped.

    `{prefix}_has_image.npy`, bool [n] or [n, i], says which pictures there are; without it, those
    that are not all zero.

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
        return None
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


def check_widths(images: Mapping[str, RawImages | None], directory: str) -> None:
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
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a whole .npy file ({error})") from None


def _nonzero(embeddings: Float[np.ndarray, "n i v"]) -> Bool[np.ndarray, "n i"]:
    step = max(1, _BLOCK // embeddings[0].size)
    starts = range(0, len(embeddings), step)
    return np.concatenate([(embeddings[start : start + step] != 0).any(axis=2) for start in starts])
