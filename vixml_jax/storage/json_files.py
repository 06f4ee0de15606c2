"""JSON files: read against a schema, so that damage is reported, and written atomically."""

import json
import os
from typing import Any, TypeVar

import msgspec
from etils import epath

from vixml_jax.errors import InputError
from vixml_jax.storage import atomic, object_store, regular_files

T = TypeVar("T")
MAX_BYTES = 1 << 26  # The values of a file take about ten times its size in memory.


def read(path: str | os.PathLike, schema: type[T], remedy: str, *, max_bytes: int = MAX_BYTES) -> T:
    """The contents of a JSON file as an instance of `schema`.

    Args:
      path: A local path, or one in an object store.
      schema: A `msgspec.Struct`, dataclass, TypedDict or NamedTuple, with types of all fields.
        `msgspec.Meta` gives their ranges.
      remedy: What the user can do about a damaged file, for the message.
      max_bytes: Largest size of a local file.

    Raises:
      InputError: If the file is missing, not a regular file or too large, is not JSON, or does not
        fit the schema.
    """
    return decode(read_bytes(path, remedy, max_bytes=max_bytes), schema, path, remedy)


def is_there(path: str | os.PathLike) -> bool:
    """Whether there is something to be read, or a broken link, which `read` then refuses."""
    return os.path.lexists(path) if object_store.is_local(path) else epath.Path(path).exists()


def read_bytes(path: str | os.PathLike, remedy: str, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a file; see `read`."""
    try:
        if not object_store.is_local(path):
            return epath.Path(path).read_bytes()
        with regular_files.open_binary(path, max_bytes=max_bytes) as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{os.fspath(path)}: {error}; {remedy}") from None
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from None


def decode(content: bytes, schema: type[T], path: str | os.PathLike, remedy: str) -> T:
    """The content of a JSON file as an instance of `schema`; see `read`."""
    try:
        return msgspec.json.decode(content, type=schema)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())  # It may quote a text of the file.
        if not isinstance(error, msgspec.ValidationError):
            reason = f"not JSON: {reason}"
        raise InputError(f"{os.fspath(path)}: {reason}; {remedy}") from None


def write(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file atomically; missing parent directories are made.

    Raises:
      ValueError: If a number is not finite, which JSON cannot represent.
      TypeError: If a value has no JSON type. In both cases an existing file is left unchanged.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    atomic.write_text(path, text + "\n")
