"""Summaries of data sets for people: how a source is read, and what is prepared."""

import itertools
import os
from typing import Any

import numpy as np

from vixml_jax.data import filters
from vixml_jax.data.card import card
from vixml_jax.data.sources.raw import SPLITS, RawDataset
from vixml_jax.data.store import PreparedDataset

_SHOWN_LABELS = 6  # Labels per query in a preview.


def preview(raw: RawDataset, notes: dict[str, Any], *, rows: int = 10) -> str:
    """Returns how a source was read: columns, sizes, warnings and the first rows of each split.

    Args:
      raw: The data set, from `preprocessing.split_and_filter`.
      notes: The notes, from `preprocessing.split_and_filter`.
      rows: Number of rows to show of each split.
    """
    table = [("", "queries", "labels", "per query", "images")]
    for split, queries in raw.splits.items():
        count, num_relevant, images = queries.items.count, queries.relevance.nnz, 0
        if queries.items.images is not None:
            images = int(queries.items.images.offsets(np.arange(count))[-1])
        per_query = f"{num_relevant / max(1, count):.2f}"
        table.append((split, f"{count:,}", f"{num_relevant:,}", per_query, f"{images:,}"))
    label_counts = np.bincount(raw.train.relevance.indices, minlength=raw.labels.count)
    num_unused = np.count_nonzero(label_counts == 0)
    lines = [*raw.summary, *raw.notes, "", *_align(table)]
    lines.append(f"{raw.labels.count:,} labels, {num_unused:,} of them without a training query")
    lines += filters.describe(notes["filters"])
    lines += _describe_rows(
        notes, {split: queries.items.count for split, queries in raw.splits.items()}
    )
    lines += _sample_rows(raw, rows)
    lines += [f"warning: {warning}" for warning in raw.warnings]
    return "\n".join(lines).lstrip("\n")


def _sample_rows(raw: RawDataset, rows: int) -> list[str]:
    """A table with the first rows of each split: id, text and labels."""
    texts, labels = {}, {}
    for split, queries in raw.splits.items():
        first = itertools.chain.from_iterable(queries.items.read_texts())
        texts[split] = list(itertools.islice(first, rows))
        indptr = queries.relevance.indptr[: len(texts[split]) + 1]
        labels[split] = np.split(queries.relevance.indices[: indptr[-1]], indptr[1:-1])
    wanted = {int(label) for split in labels for row in labels[split] for label in row}
    all_texts = enumerate(itertools.chain.from_iterable(raw.labels.read_texts()))
    label_text = {label: _shorten(text, 30) for label, text in all_texts if label in wanted}
    lines = []
    for split, split_texts in texts.items():
        table = [("  id", "text", "labels")]
        for row, text in enumerate(split_texts):
            row_labels = labels[split][row]
            shown = [label_text[int(label)] for label in row_labels[:_SHOWN_LABELS]]
            if len(row_labels) > _SHOWN_LABELS:
                shown.append(f"{len(row_labels) - _SHOWN_LABELS} more")
            item_id = _shorten(raw.splits[split].items.name(row), 20)
            table.append((f"  {item_id}", _shorten(text, 60), "; ".join(shown)))
        lines += ["", f"First rows of {split}:", *_align(table, align="<")]
    return [*lines, ""]


def _align(table: list[tuple[str, ...]], align: str = ">") -> list[str]:
    """Lines of a table; the first column is aligned to the left, the others as `align` says."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    alignments = ["<", *align * (len(widths) - 1)]
    return [
        "  ".join(
            f"{cell:{alignment}{width}}"
            for cell, alignment, width in zip(row, alignments, widths, strict=True)
        ).rstrip()
        for row in table
    ]


def _shorten(text: str, length: int) -> str:
    """A text on one line, of at most `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def _describe_rows(notes: dict[str, Any], counts: dict[str, int]) -> list[str]:
    """Lines on the rows of the source: how many there are, and where they went.

    Args:
      notes: From `preprocessing.split_and_filter`.
      counts: Number of queries of each split.
    """
    lines, left_out = [], 0
    for split, outcome in itertools.product(("train", "valid", "test"), ("dropped", "kept")):
        if count := notes.get(f"{split}_without_labels_{outcome}"):
            left_out += count if outcome == "dropped" else 0
            noun = "query" if count == 1 else "queries"
            lines.append(f"{split}: {outcome} {count:,} {noun} without labels")
    if "rows_read" in notes:  # Not in data sets of version 0.3 and before.
        facts = [f"{count:,} {split}" for split, count in counts.items()]
        facts += [f"{left_out:,} left out"] if left_out else []
        lines.insert(0, f"{notes['rows_read']:,} queries read: {', '.join(facts)}")
    return lines


def describe(dataset: PreparedDataset) -> str:
    """Returns the sizes of a prepared data set, its warnings and its location."""
    info = dataset.info
    table = [("", "items", "tokens", "images", "items with images")]
    for part, counts in info["counts"].items():
        numbers = (counts[name] for name in ("items", "tokens", "images", "with_image"))
        table.append((part, *(f"{number:,}" for number in numbers)))
    lines = _align(table)
    facts = [
        f"{info['relevant_pairs']['train'] / info['num_train']:.2f} labels per training query",
        f"vocabulary of {info['vocab_size']:,} tokens",
    ]
    if info["image_width"]:
        facts.append(f"image embeddings of {info['image_width']:,} dimensions")
    lines.append("; ".join(facts))
    lines += filters.describe(info["filters"])
    lines += _describe_rows(
        info, {split: info[f"num_{split}"] for split in SPLITS if f"num_{split}" in info}
    )
    lines += info.get("notes", [])
    lines += [f"warning: {warning}" for warning in info["warnings"]]
    path = os.path.abspath(dataset.path)
    lines.append(f"{dataset.name}: prepared in {path}")
    card_path = os.path.join(path, card.TEXT)
    if os.path.exists(card_path):  # Old data sets have no card.
        lines.append(f"data card: {card_path}")
    return "\n".join(lines)
