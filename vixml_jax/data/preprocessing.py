"""Data preparation: a source is read, split, filtered, tokenized and written, chunk by chunk."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from vixml_jax.data import filters, splitting, store
from vixml_jax.data.card import card
from vixml_jax.data.images import image_embeddings, named_images
from vixml_jax.data.sources import catalog, glyphs, tabular, xml_repository
from vixml_jax.data.sources.delimited import USUAL, Dialect
from vixml_jax.data.sources.raw import RawDataset, RawItems, RawQueries
from vixml_jax.data.store import PreparedDataset, Writer
from vixml_jax.data.text import batch_tokenizer
from vixml_jax.data.text import tokenizer as tokenizer_lib
from vixml_jax.errors import InputError
from vixml_jax.runtime import console, progress
from vixml_jax.storage import text_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GLYPHS = "glyphs"
MIN_VOCAB_SIZE = 64
_LARGEST = {
    "vocab_size": 1 << 20,
    "max_tokens": 1 << 20,
    "seed": (1 << 63) - 1,
    "propensity_a": 4.0,
    "propensity_b": 10_000.0,
}
_CHUNK_ROWS = 1 << 14  # Ids written at a time.
_AUTO, _NONE = "auto", "none"
FILTERS = (_AUTO, _NONE)
# Embeds the images that a source names, within a context; None: other processes still embed some.
EmbedImages = Callable[[RawDataset], contextlib.AbstractContextManager[RawDataset | None]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of data preparation, as the flags of `prepare`.

    Attributes:
      tokenizer: A directory, a model on the Hugging Face hub, or 'train' to train a tokenizer on
        the texts of the training queries and the labels.
      max_tokens: Maximum number of tokens per item, including special tokens.
      encoding: Text encoding of the source.
      vocab_size: Maximum vocabulary size of a trained tokenizer.
      propensity_a, propensity_b: Constants A and B of the inverse propensities, for sampling and
        for PSP@k.
      valid: Fraction of the training queries to hold out as a validation split; 0 for none.
      test: Fraction of the queries to hold out as a test split, if the source has none.
      split_by: How to draw them; see `splitting.hold_out`.
      filters: 'auto' uses the filter pairs of the source and generates them for splits without;
        'none' only uses those of the source.
      seed: Random seed.
    """

    tokenizer: str = tokenizer_lib.TRAIN
    max_tokens: int = 32
    encoding: str = "utf-8"
    vocab_size: int = 8192
    propensity_a: float = 0.6
    propensity_b: float = 2.6
    valid: float = 0.0
    test: float = 0.2
    split_by: str = splitting.RANDOM
    filters: str = _AUTO
    seed: int = 0

    def __post_init__(self) -> None:
        def require(name: str, is_valid: bool, expected: str) -> None:
            if not is_valid:
                raise InputError(f"--{name}={getattr(self, name)}: expected {expected}")

        text_files.check_encoding(self.encoding)
        require("filters", self.filters in FILTERS, f"one of {', '.join(FILTERS)}")
        for name, least in (("vocab_size", MIN_VOCAB_SIZE), ("max_tokens", 1), ("seed", 0)):
            require(name, getattr(self, name) >= least, f"at least {least}")
            require(name, getattr(self, name) <= _LARGEST[name], f"at most {_LARGEST[name]:,}")
        for name in ("propensity_a", "propensity_b"):
            most = _LARGEST[name]
            require(name, 0.0 <= getattr(self, name) <= most, f"a number from 0 to {most}")
        for name in ("valid", "test"):
            require(name, 0.0 <= getattr(self, name) < 1.0, "a fraction of at least 0 and below 1")
        splitting.parse(self.split_by)


