"""The recipe of prepare: a source is read, checked, tokenised and written, a chunk at a time."""

import dataclasses
import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from vixml_jax.data import filters, progress, splitting, store
from vixml_jax.data.card import card
from vixml_jax.data.images import image_files
from vixml_jax.data.sources import catalog, glyphs, tabular, xml_repository
from vixml_jax.data.sources.raw import RawDataset, RawItems
from vixml_jax.data.store import PreparedDataset, Writer
from vixml_jax.data.text import batch_tokenizer
from vixml_jax.data.text import tokenizer as tokenizer_lib
from vixml_jax.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GLYPHS = "glyphs"
ENCODINGS = ("utf-8", "latin-1")
MIN_VOCAB_SIZE = 64
_ROWS = 1 << 14  # Ids written at a time.
_AUTO, _NONE = "auto", "none"
FILTERS = (_AUTO, _NONE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What prepare is told beside where from and where to.

    Attributes:
      tokenizer: A directory, a name on the Hugging Face hub, or 'train': one is trained on the
        texts of the training queries and the labels.
      max_tokens: Tokens of an item at most, special ones included.
      encoding: Of the source's texts, 'utf-8' or 'latin-1'.
      vocab_size: Of a tokenizer that is trained.
      propensity_a, propensity_b: Constants of inverse propensity, for sampling and for PSP.
      valid: Share of the training queries held out to choose by; 0: none.
      test: Share of the queries held out to judge on, where the source has no test split.
      split_by: How these are drawn; see `splitting.hold_out`.
      filters: 'auto': filter pairs are those that the source gives, and made where it gives none;
        'none': those that it gives alone.
      seed: Of what is drawn.
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
        for name, choices in (("encoding", ENCODINGS), ("filters", FILTERS)):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"--{name}={getattr(self, name)}: expected one of {', '.join(choices)}"
                )
        for name, least in (("vocab_size", MIN_VOCAB_SIZE), ("max_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"--{name}={getattr(self, name)}: expected at least {least}")
        for name in ("propensity_a", "propensity_b"):
            if not 0.0 <= getattr(self, name) < np.inf:
                raise InputError(
                    f"--{name}={getattr(self, name)}: expected a finite number, not negative"
                )
        for name in ("valid", "test"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"--{name}={getattr(self, name)}: expected a share, from 0 to 1")
        splitting.parse(self.split_by)


def prepare(
    raw: RawDataset, out: str, settings: Settings, *, pictures: str = "", overwrite: bool = False
) -> PreparedDataset:
    """Prepares a data set and opens it; one that is there already, of the same settings, is kept.

    Args:
      raw: What its source has.
      out: Directory to be made.
      settings: What to make of it.
      pictures: A name for where pictures come from that `dataset.json` keeps.
      overwrite: Whether a prepared data set in `out` is made anew.

    Raises:
      InputError: If the source is at fault, or `out` holds something else.
    """
    told = {**dataclasses.asdict(settings), "source": raw.fingerprint, "images": pictures}
    if os.path.isdir(settings.tokenizer):
        told["tokenizer"] = os.path.abspath(settings.tokenizer)
    if settings.tokenizer != tokenizer_lib.TRAIN:
        told["vocab_size"] = None
    if not overwrite and os.path.isfile(os.path.join(out, store.INFO)):
        return _reuse(out, told)
    store.check_free(out, overwrite)
    raw, notes = settle(raw, settings)
    with store.write(out, overwrite=overwrite) as writer:
        fast = _make_tokenizer(settings, raw)
        parts = {name: found.items for name, found in raw.splits.items()} | {"labels": raw.labels}
        processes = batch_tokenizer.processes_for(sum(items.count for items in parts.values()))
        with batch_tokenizer.Encoders(fast, processes) as encoders:
            counts = {
                part: _write_items(writer, part, items, encoders) for part, items in parts.items()
            }
        for split, found in raw.splits.items():
            writer.add_relevance(split, found.relevance)
            writer.add(f"{split}_filter", found.filter)
        if raw.train.weights is not None:
            writer.add("train_weights", raw.train.weights.astype(np.float32, copy=False))
        info = {
            **_describe_content(raw, counts),
            **notes,
            "vocab_size": tokenizer_lib.vocab_size(fast),
            "max_tokens": settings.max_tokens,
            "propensity_a": settings.propensity_a,
            "propensity_b": settings.propensity_b,
            "settings": told,
        }
        writer.finish(info, fast.to_str())
        card.write(PreparedDataset.open(writer.directory), writer.directory)
    return PreparedDataset.open(out)


def check(out: str, settings: Settings, *, overwrite: bool) -> None:
    """Refuses, before a source is read, what could not be done with it.

    Raises:
      InputError: If `out` holds something else, or there is no such tokenizer.
    """
    if not overwrite and not os.path.isfile(os.path.join(out, store.INFO)):
        store.check_free(out, overwrite)
    if settings.tokenizer != tokenizer_lib.TRAIN:
        tokenizer_lib.load(settings.tokenizer, settings.max_tokens)


def settle(raw: RawDataset, settings: Settings) -> tuple[RawDataset, dict[str, Any]]:
    """The data set as it will be written: split, filtered, every training query with a label.

    Returns:
      It, and for `dataset.json` what became of queries without labels and why pairs are filtered.

    Raises:
      InputError: If no training query has a label, or a split cannot be made.
    """
    for split, share in (("test", settings.test), ("valid", settings.valid)):
        if split == "test" and raw.test is None and not share:
            raise InputError("--test=0: the source has no test split; expected a share above 0")
        if share and getattr(raw, split) is None:
            raw = splitting.hold_out(
                raw, split, share, split_by=settings.split_by, seed=settings.seed
            )
        elif share and split == "valid":
            raise InputError(f"--valid={share}: the source has a validation split already")
    if settings.filters == _AUTO:
        raw, why = filters.make_filters(raw)
    else:
        raw, why = filters.given_filters(raw)
    kept = np.diff(raw.train.relevance.indptr) > 0
    if not kept.any():
        raise InputError(f"{raw.name}: no training query has a label")
    bare = {
        f"{name}_without_labels_kept": int(np.sum(np.diff(found.relevance.indptr) == 0))
        for name, found in raw.splits.items()
        if name != "train"
    }
    raw = dataclasses.replace(raw, train=raw.train.select(np.flatnonzero(kept)))
    dropped = {"train_without_labels_dropped": int(np.count_nonzero(~kept))}
    return raw, {**dropped, **bare, "filters": why}


def _describe_content(raw: RawDataset, counts: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Sizes for `dataset.json`."""
    parts = [found.items for found in raw.splits.values()] + [raw.labels]
    widths = [items.images.width for items in parts if items.images is not None]
    return {
        "name": raw.name,
        **{f"num_{part}": found["items"] for part, found in counts.items()},
        "image_width": widths[0] if widths else 0,  # All are equal.
        "counts": counts,
        "relevant_pairs": {name: found.relevance.nnz for name, found in raw.splits.items()},
        "filter_pairs": {name: len(found.filter) for name, found in raw.splits.items()},
        "warnings": list(raw.warnings),
    }


def read_source(
    source: str,
    spool: str = "",
    *,
    encoding: str = "utf-8",
    seed: int = 0,
    find_images: xml_repository.FindImages = image_files.read_images,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    **of_tables: Any,
) -> RawDataset:
    """The data set of a file or a directory, or the built-in one.

    Args:
      source: A directory in the XML repository's layout, tables (see `own.find_tables`), a name of
        the catalogue, or 'glyphs'.
      spool: A directory for what tables hold; it must outlive the result.
      encoding: Of texts.
      seed: Of the split of 'glyphs'.
      find_images: Of the files trn, val, tst and lbl; embeddings beside the texts if not told.
      data_dir, manual_dir: Of a set of the catalogue; see `records.builder`.
      of_tables: See `own.read_tables`.

    Raises:
      InputError: If the source is at fault.
    """
    if source == GLYPHS:
        return glyphs.make(seed)
    if catalog.is_named(source):
        return catalog.read(
            source, data_dir=data_dir, manual_dir=manual_dir, find_images=find_images
        )
    if xml_repository.is_xml_repository(source):
        return xml_repository.read_xml_repository(
            source, encoding=encoding, find_images=find_images
        )
    return tabular.read_tables(
        source, spool, encoding=encoding, find_images=find_images, **of_tables
    )


def _reuse(out: str, settings: dict[str, Any]) -> PreparedDataset:
    """Opens what is there if it was prepared from the same source by the same settings."""
    found = store.read_info(out).get("settings", {})
    changed = sorted(key for key in settings if found.get(key) != settings[key])
    if changed:
        raise InputError(
            f"--out={out}: holds a data set prepared otherwise (other {', '.join(changed)}); "
            "--overwrite replaces it, or choose another directory"
        )
    print(
        f"{out}: prepared already from the same source by the same settings, and kept as it is "
        "(--overwrite prepares it anew)"
    )
    return PreparedDataset.open(out)


def _make_tokenizer(settings: Settings, raw: RawDataset) -> "Tokenizer":
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
    """Writes ids, texts, tokens and pictures; returns how much there is of each."""
    lengths, whole = [np.zeros(1, np.int64)], []
    with (
        writer.strings(f"{part}_texts") as add_texts,
        writer.array(f"{part}_tokens", np.int32) as token_file,
        progress.watch(f"{part} texts", items.count) as done,
    ):
        for chunk, (tokens, counts, uncut) in encoders.encode(items.read_texts()):
            add_texts(chunk)
            token_file.append(tokens)
            lengths.append(counts)
            whole.append(uncut)
            done(len(chunk))
    token_offsets = np.cumsum(np.concatenate(lengths))
    writer.add(f"{part}_tokens_offsets", token_offsets)
    writer.add(f"{part}_whole", np.concatenate(whole))
    with writer.strings(f"{part}_ids") as add_ids:
        for start in range(0, items.count, _ROWS):
            rows = range(start, min(start + _ROWS, items.count))
            add_ids([items.name(row) for row in rows])
    counts = {"items": items.count, "tokens": int(token_offsets[-1]), "images": 0, "with_image": 0}
    if items.images is not None:
        rows = np.arange(items.count)
        offsets = items.images.offsets(rows)
        writer.add(f"{part}_images_offsets", offsets)
        with (
            writer.array(f"{part}_images", np.float16, (items.images.width,)) as file,
            progress.watch(f"{part} images", int(offsets[-1])) as done,
        ):
            for block in items.images.read(rows):
                file.append(block)
                done(len(block))
        counts["images"] = int(offsets[-1])
        counts["with_image"] = int(np.count_nonzero(np.diff(offsets)))
    return counts


def preview(raw: RawDataset, notes: dict[str, Any], *, rows: int = 10) -> str:
    """What was understood of a source: columns, counts, the first rows of each split, warnings.

    Args:
      raw: From `settle`.
      notes: From `settle`.
      rows: Shown of each split.
    """
    lines = list(raw.understood)
    for name, found in raw.splits.items():
        pictures = found.items.images
        shown = 0 if pictures is None else int(pictures.offsets(np.arange(found.items.count))[-1])
        lines.append(
            f"{name:6} {found.items.count:>11,} queries, {found.relevance.nnz:,} labels in all, "
            f"{found.relevance.nnz / max(1, found.items.count):.2f} a query, {shown:,} pictures"
        )
    used = np.bincount(raw.train.relevance.indices, minlength=raw.labels.count)
    lines.append(
        f"labels {raw.labels.count:>11,}, {np.count_nonzero(used == 0):,} of them without a "
        "training query"
    )
    lines += filters.describe(notes["filters"])
    lines += _fates(notes)
    lines += [f"warning: {warning}" for warning in raw.warnings]
    shown = {}
    for name, found in raw.splits.items():
        texts = itertools.islice(itertools.chain.from_iterable(found.items.read_texts()), rows)
        for row, text in enumerate(texts):
            shown[name, row] = (
                text,
                found.relevance.indices[slice(*found.relevance.indptr[row:][:2])],
            )
    wanted = {int(label) for _, labels in shown.values() for label in labels}
    texts = itertools.chain.from_iterable(raw.labels.read_texts())
    spelt = {label: text for label, text in enumerate(texts) if label in wanted}
    for (name, row), (text, labels) in shown.items():
        if row == 0:
            lines.append(f"{name}, the first rows: id | text | labels")
        answers = "; ".join(_short(spelt[int(label)], 30) for label in labels[:6])
        more = f"; {len(labels) - 6} more" if len(labels) > 6 else ""
        called = raw.splits[name].items.name(row)
        lines.append(f"  {_short(called, 20)} | {_short(text, 60)} | {answers}{more}")
    return "\n".join(lines)


def _short(text: str, length: int) -> str:
    """A text on one line, cut."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _fates(notes: dict[str, Any]) -> list[str]:
    """A line on each split that has queries without labels."""
    return [
        f"{count:,} {split} queries without a label were {fate}"
        for split, fate in (("train", "dropped"), ("valid", "kept"), ("test", "kept"))
        if (count := notes.get(f"{split}_without_labels_{fate}"))
    ]


def describe(dataset: PreparedDataset) -> str:
    """A few lines on what was prepared and where it lies."""
    info, counts = dataset.info, dataset.info["counts"]
    lines = [
        f"{part:6} {found['items']:>11,} items {found['tokens']:>13,} tokens"
        f" {found['images']:>11,} pictures (of {found['with_image']:,} items)"
        for part, found in counts.items()
    ]
    lines.append(
        f"{info['relevant_pairs']['train'] / info['num_train']:.2f} labels a training query; "
        f"{info['vocab_size']:,} tokens known; pictures {info['image_width']} wide"
    )
    lines += filters.describe(info["filters"])
    lines += _fates(info)
    lines += [f"warning: {warning}" for warning in info["warnings"]]
    lines.append(f"{dataset.name}: in {os.path.abspath(dataset.path)}")
    if os.path.exists(found := os.path.join(os.path.abspath(dataset.path), card.TEXT)):
        lines.append(f"data card: {found}")  # Sets of before there were cards have none.
    return "\n".join(lines)
