"""Opens the data that `--data` names; a source that is not prepared yet is prepared, in a cache."""

import dataclasses
import hashlib
import json
import math
import os
from typing import Any

from vixml_jax.data import prepare_line, preprocessing, store, summary
from vixml_jax.data.images import named_images
from vixml_jax.data.preprocessing import Settings
from vixml_jax.data.sources import catalog, raw, tabular_files
from vixml_jax.data.sources.published import PublicDataset
from vixml_jax.data.store import PreparedDataset
from vixml_jax.data.text import tokenizer as tokenizer_lib
from vixml_jax.errors import InputError
from vixml_jax.runtime import console
from vixml_jax.storage import atomic, locks

VALID = 0.1  # Fraction of the training queries for validation, if the source has no such split.
_GLYPH_TOKENS = 16  # Maximum number of tokens of a text of the built-in data.
_TOKENIZER_FILES = (store.TOKENIZER, "vocab.txt", "vocab.json", "merges.txt")


class NotPreparedError(InputError):
    """A data set of the catalogue is named under a path where there is none.

    Attributes:
      dataset: The data set.
    """

    def __init__(self, message: str, dataset: PublicDataset):
        super().__init__(message)
        self.dataset = dataset


def open_glyphs(path: str, tokenizer: str) -> PreparedDataset:
    """Opens the built-in data set in `path`, where it is prepared on first use.

    Args:
      path: Directory of the data set.
      tokenizer: Directory or Hugging Face name of the model that reads it; empty: one is trained.
    """
    preprocessing.note_glyphs("data")
    if os.path.exists(path):
        return PreparedDataset.open(path)
    settings = Settings(max_tokens=_GLYPH_TOKENS, tokenizer=tokenizer or tokenizer_lib.TRAIN)
    return preprocessing.prepare(
        preprocessing.read_source(preprocessing.GLYPHS),
        path,
        settings,
        arguments=["--source=glyphs"],
    )


def open_source(source: str, tokenizer: str, cache: str) -> PreparedDataset:
    """Opens a prepared data set, or prepares a source by the defaults of `prepare`.

    Beside the defaults, a validation split is held out if the source has none. The source is
    prepared again if one of its files has changed.

    Args:
      source: Directory of a prepared data set, or what `prepare --source` accepts.
      tokenizer: Directory or Hugging Face name of the model that reads the data; empty: a tokenizer
        is trained.
      cache: Local directory for data prepared here.

    Raises:
      NotPreparedError: If there is nothing under a path that names a data set of the catalogue.
      InputError: If there is nothing else under it, or the source cannot be prepared.
    """
    if os.path.isfile(os.path.join(source, store.INFO)):
        return PreparedDataset.open(source)
    _check_exists(source, tokenizer)
    settings = Settings(tokenizer=tokenizer or tokenizer_lib.TRAIN)
    cache = os.path.abspath(os.path.expanduser(cache))
    os.makedirs(cache, exist_ok=True)
    path = os.path.join(cache, f"{_stem(source)}-{_digest(source, settings)}")
    name = os.path.basename(path) + ".lock"
    with locks.exclusive(cache, doing=f"preparing {source}", wait_s=math.inf, name=name):
        if os.path.isdir(path):
            console.status(f"{source}: prepared before, in {path}")
            return PreparedDataset.open(path)
        console.status(
            f"{source}: preparing it with "
            + (f"the tokenizer of {tokenizer}" if tokenizer else "a tokenizer trained on its texts")
        )
        return _prepare(source, path, settings)


def _check_exists(source: str, tokenizer: str) -> None:
    if os.path.exists(source) or catalog.is_named(source) or source.startswith(tabular_files.HUB):
        return
    known = catalog.recognise(source)
    if known is not None:
        how = catalog.how_to_get(known.dataset, source, tokenizer or tokenizer_lib.TRAIN)
        raise NotPreparedError(f"--data={source}: not found; {how}", known.dataset)
    raise InputError(
        f"--data={source}: not found; expected a directory that python -m vixml_jax.prepare wrote, "
        "or a source to prepare, such as shop.csv"
    )


def _prepare(source: str, path: str, settings: Settings) -> PreparedDataset:
    with atomic.scratch(path) as spool:
        try:
            contents = preprocessing.read_source(
                source, spool, find_images=named_images.find_embeddings_or_names
            )
        except InputError as error:
            if not os.path.isdir(source):
                raise
            raise InputError(
                f"{os.path.join(source, store.INFO)}: not found, so --data={source} was not "
                f"written by python -m vixml_jax.prepare; as a source: {error}"
            ) from None
        constants = catalog.propensity(source, preprocessing.sizes_of(contents))
        settings = dataclasses.replace(
            settings,
            valid=0.0 if contents.valid else VALID,
            propensity_a=constants.a,
            propensity_b=constants.b,
        )
        given = {"tokenizer": settings.tokenizer, "valid": settings.valid}
        arguments = [f"--source={source}", *(f"--{name}={value}" for name, value in given.items())]
        dataset = preprocessing.prepare(contents, path, settings, arguments=arguments)
    other = prepare_line.first(source, f"data/{_stem(source)}", **given)
    lines = [
        *contents.summary,
        summary.describe(dataset),
        f"inverse propensity: {constants}",
        f"other columns, texts, images or settings: {other}",
    ]
    console.status("\n".join(lines))
    return dataset


def _stem(source: str) -> str:
    return os.path.basename(os.path.abspath(source)).partition(".")[0]


def _digest(source: str, settings: Settings) -> str:
    """Identifies a source, the state of its files and the settings."""
    files = [source] if os.path.isfile(source) else []
    if os.path.isdir(source):
        files = [os.path.join(top, name) for top, _, names in os.walk(source) for name in names]
    identity: dict[str, Any] = {
        "format": store.FORMAT,
        "source": os.path.abspath(source) if os.path.exists(source) else source,
        "files": raw.file_stats(files, os.path.dirname(source) or "."),
        "settings": dataclasses.asdict(settings) | {"valid": VALID},
        "tokenizer": _tokenizer_stats(settings.tokenizer),
    }
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tokenizer_stats(name: str) -> dict[str, list[int]]:
    paths = [os.path.join(name, file) for file in _TOKENIZER_FILES]
    return raw.file_stats([path for path in paths if os.path.isfile(path)])
