"""Files and directories that appear whole, or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator

from etils import epath

from vixml_jax.storage import object_store


@contextlib.contextmanager
def directory(path: str | os.PathLike) -> Iterator[str]:
    """Yields an empty directory that becomes `path`; what was there is removed only afterwards."""
    path = os.path.abspath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary, retired = (f"{path}.{word}-{os.getpid()}" for word in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)  # Of a process that was killed.
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
    """Yields a name to write to, which becomes `path`; makes the directories above.

    A pipe or a device, /dev/null say, is written to as it is: a file must not take its place.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        yield os.fspath(path)
        return
    path = os.path.realpath(path)  # Else a file would take the place of a link to it.
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a whole file, here or in a store of objects."""
    if not object_store.is_local(path):  # Objects appear when they are whole.
        epath.Path(path).write_bytes(data)
        return
    with file(path) as temporary, open(temporary, "wb") as out:
        out.write(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a whole file in UTF-8, here or in a store of objects."""
    write_bytes(path, text.encode("utf-8"))
