"""Locks, so that one process at a time writes to a run, a data set or a cache."""

import contextlib
import fcntl
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator

from vixml_jax.errors import InputError

NAME = ".lock"
_POLL_S = 0.01


@contextlib.contextmanager
def exclusive(
    directory: str, *, doing: str, wait_s: float = 0.0, name: str = NAME
) -> Iterator[None]:
    """Holds a lock; the kernel gives it back when the process dies, however it dies.

    It excludes other threads and processes of this machine, and those of other machines where a
    shared file system passes `flock` on, as NFS does.

    Args:
      directory: Where the file of the lock is; must exist.
      doing: What is done meanwhile, for the message of others that find the lock held.
      wait_s: How long to wait for another holder.
      name: Of the file, which is removed at the end.

    Raises:
      InputError: If another process or thread holds the lock after this time, or the directory
        cannot be written to.
    """
    path = os.path.join(directory, name)
    end = time.monotonic() + wait_s
    while (descriptor := _acquire(path)) is None:
        if time.monotonic() >= end:
            raise InputError(
                f"{directory}: {_holder(path)}; wait until it has ended, or choose "
                "another directory"
            )
        time.sleep(_POLL_S)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "command": " ".join(sys.argv)[:1000],
            "doing": doing,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        try:
            with contextlib.suppress(OSError):  # A lock needs no space on the disk.
                file.truncate(0)
                file.write(json.dumps(holder).encode())
            yield
        finally:
            with contextlib.suppress(OSError):
                os.remove(path)


def _acquire(path: str) -> int | None:
    """Returns the descriptor of a lock that is held now; None if somebody else holds it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be created ({error.strerror}); expected a directory that can be "
            "written to, on a disk with space"
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path}: not a regular file; remove it")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(descriptor)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):  # Held, or just removed by the last holder.
        pass
    except OSError as error:
        os.close(descriptor)
        raise InputError(
            f"{path}: its file system has no locks ({error.strerror}); expected a local disk"
        ) from None
    os.close(descriptor)
    return None


def _holder(path: str) -> str:
    """Who holds a lock, in words."""
    try:
        with open(path, encoding="utf-8") as file:
            holder = json.loads(file.read(4096))
        return (
            f"in use by process {holder['pid']} on {holder['host']} since {holder['since']} "
            f"({holder['doing']})"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "in use by another process"
