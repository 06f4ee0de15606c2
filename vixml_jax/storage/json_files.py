"""JSON files: read against a schema, so that damage is reported, and written atomically."""

import json
import os
from typing import Any, TypeVar

import msgspec
from etils import epath

from vixml_jax.errors import InputError
from vixml_jax.storage import atomic

T = TypeVar("T")


def read(path: str | os.PathLike, schema: type[T], remedy: str) -> T:
    """The contents of a JSON file as an instance of `schema`.

    Args:
      path: A local path, or one in an object store.
      schema: A `msgspec.Struct`, dataclass, TypedDict or NamedTuple, with types of all fields.
      remedy: What the user can do about a damaged file, for the message.

    Raises:
      InputError: If the file cannot be read, is not JSON, or does not fit the schema.
    """
    try:
        return msgspec.json.decode(epath.Path(path).read_bytes(), type=schema)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{os.fspath(path)}: {error}; {remedy}") from None


def write(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file atomically; missing parent directories are made.

    Raises:
      ValueError: If a number is not finite, which JSON cannot represent.
      TypeError: If a value has no JSON type. In both cases an existing file is left unchanged.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    atomic.write_text(path, text + "\n")
