"""Directories that are read while others replace or delete them; uses the locks of the kernel."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from vixml_jax.errors import InputError

DELETED = ".deleted"  # Ending of the name of a directory that is being deleted.
_POLL_S = 0.01
T = TypeVar("T")


@contextlib.contextmanager
def reading(path: str) -> Iterator[bool]:
    """Yields whether a local directory exists; within the context `delete` leaves it alone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield False
        return
    try:
        with contextlib.suppress(OSError):  # A file system without locks.
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield _is_at(path, descriptor)
    finally:
        os.close(descriptor)


def delete(path: str, *, wait_s: float = 0.0, force: bool = False) -> bool:
    """Deletes a local directory, unless somebody reads it; readers never see a part of it.

    Args:
      path: The directory.
      wait_s: How long to wait for readers.
      force: Whether to delete it then all the same.

    Returns:
      Whether it is gone.
    """
    with _alone(path, wait_s) as is_alone:
        if not is_alone and not force:
            return False
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, path + DELETED)
        shutil.rmtree(path + DELETED, ignore_errors=True)
        return True


def move(path: str, target: str, *, wait_s: float) -> None:
    """Gives a local directory another name, once nobody reads it or after some seconds."""
    with _alone(path, wait_s):
        os.rename(path, target)


def one_version(path: str, read: Callable[[], T]) -> T:
    """Reads a directory that others may replace as a whole meanwhile (`atomic.directory`).

    Args:
      path: The directory.
      read: Reads it; called again if the directory has been replaced since it began.

    Raises:
      InputError, OSError: As raised by `read` on a directory that has not been replaced.
    """
    while True:
        before = _version(path)
        try:
            value = read()
        except (InputError, OSError):
            if _version(path) == before:
                raise
            continue
        if _version(path) == before:
            return value


def _version(path: str) -> tuple[int, int, int] | None:
    """What tells a directory from one that has its name at another time."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


@contextlib.contextmanager
def _alone(path: str, wait_s: float) -> Iterator[bool]:
    """Yields whether nobody reads a directory; new readers then find out that it has moved.

    Args:
      path: The directory.
      wait_s: How long to wait for readers.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    try:
        end = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(_POLL_S)
                    continue
                yield False
                return
            except OSError:  # A file system without locks.
                pass
            yield True
            return
    finally:
        os.close(descriptor)


def _is_at(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
