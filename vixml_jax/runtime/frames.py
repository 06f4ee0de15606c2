"""Messages between a process and the processes that it starts: MessagePack, nothing pickled."""

from typing import Any, BinaryIO

import msgspec

_LENGTH = 8  # Bytes of the number before each message, little endian.
_MAX_BYTES = 1 << 30


def write(file: BinaryIO, message: Any) -> None:
    """Writes a message of strings, bytes, numbers, lists and tuples, and flushes the file."""
    data = msgspec.msgpack.encode(message)
    file.write(len(data).to_bytes(_LENGTH, "little") + data)  # At once: the reader wakes once.
    file.flush()


def read(file: BinaryIO, kind: Any) -> Any:
    """The next message.

    Args:
      file: What the other process writes.
      kind: Type of the message, such as `list[str]`.

    Raises:
      EOFError: If the file ends, or has something else than such a message, such as what a library
        has printed.
    """
    length = int.from_bytes(_exactly(file, _LENGTH), "little")
    if length > _MAX_BYTES:
        raise EOFError(f"found a length of {length:,} bytes, expected at most {_MAX_BYTES:,}")
    try:
        return msgspec.msgpack.decode(_exactly(file, length), type=kind)
    except msgspec.DecodeError as error:
        raise EOFError(str(error)) from None


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise EOFError(f"found {len(data):,} bytes, expected {count:,}")
    return data
