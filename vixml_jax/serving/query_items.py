"""Turns texts and image embeddings of queries into items, as prepared data hold them."""

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from vixml_jax.data.store import Items, Ragged, Texts
from vixml_jax.data.text import batch_tokenizer
from vixml_jax.data.text import tokenizer as tokenizer_lib
from vixml_jax.errors import InputError

MAX_CHARACTERS = 1 << 16  # Longer texts are cut; the tokens that are read end long before.
_MAX_PIECES = 1 << 17  # Of texts, whose tokens are cached; about 25 MB.


class ItemReader:
    """Tokenizes texts and checks image embeddings; may be used by several threads.

    Attributes:
      num_special: Special tokens around the tokens of a text.
    """

    def __init__(self, directory: str, max_tokens: int, image_width: int):
        """Loads the tokenizer.

        Args:
          directory: Holds the tokenizer.
          max_tokens: Tokens after which texts are cut.
          image_width: Width of the image embeddings that the model reads; 0: it reads none.
        """
        tokenizer = tokenizer_lib.load(directory, max_tokens)
        self._unknown_token = tokenizer.token_to_id("[UNK]")
        self.num_special = sum(map(len, tokenizer_lib.special_tokens(tokenizer)))
        self._encoder = batch_tokenizer.Encoder(tokenizer, _MAX_PIECES)
        self._lock = threading.Lock()
        self._image_width = image_width

    def read(self, texts: Sequence[str], images: Sequence[Any] | None = None) -> Items:
        """Returns texts and images in the form of prepared data.

        Args:
          texts: Texts of the queries.
          images: For each query the embedding of its image [v], of several images [j, v], or None.

        Raises:
          InputError: If texts or images are malformed.
        """
        if isinstance(texts, str):
            raise InputError(f"found one text, {texts[:40]!r}, expected a list of texts")
        checked = [_checked_text(text, query) for query, text in enumerate(texts)]
        with self._lock:
            tokens = self._encoder.encode(checked)
        offsets = np.concatenate([[0], np.cumsum(tokens.lengths)])
        images = [None] * len(texts) if images is None else images
        if len(images) != len(texts):
            raise InputError(f"found images for {len(images)} queries, expected {len(texts)}")
        item_images = None
        if self._image_width:  # Queries without images use the same programs.
            item_images = self._ragged_images(images)
        else:
            _check_without_images(images)
        no_texts = Texts(np.zeros(0, np.uint8), np.zeros(len(texts) + 1, np.int64))
        return Items(no_texts, Ragged(tokens.values, offsets), item_images)

    def has_only_unknown_tokens(self, items: Items) -> list[bool]:
        """Whether the text of each item has tokens, none of which the tokenizer knows."""
        values, offsets = items.tokens
        return [
            b - a > self.num_special
            and self._unknown_token is not None
            and np.count_nonzero(values[a:b] != self._unknown_token) == self.num_special
            for a, b in itertools.pairwise(offsets)
        ]

    def _ragged_images(self, images: Sequence[Any]) -> Ragged:
        """Returns image embeddings of queries, checked, in float16."""
        rows = [np.zeros((0, self._image_width), np.float16)]
        for query, image in enumerate(images):
            values = _float16(query, [] if image is None else image)
            if values.ndim == 1:
                values = values[None] if len(values) else rows[0]
            if values.ndim != 2 or values.shape[1] != self._image_width:
                raise InputError(
                    f"query {query}: found an image of shape {np.shape(image)}, expected "
                    f"embeddings of width {self._image_width}"
                )
            rows.append(values)
            if not np.isfinite(values).all():
                raise InputError(f"query {query}: an image embedding is not finite in float16")
        offsets = np.cumsum([len(row) for row in rows])
        return Ragged(np.concatenate(rows), offsets)


def _check_without_images(images: Sequence[Any]) -> None:
    for query, image in enumerate(images):
        if image is not None and _float16(query, image).size:
            raise InputError(f"query {query}: found an image; the run was trained without images")


def _float16(query: int, image: Any) -> np.ndarray:
    """The embeddings that a caller gave for a query, of any shape."""
    try:
        with np.errstate(over="ignore"):
            return np.asarray(image).astype(np.float16)
    except (TypeError, ValueError):  # Rows of several lengths, or no numbers.
        raise InputError(
            f"query {query}: found images that are no array of numbers, expected embeddings"
        ) from None


def joined(parts: Sequence[Items]) -> Items:
    """Returns the items of several calls of `ItemReader.read`, in order."""
    if len(parts) == 1:
        return parts[0]
    no_texts = Texts(np.zeros(0, np.uint8), np.zeros(sum(map(len, parts)) + 1, np.int64))
    images = None
    if parts[0].images is not None:
        images = _joined([part.images for part in parts])
    return Items(no_texts, _joined([part.tokens for part in parts]), images)


def _joined(parts: Sequence[Ragged]) -> Ragged:
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    values = np.concatenate([part.values for part in parts])
    return Ragged(values, np.concatenate([[0], np.cumsum(lengths)]))


def _checked_text(text: Any, query: int) -> str:
    """Returns the beginning of a text, after checking that it can be encoded."""
    if not isinstance(text, str):
        raise InputError(f"query {query}: found {type(text).__name__}, expected a text")
    text = text[:MAX_CHARACTERS]
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"query {query}: the text contains a lone surrogate") from None
    return text
