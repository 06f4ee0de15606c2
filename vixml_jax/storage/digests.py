"""Checkpoints on disk: sealed with the digests of their files, checked before they are read.

Neither a file system nor the formats of arrays notice every damage: a crash of the machine leaves
files cut or empty, a disk turns bytes. So a directory that is written once and read much later
carries a list of its files, their sizes and checksums, made as the last thing before it gets its
name.
"""

import concurrent.futures
import json
import os
import zlib
from typing import Any

import jax
from etils import epath

from vixml_jax.parallel import distributed
from vixml_jax.storage import object_store

NAME = "digests.json"
COMMITTED = "commit_success.txt"
# Orbax writes them when all else is done, the last of all; reading needs neither.
_UNSEALED = ("_CHECKPOINT_METADATA", COMMITTED)
_CHUNK = 1 << 22
_TIMEOUT_S = 3600  # Of one write, the slowest process's.


def seal(directory: str) -> None:
    """Writes the digests of all files of a directory, and has the disk keep them for good."""
    files = _files(directory)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        digests = pool.map(lambda name: _digest(directory, name, True), files)
        found = dict(zip(files, digests, strict=True))
    path = epath.Path(directory) / NAME
    path.write_text(json.dumps({"files": found, "check": _check(found)}, indent=0) + "\n")
    if object_store.is_local(directory):
        _keep(os.fspath(path))
        for folder in {os.path.dirname(name) for name in files} | {""}:
            _keep(os.path.join(directory, folder))


def damage(directory: str) -> str | None:
    """What is wrong with a sealed directory: the first file that is, and how; None: nothing."""
    try:
        told = json.loads((epath.Path(directory) / NAME).read_bytes())
        if told["check"] != _check(told["files"]):
            return f"{NAME} has other bytes than were written"
        items = [(name, *digest) for name, digest in told["files"].items()]
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (ValueError, TypeError, KeyError):
        return f"{NAME} has other bytes than were written"

    def wrong(item: tuple[str, int, str]) -> str | None:
        name, size, check = item
        try:
            found = _digest(directory, name, False)
        except (OSError, ValueError):
            return f"{name} is missing"
        if found[0] != size:
            return f"{name} has {found[0]} bytes, {size} were written"
        return None if found[1] == check else f"{name} has other bytes than were written"

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return next((said for said in pool.map(wrong, items) if said), None)


def steps(directory: str) -> list[int]:
    """The steps whose checkpoints are complete in a directory, ascending."""
    root = epath.Path(directory)
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if path.name.isdigit() and path.is_dir()]
    # In a store of objects nothing is renamed: what is there may be under way.
    done = [
        path for path in found if object_store.is_local(directory) or (path / COMMITTED).exists()
    ]
    return sorted(int(path.name) for path in done)


def newest_whole(directory: str) -> tuple[int | None, dict[int, str]]:
    """The newest step that is as it was written, and what is wrong with those after it.

    Of several processes the first one looks; the others learn the step alone.
    """
    step, damaged = -1, {}
    if jax.process_index() == 0:
        for candidate in reversed(steps(directory)):
            said = damage(os.path.join(directory, str(candidate)))
            if said is None:
                step = candidate
                break
            damaged[candidate] = said
    step = distributed.first_says(step)
    return (None if step < 0 else step), damaged


def read(directory: str, **items: Any) -> dict[str, Any]:
    """Items of a checkpoint.

    Args:
      directory: Of one step.
      items: Abstract arrays with shardings, by the item's name; rows that are not there are zero,
        those beyond are left out. None: an item of JSON.
    """
    import orbax.checkpoint as ocp

    wanted = {
        name: ocp.args.JsonRestore()
        if like is None
        else ocp.args.StandardRestore(like, strict=False)
        for name, like in items.items()
    }
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(*wanted)) as checkpointer:
        found = checkpointer.restore(epath.Path(directory), args=ocp.args.Composite(**wanted))
    return {name: found[name] for name in wanted}


def writer(directory: str) -> Any:
    """Options for Orbax under which all that is saved in a directory is sealed."""
    import orbax.checkpoint as ocp

    def seal_it() -> None:
        # Process 0 comes here when the files of all are written, before the directory gets its
        # name (on a disk) or the file that says that it is complete (in a store of objects).
        for path in epath.Path(directory).iterdir():
            if object_store.is_local(directory):
                is_new = ocp.utils.TMP_DIR_SUFFIX in path.name
            else:
                is_new = path.is_dir() and not (path / COMMITTED).exists()
            if is_new:
                seal(os.fspath(path))

    return ocp.AsyncOptions(timeout_secs=_TIMEOUT_S, post_finalization_callback=seal_it)


def _files(directory: str) -> list[str]:
    """All files below, but the digests themselves; paths relative to the directory, sorted."""
    found, folders = [], [""]
    while folders:
        folder = folders.pop()
        for path in (epath.Path(directory) / folder).iterdir():
            name = os.path.join(folder, path.name)
            if path.is_dir():
                folders.append(name)
            elif folder or name not in (NAME, *_UNSEALED):
                found.append(name)
    return sorted(found)


def _digest(directory: str, name: str, keep: bool) -> tuple[int, str]:
    """Size and checksum of a file; of one that lies in a store of objects, which checks each
    object itself, the size alone.

    Args:
      directory: Where it lies,
      name: under this name.
      keep: Whether the disk shall have it for good before this returns.
    """
    path = epath.Path(directory) / name
    if not object_store.is_local(directory):
        return path.stat().length, ""
    check = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            check = zlib.crc32(chunk, check)
        size = file.tell()
    if keep:
        _keep(os.fspath(path))
    return size, f"{check:08x}"


def _check(files: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(files).encode()):08x}"


def _keep(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
