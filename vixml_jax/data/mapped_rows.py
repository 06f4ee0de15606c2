"""Arrays that are mapped files larger than memory: read without holding them.

The pages of a mapped file count as memory of the process that looked at them for as long as the
system has room for them, and looking at rows here and there reads much around each.
"""

import mmap
import os

import numpy as np
from jaxtyping import Int, Shaped

from vixml_jax.data.store import ranges

_SMALL = 1 << 28  # Bytes of a file that stays mapped.


def copy_runs(
    values: Shaped[np.ndarray, "t *v"],
    starts: Int[np.ndarray, " n"],
    lengths: Int[np.ndarray, " n"],
    into: Shaped[np.ndarray, "s *v"],
    at: Int[np.ndarray, " n"],
) -> None:
    """Copies runs of rows: `into[at[i] : at[i] + lengths[i]] = values[starts[i] : ...]`.

    Rows of a large mapped file are read from the file, all of them announced before the first, so
    that a disk has many reads to do at a time.

    Args:
      values: An array, mapped or not.
      starts: First row of each run.
      lengths: Rows of each.
      into: A contiguous array of the same type.
      at: Where the first row of each goes.
    """
    file = _file_of(values)
    if file is None or values.nbytes < _SMALL or not hasattr(os, "posix_fadvise"):
        into[ranges(at, lengths)] = values[ranges(starts, lengths)]
        return
    assert into.dtype == values.dtype and values.flags.c_contiguous, (into.dtype, values.dtype)
    room = memoryview(into.reshape(-1).view(np.uint8))
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
            if os.preadv(descriptor, [room[place : place + length]], start) != length:
                raise OSError(f"{file.filename}: ends before byte {start + length}")
    finally:
        os.close(descriptor)


def release(values: np.ndarray) -> None:
    """Has the process forget the pages of a mapped file that it looked at."""
    file = _file_of(values)
    if file is not None:
        file._mmap.madvise(mmap.MADV_DONTNEED)


def _file_of(values: np.ndarray | None) -> np.memmap | None:
    """The mapped file that an array is a view of."""
    while values is not None and not (isinstance(values, np.memmap) and values._mmap is not None):
        values = getattr(values, "base", None)
    return values
