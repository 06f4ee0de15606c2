"""Loads fast tokenizers of Hugging Face, trains new ones, and tokenizes the prompt of a decoder."""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from vixml_jax.data.packing import Layout, Part
from vixml_jax.data.text import tokenizer_schema
from vixml_jax.errors import InputError
from vixml_jax.storage import hub, json_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TRAIN = "train"
_FILE = "tokenizer.json"
NO_FRAME = (
    "the post-processor of the tokenizer does more than adding tokens before and after a text; "
    "expected a tokenizer that only adds tokens"
)
_LONG_WORD = re.compile(r"\S{100}(?=\S)")  # WordPiece replaces longer words by [UNK].
_LONG_TEXT = 1000  # Characters; only longer texts are searched for long words.
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MODULES = "modules.json"  # Of sentence-transformers: the directory of each part of a model.
_SETTINGS, _VOCABULARY = "tokenizer_config.json", "vocab.txt"
_FILES = (_FILE, _SETTINGS, _VOCABULARY, _MODULES)
_PROBES = ("", "a", "b a", "Ünïcode 漢字 \U0001f600\u0378 1234, x!")


class NoTokenizerError(InputError):
    """There is no tokenizer under a name."""


class _Settings(msgspec.Struct):
    """The fields of tokenizer_config.json that are used."""

    auto_map: Any = None
    do_lower_case: bool | None = True


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _Added(msgspec.Struct):
    """The tokens that a tokenizer.json has beside its vocabulary."""

    added_tokens: list[_AddedToken] | None = None


def load(name: str, max_tokens: int) -> "Tokenizer":
    """Loads a fast tokenizer, and sets it to truncate texts and never to pad them.

    Args:
      name: A directory with `tokenizer.json` (or the `vocab.txt` of a BERT), or the name of a
        model on the Hugging Face hub. No class that its files name is looked up.
      max_tokens: Maximum number of tokens of a text, special tokens included; these are kept.

    Raises:
      NoTokenizerError: If there is no such tokenizer.
      InputError: If it cannot be read, or `max_tokens` leaves no space for text.
    """
    directory = name if os.path.isdir(name) else _download(name)
    directory = _below(directory)
    tokenizer = _read(directory)
    is_described = os.path.lexists(os.path.join(directory, _FILE))
    path = os.path.join(directory, _FILE if is_described else _VOCABULARY)
    with library_errors(path):
        _check_tokens(tokenizer, path)
        return _fit(tokenizer, max_tokens, path)


def _download(name: str) -> str:
    """The directory of a tokenizer on the Hugging Face hub; no code of it is downloaded."""
    try:
        return hub.download(name, [*_FILES, *(f"*/{file}" for file in _FILES)])
    except hub.NotFoundError as error:
        raise NoTokenizerError(
            f"--tokenizer={name}: neither a directory with {_FILE} nor a model on the Hugging Face "
            f"hub ({error})"
        ) from None


def _below(directory: str) -> str:
    """Where the tokenizer of a model is: early sentence-transformers have it a directory below."""
    modules = os.path.join(directory, _MODULES)
    if os.path.lexists(os.path.join(directory, _FILE)) or not os.path.lexists(modules):
        return directory
    first = json_files.read(modules, list[hub.Module], "expected modules of sentence-transformers")[
        :1
    ]
    below = os.path.join(directory, *(module.path for module in first))
    return below if os.path.isdir(below) else directory


def _read(directory: str) -> "Tokenizer":
    """The tokenizer of a directory; never by a class that its files name."""
    from tokenizers import Tokenizer

    path, vocabulary = (os.path.join(directory, name) for name in (_FILE, _VOCABULARY))
    settings_path = os.path.join(directory, _SETTINGS)
    settings = _Settings()
    if os.path.lexists(settings_path):
        settings = json_files.read(settings_path, _Settings, "expected settings of a tokenizer")
    if settings.auto_map:
        raise InputError(
            f"{settings_path}: the tokenizer is made by code of its own (auto_map), which is never "
            f"run; expected a tokenizer that {_FILE} describes alone"
        )
    if os.path.lexists(path):
        remedy = f"expected {_FILE} of the `tokenizers` library"
        content = json_files.read_bytes(path, remedy, max_bytes=tokenizer_schema.MAX_BYTES)
        checked = tokenizer_schema.checked(content, path)
        with library_errors(path):
            tokenizer = Tokenizer.from_str(checked)
            _check_added(tokenizer, checked, path)
            return tokenizer
    if os.path.lexists(vocabulary):
        return _read_vocabulary(vocabulary, settings)
    raise NoTokenizerError(
        f"--tokenizer={directory}: found a model without a tokenizer ({_FILE}); if you trust it: "
        f"transformers.AutoTokenizer.from_pretrained({directory!r}).save_pretrained({directory!r})"
    )


def _read_vocabulary(path: str, settings: "_Settings") -> "Tokenizer":
    """The tokenizer of an early BERT, which has only a list of tokens."""
    remedy = "expected a token in each line"
    content = json_files.read_bytes(path, remedy, max_bytes=tokenizer_schema.MAX_BYTES)
    try:
        tokens = content.decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: {error}; {remedy}") from None
    vocabulary = {token.removesuffix("\r"): i for i, token in enumerate(tokens)}
    lacking = [token for token in _SPECIAL if token not in vocabulary]
    if lacking:
        raise InputError(f"{path}: lacks {lacking[0]}; expected the vocabulary of a BERT")
    return _word_piece(vocabulary, lowercase=settings.do_lower_case is not False)


@contextlib.contextmanager
def library_errors(where: str) -> Iterator[None]:
    """Turns the errors of the `tokenizers` library into an InputError about a file or flag.

    The library raises bare `Exception`, and for a panic of Rust a `BaseException` without a public
    name.
    """
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{where}: the `tokenizers` library fails ({reason}); expected {_FILE} as "
            "`save_pretrained` of transformers writes it"
        ) from None


