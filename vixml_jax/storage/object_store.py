"""Directories in a store of objects, as gs://bucket/run: reached through etils' epath."""

import concurrent.futures
import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator

from absl import flags
from etils import epath

from vixml_jax.errors import InputError

CACHE = os.path.join("~", ".cache", "vixml_jax", "data")
_EVERY_S = 60.0  # Between copies of what a run appends to.
_CHUNK = 1 << 24
_THREADS = 16


def define_flag(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines `--data_cache`. It is no part of a run: each machine may have another."""
    flags.DEFINE_string(
        "data_cache",
        CACHE,
        "Directory of this machine where prepared data of a --data=gs://... are copied to, once.",
        flag_values=values,
    )


def is_local(path: str | os.PathLike) -> bool:
    """Whether a path is on a file system, not in a store of objects."""
    return "://" not in os.fspath(path)


def absolute(path: str) -> str:
    """The path from the root; that of a store is one."""
    return os.path.abspath(path) if is_local(path) else path


def check(path: str, flag: str) -> None:
    """Refuses a store that cannot be reached, before any work.

    Raises:
      InputError: If what reads it is not installed, or it denies access.
    """
    if is_local(path):
        return
    try:
        # Objects are written by tensorstore too: a listing that is kept would not know of them.
        import fsspec

        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
        epath.Path(path).exists()
    except ImportError as error:
        raise InputError(
            f"--{flag}={path}: {error}; install what reads it: pip install 'vixml_jax[gcs]'"
        ) from None
    except Exception as error:  # Each store has errors of its own.
        raise InputError(
            f"--{flag}={path}: cannot be reached ({error}); to sign in to Google Cloud: gcloud "
            "auth application-default login"
        ) from None


def copied(path: str, name: str, cache: str) -> str:
    """A directory of a store as a local one, copied the first time that this machine asks for it.

    Processes of one machine that ask together wait for the one that copies; a copy that was cut off
    is begun again.

    Args:
      path: What to copy.
      name: Of the copy; says what is in it, as a digest does.
      cache: Where copies are kept.

    Returns:
      Where it lies.
    """
    from vixml_jax.data import progress

    cache = os.path.abspath(os.path.expanduser(cache))
    here = os.path.join(cache, name)
    os.makedirs(cache, exist_ok=True)
    with _alone(here + ".lock"):
        if os.path.isdir(here):
            return here
        files = {found.relative_to(path): found.stat().length for found in _files(path)}
        room = shutil.disk_usage(cache).free
        if sum(files.values()) > room:
            raise InputError(
                f"--data_cache={cache}: {path} takes {sum(files.values()):,} bytes, {room:,} are "
                "free; make room, or name another directory"
            )
        with (
            tempfile.TemporaryDirectory(dir=cache, prefix=f"{name}.tmp-") as scratch,
            progress.watch(f"bytes of {path}", sum(files.values())) as update,
            concurrent.futures.ThreadPoolExecutor(_THREADS) as pool,
        ):
            for size in pool.map(lambda file: _download(path, file, scratch), files):
                update(size)
            os.rename(scratch, here)
            os.makedirs(scratch)  # For the one who clears it away.
    return here


def _files(path: str) -> list[epath.Path]:
    found, folders = [], [epath.Path(path)]
    while folders:
        for one in folders.pop().iterdir():
            (folders if one.is_dir() else found).append(one)
    return found


def _download(path: str, file: os.PathLike, to: str) -> int:
    target = os.path.join(to, os.fspath(file))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with (epath.Path(path) / file).open("rb") as source, open(target, "wb") as copy:
        shutil.copyfileobj(source, copy, _CHUNK)
    return os.path.getsize(target)


@contextlib.contextmanager
def _alone(lock: str) -> Iterator[None]:
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _about(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


class Mirror:
    """A directory that files are appended to: a store has no such files, so they are written on
    this machine and copied there, in the background once a minute, and when all is done.

    A local directory is its own mirror: nothing is copied.

    Attributes:
      here: Where to write.

    Args:
      directory: Where the files belong.
      names: Of those that exist and are appended to.
    """

    def __init__(self, directory: str, names: list[str]):
        self._there = None if is_local(directory) else epath.Path(directory)
        self.here, self._copied_at = directory, time.monotonic()
        if self._there is None:
            return
        self._scratch = tempfile.TemporaryDirectory(prefix="vixml_jax-")
        self.here = self._scratch.name
        self._known: dict[str, tuple[int, int]] = {}  # Size and time of what is there.
        for name in names:
            if (self._there / name).exists():
                _download(os.fspath(self._there), name, self.here)
                self._known[name] = _about(os.path.join(self.here, name))
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._under_way: concurrent.futures.Future | None = None

    def copy(self) -> None:
        """Has what changed copied, if it is time to; returns at once."""
        if self._there is None or time.monotonic() - self._copied_at < _EVERY_S:
            return
        if self._under_way:
            if not self._under_way.done():
                return
            self._under_way.result()
        self._copied_at = time.monotonic()
        self._under_way = self._pool.submit(self._copy)

    def close(self) -> None:
        """Copies the rest; what was written here is gone then."""
        if self._there is None:
            return
        self._pool.shutdown()
        self._copy()
        self._scratch.cleanup()

    def _copy(self) -> None:
        for folder, _, names in os.walk(self.here):
            for name in names:
                path = os.path.join(folder, name)
                file = os.path.relpath(path, self.here)
                seen = _about(path)
                if self._known.get(file) != seen:
                    to = self._there / file
                    to.parent.mkdir(parents=True, exist_ok=True)
                    with open(path, "rb") as source, to.open("wb") as copy:
                        shutil.copyfileobj(source, copy, _CHUNK)
                    self._known[file] = seen
