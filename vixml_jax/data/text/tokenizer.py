"""Tokenizers: any fast one of Hugging Face, or trained on the texts; the prompt of a decoder."""

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
    "the tokenizer's post-processor does not only put tokens before and after a text; expected one "
    "that does"
)
_LONG_WORD = re.compile(r"\S{100}(?=\S)")  # WordPiece makes [UNK] of longer ones.
_LONG_TEXT = 1000
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load(name: str, max_tokens: int) -> "Tokenizer":
    """The fast tokenizer of a directory or a hub name, set to cut texts and never to pad.

    Args:
      name: A directory with `tokenizer.json` or with a checkpoint; else a model of the hub.
      max_tokens: Length at which texts are cut, special tokens included and kept.

    Raises:
      InputError: If there is no such tokenizer, or the length leaves no room for text.
    """
    from tokenizers import Tokenizer

    path = os.path.join(name, _FILE)
    if os.path.isfile(path):
        try:
            tokenizer = Tokenizer.from_file(path)
        except Exception as error:  # The library raises bare Exception.
            raise InputError(f"{path}: not a tokenizer ({error})") from None
    else:
        tokenizer = _resolve(name)
    return _fit(tokenizer, max_tokens)


def _resolve(name: str) -> "Tokenizer":
    """The tokenizer that transformers finds under a name; slow to import, so only here."""
    import transformers

    try:
        found = transformers.AutoTokenizer.from_pretrained(name, use_fast=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"--tokenizer={name}: neither a directory with {_FILE} nor a model of the Hugging Face "
            f"hub ({reason})"
        ) from None
    if not found.is_fast:
        raise InputError(f"--tokenizer={name}: has no fast tokenizer ({_FILE})")
    return found.backend_tokenizer


def train(
    read_texts: Callable[[], Iterable[list[str]]], *, vocab_size: int, max_tokens: int
) -> "Tokenizer":
    """A WordPiece tokenizer in BERT's manner (lower case, no accents), the same for the same texts.

    Args:
      read_texts: Starts to read the texts anew, and gives them a chunk at a time.
      vocab_size: Tokens at most, the five special ones included; more only where single
        characters alone are more.
      max_tokens: Length at which texts are cut, special tokens included and kept.
    """
    from tokenizers import trainers

    def cut_texts() -> Iterator[list[str]]:
        """Texts without words so long that learning, which takes the square of it, would hang."""
        for chunk in read_texts():
            yield [
                _LONG_WORD.sub(r"\g<0> ", text) if len(text) > _LONG_TEXT else text
                for text in chunk
            ]

    learner = _word_piece({"[UNK]": 0})
    pieces = sorted(_continuations(learner, cut_texts()))
    # The trainer numbers characters within words as a hash map happens to give them, and breaks
    # ties by these numbers. Named as special tokens they are numbered first, in our order.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*_SPECIAL, *pieces], show_progress=False
    )
    learner.train_from_iterator(cut_texts(), trainer)
    # A new one with what was learnt, since in the old one those characters remain special.
    return _fit(_word_piece(learner.get_vocab(with_added_tokens=False)), max_tokens)


def _continuations(tokenizer: "Tokenizer", texts: Iterable[list[str]]) -> set[str]:
    """The characters that occur within words, but not as their first, as WordPiece marks them."""
    between_spaces: set[str] = set()
    for chunk in texts:
        between_spaces.update(tokenizer.normalizer.normalize_str("\n".join(chunk)).split())
    found: set[str] = set()
    for part in between_spaces:  # Once each: a Python call a text would take minutes.
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(part):
            found.update(word[1:])
    return {f"##{character}" for character in found}


def _word_piece(vocabulary: dict[str, int]) -> "Tokenizer":
    """BERT's tokenizer; it frames texts once the vocabulary has the special tokens."""
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
    """Replaces the tokenizer's own cutting and padding, which checkpoints are shipped with."""
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if max_tokens <= special:
        raise InputError(
            f"--max_tokens={max_tokens}: the tokenizer adds {special} special tokens, expected at "
            f"least {special + 1}"
        )
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def special_tokens(tokenizer: "Tokenizer") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer adds before a text and after it.

    Raises:
      InputError: If it does something else.
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
    """How an item is written for a decoder (paper, section 3).

    [text piece][text][image piece][images][end], or images first. Begin tokens stand once, at the
    start of all, whatever the tokenizer would add to each piece; a picture's piece stands only
    where there is a picture.

    Args:
      tokenizer: Of the prepared texts.
      text: Piece before the text.
      images: Piece before the pictures.
      order: "text_image" or "image_text".
      num_images: Pictures of an item at most.
      end: The end token where the tokenizer adds none; None: there is none.
    """
    before, after = special_tokens(tokenizer)
    say, show = (
        tuple(tokenizer.encode(piece, add_special_tokens=False).ids) for piece in (text, images)
    )
    last = after[-1:] or (() if end is None else (end,))
    parts: list[Part] = [say, "text", show, "images"]
    if order == "image_text":
        parts = [show, "images", say, "text"]

    def framed(parts: list[Part]) -> tuple[Part, ...]:
        return tuple(part for part in (before, *parts, last) if part)

    return Layout(
        num_images, framed(parts), framed([say, "text"]), False, (len(before), len(after))
    )


def vocab_size(tokenizer: "Tokenizer") -> int:
    """Rows that an embedding table needs: one more than the largest id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
