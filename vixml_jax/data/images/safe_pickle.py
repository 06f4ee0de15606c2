"""Object arrays in `.npy` files, read without running anything: ViXML's picture maps.

Such a file is a pickle, and unpickling runs whatever a file says. Here it may say a few opcodes and
five names, and what stands behind the names is ours: it makes integers, lists and arrays of them,
and nothing else.
"""

import mmap
import pickle
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from vixml_jax.errors import InputError

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")  # Of numpy 1 and of numpy 2.
_MOST = 1 << 40  # Objects: a header may say a number too long to be printed.
_OBJECT = "O8"
_CODES = (_OBJECT, "i1", "i2", "i4", "i8", "u1", "u2", "u4")  # All integers fit int64.
_NDARRAY = object()  # What the name `ndarray` stands for; cannot be called.
# What numpy and Python write for arrays, lists and integers: no other objects, no dictionaries, no
# persistent ids, no extension codes.
_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.SHORT_BINBYTES, pickle.BINBYTES, pickle.SHORT_BINUNICODE, pickle.BINUNICODE),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD),
)


class _Forbidden(Exception):
    """Something that is not let in."""


class _Dtype:
    """A dtype as pickled: made of a code, then told its byte order."""

    def __init__(self, code: Any, align: Any, copy: Any):
        if code not in _CODES:
            raise _Forbidden(f"the dtype {code!r}")
        self._code, self._order = code, "="

    def __setstate__(self, state: Any) -> None:
        _, order, subarray, names, fields, *_ = state
        if order not in ("<", ">", "=", "|") or (subarray, names, fields) != (None, None, None):
            raise _Forbidden("a dtype with parts")
        self._order = order

    @property
    def is_object(self) -> bool:
        return self._code == _OBJECT

    def decode(self, content: Any, count: int) -> Shaped[np.ndarray, " n"]:
        """As many integers as told; a view of their bytes."""
        dtype = np.dtype(self._order + self._code)
        if type(content) is not bytes or len(content) != count * dtype.itemsize:
            raise _Forbidden(f"an array that is not of its length, {count}")
        return np.frombuffer(content, dtype)


class _Array:
    """An array as pickled: made empty, then told its shape, dtype and content."""

    values: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, content = state
        if type(dtype) is not _Dtype or len(shape) != 1 or type(shape[0]) is not int:
            raise _Forbidden(f"an array of {len(shape)} dimensions, or of something else")
        if not dtype.is_object:
            self.values = dtype.decode(content, shape[0])
        elif type(content) is list and len(content) == shape[0]:
            self.values = content
        else:
            raise _Forbidden(f"an array that is not of its length, {shape[0]}")


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    """Stands for numpy's `_reconstruct`, which makes any array of any size."""
    if kind is not _NDARRAY or shape != (0,) or code != b"b":
        raise _Forbidden("an array that is not made as numpy does")
    return _Array()


def _scalar(dtype: Any, content: Any) -> int:
    """Stands for numpy's `scalar`: one integer."""
    if type(dtype) is not _Dtype or dtype.is_object:
        raise _Forbidden("a scalar that is no integer")
    return int(dtype.decode(content, 1)[0])


_NAMES = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Dtype,
    **{(module, "_reconstruct"): _reconstruct for module in _MULTIARRAY},
    **{(module, "scalar"): _scalar for module in _MULTIARRAY},
}


class _Dispatch(dict):
    """The opcodes that are known."""

    def __missing__(self, opcode: int) -> None:
        raise _Forbidden(f"the opcode {bytes([opcode])!r}")


# The one written in C sets aside what the index of a memo claims: a file of 12 bytes takes all
# memory that there is. This one is half as fast: 7 s for the 2.25 million items of the largest set.
class _Unpickler(pickle._Unpickler):
    """Knows few opcodes, few names, and our functions behind them."""

    dispatch = _Dispatch({code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise _Forbidden(f"the name {f'{module}.{name}'!r}")
        return _NAMES[module, name]


def load_object_array(path: str) -> Shaped[np.ndarray, " n"]:
    """The objects in a `.npy` file: each an int, a list of ints, or an array of integers.

    Args:
      path: Of a file that `numpy.save` wrote from a 1-d array of objects, in numpy 1 or 2.

    Raises:
      InputError: If it is no such file, or holds anything else. Nothing of it is ever run.
    """
    try:
        with (
            open(path, "rb") as file,
            # Of a map, no more is ever read than there is, whatever a length claims.
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            count = _read_header(content)
            found = _Unpickler(content).load()
            more = len(content.read(1))
    except _Forbidden as error:
        raise InputError(
            f"{path}: holds {str(error)[:200]}; expected integers, lists and arrays of integers "
            "alone, and nothing else was made or run"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # Of broken bytes, parsers of headers and pickles raise anything.
        said = f"{type(error).__name__}: {str(error)[:200]!r}"
        raise InputError(f"{path}: not a whole .npy file of objects ({said})") from None
    values = found.values if type(found) is _Array else None
    if type(values) is not list or len(values) != count or more:
        raise InputError(f"{path}: not one array of {count} objects, as its header says")
    return np.fromiter((_plain(value, path, n) for n, value in enumerate(values)), object, count)


def _read_header(file: BinaryIO | mmap.mmap) -> int:
    """How many objects the header announces."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version}")
    shape, _, dtype = readers[version](file)
    if len(shape) != 1 or shape[0] > _MOST or dtype.kind != "O":
        raise ValueError(f"{dtype} {shape}, expected objects in one dimension")
    return shape[0]


def _plain(value: Any, path: str, item: int) -> int | list[int] | Shaped[np.ndarray, " k"]:
    """One of the objects, without ours around it."""
    if type(value) is _Array:
        value = value.values
    if type(value) is int or type(value) is np.ndarray:
        return value
    if type(value) is list and all(type(one) is int for one in value):
        return value
    found = type(value).__name__.strip("_")
    if type(value) is list:
        found += " of " + ", ".join(sorted({type(one).__name__.strip("_") for one in value}))
    raise InputError(
        f"{path}, item {item} (from 0): {found}, expected an integer, or a list or an array of "
        "integers"
    )
