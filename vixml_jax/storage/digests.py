"""Checksums of checkpoints, written with them and verified before they are read.

Neither file systems nor array formats detect all damage: a crash of the machine can leave files
truncated or empty, and a disk can corrupt bytes. A checkpoint directory therefore holds a list of
its files with their sizes and checksums, written last, just before the directory gets its name.
"""

import concurrent.futures
import json
import os
import zlib
from typing import Annotated, Any, TypeVar

import msgspec
from etils import epath

from vixml_jax import errors
from vixml_jax.errors import InputError
from vixml_jax.storage import json_files, object_store, regular_files

NAME = "digests.json"
COMMITTED = "commit_success.txt"
REPLACED = ".replaced"  # Ending of a directory for checkpoints whose replacements are written.
# Orbax writes these files last, after the digests; reading a checkpoint needs neither.
_NOT_COVERED = ("_CHECKPOINT_METADATA", COMMITTED)
_CHUNK = 1 << 22
_SHOWN = 200  # Characters of names and messages that are shown.
T = TypeVar("T")
_TIMEOUT_S = 3600  # Time limit of one write on the slowest process.


class _Digests(msgspec.Struct):
    """Contents of the list: by relative path, the size and the CRC-32 of a file."""

    files: dict[str, tuple[Annotated[int, msgspec.Meta(ge=0)], str]]
    check: str


def write_digests(directory: str) -> None:
    """Writes the digests of all files of a directory, and flushes everything to the disk."""
    files = _files(directory)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        values = pool.map(lambda name: _digest(directory, name, flush=True), files)
        digests = dict(zip(files, values, strict=True))
    path = epath.Path(directory) / NAME
    path.write_text(json.dumps({"files": digests, "check": _check(digests)}, indent=0) + "\n")
    if object_store.is_local(directory):
        _flush(os.fspath(path))
        for folder in {os.path.dirname(name) for name in files} | {""}:
            _flush(os.path.join(directory, folder))


def damage(directory: str) -> str | None:
    """The first mismatch between a directory and its digests, in words; None if it is intact."""
    path = os.path.join(directory, NAME)
    if not json_files.is_there(path):
        return f"{NAME} is missing"
    try:
        digests = json_files.read(path, _Digests, "")
    except InputError:
        return f"{NAME} has unreadable content"
    if digests.check != _check(digests.files):
        return f"{NAME} has a wrong checksum"
    items = [(name, *digest) for name, digest in digests.files.items()]
    if not all(_is_within(name) for name, *_ in items):
        return f"{NAME} names files outside the checkpoint"

    def mismatch(item: tuple[str, int, str]) -> str | None:
        name, expected_size, expected_check = item
        shown = name[:_SHOWN]
        try:
            size, check = _digest(directory, name)
        except (OSError, ValueError):
            return f"{shown} is missing"
        if size != expected_size:
            return f"{shown} has {size} bytes, expected {expected_size}"
        return None if check == expected_check else f"{shown} has a wrong checksum"

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return next((text for text in pool.map(mismatch, items) if text), None)


def of_all(directory: str) -> str:
    """What tells the files of a directory from all others, by their digests."""
    return json_files.read(os.path.join(directory, NAME), _Digests, "").check


def steps(directory: str) -> list[int]:
    """Steps with complete checkpoints in a directory, ascending."""
    root = epath.Path(directory)
    if not root.is_dir():
        return []
    paths = [path for path in root.iterdir() if path.name.isdigit() and path.is_dir()]
    # On a disk a checkpoint is renamed once it is complete. Object stores cannot rename.
    complete = [
        path for path in paths if object_store.is_local(directory) or (path / COMMITTED).exists()
    ]
    return sorted(int(path.name) for path in complete)