def prepare(
    raw: RawDataset,
    out: str,
    settings: Settings,
    *,
    image_source: str = "",
    embed_images: EmbedImages = lambda raw: contextlib.nullcontext(named_images.drop(raw)),
    arguments: Sequence[str] | None = None,
    overwrite: bool = False,
) -> PreparedDataset | None:
    """Prepares a data set and opens it; an existing one with the same settings is kept.

    Args:
      raw: Contents of the source.
      out: Directory to create.
      settings: The settings.
      image_source: Description of how images are embedded, stored in `dataset.json`.
      embed_images: Embeds the images that the source names. This may take hours, and is the last
        step that reads the source: all checks are made before. Within its context the data set is
        written. It may yield None: other processes still embed some.
      arguments: Flags of the command, stored in `dataset.json` for `prepare_line.again`.
      overwrite: Whether to replace a prepared data set in `out`.

    Returns:
      The data set; None: it is left to another process.

    Raises:
      InputError: If the source is not valid, or `out` contains something else.
    """
    stored_settings = {
        **dataclasses.asdict(settings),
        "source": raw.fingerprint,
        "images": image_source,
    }
    if os.path.isdir(settings.tokenizer):
        stored_settings["tokenizer"] = os.path.abspath(settings.tokenizer)
    if settings.tokenizer != tokenizer_lib.TRAIN:
        stored_settings["vocab_size"] = None
    if not overwrite and os.path.isfile(os.path.join(out, store.INFO)):
        return _reuse(out, stored_settings)
    store.check_free(out, overwrite)
    raw, notes = split_and_filter(raw, settings)
    with embed_images(raw) as embedded:
        if embedded is None:
            return None
        given = {} if arguments is None else {"arguments": list(arguments)}
        _write(embedded, out, settings, notes | {"settings": stored_settings} | given, overwrite)
    return PreparedDataset.open(out)


def _write(
    raw: RawDataset, out: str, settings: Settings, notes: dict[str, Any], overwrite: bool
) -> None:
    """Tokenizes and writes a data set, whose images are embedded.

    Args:
      raw: The data set.
      out: Directory to create.
      settings: The settings.
      notes: More of `dataset.json`.
      overwrite: Whether to replace a prepared data set in `out`.
    """
    with store.write(out, overwrite=overwrite) as writer:
        tokenizer = _make_tokenizer(settings, raw)
        parts = {split: queries.items for split, queries in raw.splits.items()}
        parts["labels"] = raw.labels
        processes = batch_tokenizer.processes_for(sum(items.count for items in parts.values()))
        with batch_tokenizer.Encoders(tokenizer, processes) as encoders:
            counts = {
                part: _write_items(writer, part, items, encoders) for part, items in parts.items()
            }
        for split, queries in raw.splits.items():
            writer.add_relevance(split, queries.relevance)
            writer.add(f"{split}_filter", queries.filter)
        if raw.train.weights is not None:
            writer.add("train_weights", raw.train.weights.astype(np.float32, copy=False))
        info = {
            **_describe_content(raw, counts),
            **notes,
            "vocab_size": tokenizer_lib.vocab_size(tokenizer),
            "max_tokens": settings.max_tokens,
            "propensity_a": settings.propensity_a,
            "propensity_b": settings.propensity_b,
        }
        writer.finish(info, tokenizer.to_str())
        card.write(PreparedDataset.open(writer.directory), writer.directory)


def note_glyphs(flag: str) -> None:
    """Says that the built-in data are meant, if there is a file or directory of their name."""
    if os.path.lexists(GLYPHS):
        console.status(
            f"--{flag}={GLYPHS}: the built-in data; --{flag}=./{GLYPHS} names what is in this "
            "directory"
        )


def check(out: str, settings: Settings, *, overwrite: bool) -> None:
    """Checks the settings that do not depend on the source, before it is read.

    Raises:
      InputError: If `out` contains something else, or the tokenizer does not exist.
    """
    if not overwrite and not os.path.isfile(os.path.join(out, store.INFO)):
        store.check_free(out, overwrite)
    if settings.tokenizer != tokenizer_lib.TRAIN:
        tokenizer_lib.load(settings.tokenizer, settings.max_tokens)


def sizes_of(raw: RawDataset) -> dict[str, int]:
    """Numbers of items of each split that the source has, and of the labels."""
    return {
        **{split: queries.items.count for split, queries in raw.splits.items() if split != "valid"},
        "labels": raw.labels.count,
    }


