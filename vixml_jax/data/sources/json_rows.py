"""Rows of JSON files: one object per line, or one array of objects."""

import collections
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from vixml_jax.errors import InputError
from vixml_jax.storage import text_files

_READ_CHARACTERS = 1 << 16  # Of an array at a time.
_SPACE = re.compile(r"[ \t\r\n]*")


def read_objects(
    path: str, encoding: str
) -> Iterator[tuple[int, dict[str, Any] | InputError, int]]:
    """Line, object and length of each row of a JSON file: an object per line, or an array of them.

    The length is that of the text of the row.

    Raises:
      InputError: If an array, or the rest of it, is not JSON.
    """
    with text_files.open_text(path, encoding) as (file, _):
        is_array = file.peek(1).lstrip().startswith(b"[")
    if is_array:
        yield from _array_rows(path, encoding)
        return
    for number, text in text_files.lines(path, encoding):
        if isinstance(text, InputError):
            yield number, text, 0
        elif not text.isspace():
            yield number, _object_of_line(path, number, text), len(text)


def _object_of_line(path: str, number: int, text: str) -> dict[str, Any] | InputError:
    """The JSON object of a line, or its error."""
    try:
        row = _DECODER.decode(text.strip())
    except (ValueError, RecursionError) as error:
        return InputError(
            f"{path}, line {number}: not JSON ({error}); expected one object per line, or one array"
        )
    return row if isinstance(row, dict) else _no_object_error(path, number, text)


def _no_object_error(path: str, number: int, text: str) -> InputError:
    return InputError(
        f"{path}, line {number}: found {text.strip()[:40]!r}, expected JSON objects, one per line "
        "or in one array"
    )


def _array_rows(path: str, encoding: str) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Line, object and length of each item of a JSON array of objects."""
    with text_files.open_text(path, encoding) as (file, text_encoding):
        array = _ArrayText(path, io.TextIOWrapper(file, text_encoding, newline=""))
        array.take("[")
        if array.next_character() != "]":
            yield array.take_object()
            while array.next_character() == ",":
                array.take(",")
                yield array.take_object()
        array.take("]")
        array.take("")


class _ArrayText:
    """The text of a JSON array, of which only the item being parsed is in memory."""

    def __init__(self, path: str, stream: io.TextIOBase):
        self._path, self._stream = path, stream
        self._text, self._position, self._line = "", 0, 1

    def _read_more(self) -> bool:
        """Adds the next part of the file to what is left; False at the end."""
        rest = self._text[self._position :]
        try:  # At least as much as there is: an object is parsed again with each part of it.
            more = self._stream.read(max(_READ_CHARACTERS, len(rest)))
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self._path}, after line {self._line}: byte 0x{error.object[error.start]:02x} is "
                f"not {error.encoding}; pass --encoding"
            ) from None
        self._text, self._position = rest + more, 0
        return bool(more)

    def next_character(self) -> str:
        """The next character that is not white space, which is not taken; empty at the end."""
        while True:
            end = _SPACE.match(self._text, self._position).end()
            self._line += self._text.count("\n", self._position, end)
            self._position = end
            if end < len(self._text):
                return self._text[end]
            if not self._read_more():
                return ""

    def take(self, expected: str) -> None:
        """Takes the next character, or the end of the file."""
        found = self.next_character()
        if found != expected:
            found, wanted = (repr(text) if text else "the end" for text in (found, expected))
            wanted += " or ','" if expected == "]" else ""
            raise InputError(
                f"{self._path}, line {self._line}: found {found}, expected {wanted}, as of one "
                "array of JSON objects"
            )
        self._position += len(expected)

    def take_object(self) -> tuple[int, dict[str, Any], int]:
        """Takes the object that comes next, and returns its line, the object and its length."""
        line = self._line
        if self.next_character() != "{":
            raise _no_object_error(self._path, self._line, self._text[self._position :][:60])
        line = self._line
        while True:
            try:
                row, end = _DECODER.raw_decode(self._text, self._position)
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._position > text_files.MAX_LINE or not self._read_more():
                    raise InputError(
                        f"{self._path}, line {line}: the object that begins here is not JSON "
                        f"({getattr(error, 'msg', error)})"
                    ) from None
                continue
            self._line += self._text.count("\n", self._position, end)
            length, self._position = end - self._position, end
            return line, row, length


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


def _object_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are unique."""
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        (name, _), *_ = counts.most_common(1)
        raise ValueError(f"{name!r} occurs twice in an object")
    return result


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object_of_pairs)
