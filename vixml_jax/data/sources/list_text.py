"""Lists that were written as text: by JSON, by Python's or by numpy's `str`."""

import ast
import json
import re
from typing import Any

# A string in quotes, a bracket, a comma, or a word such as a number.
_TOKEN = re.compile(
    r"""(?P<space>\s*)(?P<token>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[][(){},]|[^][(){}\s,'"]+)""",
    re.DOTALL,
)
_CLOSING = {"[": "]", "(": ")", "{": "}"}
# Names that Python and numpy write around a list or an item: np.str_('a'), array(['a']), dtype.
_DTYPE = re.compile(r",\s*dtype=[^\[\](){}]*(?=\)\s*$)")
_NAME = re.compile(r"(?:np|numpy)\.\w+|array|set|frozenset")
_INTEGER = re.compile(r"[+-]?(?:0|[1-9]\d{0,300})")
_FLOAT = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|nan|[+-]?inf")
_CONSTANTS = {"None": None, "True": True, "False": False}
_MAX_DEPTH = 8


class ShortenedError(ValueError):
    """A list whose middle was replaced by '...' when it was written."""


def looks_like_list(text: str) -> bool:
    """Whether a text is set in brackets as lists are: `[a]`, `{a}` or `array([a])`."""
    text = text.strip()
    return text.startswith(("[", "array([")) or (text.startswith("{") and text.endswith("}"))


def parse(text: str) -> list[Any] | None:
    """The list that a text holds; None if the text is not a list.

    Read are JSON, `str` of a Python list, set or tuple (`['a', 'b']`), and `str` and `repr` of a
    numpy array (`['a' 'b']`, without commas and over several lines). Words without quotes are
    numbers, None, True or False: `[Deluxe Edition]` is not a list.

    Raises:
      ShortenedError: If numpy or pandas left out items (`['a' 'b' ... 'z']`).
    """
    if not text.lstrip().startswith(("[", "(", "{", "array(", "set(", "frozenset(")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        pass
    else:
        return value if isinstance(value, list) else None
    tokens = _tokens(_DTYPE.sub("", text))
    try:
        value, end = _parse_item(tokens, 0, 0)
    except ShortenedError:
        raise
    except (ValueError, SyntaxError, IndexError):
        return None
    return value if end == len(tokens) and isinstance(value, list) else None


def _tokens(text: str) -> list[str]:
    """Brackets, commas, quoted strings and words in order; empty if the text is not a list."""
    tokens, position, text = [], 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:  # A quote that is not closed.
            return []
        token = match["token"]
        # Items must not touch: SQL doubles a quote in ['it''s'].
        if tokens and not match["space"] and _is_item(token) and _is_item(tokens[-1]):
            return []
        tokens.append(token)
        position = match.end()
    return tokens


def _is_item(token: str) -> bool:
    return token not in "[](){},"


def _parse_item(tokens: list[str], index: int, depth: int) -> tuple[Any, int]:
    """The item that begins at a token, and the index after it.

    Raises:
      ValueError, SyntaxError, IndexError: If there is no item.
    """
    token = tokens[index]
    if token in _CLOSING:
        return _parse_items(tokens, index, depth + 1)
    if tokens[index + 1 : index + 2] == ["("] and _NAME.fullmatch(token):
        if tokens[index + 2] == ")":  # set()
            return [], index + 3
        item, index = _parse_item(tokens, index + 2, depth)
        if tokens[index] != ")":
            raise ValueError("no closing parenthesis")
        return item, index + 1
    return _value(token), index + 1


def _value(token: str) -> Any:
    """The value of a quoted string or of a word.

    Raises:
      ValueError, SyntaxError: If it is none.
    """
    if token[0] in "'\"":
        return ast.literal_eval(token)
    if token in _CONSTANTS:
        return _CONSTANTS[token]
    if _INTEGER.fullmatch(token):
        return int(token)
    if _FLOAT.fullmatch(token):
        return float(token)
    raise ValueError("neither a text nor a number")


def _parse_items(tokens: list[str], index: int, depth: int) -> tuple[list[Any], int]:
    """The items from an opening bracket to its closing one, and the index after it.

    Raises:
      ValueError: If these are not items that are separated all by commas or all by white space.
    """
    if depth > _MAX_DEPTH:
        raise ValueError("too deeply nested")
    opening, items, num_commas, shortened = tokens[index], [], 0, False
    index += 1
    while tokens[index] != _CLOSING[opening]:
        if tokens[index] == ",":
            num_commas += 1
            if num_commas > len(items):
                raise ValueError("no item before a comma")
            index += 1
        elif tokens[index] in ("...", "Ellipsis"):
            shortened, index = True, index + 1
            items.append(None)
        else:
            item, index = _parse_item(tokens, index, depth)
            items.append(item)
    # A comma may follow the last item. Python joins strings without a comma: ['a', 'b' 'c'].
    if num_commas not in (0, len(items) - 1, len(items)):
        raise ValueError("commas between some items only")
    if opening != "[" and len(items) > 1 and not num_commas:
        raise ValueError("no commas")
    if opening == "(" and items and not num_commas:  # A tuple of one item ends in a comma.
        raise ValueError("not a tuple")
    if shortened:
        raise ShortenedError("the list was shortened with '...' when it was written")
    return items, index + 1
