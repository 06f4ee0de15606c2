"""Opens files that are to be regular ones: never a pipe, a socket or a device, which could hang."""

import contextlib
import errno
import functools
import os
import stat
from typing import BinaryIO

from vixml_jax.errors import InputError

_TOO_MANY = (errno.EMFILE, errno.ENFILE)


def too_many(path: str) -> str:
    """What to say of a file that is not opened because the process has too many of them open."""
    return f"{path}: too many files are open; allow more of them: ulimit -n 4096"


def open_binary(path: str | os.PathLike, *, max_bytes: int | None = None) -> BinaryIO:
    """A regular file, open for reading.

    Args:
      path: Of the file; symbolic links are followed.
      max_bytes: Largest size; None: any.

    Raises:
      InputError: If there is no such file, it is not a regular one, or it is larger.
    """
    path = os.fspath(path)
    try:
        # Without O_NONBLOCK, a pipe that nobody writes to is waited for.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _TOO_MANY:
            raise InputError(too_many(path)) from None
        raise InputError(f"{path}: {error.strerror or error}; expected a regular file") from None
    except ValueError as error:
        raise InputError(f"{path!r}: {error}; expected the path of a regular file") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: not a regular file; expected one")
        if status.st_dev in _kernel_devices():
            raise InputError(f"{path}: a file of the kernel; expected a regular file on a disk")
        if max_bytes is not None and status.st_size > max_bytes:
            raise InputError(f"{path}: {status.st_size:,} bytes, expected at most {max_bytes:,}")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


@functools.cache
def _kernel_devices() -> frozenset[int]:
    """File systems whose files look regular, but have no size and may never end."""
    found = set()
    for path in ("/proc", "/sys"):
        with contextlib.suppress(OSError):
            found.add(os.stat(path).st_dev)
    return frozenset(found - {os.stat("/").st_dev})


def check(path: str | os.PathLike, *, max_bytes: int | None = None) -> None:
    """Checks that `open_binary` opens a file; see there."""
    open_binary(path, max_bytes=max_bytes).close()
