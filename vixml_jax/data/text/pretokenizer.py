"""Splits texts into pieces that a tokenizer treats independently of each other."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """How texts are split into pieces, such that their tokens together are those of the text.

    Attributes:
      split: Returns the pieces of a text.
      end: A special token that ends each piece when several are tokenized as one text; None if
        there is no such token.
    """

    split: Callable[[str], list[str]]
    end: str | None


# Normalizers that look at one character and the marks that follow it, never beyond a space.
_LOCAL_NORMALIZERS = {
    "BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents",
}  # fmt: skip
_SPLITS_AT_SPACES = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_SPLITS_FURTHER = _SPLITS_AT_SPACES | {"Digits", "Punctuation"}
# The regular expressions of Qwen 2 and 3 and of Llama 3. As in that of GPT-2, a match has spaces
# only at its beginning, or consists of spaces.
QWEN, LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits +
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("", "{1,3}")
)  # fmt: skip
# Texts in which a byte-level tokenizer may see more than one space at a time.
_UNEVEN = re.compile(r"^ | $|  |[^\S ]")


def rule_of(about: dict[str, Any]) -> Rule:
    """The rule of a tokenizer; an unknown kind of tokenizer has whole texts as pieces.

    Args:
      about: Parsed JSON of the tokenizer.
    """
    normalizers = _types(about["normalizer"], "normalizers")
    splits = _types(about["pre_tokenizer"], "pretokenizers")
    added = about["added_tokens"]
    if all(token["content"].isascii() and len(token["content"].split()) == 1 for token in added):
        if (
            splits[:1]
            and splits[0] in _SPLITS_AT_SPACES
            and _SPLITS_FURTHER.issuperset(splits)
            and _LOCAL_NORMALIZERS.issuperset(normalizers)
        ):
            end = _end(added)
            return Rule(_split_at_spaces, None if end is None else f" {end} ")
        if (
            _is_byte_level(about["pre_tokenizer"])
            and normalizers in ([], ["NFC"])
            and not any(token["rstrip"] for token in added)
        ):
            return Rule(_split_before_spaces, _end(added))
    return Rule(lambda text: [text], None)


def _types(about: dict[str, Any] | None, members: str) -> list[str]:
    """The types of the steps of a normalizer or pre-tokenizer.

    Args:
      about: Its JSON; None if the tokenizer has none.
      members: Key of the steps of a sequence.
    """
    if about is None:
        return []
    steps = about[members] if about["type"] == "Sequence" else [about]
    return [step["type"] for step in steps]


def _end(added: list[dict[str, Any]]) -> str | None:
    """A special token that is matched exactly, without regard to the text around it."""
    for token in added:
        if token["special"] and not (
            token["normalized"] or token["single_word"] or token["lstrip"]
        ):
            return token["content"]
    return None


def _is_byte_level(about: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer is that of GPT-2, Qwen or Llama."""
    types = _types(about, "pretokenizers")
    if types == ["ByteLevel"]:
        last = about if about["type"] == "ByteLevel" else about["pretokenizers"][0]
        return last["use_regex"]
    if types != ["Split", "ByteLevel"]:
        return False
    first, last = about["pretokenizers"]
    return (
        first["pattern"].get("Regex") in (QWEN, LLAMA)
        and (first["behavior"], first["invert"]) == ("Isolated", False)
        and not (last["use_regex"] or last["add_prefix_space"])
    )


def _split_at_spaces(text: str) -> list[str]:
    return text.split(" ")


def _split_before_spaces(text: str) -> list[str]:
    """Words with the space before them; the whole text if its spaces are not single spaces."""
    return [text] if _UNEVEN.search(text) else text.replace(" ", "\n ").split("\n")