def newest_intact(directory: str) -> tuple[int | None, dict[int, str]]:
    """The newest step whose checkpoint is intact, and what is wrong with later ones.

    Returns:
      The step, None if there is none, and a description of the damage by step.
    """
    damaged = {}
    for step in reversed(steps(directory)):
        mismatch = damage(os.path.join(directory, str(step)))
        if mismatch is None:
            return step, damaged
        damaged[step] = mismatch
    return None, damaged


def read(directory: str, **items: Any) -> dict[str, Any]:
    """The items of a checkpoint, by name.

    Args:
      directory: Directory of one step.
      items: Abstract arrays with shardings for each item, None for a JSON item. Where a stored
        array has fewer rows the rest is zero; additional rows are dropped.

    Raises:
      InputError: If Orbax cannot read it.
    """
    import orbax.checkpoint as ocp

    restores = {
        name: ocp.args.JsonRestore()
        if like is None
        else ocp.args.StandardRestore(like, strict=False)
        for name, like in items.items()
    }
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler(*restores)) as checkpointer:
            arguments = ocp.args.Composite(**restores)
            restored = checkpointer.restore(epath.Path(directory), args=arguments)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Orbax and TensorStore raise anything on metadata of another shape.
        if errors.disk_fault(error) is not None:
            raise
        reason = " ".join(str(error).split())[:_SHOWN]
        raise InputError(
            f"{directory}: cannot be read ({type(error).__name__}: {reason}); expected a "
            "checkpoint written by train: put it back from a copy of the run"
        ) from error
    return {name: restored[name] for name in restores}


def read_position(directory: str, kind: type[T]) -> T:
    """The position in a checkpoint.

    Args:
      directory: Directory of one step.
      kind: Its type; fields that the type does not have are ignored.

    Raises:
      InputError: If it is of another shape.
    """
    try:
        return msgspec.convert(read(directory, position=None)["position"], kind)
    except msgspec.ValidationError as error:
        path = os.path.join(directory, "position")
        raise InputError(f"{path}: {error}; expected a checkpoint written by train") from None


def async_options(directory: str) -> Any:
    """Orbax options that write digests with every checkpoint saved in a directory."""
    import orbax.checkpoint as ocp

    def write_new_digests() -> None:
        # Process 0 calls this once all processes have written their files, before the directory
        # gets its final name (on a disk) or the file that marks it as complete (object store).
        for path in epath.Path(directory).iterdir():
            if object_store.is_local(directory):
                is_new = ocp.utils.TMP_DIR_SUFFIX in path.name
            else:
                is_new = path.is_dir() and not (path / COMMITTED).exists()
            if is_new:
                write_digests(os.fspath(path))

    return ocp.AsyncOptions(timeout_secs=_TIMEOUT_S, post_finalization_callback=write_new_digests)


def _files(directory: str) -> list[str]:
    """Relative paths of all files covered by the digests, sorted."""
    names, folders = [], [""]
    while folders:
        folder = folders.pop()
        for path in (epath.Path(directory) / folder).iterdir():
            name = os.path.join(folder, path.name)
            if path.is_dir():
                folders.append(name)
            elif folder or name not in (NAME, *_NOT_COVERED):
                names.append(name)
    return sorted(names)


def _digest(directory: str, name: str, *, flush: bool = False) -> tuple[int, str]:
    """Size and CRC-32 of a file; no CRC in an object store, which verifies objects itself.

    Args:
      directory: Directory of the checkpoint.
      name: Path of the file within it.
      flush: Whether to flush the file to the disk.
    """
    path = epath.Path(directory) / name
    if not object_store.is_local(directory):
        return path.stat().length, ""
    check = 0
    with regular_files.open_binary(path) as file:
        while chunk := file.read(_CHUNK):
            check = zlib.crc32(chunk, check)
        size = file.tell()
    if flush:
        _flush(os.fspath(path))
    return size, f"{check:08x}"


def _is_within(name: str) -> bool:
    """Whether a relative path stays in its directory."""
    return not os.path.isabs(name) and ".." not in name.split("/") and "\0" not in name


def _check(files: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(files).encode()):08x}"


def _flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
