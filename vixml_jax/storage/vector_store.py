"""The vectors of one step of a run, kept once: memory-mapped, with checksums.

They are in `vectors/` of the run directory: `NAME.npy` for each array, and `about.json` with the
step, the hash of the data, and dtype, shape and checksum of each array. Other code reads only what
fits all of them, so a store needs no care: whatever is missing, damaged, or of another step or
other data is made anew.

Vectors are float32. In float16 one hit in 1,492 test queries changed (R@100 by 0.03).
"""

import contextlib
import fcntl
import functools
import hashlib
import os
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
from jaxtyping import Float

from vixml_jax.errors import InputError, NotFiniteError
from vixml_jax.storage import atomic, json_files, npy_files, object_store

DIRECTORY = "vectors"  # In a run directory.
ABOUT = "about.json"
_LOCK = "lock"  # Held shared while arrays are opened, alone while they are written.
_DTYPE = np.dtype("<f4")
_BLOCK_BYTES = 1 << 24

Vectors = Float[np.ndarray, "n e"]


class _Array(msgspec.Struct):
    """What `about.json` says of an array; `sha256` is of its values, without the header."""

    dtype: str
    shape: tuple[int, int]
    sha256: str


class _About(msgspec.Struct):
    """Contents of `about.json`: the arrays by name, and what they belong to."""

    step: int
    content_hash: str
    arrays: dict[str, _Array]