def split_and_filter(raw: RawDataset, settings: Settings) -> tuple[RawDataset, dict[str, Any]]:
    """The data set with all splits and filter pairs, without training queries that have no label.

    Returns:
      The data set, and notes for `dataset.json`: numbers of queries without labels, and the report
      of `filters.make_filters`.

    Raises:
      InputError: If no training query has a label, or a split cannot be made.
    """
    num_read = sum(queries.items.count for queries in raw.splits.values())
    has_labels = _labelled(raw.train)
    if not has_labels.any():
        raise InputError(f"{raw.name}: no training query has a label; expected at least one")
    # Before queries are held out: one without a label can be neither trained on nor measured.
    raw = dataclasses.replace(raw, train=raw.train.select(np.flatnonzero(has_labels)))
    held_out = [split for split in ("test", "valid") if getattr(raw, split) is None]
    for split, fraction in (("test", settings.test), ("valid", settings.valid)):
        if split == "test" and raw.test is None and not fraction:
            raise InputError("--test=0: the source has no test split; expected a fraction above 0")
        if fraction and getattr(raw, split) is None:
            raw = splitting.hold_out(
                raw, split, fraction, split_by=settings.split_by, seed=settings.seed
            )
        elif fraction and split == "valid":
            raise InputError(
                f"--valid={fraction}: the source has a validation split already; expected 0"
            )
    if settings.filters == _AUTO:
        raw, filter_report = filters.make_filters(raw)
    else:
        raw, filter_report = filters.given_filters(raw)
    notes: dict[str, Any] = {
        "rows_read": num_read,
        "train_without_labels_dropped": int(np.count_nonzero(~has_labels)),
        "filters": filter_report,
    }
    for split in ("test", "valid"):
        queries = getattr(raw, split)
        if queries is None:
            continue
        has_labels = _labelled(queries)
        num_without = int(np.count_nonzero(~has_labels))
        if split in held_out:  # Their only labels were the queries themselves.
            notes[f"{split}_without_labels_dropped"] = num_without
            queries = queries.select(np.flatnonzero(has_labels))
            if not queries.items.count:
                raise InputError(
                    f"{raw.name}: no label of a query held out for {split} is another item than "
                    "the query; pass --filters=none, or a larger fraction"
                )
            raw = dataclasses.replace(raw, **{split: queries})
        notes[f"{split}_without_labels_kept"] = 0 if split in held_out else num_without
    return raw, notes


def _labelled(queries: RawQueries) -> Bool[np.ndarray, " n"]:
    """Whether each query has a label."""
    return np.diff(queries.relevance.indptr) > 0


