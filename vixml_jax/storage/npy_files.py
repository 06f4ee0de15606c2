"""Opens `.npy` files of any origin: memory-mapped, so that a header cannot make memory be taken."""

import errno
import math
import os
import tokenize

import numpy as np
from jaxtyping import Int, Shaped

from vixml_jax.errors import InputError
from vixml_jax.storage import regular_files

_BLOCK = 1 << 22  # Values checked at a time.


def open_mapped(path: str, remedy: str) -> Shaped[np.ndarray, "..."]:
    """The array of a file, memory-mapped unless it is empty; in the order of C.

    Args:
      path: Of the file.
      remedy: What the user can do about a damaged file, for the message.

    Raises:
      InputError: If the file is missing, is no `.npy` file, is shorter than its header says, or
        holds Python objects or another order of values.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path}: not found; {remedy}")
    with regular_files.open_binary(path) as file:
        try:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"format {version}, expected (1, 0)")
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        # numpy's reader of headers lets many errors through that parts of Python raise.
        except (
            OSError, ValueError, EOFError, TypeError, SyntaxError, RecursionError, MemoryError,
            OverflowError, tokenize.TokenError,
        ) as error:  # fmt: skip
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{path}: truncated or damaged ({reason}); {remedy}") from None
        is_valid = not dtype.hasobject and dtype.itemsize and all(0 <= n < 1 << 62 for n in shape)
        if not is_valid or (is_fortran and len(shape) > 1):
            order = ", transposed" if is_fortran else ""
            raise InputError(f"{path}: damaged (found {dtype} {shape}{order}); {remedy}")
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
            mapped = np.memmap(file, dtype, "r", offset, shape)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            raise InputError(regular_files.too_many(path)) from None
    mapped.filename = os.path.abspath(path)
    return mapped


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
