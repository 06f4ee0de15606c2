"""Checks that prepared data were tokenized for the pretrained model that is trained on them.

Another tokenizer gives ids that mean other words to the model. Training then runs to its end, with
a model that has learned little.
"""

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from vixml_jax.data import prepare_line
from vixml_jax.data.store import Items, PreparedDataset
from vixml_jax.data.text import tokenizer as tokenizer_lib
from vixml_jax.errors import InputError
from vixml_jax.runtime import console

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SAMPLE = 500  # Texts of each part that are tokenized again.
_UNUSED = ("version", "truncation", "padding")  # Entries of tokenizer.json that `prepare` replaces.


def check(dataset: PreparedDataset, model: str) -> None:
    """Checks that a data set has the tokens that the tokenizer of a model gives.

    Equal tokenizer files agree. Different ones may agree as well, such as those of two sizes of a
    model, so texts of all parts are then tokenized again and compared token by token.

    Args:
      dataset: Prepared data.
      model: Directory or Hugging Face name of the model.

    Raises:
      InputError: If a text has other tokens; the message has the command that prepares the data for
        the model.
    """
    try:
        wanted = tokenizer_lib.load(model, dataset.max_tokens)
    except tokenizer_lib.NoTokenizerError:
        made = dataset.info.get("settings", {}).get("tokenizer", "another tokenizer")
        console.warning(
            f"--model.pretrained={model} comes without a tokenizer, so it cannot be checked that "
            f"--data={dataset.path} was tokenized for it (--tokenizer={made})"
        )
        return
    stored = tokenizer_lib.load(os.path.dirname(dataset.tokenizer), dataset.max_tokens)
    if _content(stored) == _content(wanted):
        return
    for part in (dataset.labels, dataset.train, dataset.valid, dataset.test):
        text = _first_difference(part, wanted) if part is not None else None
        if text is not None:
            shown = text if len(text) <= 40 else f"{text[:39]}…"
            raise InputError(
                f"--data={dataset.path} was not tokenized by the tokenizer of --model.pretrained="
                f"{model} ({shown!r} has other tokens); prepare it with that tokenizer: "
                f"{prepare_line.again(dataset.info, dataset.path, tokenizer=model)}"
            )


def _content(tokenizer: "Tokenizer") -> dict[str, Any]:
    """What a tokenizer does, without how it truncates and pads."""
    content = json.loads(tokenizer.to_str())
    return {name: value for name, value in content.items() if name not in _UNUSED}


def _first_difference(items: Items, tokenizer: "Tokenizer") -> str | None:
    """A text whose stored tokens are not those of the tokenizer; None: they agree in a sample.

    The sample is spread over all rows and has the first and the last.
    """
    rows = np.unique(np.linspace(0, len(items) - 1, min(_SAMPLE, len(items))).astype(np.int64))
    texts = [items.texts[row] for row in rows.tolist()]
    offsets = items.tokens.offsets
    with tokenizer_lib.library_errors("the tokenizer of the texts"):
        encodings = tokenizer.encode_batch(texts)
    for row, text, found in zip(rows, texts, encodings, strict=True):
        if not np.array_equal(items.tokens.values[offsets[row] : offsets[row + 1]], found.ids):
            return text
    return None
