"""Batches of the rows of an arrow file: of a stream, as `datasets` writes, or a file, as feather.

Buffers that are compressed say how large they are before they are decompressed; these sizes are
checked. Others are mapped, and take no memory.
"""

import mmap
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from vixml_jax.errors import InputError
from vixml_jax.storage import expansion, regular_files

_MAX_BATCH = 1 << 26  # Bytes of a batch that may be compressed by any factor.
_MAGIC = b"ARROW1"
_CONTINUATION = 0xFFFFFFFF
_DICTIONARY, _BATCH = 2, 3  # Kinds of messages.
_REMEDY = "write it again, in smaller batches or without compression"


def batches(path: str, names: Sequence[str], file: Any) -> Iterator[Any]:
    """The record batches of a file, with only some of its columns.

    Args:
      path: Path of the file.
      names: The columns.
      file: The file, mapped by pyarrow.

    Raises:
      InputError: If a batch expands beyond measure.
    """
    import pyarrow

    _check_messages(path)
    reader, is_stream = open_reader(file)
    fields = [index for index, name in enumerate(reader.schema.names) if name in names]
    # An empty list would mean all of them.
    options = pyarrow.ipc.IpcReadOptions(included_fields=fields or [0], use_threads=False)
    file.seek(0)
    if is_stream:
        yield from pyarrow.ipc.open_stream(file, options=options)
        return
    reader = pyarrow.ipc.open_file(file, options=options)
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def open_reader(file: Any) -> tuple[Any, bool]:
    """A reader of a mapped file, and whether it is a stream."""
    import pyarrow

    file.seek(0)
    try:
        return pyarrow.ipc.open_stream(file), True
    except pyarrow.ArrowInvalid:
        file.seek(0)
        return pyarrow.ipc.open_file(file), False


class _Message(NamedTuple):
    """Where a message is: its metadata, a flatbuffer, and its body."""

    at: int
    length: int
    body: int


def _check_messages(path: str) -> None:
    """Checks the sizes of all batches and dictionaries of a file."""
    with (
        regular_files.open_binary(path) as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        try:
            is_file = data[:6] == _MAGIC and data[-6:] == _MAGIC
            for message in _in_file(data) if is_file else _in_stream(data):
                stored, expanded = _sizes(data, message)
                if expanded > max(_MAX_BATCH, expansion.MAX_RATIO * stored):
                    raise InputError(
                        f"{path}: a batch of {stored:,} bytes expands to {expanded:,}; expected at "
                        f"most {expansion.MAX_RATIO} times its size, since more is a damaged or a "
                        f"hostile file; {_REMEDY}"
                    )
        except (struct.error, IndexError, OverflowError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{path}: not a complete arrow file (a message is damaged: {error})"
            ) from None


def _in_stream(data: mmap.mmap) -> Iterator[_Message]:
    """The messages of a stream."""
    at = 0
    while at + 4 <= len(data):
        message = _message_at(data, at)
        if message is None:
            return
        yield message
        (body,) = _Table.root(data, message.at).scalar(3, "<q", 0)
        if body < 0:
            raise ValueError("a size is negative")
        at = message.body + body


def _in_file(data: mmap.mmap) -> Iterator[_Message]:
    """The messages that the footer of a file lists."""
    (length,) = struct.unpack_from("<i", data, len(data) - 10)
    footer = _Table.root(data, len(data) - 10 - length)
    for field in (2, 3):
        for at in footer.structs(field, 24):
            (offset,) = struct.unpack_from("<q", data, at)
            message = _message_at(data, offset)
            if message is not None:
                yield message


def _message_at(data: mmap.mmap, at: int) -> _Message | None:
    """The message that begins at an offset; None at the end of a stream."""
    if at < 0:
        raise ValueError("an offset is negative")
    (length,) = struct.unpack_from("<I", data, at)
    prefix = 4
    if length == _CONTINUATION:  # Not in files of before version 0.15.
        (length,) = struct.unpack_from("<I", data, at + 4)
        prefix = 8
    return _Message(at + prefix, length, at + prefix + length) if length else None


def _sizes(data: mmap.mmap, message: _Message) -> tuple[int, int]:
    """Bytes of the buffers of a batch or dictionary in the file, and when they are decompressed."""
    table = _Table.root(data, message.at)
    (kind,) = table.scalar(1, "<B", 0)
    header = table.table(2)
    if kind == _DICTIONARY and header is not None:
        header = header.table(1)
    if kind not in (_DICTIONARY, _BATCH) or header is None or header.table(3) is None:
        return 0, 0
    stored = expanded = 0
    for at in header.structs(2, 16):
        offset, length = struct.unpack_from("<qq", data, at)
        if length >= 8:
            (size,) = struct.unpack_from("<q", data, message.body + offset)
            stored += length
            expanded += max(size, 0)  # -1: the buffer is not compressed.
    return stored, expanded


class _Table(NamedTuple):
    """A table of a flatbuffer: https://flatbuffers.dev/internals."""

    data: mmap.mmap
    at: int

    @classmethod
    def root(cls, data: mmap.mmap, at: int) -> "_Table":
        """The table that a flatbuffer at an offset holds."""
        return cls(data, at + struct.unpack_from("<I", data, at)[0])

    def _place(self, field: int) -> int | None:
        """Where the value of a field is; None: it has the default."""
        vtable = self.at - struct.unpack_from("<i", self.data, self.at)[0]
        if vtable < 0 or 4 + 2 * field >= struct.unpack_from("<H", self.data, vtable)[0]:
            return None
        (offset,) = struct.unpack_from("<H", self.data, vtable + 4 + 2 * field)
        return self.at + offset if offset else None

    def scalar(self, field: int, form: str, default: int) -> tuple[int]:
        """A number."""
        place = self._place(field)
        return (default,) if place is None else struct.unpack_from(form, self.data, place)

    def table(self, field: int) -> "_Table | None":
        """A table within this one."""
        place = self._place(field)
        return None if place is None else _Table.root(self.data, place)

    def structs(self, field: int, size: int) -> Iterator[int]:
        """Where the structs of a vector begin."""
        place = self._place(field)
        if place is not None:
            place += struct.unpack_from("<I", self.data, place)[0]
            (count,) = struct.unpack_from("<I", self.data, place)
            yield from range(place + 4, place + 4 + count * size, size)
