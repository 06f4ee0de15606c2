"""Reads `.npy` files of Python objects, such as ViXML's image maps, without running their code.

Such a file is a pickle, and the usual unpickler calls any function that a pickle names. This one
accepts few opcodes and five names, which stand for functions of this module; they create integers,
lists and arrays of integers, and nothing else.
"""

import mmap
import pickle
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from vixml_jax.errors import InputError
from vixml_jax.storage import regular_files

_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")  # In NumPy 1 and NumPy 2.
_MAX_OBJECTS = 1 << 40  # A header may have a number that is too long to print.
_OBJECT = "O8"
_CODES = (_OBJECT, "i1", "i2", "i4", "i8", "u1", "u2", "u4")  # All integers fit into int64.
_NDARRAY = object()  # Stands for the name `ndarray`; it cannot be called.
# The opcodes that NumPy and Python write for arrays, lists and integers: no other objects, no
# dictionaries, no persistent ids, no extension codes.
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
    """A part of a pickle that is not allowed."""


class _Dtype:
    """A pickled dtype: created from a code; its state then sets the byte order."""

    def __init__(self, code: Any, align: Any, copy: Any):
        if code not in _CODES:
            raise _Forbidden(f"the dtype {code!r}")
        self._code, self._order = code, "="

    def __setstate__(self, state: Any) -> None:
        _, order, subarray, names, fields, *_ = state
        if order not in ("<", ">", "=", "|") or (subarray, names, fields) != (None, None, None):
            raise _Forbidden("a structured dtype, or an unknown byte order")
        self._order = order

    @property
    def is_object(self) -> bool:
        return self._code == _OBJECT

    def decode(self, content: Any, count: int) -> Shaped[np.ndarray, " n"]:
        """The `count` integers in `content`, as a view of its bytes."""
        dtype = np.dtype(self._order + self._code)
        if type(content) is not bytes or len(content) != count * dtype.itemsize:
            raise _Forbidden(f"an array whose content does not have its length, {count}")
        return np.frombuffer(content, dtype)


class _Array:
    """A pickled array: created empty; its state then sets shape, dtype and content."""

    values: Any = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, _, content = state
        if type(dtype) is not _Dtype or len(shape) != 1 or type(shape[0]) is not int:
            raise _Forbidden(f"an array of {len(shape)} dimensions, or without a dtype")
        if not dtype.is_object:
            self.values = dtype.decode(content, shape[0])
        elif type(content) is list and len(content) == shape[0]:
            self.values = content
        else:
            raise _Forbidden(f"an array whose content does not have its length, {shape[0]}")


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    """Replaces NumPy's `_reconstruct`, which creates any array of any size."""
    if kind is not _NDARRAY or shape != (0,) or code != b"b":
        raise _Forbidden("an array that is not created as NumPy does")
    return _Array()


def _scalar(dtype: Any, content: Any) -> int:
    """Replaces NumPy's `scalar`; returns an integer."""
    if type(dtype) is not _Dtype or dtype.is_object:
        raise _Forbidden("a scalar that is not an integer")
    return int(dtype.decode(content, 1)[0])


_NAMES = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Dtype,
    **{(module, "_reconstruct"): _reconstruct for module in _MULTIARRAY},
    **{(module, "scalar"): _scalar for module in _MULTIARRAY},
}


class _Dispatch(dict):
    """The functions of the allowed opcodes."""

    def __missing__(self, opcode: int) -> None:
        raise _Forbidden(f"the opcode {bytes([opcode])!r}")


# The unpickler written in C allocates a memo of the size that an index claims, so a file of 12
# bytes can take all memory. The one in Python takes twice as long: 7 s for the 2.25 million items
# of the largest data set.
class _Unpickler(pickle._Unpickler):
    """An unpickler that accepts few opcodes and few names."""

    dispatch = _Dispatch({code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise _Forbidden(f"the name {f'{module}.{name}'!r}")
        return _NAMES[module, name]


def load_object_array(path: str) -> Shaped[np.ndarray, " n"]:
    """The objects in a `.npy` file: each an int, a list of ints, or an array of integers.

    Args:
      path: A file that `numpy.save` of NumPy 1 or 2 wrote from a 1-d array of objects.

    Raises:
      InputError: If it is not such a file, or has anything else in it. No code of it is ever run.
    """
    try:
        with (
            regular_files.open_binary(path) as file,
            # Reads of a map end with the file, however long the pickle claims that something is.
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            count = _read_header(content)
            loaded = _Unpickler(content).load()
            at_end, size = not content.read(1), len(content)
    except _Forbidden as error:
        raise InputError(
            f"{path}: found {str(error)[:200]}; expected only integers, lists and arrays of "
            "integers (no code of the file was run)"
        ) from None
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # Damaged headers and pickles raise anything.
        reason = f"{type(error).__name__}: {str(error)[:200]!r}"
        raise InputError(f"{path}: not a complete .npy file of objects ({reason})") from None
    values = loaded.values if type(loaded) is _Array else None
    if type(values) is not list or len(values) != count or not at_end:
        raise InputError(f"{path}: expected one array of {count} objects, as in its header")
    if sum(map(_count, values)) > size:  # An integer takes a byte or more.
        raise InputError(f"{path}: repeats lists, to more integers than it has bytes")
    return np.fromiter((_plain(value, path, n) for n, value in enumerate(values)), object, count)


def _count(value: Any) -> int:
    """The number of elements of an object of the array."""
    if type(value) is _Array:
        value = value.values
    return len(value) if type(value) in (list, np.ndarray) else 1


def _read_header(file: BinaryIO | mmap.mmap) -> int:
    """The number of objects according to the header."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version}")
    shape, _, dtype = readers[version](file)
    if len(shape) != 1 or shape[0] > _MAX_OBJECTS or dtype.kind != "O":
        raise ValueError(f"found {dtype} {shape}, expected objects in one dimension")
    return shape[0]


def _plain(value: Any, path: str, item: int) -> int | list[int] | Shaped[np.ndarray, " k"]:
    """An object of the array as int, list or NumPy array."""
    if type(value) is _Array:
        value = value.values
    if type(value) is int or type(value) is np.ndarray:
        return value
    if type(value) is list and all(type(element) is int for element in value):
        return value
    kind = type(value).__name__.strip("_")
    if type(value) is list:
        kinds = {type(element).__name__.strip("_") for element in value}
        kind += f" of {', '.join(sorted(kinds))}"
    raise InputError(
        f"{path}, item {item} (from 0): found {kind}, expected an integer, or a list or an array "
        "of integers"
    )
