"""Opens `.npy` files of any origin: memory-mapped, so that a header cannot make memory be taken."""

import errno
import math
import mmap
import os
import tokenize
import zipfile
from typing import BinaryIO

import numpy as np
from jaxtyping import Int, Shaped

from vixml_jax.errors import InputError
from vixml_jax.runtime import host_memory
from vixml_jax.storage import regular_files

_BLOCK = 1 << 22  # Values checked at a time.
_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def open_mapped(path: str, remedy: str, *, any_order: bool = False) -> Shaped[np.ndarray, "..."]:
    """The array of a file, memory-mapped unless it is empty.

    Args:
      path: Of the file.
      remedy: What the user can do about a damaged file, for the message.
      any_order: Whether values may be in the order of Fortran, too, as of a transposed array.

    Raises:
      InputError: If the file is missing, is no `.npy` file, is shorter than its header says, or
        holds Python objects or another order of values.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path}: not found; {remedy}")
    with regular_files.open_binary(path) as file:
        try:
            version = np.lib.format.read_magic(file)
            if version not in _READERS:
                raise ValueError(f"format {version}, expected one of {[*_READERS]}")
            shape, is_fortran, dtype = _READERS[version](file)
        # numpy's reader of headers lets many errors through that parts of Python raise.
        except (
            OSError, ValueError, EOFError, TypeError, SyntaxError, RecursionError, MemoryError,
            OverflowError, tokenize.TokenError,
        ) as error:  # fmt: skip
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: truncated or damaged ({reason}); {remedy}") from None
        is_valid = not dtype.hasobject and dtype.itemsize and all(0 <= n < 1 << 62 for n in shape)
        is_transposed = is_fortran and len(shape) > 1
        if not is_valid or (is_transposed and not any_order):
            order = ", transposed" if is_fortran else ""
            fault = "holds Python objects, which are not read" if dtype.hasobject else "damaged"
            raise InputError(f"{path}: {fault} (found {dtype} {shape}{order}); {remedy}")
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
        needed = offset + math.prod(shape) * dtype.itemsize
        if size != needed:
            raise InputError(
                f"{path}: truncated or damaged ({size:,} bytes, expected {needed:,}); {remedy}"
            )
        if 0 in shape:  # An empty file cannot be mapped.
            return np.zeros(shape, dtype)
        # Of the open file: another one may have its name meanwhile.
        try:
            mapped = np.memmap(file, dtype, "r", offset, shape, "F" if is_transposed else "C")
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise InputError(regular_files.too_many(path)) from None
    mapped.filename = os.path.abspath(path)
    return mapped


def release(array: Shaped[np.ndarray, "..."]) -> None:
    """Releases the pages of a mapped file that were read, which count as memory of the process."""
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, mmap.mmap):
        array.madvise(mmap.MADV_DONTNEED)


def check_archive(file: str | BinaryIO) -> None:
    """Checks that the arrays of an `.npz` file fit into memory, by the sizes that it declares.

    `zipfile` reads no more of a member than that.

    Raises:
      ValueError: If they do not.
      OSError, zipfile.BadZipFile: If it is no such file.
    """
    with zipfile.ZipFile(file) as archive:
        needed = sum(part.file_size for part in archive.infolist())
    free = host_memory.available()
    if free is not None and needed > free // 2:
        raise ValueError(f"its arrays have {needed:,} bytes, more than fit into memory twice")


def are_offsets(offsets: Int[np.ndarray, " n"], rows: int, total: int) -> bool:
    """Whether offsets divide `total` values into rows: ascending from 0 to their number."""
    if offsets.shape != (rows + 1,) or not len(offsets):
        return False
    if offsets[0] != 0 or offsets[-1] != total:
        return False
    starts = range(0, len(offsets) - 1, _BLOCK)
    return all((np.diff(offsets[start : start + _BLOCK + 1]) >= 0).all() for start in starts)


def is_csr(
    data: Shaped[np.ndarray, " n"],
    indices: Int[np.ndarray, " n"],
    indptr: Int[np.ndarray, " r+1"],
    columns: int,
) -> bool:
    """Whether arrays are a matrix of rows with so many columns; SciPy would crash on others."""
    if any(x.ndim != 1 for x in (data, indices, indptr)) or not len(indptr):
        return False
    if any(x.dtype.kind not in "iu" for x in (indices, indptr)) or data.dtype.kind != "f":
        return False
    if indptr[0] != 0 or not indptr[-1] == len(indices) == len(data):
        return False
    if (np.diff(indptr) < 0).any():
        return False
    blocks = (indices[start : start + _BLOCK] for start in range(0, len(indices), _BLOCK))
    return all(0 <= block.min() and block.max() < columns for block in blocks)
