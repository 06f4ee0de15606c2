"""Loads fast tokenizers of Hugging Face, trains new ones, and tokenizes the prompt of a decoder."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from vixml_jax.data.packing import Layout, Part
from vixml_jax.errors import InputError

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


class NoTokenizerError(InputError):
    """There is no tokenizer under a name."""


def load(name: str, max_tokens: int) -> "Tokenizer":
    """Loads a fast tokenizer, and sets it to truncate texts and never to pad them.

    Args:
      name: A directory with `tokenizer.json` or a checkpoint, or the name of a model on the
        Hugging Face hub.
      max_tokens: Maximum number of tokens of a text, special tokens included; these are kept.

    Raises:
      NoTokenizerError: If there is no such tokenizer.
      InputError: If it cannot be read, or `max_tokens` leaves no space for text.
    """
    from tokenizers import Tokenizer

    name = _directory(name)
    path = os.path.join(name, _FILE)
    if os.path.isfile(path):
        try:
            tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # The library raises bare Exception.
            raise InputError(
                f"{path}: not a tokenizer of the `tokenizers` library ({error})"
            ) from None
    else:
        tokenizer = _resolve(name)
    return _fit(tokenizer, max_tokens)


def _directory(name: str) -> str:
    """Where the tokenizer of a model is: early sentence-transformers have it a directory below."""
    modules = os.path.join(name, _MODULES)
    if os.path.isfile(os.path.join(name, _FILE)) or not os.path.isfile(modules):
        return name
    try:
        with open(modules, encoding="utf-8") as file:
            below = os.path.join(name, json.load(file)[0]["path"])
    except (ValueError, LookupError, TypeError):
        return name  # What is wrong with the model is told where its weights are read.
    return below if os.path.isfile(os.path.join(below, _FILE)) else name


def _resolve(name: str) -> "Tokenizer":
    """The tokenizer that transformers finds under a name; importing transformers is slow."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, use_fast=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise NoTokenizerError(
            f"--tokenizer={name}: neither a directory with {_FILE} nor a model on the Hugging Face "
            f"hub ({reason})"
        ) from None
    if not tokenizer.is_fast:
        raise InputError(f"--tokenizer={name}: expected a model with a fast tokenizer ({_FILE})")
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        # Of a model without the files of a tokenizer, transformers makes one without words.
        raise NoTokenizerError(
            f"--tokenizer={name}: found a model without a tokenizer; expected {_FILE} in it"
        )
    return tokenizer.backend_tokenizer


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
    return _fit(_word_piece(learner.get_vocab(with_added_tokens=False)), max_tokens)


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


def _word_piece(vocabulary: dict[str, int]) -> "Tokenizer":
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
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
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


def _fit(tokenizer: "Tokenizer", max_tokens: int) -> "Tokenizer":
    """Replaces the truncation and padding that a tokenizer was saved with."""
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if max_tokens <= special:
        raise InputError(
            f"--max_tokens={max_tokens}: the tokenizer adds {special} special tokens; expected at "
            f"least {special + 1}"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


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