def train(
    read_texts: Callable[[], Iterable[list[str]]], *, vocab_size: int, max_tokens: int
) -> "Tokenizer":
    """Trains a WordPiece tokenizer like BERT's (lower case, no accents); it is deterministic.

    Args:
      read_texts: Returns an iterator over the texts, a chunk at a time; called twice.
      vocab_size: Maximum size of the vocabulary, the five special tokens included. It is exceeded
        only if there are more single characters.
      max_tokens: Maximum number of tokens of a text, special tokens included; these are kept.
    """
    from tokenizers import trainers

    def cut_texts() -> Iterator[list[str]]:
        """The texts with long words cut; the time of training grows with their squared length."""
        for chunk in read_texts():
            yield [
                _LONG_WORD.sub(r"\g<0> ", text) if len(text) > _LONG_TEXT else text
                for text in chunk
            ]

    learner = _word_piece({"[UNK]": 0})
    pieces = sorted(_continuations(learner, cut_texts()))
    # The trainer numbers characters within words in the order of a hash map, and breaks ties by
    # these numbers. As special tokens they are numbered first and in sorted order.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*_SPECIAL, *pieces], show_progress=False
    )
    learner.train_from_iterator(cut_texts(), trainer)
    # A new tokenizer with the same vocabulary, since those characters are special in the old one.
    return _fit(
        _word_piece(learner.get_vocab(with_added_tokens=False)), max_tokens, "the tokenizer"
    )


def _continuations(tokenizer: "Tokenizer", texts: Iterable[list[str]]) -> set[str]:
    """The characters that occur after the first of a word, in WordPiece's notation."""
    between_spaces: set[str] = set()
    for chunk in texts:
        between_spaces.update(tokenizer.normalizer.normalize_str("\n".join(chunk)).split())
    characters: set[str] = set()
    for part in between_spaces:  # Each only once, since a Python call per text takes minutes.
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(part):
            characters.update(word[1:])
    return {f"##{character}" for character in characters}


def _word_piece(vocabulary: dict[str, int], *, lowercase: bool = True) -> "Tokenizer":
    """BERT's tokenizer; it adds special tokens to texts if the vocabulary has them."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    if all(token in vocabulary for token in _SPECIAL):
        tokenizer.add_special_tokens(list(_SPECIAL))
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
        )
    return tokenizer


def _fit(tokenizer: "Tokenizer", max_tokens: int, name: str) -> "Tokenizer":
    """Replaces the truncation and padding that a tokenizer was saved with."""
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if max_tokens <= special:
        raise InputError(
            f"--max_tokens={max_tokens}: {name} adds {special} special tokens; expected at "
            f"least {special + 1}"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def _check_tokens(tokenizer: "Tokenizer", path: str) -> None:
    """Tokenizes some texts: what fails on all texts fails here, not in the middle of a data set."""
    known = vocab_size(tokenizer)
    for text in _PROBES:
        largest = max(tokenizer.encode(text).ids, default=0)
        if largest >= known:
            raise InputError(
                f"{path}: gives texts the token {largest}, expected less than {known}, "
                "the size of its vocabulary"
            )


def _check_added(tokenizer: "Tokenizer", content: str, path: str) -> None:
    """Checks that added tokens have the ids that their file says.

    The library numbers those that are not in the vocabulary by itself, from its size on.
    """
    added = msgspec.json.decode(content, type=_Added).added_tokens
    for token in added or ():
        found = tokenizer.token_to_id(token.content)
        if found != token.id:
            raise InputError(
                f"{path}: the added token {token.content[:40]!r} has the id {token.id}, but the "
                f"`tokenizers` library gives it {found}; expected ids that follow those of the "
                "vocabulary without a gap, as `save_pretrained` of transformers writes them"
            )


def special_tokens(tokenizer: "Tokenizer") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that the tokenizer adds before and after a text.

    Raises:
      InputError: If its post-processor does something else.
    """
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a").ids
    before = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), None)
    if before is None:
        raise InputError(NO_FRAME)
    return tuple(framed[:before]), tuple(framed[before + len(bare) :])


def prompt_layout(
    tokenizer: "Tokenizer", *, text: str, images: str, order: str, num_images: int, end: int | None
) -> Layout:
    """The layout of an item for a decoder (paper, section 3).

    An item is [text prompt][text][image prompt][images][end], or the images come first. Begin
    tokens appear once, at the start; the image prompt appears only if the item has an image.

    Args:
      tokenizer: Tokenizer of the prepared texts.
      text: Prompt before the text.
      images: Prompt before the images.
      order: "text_image" or "image_text".
      num_images: Maximum number of images of an item.
      end: The end token, used if the tokenizer adds none; None if there is none.
    """
    with library_errors("the tokenizer of the prompts"):
        before, after = special_tokens(tokenizer)
        text_prompt, image_prompt = (
            tuple(tokenizer.encode(piece, add_special_tokens=False).ids) for piece in (text, images)
        )
    last = after[-1:] or (() if end is None else (end,))
    parts: list[Part] = [text_prompt, "text", image_prompt, "images"]
    if order == "image_text":
        parts = [image_prompt, "images", text_prompt, "text"]

    def framed(parts: list[Part]) -> tuple[Part, ...]:
        return tuple(part for part in (before, *parts, last) if part)

    return Layout(
        num_images=num_images,
        seen=framed(parts),
        unseen=framed([text_prompt, "text"]),
        reserve_images=False,
        trim=(len(before), len(after)),
    )


def vocab_size(tokenizer: "Tokenizer") -> int:
    """Number of rows that an embedding table needs: the largest token id plus one."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
