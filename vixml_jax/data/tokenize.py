"""Texts to ragged int32 tokens, by any fast Hugging Face tokenizer or one trained on the texts."""

import itertools
import json
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from vixml_jax.data import pieces
from vixml_jax.data.packing import Layout, Part
from vixml_jax.data.store import ranges
from vixml_jax.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TRAIN = "train"
_FILE = "tokenizer.json"
_MOST_PIECES = 1 << 20  # Remembered, of four tokens on average: some 200 MB.
_TOGETHER = 64  # New pieces tokenised as one text.
_NO_FRAME = (
    "the tokenizer's post-processor does not only put tokens before and after a text; expected one "
    "that does"
)
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

    learner = _word_piece({"[UNK]": 0})
    pieces = sorted(_continuations(learner, read_texts()))
    # The trainer numbers characters within words as a hash map happens to give them, and breaks
    # ties by these numbers. Named as special tokens they are numbered first, in our order.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*_SPECIAL, *pieces], show_progress=False
    )
    learner.train_from_iterator(read_texts(), trainer)
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
        raise InputError(_NO_FRAME)
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


def encode(
    tokenizer: "Tokenizer", texts: list[str]
) -> tuple[Int[np.ndarray, " total"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Tokens of texts, as `Encoder.encode` gives them; for many calls make an `Encoder`."""
    return Encoder(tokenizer).encode(texts)


class Encoder:
    """Texts to tokens, each piece of a text once: the tokens of pieces seen before are looked up.

    Most tokenizers treat what stands between spaces by itself, and words repeat: looking them up
    takes a tenth of the time. What is new goes to the tokenizer, on all processors.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        """Takes a tokenizer that cuts as `load` has it.

        Raises:
          InputError: If it does more than to put tokens before and after a text.
        """
        from tokenizers import Tokenizer

        self._before, self._after = special_tokens(tokenizer)
        frame = len(self._before) + len(self._after)
        cut = tokenizer.truncation
        self._room = cut["max_length"] - frame if cut else np.iinfo(np.int32).max
        written = tokenizer.to_str()
        self._split, self._end = pieces.rule_of(json.loads(written))
        self._end_token = None if self._end is None else tokenizer.token_to_id(self._end.strip())
        self._uncut = Tokenizer.from_str(written)
        self._uncut.no_truncation()
        self._uncut.no_padding()
        for text in ("", "b a"):
            bare = self._uncut.encode(text, add_special_tokens=False).ids
            if self._uncut.encode(text).ids != [*self._before, *bare, *self._after]:
                raise InputError(_NO_FRAME)
        self._numbers = _Numbers()
        self._tokens = np.zeros(0, np.int32)  # Of all known pieces, one after the other.
        self._ends = np.zeros(1, np.int64)  # Where those of piece i end, at i + 1.

    def encode(
        self, texts: list[str]
    ) -> tuple[Int[np.ndarray, " total"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """Tokens of texts as the tokenizer cuts them.

        Returns:
          The tokens of all texts one after the other, int32; the number of each text's, int64; and
          the number that it had if it were not cut, special tokens included, int32.
        """
        split = [self._split(text) for text in texts]
        counts = np.fromiter(map(len, split), np.int64, len(split))
        numbers = map(self._numbers.__getitem__, itertools.chain.from_iterable(split))
        found = np.fromiter(numbers, np.int64, int(counts.sum()))
        del split
        self._learn()
        at = self._ends[found]
        sizes = self._ends[found + 1] - at
        ends = np.concatenate([[0], np.cumsum(sizes)])  # As if no text were cut.
        last = np.cumsum(counts)
        begins = ends[last - counts]
        whole = ends[last] - begins
        left = self._room - (ends[:-1] - np.repeat(begins, counts))  # Room for each piece.
        kept = self._tokens[ranges(at, np.clip(left, 0, sizes))]
        self._forget()
        frame = len(self._before) + len(self._after)
        lengths = np.minimum(whole, self._room) + frame
        return self._frame(kept, lengths), lengths, (whole + frame).astype(np.int32)

    def _learn(self) -> None:
        """Has the new pieces tokenised."""
        new, self._numbers.new = self._numbers.new, []
        if new:
            tokens, lengths = self._tokenise(new)
            self._tokens = np.concatenate([self._tokens, tokens])
            self._ends = np.concatenate([self._ends, self._ends[-1] + np.cumsum(lengths)])

    def _tokenise(self, new: list[str]) -> tuple[Int[np.ndarray, " total"], Int[np.ndarray, " n"]]:
        """Tokens of pieces one after the other, and the number of each piece's."""
        if self._end is not None:  # A call's cost is shared by many pieces.
            parts = (new[start : start + _TOGETHER] for start in range(0, len(new), _TOGETHER))
            tokens, _ = self._run([self._end.join([*part, ""]) for part in parts])
            ends = tokens == self._end_token
            at = np.flatnonzero(ends)
            if len(at) == len(new):  # Else some piece says the end itself.
                return tokens[~ends], np.diff(at, prepend=-1) - 1
        return self._run(new)

    def _run(self, texts: list[str]) -> tuple[Int[np.ndarray, " total"], Int[np.ndarray, " n"]]:
        """What the tokenizer makes of texts, and the number of tokens of each."""
        found = self._uncut.encode_batch_fast(texts, add_special_tokens=False)
        rows = [np.array(encoding.ids, np.int32) for encoding in found]
        return np.concatenate(rows), np.fromiter(map(len, rows), np.int64, len(rows))

    def _forget(self) -> None:
        """Keeps of the pieces those first seen: the frequent ones are among them."""
        most = int(np.searchsorted(self._ends, 4 * _MOST_PIECES, side="right")) - 1
        most = min(most, _MOST_PIECES)
        while len(self._numbers) > most:
            self._numbers.popitem()  # The last one.
        self._ends = self._ends[: most + 1]
        self._tokens = self._tokens[: self._ends[-1]]

    def _frame(
        self, kept: Int[np.ndarray, " k"], lengths: Int[np.ndarray, " n"]
    ) -> Int[np.ndarray, " total"]:
        """Puts the special tokens before and after each text."""
        tokens = np.empty(int(lengths.sum()), np.int32)
        text = np.ones(len(tokens), bool)
        ends = np.cumsum(lengths)
        for begins, special in (
            (ends - lengths, self._before),
            (ends - len(self._after), self._after),
        ):
            for i, token in enumerate(special):
                tokens[begins + i] = token
                text[begins + i] = False
        tokens[text] = kept
        return tokens


class _Numbers(dict):
    """Numbers pieces of text in the order in which they are first asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []

    def __missing__(self, piece: str) -> int:
        self[piece] = number = len(self)
        self.new.append(piece)
        return number
