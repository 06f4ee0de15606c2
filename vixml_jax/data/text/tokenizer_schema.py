"""Checks a tokenizer.json before the `tokenizers` library reads it.

The library ends the whole process on some files, takes any amount of memory for others, and fails
on texts later with a third kind. So only known components pass, with numbers in bounds and with
references to tokens that exist.
"""

import base64
import math
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union

import msgspec
import numpy as np

from vixml_jax.errors import InputError

MAX_BYTES = 1 << 28  # Of a file; that of Gemma 3 has 33 MB.
_MAX_IDS = 1 << 24  # The library takes memory for all ids up to the largest.
_MAX_HOLES = 4096  # Ids without a token, in addition to as many as there are tokens.
_MAX_GROWTH = 256  # Of a text by its normalizers.

_Id = Annotated[int, msgspec.Meta(ge=0, lt=_MAX_IDS)]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]
_Affix = Annotated[str, msgspec.Meta(max_length=100)]
_Character = Annotated[str, msgspec.Meta(min_length=1, max_length=1)]
_Vocabulary = Annotated[dict[str, _Id], msgspec.Meta(min_length=1)]
_Behavior = Literal["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]


class _Component(msgspec.Struct, tag_field="type"):
    """A step of a tokenizer; the field `type` says which."""


def _switches_only(*names: str) -> tuple[type[_Component], ...]:
    """Components without texts and numbers in their settings."""
    return tuple(msgspec.defstruct(name, [], bases=(_Component,), tag=name) for name in names)


class _Pattern(msgspec.Struct, forbid_unknown_fields=True):
    String: _Text | None = None
    Regex: Annotated[str, msgspec.Meta(min_length=1, max_length=10_000)] | None = None

    def __post_init__(self) -> None:
        if (self.String is None) == (self.Regex is None):
            raise ValueError("expected a pattern with either String or Regex")


class _Replace(_Component, tag="Replace"):
    pattern: _Pattern
    content: Annotated[str, msgspec.Meta(max_length=1000)]

    @property
    def growth(self) -> float:
        """How many times as long a text may become."""
        return len(self.content) / len(self.pattern.String or "x")


class _Prepend(_Component, tag="Prepend"):
    prepend: _Affix


class _Precompiled(_Component, tag="Precompiled"):
    precompiled_charsmap: str

    @property
    def growth(self) -> float:
        """See `_Replace`."""
        return _longest_replacement(self.precompiled_charsmap)


class _Normalizers(_Component, tag="Sequence"):
    normalizers: "list[_Normalizer]"


class _Metaspace(_Component, tag="Metaspace"):
    replacement: _Character = "▁"
    prepend_scheme: Literal["always", "never", "first"] = "always"


class _Split(_Component, tag="Split"):
    pattern: _Pattern
    behavior: _Behavior


class _CharDelimiterSplit(_Component, tag="CharDelimiterSplit"):
    delimiter: _Character


class _Punctuation(_Component, tag="Punctuation"):
    behavior: _Behavior = "Isolated"


class _FixedLength(_Component, tag="FixedLength"):
    length: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 5


class _PreTokenizers(_Component, tag="Sequence"):
    pretokenizers: "list[_PreTokenizer]"


class _Frame(_Component, tag="BertProcessing"):
    sep: tuple[str, _Id]
    cls: tuple[str, _Id]


class _RobertaFrame(_Frame, tag="RobertaProcessing"):
    pass


class _Name(msgspec.Struct):
    id: str
    type_id: _Id = 0


class _Piece(msgspec.Struct, forbid_unknown_fields=True):
    SpecialToken: _Name | None = None
    Sequence: _Name | None = None


class _SpecialToken(msgspec.Struct):
    id: str
    ids: Annotated[list[_Id], msgspec.Meta(max_length=100)]
    tokens: list[str]


class _Template(_Component, tag="TemplateProcessing"):
    single: Annotated[list[_Piece], msgspec.Meta(max_length=100)]
    pair: Annotated[list[_Piece], msgspec.Meta(max_length=100)]
    special_tokens: dict[str, _SpecialToken]

    def __post_init__(self) -> None:
        for pieces, sequences in ((self.single, ("A",)), (self.pair, ("A", "B"))):
            for piece in pieces:
                if (piece.SpecialToken is None) == (piece.Sequence is None):
                    raise ValueError("expected SpecialToken or Sequence")
                if piece.SpecialToken and piece.SpecialToken.id not in self.special_tokens:
                    raise ValueError(f"special_tokens lacks {_shown(piece.SpecialToken.id)}")
                if piece.Sequence and piece.Sequence.id not in sequences:
                    raise ValueError(f"unknown sequence {_shown(piece.Sequence.id)}")


class _Processors(_Component, tag="Sequence"):
    processors: "Annotated[list[_Processor], msgspec.Meta(max_length=100)]"


class _BytePairs(_Component, tag="BPE"):
    vocab: _Vocabulary
    merges: list[tuple[str, str] | str]
    unk_token: str | None = None
    dropout: Annotated[float, msgspec.Meta(le=0)] | None = (
        None  # Texts have the same tokens always.
    )
    continuing_subword_prefix: _Affix | None = None
    end_of_word_suffix: _Affix | None = None

    def __post_init__(self) -> None:
        if self.unk_token:
            _require([self.unk_token], self.vocab)
        _require(self._merged(), self.vocab)

    def _merged(self) -> Iterator[str]:
        """The tokens that the merges use and make."""
        prefix = self.continuing_subword_prefix or ""
        for merge in self.merges:
            left, separator, right = (
                merge.partition(" ") if isinstance(merge, str) else (merge[0], " ", merge[1])
            )
            if not separator or not right.startswith(prefix):
                raise ValueError(f"malformed merge {_shown(merge)}")
            yield from (left, right, left + right.removeprefix(prefix))


class _WordPiece(_Component, tag="WordPiece"):
    vocab: _Vocabulary
    unk_token: str
    continuing_subword_prefix: _Affix = "##"
    max_input_chars_per_word: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 100

    def __post_init__(self) -> None:
        _require([self.unk_token], self.vocab)


class _WordLevel(_Component, tag="WordLevel"):
    vocab: _Vocabulary
    unk_token: str

    def __post_init__(self) -> None:
        _require([self.unk_token], self.vocab)


class _Unigram(_Component, tag="Unigram"):
    vocab: Annotated[
        list[tuple[Annotated[str, msgspec.Meta(min_length=1)], float]],
        msgspec.Meta(min_length=1, max_length=_MAX_IDS),
    ]
    unk_id: int

    def __post_init__(self) -> None:
        if not 0 <= self.unk_id < len(self.vocab):
            raise ValueError(f"unk_id is {self.unk_id}, of {len(self.vocab)} tokens")


class _Decoders(_Component, tag="Sequence"):
    decoders: "list[_Decoder]"


_Normalizer = Union[
    *_switches_only(
        *("BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Strip"),
        *("Nmt", "ByteLevel"),
    ),
    *(_Replace, _Prepend, _Precompiled, _Normalizers),
]
_PreTokenizer = Union[
    *_switches_only(
        *("BertPreTokenizer", "ByteLevel", "Whitespace", "WhitespaceSplit", "Digits"),
        "UnicodeScripts",
    ),
    *(_Metaspace, _Split, _CharDelimiterSplit, _Punctuation, _FixedLength, _PreTokenizers),
]
_Processor = Union[*_switches_only("ByteLevel"), *(_Frame, _RobertaFrame, _Template, _Processors)]
_Decoder = Union[
    *_switches_only("BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Strip", "WordPiece"),
    *(_Metaspace, _Replace, _Decoders),
]


class _AddedToken(msgspec.Struct):
    id: _Id
    content: _Text


class _Tokenizer(msgspec.Struct):
    """The parts of a tokenizer.json that are used."""

    model: _BytePairs | _WordPiece | _WordLevel | _Unigram
    added_tokens: list[_AddedToken] = []
    normalizer: _Normalizer | None = None
    pre_tokenizer: _PreTokenizer | None = None
    post_processor: _Processor | None = None
    decoder: _Decoder | None = None

    def __post_init__(self) -> None:
        _check_ids(self.model.vocab, self.added_tokens)
        growth = math.prod(max(1.0, step.growth) for step in _replacements(self.normalizer))
        if growth > _MAX_GROWTH:
            raise ValueError(
                f"the normalizer makes texts up to {growth:.0f} times as long, expected at most "
                f"{_MAX_GROWTH}"
            )


def checked(content: bytes, path: str) -> str:
    """A tokenizer.json without truncation and padding, safe to be read.

    Args:
      content: Of the file.
      path: Its path, for messages.

    Raises:
      InputError: If it is not JSON, or describes a tokenizer that cannot be trusted to work.
    """
    try:
        fields = msgspec.json.decode(content, type=dict[str, Any])
        # As the library stores numbers in 32 bits, both are bounded; the caller sets its own.
        fields |= {"truncation": None, "padding": None}
        model = fields.get("model")
        if isinstance(model, dict):
            model.setdefault("type", _kind(model))
        msgspec.convert(fields, _Tokenizer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: not a tokenizer of the `tokenizers` library ({reason})"
        ) from None
    return msgspec.json.encode(fields).decode()


def _check_ids(
    vocabulary: Mapping[str, int] | list[tuple[str, float]], added: Iterable[_AddedToken]
) -> None:
    """Checks that no two tokens have the same id, and that few ids have no token.

    A model has a row for each id up to the largest.
    """
    if isinstance(vocabulary, list):
        vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
    ids = dict(vocabulary)
    for token in added:
        if ids.setdefault(token.content, token.id) != token.id:
            raise ValueError(
                f"the token {_shown(token.content)} has the ids {ids[token.content]} and {token.id}"
            )
    of: dict[int, str] = {}
    for token, id in ids.items():
        if of.setdefault(id, token) != token:
            raise ValueError(f"{_shown(of[id])} and {_shown(token)} have the same id, {id}")
    largest = max(ids.values())
    if largest >= 2 * len(ids) + _MAX_HOLES:
        raise ValueError(f"the largest id is {largest}, of {len(ids)} tokens")


def _kind(model: dict[str, Any]) -> str:
    """The type of a model that does not say it, as files of 2020 do not."""
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _require(tokens: Iterable[str], vocabulary: Container[str]) -> None:
    for token in tokens:
        if token not in vocabulary:
            raise ValueError(f"the vocabulary lacks {_shown(token)}")


def _shown(value: Any) -> str:
    """A short form of a value, for messages."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _replacements(normalizer: Any) -> Iterator[_Replace | _Precompiled]:
    """The steps of a normalizer that may make texts longer."""
    if isinstance(normalizer, _Normalizers):
        for step in normalizer.normalizers:
            yield from _replacements(step)
    elif isinstance(normalizer, (_Replace, _Precompiled)):
        yield normalizer


def _longest_replacement(charsmap: str) -> int:
    """Checks the table of normalizations of SentencePiece; the bytes of its longest result.

    The table is a double-array trie, units of 32 bits, and texts that end with a zero byte, which
    the leaves of the trie point to. The library follows both without checks.

    Args:
      charsmap: The size of the trie in bytes, the trie and the texts, in base64.
    """
    content = base64.b64decode(charsmap, validate=True)
    size = int.from_bytes(content[:4], "little")
    trie, texts = content[4 : 4 + size], content[4 + size :]
    if not size or size % 4 or len(trie) != size:
        raise ValueError("precompiled_charsmap is truncated")
    texts.decode()
    units = np.frombuffer(trie, "<u4").astype(np.int64)
    offsets = (units >> 10) << ((units & (1 << 9)) >> 6)
    after = np.arange(len(units)) ^ offsets
    is_reached = (units & 0x80000000 == 0) & (units & 0xFF != 0)
    is_reached[0] = True
    if np.any(after[is_reached] | 0xFF >= len(units)):
        raise ValueError("precompiled_charsmap is damaged")
    leaves = units[after[is_reached & (units & 0x100 != 0)]] & 0x7FFFFFFF
    starts = np.append(np.flatnonzero(np.frombuffer(texts, np.uint8) & 0xC0 != 0x80), len(texts))
    if not np.isin(leaves, starts).all():  # Of characters.
        raise ValueError("precompiled_charsmap is damaged")
    return max(map(len, texts.split(b"\0")))