class VectorStore:
    """The vectors of one step of a run.

    Where a run directory is in an object store or shared by several processes, and where it cannot
    be written to, new arrays are kept in memory instead, as long as this instance exists.
    """

    def __init__(self, workdir: str, step: int, content_hash: str, *, num_processes: int = 1):
        """Opens the store; nothing is read or written yet.

        Args:
          workdir: The run directory.
          step: Step of the model. In the epochs of a label head, which change no vectors: the last
            step before them.
          content_hash: Content hash of the prepared data.
          num_processes: Processes of the run; with more than one, each keeps its rows in memory.
        """
        self._step, self._content_hash = step, content_hash
        self._directory: str | None = None
        if object_store.is_local(workdir) and num_processes == 1:
            self._directory = os.path.abspath(os.path.join(workdir, DIRECTORY))
        self._writable = self._directory is not None
        self._in_memory: dict[str, Vectors] = {}

    def get(self, name: str) -> Vectors | None:
        """An array, memory-mapped and read-only; None if there is none of this step and data.

        The checksum is verified once per process. A damaged array is never returned; a warning
        names its file.

        Args:
          name: Name of the array: 'train', 'valid' and 'test' for the unit vectors of queries,
            'labels' for prototypes.
        """
        if name in self._in_memory:
            return self._in_memory[name]
        if self._directory is None or not os.path.exists(self._path(ABOUT)):
            return None
        try:
            with self._locked(fcntl.LOCK_SH):
                return self._open(name)
        except _Damaged as damage:
            self._warn(name, f"{damage}; made anew")
        except OSError as error:
            self._warn(name, f"{error.strerror or error}; not used")
        return None

    def put(self, name: str, values: Vectors) -> Vectors:
        """Stores an array, in place of one of the same name, and returns it as `get` would.

        Arrays of another step or other data are removed. If nothing can be written, a line says so
        once, and the array is kept in memory.

        Raises:
          NotFiniteError: If a value is not finite.
        """
        values = np.ascontiguousarray(values, _DTYPE)
        if not all(np.isfinite(block).all() for block in _blocks(values)):
            raise NotFiniteError(
                f"vectors of {name} at step {self._step}: some are not finite; evaluate an earlier "
                "checkpoint, or train again with a lower --optimizer.learning_rate"
            )
        self._in_memory.pop(name, None)
        if self._writable:
            try:
                os.makedirs(self._directory, exist_ok=True)
                with self._locked(fcntl.LOCK_EX):
                    self._write(name, values)
                    return self._open(name)
            except (OSError, _Damaged) as error:
                self._writable = False
                reason = getattr(error, "strerror", None) or error
                self._warn(name, f"cannot be stored ({reason}); vectors are kept in memory")
        self._in_memory[name] = values
        return values

    def get_or_make(self, name: str, make: Callable[[], Vectors], rows: int, width: int) -> Vectors:
        """An array of the store; if there is none of this shape, it is made and stored.

        Args:
          name: Name of the array; see `get`.
          make: Returns the array.
          rows, width: Its shape.
        """
        found = self.get(name)
        if found is not None and found.shape != (rows, width):
            self._warn(name, f"found shape {found.shape}, expected {(rows, width)}; made anew")
            found = None
        return self.put(name, make()) if found is None else found

    def _path(self, file: str) -> str:
        return os.path.join(self._directory, file)

    def _warn(self, name: str, text: str) -> None:
        print(f"warning: {self._path(f'{name}.npy')}: {text}", flush=True)

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        flags = os.O_RDONLY if kind == fcntl.LOCK_SH else os.O_WRONLY | os.O_CREAT
        # Without O_NONBLOCK, a pipe in its place would be waited for.
        descriptor = os.open(self._path(_LOCK), flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)

    def _listed(self) -> dict[str, _Array]:
        """The arrays of this step and data that `about.json` lists."""
        if not os.path.exists(self._path(ABOUT)):
            return {}
        try:
            about = json_files.read(self._path(ABOUT), _About, "made anew")
        except InputError as error:
            print(f"warning: {error}", flush=True)
            return {}
        same = (about.step, about.content_hash) == (self._step, self._content_hash)
        return about.arrays if same else {}

    def _open(self, name: str) -> Vectors | None:
        """An array that `about.json` lists, verified; None if it lists none.

        Raises:
          _Damaged: If the file does not match.
        """
        array = self._listed().get(name)
        if array is None:
            return None
        path = self._path(f"{name}.npy")
        try:
            status = os.stat(path)
            values = npy_files.open_mapped(path, "made anew")
        except FileNotFoundError:
            raise _Damaged("missing") from None
        except InputError as error:
            reason = str(error).removeprefix(f"{path}: ").removesuffix("; made anew")
            raise _Damaged(reason) from None
        found, expected = (values.dtype.str, values.shape), (array.dtype, array.shape)
        if found != expected or found[0] != _DTYPE.str:
            raise _Damaged(f"found {found}, expected {(_DTYPE.str, array.shape)}; see {ABOUT}")
        fault = _fault(path, status.st_ino, status.st_mtime_ns, array.sha256)
        if fault:
            raise _Damaged(fault)
        return values

    def _write(self, name: str, values: Vectors) -> None:
        """Writes an array while the lock is held.

        `about.json` never lists an array while its file is replaced: if the process is killed,
        the array is made anew.
        """
        arrays = self._listed()
        arrays.pop(name, None)
        self._write_about(arrays)
        for file in os.listdir(self._directory):
            # Of another step, or left by a process that was killed.
            stem, extension = os.path.splitext(file)
            if ".tmp-" in extension or (extension == ".npy" and stem not in arrays):
                os.remove(self._path(file))
        digest = hashlib.sha256()
        with atomic.file(self._path(f"{name}.npy")) as temporary, open(temporary, "wb") as file:
            header = {"descr": _DTYPE.str, "fortran_order": False, "shape": values.shape}
            np.lib.format.write_array_header_1_0(file, header)
            for block in _blocks(values):
                data = memoryview(block).cast("B") if block.size else b""
                file.write(data)
                digest.update(data)
        arrays[name] = _Array(_DTYPE.str, values.shape, digest.hexdigest())
        self._write_about(arrays)

    def _write_about(self, arrays: dict[str, _Array]) -> None:
        about = _About(self._step, self._content_hash, arrays)
        json_files.write(self._path(ABOUT), msgspec.to_builtins(about))


class _Damaged(Exception):
    """An array that does not match `about.json`; the message says how."""


def _blocks(values: Vectors) -> Iterator[Vectors]:
    """Consecutive rows of about 16 MiB, which bound the memory of what is done with them."""
    rows = max(1, _BLOCK_BYTES // max(1, values[:1].nbytes))
    return (values[start : start + rows] for start in range(0, len(values), rows))


@functools.lru_cache(maxsize=64)
def _fault(path: str, inode: int, modified_ns: int, sha256: str) -> str | None:
    """What is wrong with the values of a file, in words; None: nothing.

    The result is remembered, so that a process verifies an array once.

    Args:
      path: The file.
      inode, modified_ns: They tell a file from one that replaced it.
      sha256: Expected checksum of the values.
    """
    digest = hashlib.sha256()
    finite = True
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            whole = len(block) - len(block) % _DTYPE.itemsize
            finite = finite and bool(np.isfinite(np.frombuffer(block[:whole], _DTYPE)).all())
    if digest.hexdigest() != sha256:
        return "wrong checksum"
    return None if finite else "some values are not finite"
