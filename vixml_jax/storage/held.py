"""Directories that are not deleted while somebody reads them, by the locks of the kernel."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator

DELETED = ".deleted"  # Ending of the name of a directory that is being deleted.
_POLL_S = 0.01


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
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        end = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= end:
                    if force:
                        break
                    return False
                time.sleep(_POLL_S)
                continue
            except OSError:  # A file system without locks.
                pass
            break
        os.rename(path, path + DELETED)
        shutil.rmtree(path + DELETED, ignore_errors=True)
        return True
    finally:
        os.close(descriptor)


def _is_at(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
