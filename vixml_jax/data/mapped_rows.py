"""Reads rows of memory-mapped files that are larger than memory, without keeping their pages.

The pages of a mapped file that a process has read count as its memory until the system needs them
for something else, and reading scattered rows through a mapping also reads the pages around them.
"""

import mmap
import os

import numpy as np
from jaxtyping import Int, Shaped

from vixml_jax.data.store import ranges

_SMALL = 1 << 28  # Bytes; smaller files are read through their mapping.


def copy_runs(
    values: Shaped[np.ndarray, "t *v"],
    starts: Int[np.ndarray, " n"],
    lengths: Int[np.ndarray, " n"],
    into: Shaped[np.ndarray, "s *v"],
    at: Int[np.ndarray, " n"],
) -> None:
    """Copies runs of rows: `into[at[i] : at[i] + lengths[i]] = values[starts[i] : ...]`.

    Rows of a large mapped file are read from the file itself. All reads are announced to the
    system first, so that the disk can work on many at a time.

    Args:
      values: Array to copy from, mapped or not.
      starts: First row of each run in `values`.
      lengths: Number of rows of each run.
      into: Contiguous array of the same dtype to copy to.
      at: First row of each run in `into`.

    Raises:
      OSError: If the file is shorter than the array.
    """
    file = _file_of(values)
    if file is None or values.nbytes < _SMALL or not hasattr(os, "posix_fadvise"):
        into[ranges(at, lengths)] = values[ranges(starts, lengths)]
        return
    assert into.dtype == values.dtype and values.flags.c_contiguous, (into.dtype, values.dtype)
    buffer = memoryview(into.reshape(-1).view(np.uint8))
    begin = file.offset + values.ctypes.data - file.ctypes.data
    size = values[:1].nbytes
    runs = [
        (begin + start * size, place * size, length * size)
        for start, place, length in zip(starts.tolist(), at.tolist(), lengths.tolist(), strict=True)
        if length
    ]
    descriptor = os.open(file.filename, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for start, _, length in runs:
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)
        for start, place, length in runs:
            if os.preadv(descriptor, [buffer[place : place + length]], start) != length:
                raise OSError(
                    f"{file.filename}: the file ends before byte {start + length}; it was truncated"
                )
    finally:
        os.close(descriptor)


def release(values: np.ndarray) -> None:
    """Releases the memory of the pages that were read of a mapped file; else does nothing."""
    file = _file_of(values)
    if file is not None:
        file._mmap.madvise(mmap.MADV_DONTNEED)


def _file_of(values: np.ndarray | None) -> np.memmap | None:
    """The mapped file that an array is a view of; None if it is in memory."""
    while values is not None and not (isinstance(values, np.memmap) and values._mmap is not None):
        values = getattr(values, "base", None)
    return values
