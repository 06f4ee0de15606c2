"""Directories in an object store, such as gs://bucket/run, accessed with etils' epath."""

import concurrent.futures
import glob
import math
import os
import shutil
import tempfile
import time

from absl import flags
from etils import epath

from vixml_jax.errors import InputError
from vixml_jax.runtime import progress
from vixml_jax.storage import locks

CACHE = os.path.join("~", ".cache", "vixml_jax", "data")
_EVERY_S = 60.0  # Time between two copies by a Mirror.
_CHUNK = 1 << 24
_THREADS = 16


def define_flag(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines `--data_cache`, which may differ between the machines of a run."""
    flags.DEFINE_string(
        "data_cache",
        CACHE,
        "Local directory for data that --data names elsewhere. Data of gs://... are copied "
        "there once; a source such as shop.csv is prepared there once.",
        flag_values=values,
    )


def is_local(path: str | os.PathLike) -> bool:
    """Whether a path is on a file system, not in an object store."""
    return "://" not in os.fspath(path)


def absolute(path: str) -> str:
    """The absolute path; paths in an object store are returned unchanged."""
    return os.path.abspath(path) if is_local(path) else path


def check(path: str, flag: str) -> None:
    """Checks that the object store of a path can be accessed; does nothing for local paths.

    Args:
      path: Path given by the user.
      flag: Name of its flag, for the error message.

    Raises:
      InputError: If the client library is not installed, or access is denied.
    """
    if is_local(path):
        return
    try:
        # tensorstore writes objects as well, which a cached listing of gcsfs would not contain.
        import fsspec

        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        epath.Path(path).exists()
    except ImportError as error:
        raise InputError(
            f"--{flag}={path}: {error}; install support for it: pip install 'vixml_jax[gcs]'"
        ) from None
    except Exception as error:  # Each object store raises its own types.
        raise InputError(
            f"--{flag}={path}: cannot be accessed ({error}); to sign in to Google Cloud, run: "
            "gcloud auth application-default login"
        ) from None


def local_copy(path: str, name: str, cache: str) -> str:
    """Path of a local copy of a directory in an object store, made on the first call.

    Other processes of this machine wait for the one that copies. A copy that was interrupted is
    started again.

    Args:
      path: Directory in the object store.
      name: Name of the copy, which must identify its content.
      cache: Local directory that holds the copies.

    Raises:
      InputError: If the disk lacks the space for the copy.
    """
    cache = os.path.abspath(os.path.expanduser(cache))
    copy = os.path.join(cache, name)
    os.makedirs(cache, exist_ok=True)
    with locks.exclusive(cache, doing=f"copying {path}", wait_s=math.inf, name=name + ".lock"):
        if os.path.isdir(copy):
            return copy
        for left in glob.glob(glob.escape(copy) + ".tmp-*"):  # By a process that was killed.
            shutil.rmtree(left, ignore_errors=True)
        files = {file.relative_to(path): file.stat().length for file in _files(path)}
        total, free = sum(files.values()), shutil.disk_usage(cache).free
        if total > free:
            raise InputError(
                f"--data_cache={cache}: {path} takes {total:,} bytes, but only {free:,} are free; "
                "free disk space, or choose another directory"
            )
        with (
            tempfile.TemporaryDirectory(dir=cache, prefix=f"{name}.tmp-") as scratch,
            progress.track(f"bytes of {path}", total) as update,
            concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
        ):
            for size in pool.map(lambda file: _download(path, file, scratch), files):
                update(size)
            os.rename(scratch, copy)
            os.makedirs(scratch)  # TemporaryDirectory expects it to exist.
    return copy


def _files(path: str) -> list[epath.Path]:
    files, folders = [], [epath.Path(path)]
    while folders:
        for entry in folders.pop().iterdir():
            (folders if entry.is_dir() else files).append(entry)
    return files


def _download(path: str, file: os.PathLike, to: str) -> int:
    """Copies one file of a directory; returns its size in bytes."""
    target = os.path.join(to, os.fspath(file))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with (epath.Path(path) / file).open("rb") as source, open(target, "wb") as copy:
        shutil.copyfileobj(source, copy, _CHUNK)
    return os.path.getsize(target)


def _version(path: str) -> tuple[int, int]:
    """Size and modification time, by which a changed file is recognised."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


class Mirror:
    """A local directory whose files are copied to an object store.

    Object stores cannot append to a file. A run therefore appends to files in a local directory,
    which are copied in the background once a minute, and at the end. If the target is a local
    directory, it is used directly and nothing is copied.

    Attributes:
      local: The local directory to write to.

    Args:
      directory: The target directory.
      names: Names of existing files that will be appended to.
    """

    def __init__(self, directory: str, names: list[str]):
        self._target = None if is_local(directory) else epath.Path(directory)
        self.local, self._copied_at = directory, time.monotonic()
        if self._target is None:
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="vixml_jax-")
        self.local = self._scratch.name
        self._copied: dict[str, tuple[int, int]] = {}  # Version of each file in the target.
        for name in names:
            if (self._target / name).exists():
                _download(os.fspath(self._target), name, self.local)
                self._copied[name] = _version(os.path.join(self.local, name))
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._pending: concurrent.futures.Future | None = None

    def copy(self) -> None:
        """Starts copying changed files in the background, at most once a minute."""
        if self._target is None or time.monotonic() - self._copied_at < _EVERY_S:
            return
        if self._pending:
            if not self._pending.done():
                return
            self._pending.result()
        self._copied_at = time.monotonic()
        self._pending = self._pool.submit(self._copy)

    def close(self) -> None:
        """Copies the remaining changes and removes the local directory."""
        if self._target is None:
            return
        self._pool.shutdown()
        self._copy()
        self._scratch.cleanup()

    def _copy(self) -> None:
        for folder, _, names in os.walk(self.local):
            for name in names:
                path = os.path.join(folder, name)
                file = os.path.relpath(path, self.local)
                version = _version(path)
                if self._copied.get(file) != version:
                    target = self._target / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with open(path, "rb") as source, target.open("wb") as copy:
                        shutil.copyfileobj(source, copy, _CHUNK)
                    self._copied[file] = version
