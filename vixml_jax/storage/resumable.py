"""Files of lines that are written in parts, by a process each, and go on where one was killed.

Part 2 of 4 of `out.jsonl` is `out-00002-of-00004.jsonl`. While it is written it is called
`<part>.unfinished`, and is locked by its writer (`flock`). `<part>.json` says what it holds: a
later writer goes on only with what it would write itself. When the last part is finished,
`out.manifest.json` lists all of them.
"""

import contextlib
import fcntl
import hashlib
import itertools
import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import msgspec

from vixml_jax.errors import InputError
from vixml_jax.storage import json_files, regular_files

_UNFINISHED, _ABOUT, _MANIFEST = ".unfinished", ".json", ".manifest.json"
_BLOCK = 1 << 20


class About(msgspec.Struct, kw_only=True):
    """What a part holds.

    Attributes:
      of: Digest of all that its lines depend on.
      lines: Number of lines; None: it is not finished.
      sha256: Of its content; empty: it is not finished.
    """

    of: str
    lines: int | None = None
    sha256: str = ""


class Place(NamedTuple):
    """Where a part belongs.

    Attributes:
      path: Of all parts together.
      index: Of the part, from 0.
      count: Number of parts.
    """

    path: str
    index: int = 0
    count: int = 1

    @property
    def part(self) -> str:
        """Path of the part; that of the whole if there is one part only."""
        if self.count == 1:
            return self.path
        root, extension = os.path.splitext(self.path)
        return f"{root}-{self.index:05d}-of-{self.count:05d}{extension}"

    @property
    def unfinished(self) -> str:
        """Path of the part while it is written."""
        return self.part + _UNFINISHED


def check_index(index: int, count: int) -> None:
    """Checks `--process_index`.

    Raises:
      InputError: If it is not below `--num_processes`.
    """
    if index >= count:
        raise InputError(
            f"--process_index={index}: expected 0 to {count - 1}, because of "
            f"--num_processes={count}"
        )


class Unfinished(NamedTuple):
    """A part that is being written.

    Attributes:
      file: To write lines to.
      path: Of the file.
      num_kept: Number of lines that an earlier process has written, all of them complete.
    """

    file: BinaryIO
    path: str
    num_kept: int

    def kept(self) -> Iterator[bytes]:
        """Yields the lines that an earlier process has written, one by one."""
        with open(self.path, "rb") as file:
            yield from itertools.islice(file, self.num_kept)


def finished(place: Place, of: str) -> About | None:
    """What a part holds that is finished; None: it is not, or is of something else.

    Args:
      place: Of the part.
      of: Digest of all that its lines depend on.
    """
    about = _read_about(place)
    if about is None or about.of != of or about.lines is None or not os.path.isfile(place.part):
        return None
    with regular_files.open_binary(place.part) as file:
        return about if _digest_and_lines(file) == (about.sha256, about.lines) else None


def _digest_and_lines(file: BinaryIO) -> tuple[str, int]:
    digest, lines = hashlib.sha256(), 0
    while block := file.read(_BLOCK):
        digest.update(block)
        lines += block.count(b"\n")
    return digest.hexdigest(), lines


@contextlib.contextmanager
def writing(place: Place, of: str) -> Iterator[Unfinished]:
    """Yields a part to go on with; it gets its name at the end of the context.

    If the context is left by an exception, what is written stays to be gone on with.

    Args:
      place: Of the part.
      of: Digest of all that its lines depend on.

    Raises:
      InputError: If another process writes the same part.
    """
    path = place.unfinished
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{path}: another process writes it; give each process a --process_index of its own"
            ) from None
        if not (os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path))):
            raise InputError(f"{place.part}: another process has just finished it; start again")
        about = _read_about(place)
        if about is None or about.of != of:
            with contextlib.suppress(FileNotFoundError):
                os.remove(_manifest(place))  # Its parts are no longer of one kind.
            file.truncate(0)  # Before it is said to be of something else.
            json_files.write(place.part + _ABOUT, msgspec.to_builtins(About(of=of)))
        num_kept = _keep_complete_lines(file)
        yield Unfinished(file, path, num_kept)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        sha256, lines = _digest_and_lines(file)
        done = About(of=of, lines=lines, sha256=sha256)
        # In this order: killed in between, the next writer finds all lines and ends at once.
        json_files.write(place.part + _ABOUT, msgspec.to_builtins(done))
        os.replace(path, place.part)
    _write_manifest(place, of)


def _keep_complete_lines(file: BinaryIO) -> int:
    """Cuts a file after its last line break, where it is left; returns the number of lines."""
    lines = size = end = 0
    while block := file.read(_BLOCK):
        if b"\n" in block:
            lines += block.count(b"\n")
            end = size + block.rindex(b"\n") + 1
        size += len(block)
    file.truncate(end)
    file.seek(end)
    return lines


def _read_about(place: Place) -> About | None:
    path = place.part + _ABOUT
    if not os.path.lexists(path):
        return None
    return json_files.read(path, About, f"remove {path}; the part is then written anew")


def of_something_else(place: Place, of: str) -> list[str]:
    """Paths of the parts that are finished or begun, and depend on something else.

    Args:
      place: Of any of the parts.
      of: Digest of all that their lines should depend on.
    """
    abouts = {one.part: _read_about(one) for one in _all(place)}
    return [part for part, about in abouts.items() if about is not None and about.of != of]


def _all(place: Place) -> list[Place]:
    return [place._replace(index=index) for index in range(place.count)]


def _manifest(place: Place) -> str:
    return os.path.splitext(place.path)[0] + _MANIFEST


def _write_manifest(place: Place, of: str) -> None:
    """Writes the list of all parts, once all are finished."""
    places = _all(place)
    if place.count == 1 or not all(os.path.isfile(one.part) for one in places):
        return
    parts = [finished(one, of) for one in places]
    if all(parts):
        listed = [
            {"file": os.path.basename(one.part), "lines": part.lines, "sha256": part.sha256}
            for one, part in zip(places, parts, strict=True)
        ]
        total = sum(part.lines for part in parts)
        json_files.write(_manifest(place), {"of": of, "lines": total, "parts": listed})


def digest_of(*values: object, files: tuple[str, ...] = ()) -> str:
    """A digest of values, of JSON types, and of the contents of files."""
    found = hashlib.sha256(msgspec.json.encode(values))
    for path in files:
        with regular_files.open_binary(path) as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()
