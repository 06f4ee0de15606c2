"""Conversion of table cells to text, lists, numbers, embeddings and times."""

import datetime
import decimal
import html.entities
import re
from typing import Any

import numpy as np
from jaxtyping import Float16

from vixml_jax.data import filters
from vixml_jax.data.sources import list_text
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


# Numbers in a text as spreadsheets and data frames write those that they hold as floats.
_WHOLE_FLOAT = re.compile(r"([+-]?\d+)\.0+")
_EXPONENT = re.compile(r"[+-]?\d(?:\.\d+)?[eE]\+?\d+")
# An HTML entity ends in a semicolon: `&amp;`, `&#39;`.
_ENTITY = rf"&(?:#\d+|#[xX][0-9a-fA-F]+|{'|'.join(html.entities.name2codepoint)}|apos);"
ENTITY = re.compile(_ENTITY)
_BETWEEN_SEMICOLONS = re.compile(rf"(?:{_ENTITY}|[^;])+")
_EXACT_DIGITS = 15  # Integers of at most so many digits are exact in a double.


def text(value: Any, chunk: Chunk, row: int, column: str) -> str:
    """A cell as text; numbers and dates are formatted, and None is the empty text.

    Raises:
      InputError: If the cell is of another type, cannot be encoded as UTF-8, or is a float so large
        that it may stand for several integers.
    """
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(
                f"{chunk.where(row)}: {column!r} has bytes that are not UTF-8; expected text"
            ) from None
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
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float | np.floating) and np.isfinite(value):
        if not float(value).is_integer():
            return str(value)
        digits = np.finfo(type(value)).nmant + 1
        if abs(value) >= 2.0**digits:
            raise InputError(
                f"{chunk.where(row)}: {column!r} is {float(value):.17g}, a floating-point number "
                f"from 2^{digits} on, where different integers become equal; write it as text or "
                "as an integer"
            )
        return str(int(value))
    if isinstance(value, decimal.Decimal) and value.is_finite():
        return str(int(value)) if value == value.to_integral_value() else str(value)
    if isinstance(value, datetime.date):
        return value.isoformat()
    raise InputError(f"{chunk.where(row)}: {column!r} is {str(value)[:40]!r}, expected text")


def name(value: Any, chunk: Chunk, row: int, column: str) -> str:
    """A cell as the name of an item: the id of a query or a label, or the text of a label.

    Raises:
      InputError: Like `text`, and if the text is a number that was rounded when it was written.
    """
    result = text(value, chunk, row, column)
    if result[:1] in "0123456789+-" and is_rounded(result):
        raise InputError(
            f"{chunk.where(row)}: {column!r} is {result[:40]!r}, a rounded number, to which "
            "different ids become equal; write ids as text, or as integers with all digits"
        )
    return result


def is_rounded(word: str) -> bool:
    """Whether a word is a number that may stand for several integers.

    These are numbers with an exponent, as Excel shows long ones (`1.23457E+11`), and the decimals
    of a double from 2^53 on (`9007199254740992.0`).
    """
    if _EXPONENT.fullmatch(word):
        return True
    whole = _WHOLE_FLOAT.fullmatch(word)
    return bool(whole) and abs(int(whole[1][-400:])) >= 2**53


def as_integer(word: str) -> str:
    """A word as an integer if it is one written with decimals (`7.0` as `7`), else unchanged.

    Data frames hold integers as floats where a value is missing, and write them with decimals.
    """
    whole = _WHOLE_FLOAT.fullmatch(word) if word.endswith("0") else None
    if whole is None or len(whole[1].lstrip("+-")) > _EXACT_DIGITS:
        return word
    return whole[1]


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


def split_text(value: str, separator: str) -> list[str]:
    """The parts of a text between separators, without white space around them or empty parts.

    A semicolon that ends an HTML entity (`R&amp;B`) does not separate. Without a separator, the
    whole text is the only part.
    """
    if not separator:
        parts = [value]
    elif separator == ";" and "&" in value:
        parts = _BETWEEN_SEMICOLONS.findall(value)
    else:
        parts = value.split(separator)
    return [part for part in map(str.strip, parts) if part]


def list_items(value: Any, separator: str, chunk: Chunk, row: int, column: str) -> list[Any]:
    """The items of a cell that is a list, a list written as text, or a text with separators.

    Raises:
      InputError: If the text is a list that was shortened when it was written.
    """
    if value is None:
        return []
    if isinstance(value, str):
        try:
            items = list_text.parse(value)
        except list_text.ShortenedError as error:
            raise InputError(
                f"{chunk.where(row)}: {column!r} is {value[:40]!r}: {error}; write whole lists, "
                "for example with json.dumps"
            ) from None
        return split_text(value, separator) if items is None else items
    if isinstance(value, np.ndarray):
        return list(value) if value.dtype.kind == "f" else value.tolist()
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
            items = list_text.parse(value)
            value = value.replace(",", " ").split() if items is None else items
        if isinstance(value, np.ndarray) and value.dtype == object:
            value = np.stack([np.asarray(vector) for vector in value]) if len(value) else []
        with np.errstate(over="ignore"):
            array = np.asarray(value, None if isinstance(value, np.ndarray) else np.float64)
            array = array.astype(np.float16)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(
            f"{chunk.where(row)}: {column!r} is not an embedding ({str(error)[:200]})"
        ) from None
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


def is_date(value: Any) -> bool:
    """Whether a time is given as a date rather than as a number."""
    if isinstance(value, str):
        return not value.strip().replace(".", "").lstrip("-").isdigit()
    return isinstance(value, datetime.date)


def time(value: Any, chunk: Chunk, row: int, column: str) -> float:
    """A cell as a time: any number, or an ISO 8601 date in seconds since 1970."""
    try:
        if isinstance(value, str) and is_date(value):
            value = datetime.datetime.fromisoformat(value.strip())
        if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
            value = datetime.datetime(value.year, value.month, value.day)
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