def _describe_content(raw: RawDataset, counts: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Name, sizes and warnings for `dataset.json`."""
    parts = [queries.items for queries in raw.splits.values()] + [raw.labels]
    widths = [items.images.width for items in parts if items.images is not None]
    return {
        "name": raw.name,
        **{f"num_{part}": part_counts["items"] for part, part_counts in counts.items()},
        "image_width": widths[0] if widths else 0,  # All widths are equal.
        "counts": counts,
        "relevant_pairs": {split: queries.relevance.nnz for split, queries in raw.splits.items()},
        "filter_pairs": {split: len(queries.filter) for split, queries in raw.splits.items()},
        **({} if raw.reading is None else {"reading": dataclasses.asdict(raw.reading)}),
        "notes": list(raw.notes),
        "warnings": list(raw.warnings),
    }


def read_source(
    source: str,
    spool: str = "",
    *,
    dialect: Dialect = USUAL,
    seed: int = 0,
    find_images: xml_repository.FindImages = image_embeddings.read_images,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    **table_options: Any,
) -> RawDataset:
    """Reads a source of any kind.

    Args:
      source: Tables (see `tabular_files.find_tables`), a directory in the XML repository's layout,
        the name of a data set of the catalogue, or 'glyphs'.
      spool: A directory for temporary files of tables, which must outlive the result.
      dialect: Text encoding; delimiter and quotes of csv and tsv.
      seed: Random seed of the split of 'glyphs'.
      find_images: Finds the images of files with the prefixes trn, val, tst and lbl; by default
        embeddings beside the texts.
      data_dir, manual_dir: For a data set of the catalogue; see `tfds_records.builder`.
      table_options: Options of `tabular.read_tables`.

    Raises:
      InputError: If the source does not exist or is not valid.
    """
    if source == GLYPHS:
        return glyphs.make(seed)
    if catalog.is_named(source):
        return catalog.read(
            source, data_dir=data_dir, manual_dir=manual_dir, find_images=find_images
        )
    if xml_repository.is_xml_repository(source):
        return xml_repository.read_xml_repository(
            source, encoding=dialect.encoding, find_images=find_images
        )
    return tabular.read_tables(
        source, spool, dialect=dialect, find_images=find_images, **table_options
    )


def _reuse(out: str, settings: dict[str, Any]) -> PreparedDataset:
    """Opens an existing data set if it was prepared from the same source with these settings."""
    existing = store.read_info(out).get("settings", {})
    changed = sorted(key for key in settings if existing.get(key) != settings[key])
    if changed:
        raise InputError(
            f"--out={out}: contains a prepared data set that differs in {', '.join(changed)}; pass "
            "--overwrite to replace it, or choose another directory"
        )
    console.status(
        f"{out}: already prepared from the same source with the same settings; kept as it is "
        "(--overwrite prepares it again)"
    )
    return PreparedDataset.open(out)


def _make_tokenizer(settings: Settings, raw: RawDataset) -> "Tokenizer":
    """The tokenizer of the settings, trained if requested."""
    if settings.tokenizer != tokenizer_lib.TRAIN:
        return tokenizer_lib.load(settings.tokenizer, settings.max_tokens)

    def texts() -> Iterator[list[str]]:
        yield from raw.train.items.read_texts()
        yield from raw.labels.read_texts()

    return tokenizer_lib.train(
        texts, vocab_size=settings.vocab_size, max_tokens=settings.max_tokens
    )


def _write_items(
    writer: Writer, part: str, items: RawItems, encoders: batch_tokenizer.Encoders
) -> dict[str, int]:
    """Writes the ids, texts, tokens and images of a part, and returns their numbers."""
    lengths, full_lengths = [np.zeros(1, np.int64)], []
    with (
        writer.strings(f"{part}_texts") as add_texts,
        writer.array(f"{part}_tokens", np.int32) as token_file,
        progress.track(f"{part} texts", items.count, unit="texts") as done,
    ):
        for chunk, encoded in encoders.encode(items.read_texts()):
            add_texts(chunk)
            token_file.append(encoded.values)
            lengths.append(encoded.lengths)
            full_lengths.append(encoded.full_lengths)
            done(len(chunk))
    token_offsets = np.cumsum(np.concatenate(lengths))
    writer.add(f"{part}_tokens_offsets", token_offsets)
    writer.add(f"{part}_whole", np.concatenate(full_lengths))
    with writer.strings(f"{part}_ids") as add_ids:
        for start in range(0, items.count, _CHUNK_ROWS):
            rows = range(start, min(start + _CHUNK_ROWS, items.count))
            add_ids([items.name(row) for row in rows])
    counts = {"items": items.count, "tokens": int(token_offsets[-1]), "images": 0, "with_image": 0}
    if items.images is not None:
        rows = np.arange(items.count)
        offsets = items.images.offsets(rows)
        writer.add(f"{part}_images_offsets", offsets)
        with (
            writer.array(f"{part}_images", np.float16, (items.images.width,)) as file,
            progress.track(f"{part} images", int(offsets[-1]), unit="images") as done,
        ):
            for block in items.images.read(rows):
                file.append(block)
                done(len(block))
        counts["images"] = int(offsets[-1])
        counts["with_image"] = int(np.count_nonzero(np.diff(offsets)))
    return counts
