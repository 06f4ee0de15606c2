"""JSON files that hold their own checksum, so that a damaged value is found where it fits, too.

The checksum finds damage and accidents. It does not stop someone who can write the file, and so can
compute it again. Files of earlier versions have none and are read as they are.
"""

import hashlib
import json
import os
from typing import Any, TypeVar

import msgspec

from vixml_jax.errors import InputError
from vixml_jax.storage import json_files

T = TypeVar("T")
FIELD = "check"  # At the top level of a file: SHA-256 of all other fields.


def stamped(value: dict[str, Any]) -> dict[str, Any]:
    """The fields of a file with their checksum."""
    fields = {name: value[name] for name in value if name != FIELD}
    return {**fields, FIELD: _check(fields)}


def opened(value: dict[str, Any], path: str | os.PathLike, remedy: str) -> dict[str, Any]:
    """The fields of a file without their checksum, after comparing it.

    Args:
      value: Contents of the file.
      path: Of the file, for the message.
      remedy: What the user can do about a damaged file, for the message.

    Raises:
      InputError: If the file holds a checksum of other fields.
    """
    fields = {name: value[name] for name in value if name != FIELD}
    if FIELD in value and value[FIELD] != _check(fields):
        raise InputError(
            f"{os.fspath(path)}: damaged (its fields do not match their checksum, {FIELD!r}); "
            f"{remedy}"
        )
    return fields


def write(path: str | os.PathLike, value: dict[str, Any]) -> None:
    """Writes a JSON file with its checksum, as `json_files.write` does."""
    json_files.write(path, stamped(value))


def read(path: str | os.PathLike, schema: type[T], remedy: str) -> T:
    """The contents of a JSON file as an instance of `schema`, like `json_files.read`.

    Raises:
      InputError: Also if the file holds a checksum of other fields.
    """
    fields = opened(json_files.read(path, dict[str, Any], remedy), path, remedy)
    try:
        return msgspec.convert(fields, schema)
    except (msgspec.ValidationError, RecursionError) as error:
        raise InputError(f"{os.fspath(path)}: {error}; {remedy}") from None


def _check(fields: dict[str, Any]) -> str:
    """Of the values, however they are laid out in the file."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
