"""Object arrays that numpy pickled, read without running anything: ViXML's picture maps.

A `.npy` file of objects is a pickle, and unpickling runs whatever the file says. Here the names
that it may say are a handful, and what stands behind them is ours: it makes arrays of integers,
and arrays and lists of such, and nothing else.
"""

import io
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from vixml_jax.errors import InputError

_MOST_BYTES = 1 << 30  # Of a map: that of millions of items takes some 100 MB.
_NUMPY = {"numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy._core.numeric"}


class _Forbidden(pickle.UnpicklingError):
    """Something that is not let in."""


class _Dtype:
    """A dtype as pickled: made of a code, then told its byte order."""

    def __init__(self, code: str, align: bool = False, copy: bool = True):
        if code not in ("O8", "O", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"):
            raise _Forbidden(f"arrays of {code!r}")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order, parts = state[1], state[2:5]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in parts):
            raise _Forbidden("a dtype with parts")
        self.order = order

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(object if self.code[0] == "O" else self.order + self.code)


class _Array:
    """An array as pickled: made empty, then told its shape, dtype and content."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, of, fortran, content = state
        if not isinstance(of, _Dtype) or fortran not in (False, True):
            raise _Forbidden("an array of something else than integers or objects")
        if len(shape) != 1 or not isinstance(shape[0], int) or shape[0] < 0:
            raise _Forbidden(f"an array of shape {shape}")
        if of.dtype.hasobject:
            if not isinstance(content, list) or len(content) != shape[0]:
                raise _Forbidden("an array whose content is not of its length")
            self.values: Any = content
            return
        if isinstance(content, str):  # As protocol 0 has bytes.
            content = content.encode("latin-1")
        if not isinstance(content, bytes) or len(content) != shape[0] * of.dtype.itemsize:
            raise _Forbidden("an array whose content is not of its length")
        self.values = np.frombuffer(content, of.dtype)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    """Stands for numpy's function of this name, which makes any subclass of ndarray."""
    if kind is not _Array or shape != (0,) or code not in (b"b", "b"):
        raise _Forbidden("an array made in another way")
    return _Array()


def _scalar(of: Any, content: Any = None) -> int:
    """Stands for numpy's function of this name: one integer."""
    if not isinstance(of, _Dtype) or of.dtype.hasobject:
        raise _Forbidden("a scalar that is no integer")
    if isinstance(content, str):
        content = content.encode("latin-1")
    if not isinstance(content, bytes) or len(content) != of.dtype.itemsize:
        raise _Forbidden("a scalar whose content is not of its length")
    return int(np.frombuffer(content, of.dtype)[0])


def _frombuffer(content: Any, of: Any, shape: Any, order: Any) -> _Array:
    """Stands for numpy's `_frombuffer`, which protocol 5 names."""
    if not isinstance(content, bytes | bytearray):
        raise _Forbidden("an array whose content is no bytes")
    made = _Array()
    made.__setstate__((1, shape, of, order == "F", bytes(content)))
    return made


def _encode(text: str, encoding: str) -> bytes:
    """Stands for `_codecs.encode`, which protocols 0 to 2 name for bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _Forbidden("text that is encoded otherwise")
    return text.encode("latin-1")


class _Function:
    """One of ours; as an object that a pickle can call but not change."""

    __slots__ = ("_run",)

    def __init__(self, run: Callable[..., Any]):
        self._run = run

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def __setstate__(self, state: Any) -> None:
        raise _Forbidden("a changed function")


_BY_NAME = {
    "_reconstruct": _Function(_reconstruct),
    "scalar": _Function(_scalar),
    "_frombuffer": _Function(_frombuffer),
    "ndarray": _Array,
    "dtype": _Dtype,
}


class _Unpickler(pickle.Unpickler):
    """Knows a few names, and our functions behind them."""

    def find_class(self, module: str, name: str) -> Any:
        if module in _NUMPY and name in _BY_NAME:
            return _BY_NAME[name]
        if (module, name) == ("__builtin__", "bytes"):
            return _Function(lambda: b"")  # As protocols 0 to 2 have no bytes at all.
        if (module, name) == ("_codecs", "encode"):
            return _Function(_encode)
        raise _Forbidden(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Forbidden("a persistent id")


def load(path: str) -> list[Any]:
    """The elements of a 1-d object array in a `.npy` file: integers, lists and arrays of such.

    Args:
      path: Of a file that `numpy.save` wrote, by numpy 1 or 2.

    Raises:
      InputError: If it is no such file, or holds anything but integers, lists and arrays.
    """
    try:
        with open(path, "rb") as file:
            count = _read_header(file)
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise _Forbidden(f"more than {_MOST_BYTES >> 30} GiB")
        found = _Unpickler(io.BytesIO(data)).load()
    except _Forbidden as error:
        raise InputError(
            f"{path}: holds {error}; expected lists of integers alone, and nothing was run"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # Of broken bytes, numpy's header and pickle raise anything.
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: not a whole .npy file of an object array ({type(error).__name__}: {said})"
        ) from None
    values = found.values if isinstance(found, _Array) else None
    if not isinstance(values, list) or len(values) != count:
        raise InputError(f"{path}: not an array of {count} objects, as its header says")
    return [_plain(value, path, row) for row, value in enumerate(values)]


def _read_header(file: BinaryIO) -> int:
    """Elements of the 1-d object array that the header announces."""
    version = np.lib.format.read_magic(file)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"version {version}")
    shape, _, dtype = read(file)
    if len(shape) != 1 or dtype != object:
        raise ValueError(f"{dtype} {shape}, expected objects in one dimension")
    return shape[0]


def _plain(value: Any, path: str, row: int) -> int | list[int] | Shaped[np.ndarray, " k"]:
    """An element, checked: an integer, or a list or an array of integers."""
    if isinstance(value, _Array):
        value = value.values
    if isinstance(value, np.ndarray):
        return value
    if isinstance(value, list):
        if set(map(type, value)) <= {int}:
            return value
    elif isinstance(value, int) and not isinstance(value, bool):
        return value
    raise InputError(f"{path}, item {row} (from 0): a {type(value).__name__}, expected integers")
