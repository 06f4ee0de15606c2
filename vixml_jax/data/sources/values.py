"""Values of cells: text, lists, numbers, embeddings, times; what is none of these is refused."""

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
# The part of the data that a file, a directory of shards, or a value of a split column names.
PARTS = {
    "train": ("train", "training", "trn"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing", "tst"),
    LABELS: ("labels", "label", "lbl"),
}


def text(value: Any, chunk: Chunk, row: int, column: str) -> str:
    """A cell as text: numbers as written, None as nothing."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise InputError(
                f"{chunk.where(row)}: {column!r} holds half a character (a lone surrogate)"
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
    """The split that each row names."""
    found = []
    for row, value in enumerate(chunk.columns[column]):
        word = str(value).strip().lower()
        split = next((name for name in SPLITS if word in PARTS[name]), None)
        if split is None:
            raise InputError(
                f"{chunk.where(row)}: {column!r} is {str(value)[:40]!r}, expected train, valid or "
                "test"
            )
        found.append(split)
    return found


def pieces(value: Any, separator: str, chunk: Chunk, row: int, column: str) -> list[Any]:
    """The values that a cell lists: a list, JSON of one, or a string with separators."""
    if value is None:
        return []
    if isinstance(value, str):
        if value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{chunk.where(row)}: {column!r} begins as a JSON list but is none ({error})"
                ) from None
        else:
            parts = value.split(separator) if separator else [value]
            return [part for part in map(str.strip, parts) if part]
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, list | tuple) else [value]


def numbers(chunk: Chunk, row: int, column: str, separator: str) -> list[float]:
    """Weights of a cell: finite in float32 and not negative."""
    found = []
    for value in pieces(chunk.columns[column][row], separator, chunk, row, column):
        try:
            with np.errstate(over="ignore"):
                number = float(np.float32(float(value)))
        except (TypeError, ValueError, OverflowError):
            number = -1.0
        if not 0.0 <= number < float("inf"):
            raise InputError(
                f"{chunk.where(row)}: {str(value)[:40]!r} in {column!r}, expected a number of at "
                "least 0 that float32 holds"
            )
        found.append(number)
    return found


def vectors(value: Any, chunk: Chunk, row: int, column: str) -> Float16[np.ndarray, "k v"] | None:
    """The embeddings of a cell; None: it has none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, str):
            if value.lstrip().startswith("["):
                value = json.loads(value)
            else:
                value = value.replace(",", " ").split()
        if isinstance(value, np.ndarray) and value.dtype == object:
            value = np.stack([np.asarray(one) for one in value]) if len(value) else []
        with np.errstate(over="ignore"):
            found = np.asarray(value, None if isinstance(value, np.ndarray) else np.float64)
            found = found.astype(np.float16)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{chunk.where(row)}: {column!r} is no embedding ({error})") from None
    if not found.size:
        return None
    if found.ndim not in (1, 2):
        raise InputError(
            f"{chunk.where(row)}: {column!r} has {found.ndim} dimensions, expected 1 or 2"
        )
    found = found.reshape(-1, found.shape[-1])
    if not np.isfinite(found).all():
        raise InputError(
            f"{chunk.where(row)}: {column!r} is not finite in float16; expected numbers within "
            "65504"
        )
    return found


def time(value: Any, chunk: Chunk, row: int, column: str) -> float:
    """Seconds or any other count, or a date in ISO 8601."""
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
            "like 2024-05-17"
        )
    return number


def group(value: Any, chunk: Chunk, row: int, column: str) -> np.uint64:
    return filters.keys([text(value, chunk, row, column)])[0]
