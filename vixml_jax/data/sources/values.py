"""Conversion of table cells to text, lists, numbers, embeddings and times."""

import datetime
import json
from typing import Any

import numpy as np
from jaxtyping import Float16

from vixml_jax.data import filters
from vixml_jax.data.sources.raw import SPLITS
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.errors import InputError

LABELS = "labels"
# Words in the name of a file, of a directory of shards or in a split column that name a part.
PARTS = {
    "train": ("train", "training", "trn"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing", "tst"),
    LABELS: ("labels", "label", "lbl"),
}


def text(value: Any, chunk: Chunk, row: int, column: str) -> str:
    """A cell as text; numbers are formatted, and None is the empty text.

    Raises:
      InputError: If the cell is of another type, or cannot be encoded as UTF-8.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(
                f"{chunk.where(row)}: {column!r} contains a lone surrogate (half of a UTF-16 "
                "pair); expected valid Unicode text"
            ) from None
        return value
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value == value:
        return str(int(value)) if value.is_integer() else str(value)
    raise InputError(f"{chunk.where(row)}: {column!r} is {str(value)[:40]!r}, expected text")


def splits(chunk: Chunk, column: str) -> list[str]:
    """The split of each row, from its split column."""
    names = []
    for row, value in enumerate(chunk.columns[column]):
        word = str(value).strip().lower()
        split = next((name for name in SPLITS if word in PARTS[name]), None)
        if split is None:
            raise InputError(
                f"{chunk.where(row)}: {column!r} is {str(value)[:40]!r}, expected train, valid or "
                "test"
            )
        names.append(split)
    return names


def list_items(value: Any, separator: str, chunk: Chunk, row: int, column: str) -> list[Any]:
    """The items of a cell that is a list, a JSON list, or a string with separators."""
    if value is None:
        return []
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{chunk.where(row)}: {column!r} starts with '[' but is not a JSON list "
                    f"({error})"
                ) from None
        else:
            parts = value.split(separator) if separator else [value]
            return [part for part in map(str.strip, parts) if part]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]


def numbers(chunk: Chunk, row: int, column: str, separator: str) -> list[float]:
    """The weights of a cell, which are not negative and finite in float32."""
    weights = []
    for value in list_items(chunk.columns[column][row], separator, chunk, row, column):
        try:
            with np.errstate(over="ignore"):
                number = float(np.float32(float(value)))
        except (TypeError, ValueError, OverflowError):
            number = -1.0
        if not 0.0 <= number < float("inf"):
            raise InputError(
                f"{chunk.where(row)}: {str(value)[:40]!r} in {column!r}, expected a number of at "
                "least 0, finite in float32"
            )
        weights.append(number)
    return weights


def vectors(value: Any, chunk: Chunk, row: int, column: str) -> Float16[np.ndarray, "k v"] | None:
    """The embeddings of a cell, one or several; None for an empty cell."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, str):
            if value.lstrip().startswith("["):
                value = json.loads(value)
            else:
                value = value.replace(",", " ").split()
        if isinstance(value, np.ndarray) and value.dtype == object:
            value = np.stack([np.asarray(vector) for vector in value]) if len(value) else []
        with np.errstate(over="ignore"):
            array = np.asarray(value, None if isinstance(value, np.ndarray) else np.float64)
            array = array.astype(np.float16)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{chunk.where(row)}: {column!r} is not an embedding ({error})") from None
    if not array.size:
        return None
    if array.ndim not in (1, 2):
        raise InputError(
            f"{chunk.where(row)}: {column!r} has {array.ndim} dimensions, expected 1 or 2"
        )
    array = array.reshape(-1, array.shape[-1])
    if not np.isfinite(array).all():
        raise InputError(
            f"{chunk.where(row)}: {column!r} is not finite in float16; expected numbers from "
            "-65504 to 65504"
        )
    return array


def time(value: Any, chunk: Chunk, row: int, column: str) -> float:
    """A cell as a time: any number, or an ISO 8601 date in seconds since 1970."""
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    try:
        if isinstance(value, str) and not value.replace(".", "").lstrip("-").isdigit():
            value = datetime.datetime.fromisoformat(value.strip())
        if isinstance(value, datetime.datetime):
            value = value.replace(tzinfo=value.tzinfo or datetime.UTC).timestamp()
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not np.isfinite(number):
        raise InputError(
            f"{chunk.where(row)}: {str(value)[:40]!r} in {column!r}, expected a number or a date "
            "such as 2024-05-17"
        )
    return number


def group(value: Any, chunk: Chunk, row: int, column: str) -> np.uint64:
    """A cell as the number of a group: the hash of its text."""
    return filters.keys([text(value, chunk, row, column)])[0]
