"""Atomic writes: files and directories that appear only once they are complete.

What is being written has a random name beside the final one, `<name>.tmp-<random>`, and is locked
by its writer (`flock`), so the next writer recognises and removes what a killed one has left. On a
file system whose locks do not reach other machines, it may remove what another machine is writing;
that write then fails, and the final name still holds one complete version.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator

from etils import epath

from vixml_jax.storage import object_store

_WRITTEN, _REPLACED = ".tmp-", ".old-"  # Before the random part of a name.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # https://man7.org/linux/man-pages/man2/rename.2.html


@contextlib.contextmanager
def directory(path: str | os.PathLike) -> Iterator[str]:
    """Yields an empty directory that becomes `path` at the end, replacing what was there.

    Its contents are on the disk before it appears.
    """
    path = os.path.abspath(path)
    with scratch(path) as temporary:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in (*names, "."):
                _sync(os.path.join(folder, name))
        _replace(temporary, path)
        _sync(os.path.dirname(path))


@contextlib.contextmanager
def scratch(path: str | os.PathLike) -> Iterator[str]:
    """Yields an empty directory beside `path`, for temporary files; it is removed at the end.

    If the process is killed, the next writer of `path` removes it.
    """
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    recover(path)
    with _naming(path):
        temporary, descriptor = _create(path, is_directory=True)
    try:
        with _naming(path, temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


@contextlib.contextmanager
def file(path: str | os.PathLike) -> Iterator[str]:
    """Yields the name of an empty file to write to, which becomes `path` at the end.

    Its contents are on the disk before it appears. Missing parent directories are created. A pipe
    or a device, such as /dev/null, is written to directly, because a file must not replace it.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        yield os.fspath(path)
        return
    path = os.path.realpath(path)  # A symbolic link stays, its target is replaced.
    os.makedirs(os.path.dirname(path), exist_ok=True)
    recover(path)
    with _naming(path):
        temporary, descriptor = _create(path, is_directory=False)
    try:
        with _naming(path, temporary):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(os.path.dirname(path))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        os.close(descriptor)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file atomically, on a disk or in an object store."""
    if not object_store.is_local(path):  # Object stores write objects atomically.
        epath.Path(path).write_bytes(data)
        return
    with file(path) as temporary, open(temporary, "wb") as out:
        out.write(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file atomically, on a disk or in an object store."""
    write_bytes(path, text.encode("utf-8"))


def recover(path: str | os.PathLike) -> None:
    """Removes what killed writers of `path` have left beside it.

    Where file systems cannot exchange two names, a writer may have been killed between two renames:
    the earlier version then gets its name back.
    """
    parent, base = os.path.split(os.path.abspath(path))
    for name in os.listdir(parent):
        kind = next((kind for kind in (_WRITTEN, _REPLACED) if name.startswith(base + kind)), None)
        if kind is None:
            continue
        left = os.path.join(parent, name)
        with _locked(left) as is_ours:
            if not is_ours:
                continue
            if kind == _REPLACED and not os.path.lexists(path):
                os.rename(left, path)
            elif os.path.isdir(left):
                shutil.rmtree(left, ignore_errors=True)
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(left)


@contextlib.contextmanager
def _naming(path: str, temporary: str | None = None) -> Iterator[None]:
    """Lets errors of the system name what is written, not its temporary name or nothing.

    Args:
      path: The final name.
      temporary: The temporary one; None: any below the same directory.
    """
    try:
        yield
    except OSError as error:
        name = error.filename
        if name is None and error.errno in _NO_SPACE:  # Of a write to an open file.
            error.filename = path
        elif isinstance(name, str) and name.startswith(temporary or path + _WRITTEN):
            error.filename = path + (name.removeprefix(temporary) if temporary else "")
        raise


def _create(path: str, *, is_directory: bool) -> tuple[str, int]:
    """Creates an empty file or directory beside `path`; returns its name and its lock."""
    while True:
        temporary = f"{path}{_WRITTEN}{secrets.token_hex(8)}"
        if is_directory:
            os.mkdir(temporary)
        else:
            os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:  # `recover` of another process has removed it.
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        except OSError:  # No locks here: then `recover` removes nothing either.
            pass
        if os.fstat(descriptor).st_nlink and os.path.lexists(temporary):
            return temporary, descriptor
        os.close(descriptor)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[bool]:
    """Yields whether nobody else holds the lock of a file or directory; it is held meanwhile."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # Held, or there are no locks here.
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _replace(temporary: str, path: str) -> None:
    """Gives a directory its final name; an existing one is at `temporary` then, or removed."""
    while True:
        if not os.path.lexists(path):
            try:
                os.rename(temporary, path)
                return
            except OSError as error:  # Another writer was faster.
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
        if _exchange(temporary, path):
            return
        if not os.path.lexists(path):  # Removed meanwhile.
            continue
        replaced = f"{path}{_REPLACED}{secrets.token_hex(8)}"
        with _locked(path):  # So that `recover` leaves it alone meanwhile.
            os.rename(path, replaced)
            try:
                os.rename(temporary, path)
            except OSError:
                os.rename(replaced, path)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        return


def _exchange(one: str, other: str) -> bool:
    """Exchanges two names in one step; returns whether that was possible."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # Not Linux.
        return False
    names = os.fsencode(one), os.fsencode(other)
    if not rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOENT):
        return False
    raise OSError(number, os.strerror(number), other)


def _sync(path: str) -> None:
    """Waits until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):  # Not of a disk.
            raise
    finally:
        os.close(descriptor)
