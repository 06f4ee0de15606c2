"""Atomic writes: files and directories that appear only once they are complete."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from etils import epath

from vixml_jax.storage import object_store


@contextlib.contextmanager
def directory(path: str | os.PathLike) -> Iterator[str]:
    """Yields an empty directory that becomes `path` at the end, replacing what was there."""
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary, retired = (f"{path}.{suffix}-{os.getpid()}" for suffix in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)  # Left by a process that was killed.
    os.mkdir(temporary)
    try:
        yield temporary
        if not os.path.isdir(path):
            os.rename(temporary, path)
            return
        os.rename(path, retired)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(retired, path)
            raise
        shutil.rmtree(retired)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def file(path: str | os.PathLike) -> Iterator[str]:
    """Yields a file name to write to, which becomes `path` at the end.

    Missing parent directories are created. A pipe or a device, such as /dev/null, is written to
    directly, because a file must not replace it.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        yield os.fspath(path)
        return
    path = os.path.realpath(path)  # A symbolic link stays, its target is replaced.
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


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
