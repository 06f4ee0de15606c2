"""The data card, `dataset.md` and `dataset.png`: one page that describes a prepared data set."""

import os
import re
import textwrap
import unicodedata
from collections.abc import Sequence

from vixml_jax.data import filters
from vixml_jax.data.card import plots, stats
from vixml_jax.data.card.stats import DatasetStats, percent
from vixml_jax.data.store import PreparedDataset
from vixml_jax.runtime import console

TEXT, IMAGE = "dataset.md", "dataset.png"
_BINS = (0, 1, 2, 3, 4, 5, 6, 11, 21, 51, 101)  # Labels per query: first number of each line.
_LINE = 100  # Characters.
_EXAMPLES = 5
_EXAMPLE_LABELS = 5
_EXAMPLE_WIDTH = 80  # Characters.
# Characters with a meaning in Markdown; an underscore within a word has none.
_MARKS = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])")
_FIRST_MARKS = re.compile(r"^(\d*)([#+=.)-])")  # At the start of a line.


def write(dataset: PreparedDataset, directory: str) -> None:
    """Writes `dataset.md` and `dataset.png` into a directory; both are deterministic."""
    measured = stats.measure(dataset)
    with open(os.path.join(directory, TEXT), "w", encoding="utf-8") as file:
        file.write(describe(dataset, measured))
    plots.draw(dataset, os.path.join(directory, IMAGE))


def describe(dataset: PreparedDataset, measured: DatasetStats) -> str:
    """The card in Markdown, readable as plain text too."""
    return (
        "\n\n".join(
            [
                f"# {escape(dataset.name)}",
                *_describe_sizes(dataset, measured),
                f"![Distributions of tokens, labels and images]({IMAGE})",
                *_describe_labels_per_query(dataset, measured),
                *_describe_queries_per_label(dataset, measured),
                *_describe_images(dataset, measured),
                *_describe_repeats(measured),
                *_describe_source(dataset, measured),
                "## Filter pairs",
                _list(filters.describe(dataset.info["filters"])),
                "## Warnings",
                _list(dataset.info["warnings"]),
                "## Examples",
                _examples(dataset),
                "## Settings",
                _settings(dataset),
            ]
        )
        + "\n"
    )


def escape(text: str, width: int | None = None) -> str:
    """A text on one line, escaped for Markdown and HTML.

    Args:
      text: Any text.
      width: Maximum number of characters before escaping; None: no limit.
    """
    plain = (" " if unicodedata.category(c) == "Cc" else c for c in text)
    line = console.printable(" ".join("".join(plain).split()))  # Bidirectional characters, too.
    if width is not None and len(line) > width:
        line = line[: width - 1] + "…"
    return _FIRST_MARKS.sub(r"\1\\\2", _MARKS.sub(r"\\\g<0>", line))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns aligned in plain text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def _paragraph(text: str) -> str:
    return textwrap.fill(text, _LINE, break_long_words=False, break_on_hyphens=False)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines) or "None."


def _describe_sizes(dataset: PreparedDataset, measured: DatasetStats) -> list[str]:
    rows = []
    for name, part in measured.parts.items():
        tokens, split = part.tokens, measured.splits.get(name)
        rows.append(
            [
                name,
                f"{tokens.items:,}",
                f"{split.labels.total:,}" if split else "",
                f"{part.empty:,}",
                f"{tokens.mean:.1f}",
                *(f"{n:,}" for n in (tokens.percentile(50), tokens.percentile(95), tokens.maximum)),
                percent(part.truncated_texts, tokens.items),
                percent(part.truncated_tokens, tokens.total),
            ]
        )
    lengths = ("tokens: mean", "median", "95 %", "max", "truncated texts", "truncated tokens")
    return [
        _table(["", "items", "pairs", "empty", *lengths], rows),
        _paragraph(
            "A pair is a query and one of its labels. Empty items have no text. Tokens are counted "
            "before truncation, with special tokens; texts are truncated to "
            f"{dataset.max_tokens} tokens. `--max_tokens={measured.suggested_max_tokens}` would "
            f"keep {stats.UNTRUNCATED_PERCENT} % of the training queries and of the labels "
            "complete."
        ),
    ]


def _describe_labels_per_query(dataset: PreparedDataset, measured: DatasetStats) -> list[str]:
    labels = {name: split.labels for name, split in measured.splits.items()}
    figures = [
        [name, f"{counts.mean:.2f}", f"{counts.percentile(50):,}", f"{counts.maximum:,}"]
        for name, counts in labels.items()
    ]
    histogram = []
    for least, following in zip(_BINS, (*_BINS[1:], None), strict=True):
        most = None if following is None else following - 1
        queries = [counts.between(least, most).items for counts in labels.values()]
        if any(queries) or not least:
            percents = map(percent, queries, (counts.items for counts in labels.values()))
            histogram.append([_range(least, most), *percents])
    lines = [
        "## Labels per query",
        _table(["", "mean", "median", "max"], figures),
        _table(["labels per query", *labels], histogram),
    ]
    if dropped := dataset.info["train_without_labels_dropped"]:
        lines.append(f"{dropped:,} training queries without a label were dropped.")
    return lines


def _range(least: int, most: int | None) -> str:
    if most is None:
        return f"{least} or more"
    if most == 0:
        return "none"
    return str(least) if least == most else f"{least} to {most}"


def _describe_queries_per_label(dataset: PreparedDataset, measured: DatasetStats) -> list[str]:
    frequencies, test = measured.frequencies, measured.splits["test"]
    rows = []
    for name, least, most in stats.GROUPS:
        labels = frequencies.between(least, most).items
        percents = [
            percent(split.group_pairs[name], split.labels.total)
            for split in measured.splits.values()
        ]
        rows.append([name, _range(least, most), f"{labels:,}"])
        rows[-1] += [percent(labels, frequencies.items), *percents]
    header = ["group", "training queries", "labels", "of labels"]
    header += [f"of {name} pairs" for name in measured.splits]
    if unseen := int(frequencies.counts[0]):
        note = (
            f"{unseen:,} labels do not occur in training. They are in "
            f"{test.group_pairs['unseen']:,} of the {test.labels.total:,} test pairs, and "
            f"{test.only_unseen:,} test queries have only such labels. A model that predicts only "
            "labels that occur in training has a recall of at most "
            f"{100 * test.recall_ceiling:.2f} % on the test split (a query without labels counts "
            "as 0)."
        )
    else:
        note = "Every label occurs in training."
    least_weight, largest_weight = measured.inverse_propensity
    return [
        "## Queries per label",
        f"Training queries per label: mean {frequencies.mean:.1f}, median "
        f"{frequencies.percentile(50):,}, maximum {frequencies.maximum:,}.",
        _table(header, rows),
        _paragraph(note),
        f"Inverse propensities (A = {dataset.propensity_a:g}, B = {dataset.propensity_b:g}) range "
        f"from {least_weight:.2f} (most frequent label) to {largest_weight:.2f} (rarest label).",
    ]


def _describe_images(dataset: PreparedDataset, measured: DatasetStats) -> list[str]:
    """A row for each split, and for the labels, if it has images."""
    rows = []
    for name, part in measured.parts.items():
        if (images := part.images) is None:
            continue
        with_images = images.items - int(images.counts[0])
        rows.append([name, f"{images.total:,}", f"{with_images:,}"])
        rows[-1] += [percent(with_images, images.items)]
        rows[-1] += [f"{images.total / max(with_images, 1):.2f}", f"{images.maximum:,}"]
    if not rows:
        return ["## Images", "None."]
    without = [name for name, part in measured.parts.items() if part.images is None]
    header = ["", "images", "items with images", "of items", "images per such item: mean", "max"]
    note = f"Each image is an embedding of width {dataset.image_width}."
    note += f" Without images: {', '.join(without)}." if without else ""
    return ["## Images", _table(header, rows), note]


def _describe_repeats(measured: DatasetStats) -> list[str]:
    rows = []
    for name, part in measured.parts.items():
        items, overlap = part.tokens.items, ["", ""]
        if name in measured.splits and name != "train":
            in_train = measured.splits[name].in_train
            overlap = [f"{in_train:,}", percent(in_train, items)]
        rows.append([name, f"{part.repeated:,}", percent(part.repeated, items)])
        rows[-1] += [f"{part.distinct:,}", *overlap]
    return [
        "## Repeated texts",
        "Texts are compared without regard to case, character width, form of accents and white "
        "space.\nEmpty texts are not counted.",
        _table(
            [
                "",
                "items with a repeated text",
                "of items",
                "distinct repeated texts",
                "items whose text is in train",
                "of items",
            ],
            rows,
        ),
    ]


def _describe_source(dataset: PreparedDataset, measured: DatasetStats) -> list[str]:
    """Where the rows of the source went, and what was noted while they were read."""
    notes = list(dataset.info.get("notes", []))
    if "rows_read" in dataset.info:  # Not in data sets of version 0.3 and before.
        read = dataset.info["rows_read"]
        queries = {name: split.labels.items for name, split in measured.splits.items()}
        facts = [f"{count:,} {name}" for name, count in queries.items()]
        if left_out := read - sum(queries.values()):
            facts.append(f"{left_out:,} left out, because no label is left for them")
        notes.insert(0, f"{read:,} queries read: {', '.join(facts)}")
    return ["## Rows of the source", _list(notes)] if notes else []


def _examples(dataset: PreparedDataset) -> str:
    """Training queries at equal distances in the data, and their first labels."""
    count, relevance = len(dataset.train), dataset.train_relevance
    lines = []
    for row in sorted({i * count // _EXAMPLES for i in range(_EXAMPLES)}):
        labels = relevance.indices[relevance.indptr[row] : relevance.indptr[row + 1]]
        shown = [_quote(dataset.labels.texts[int(label)]) for label in labels[:_EXAMPLE_LABELS]]
        if more := len(labels) - len(shown):
            shown.append(f"and {more:,} more")
        lines.append(f"- {_quote(dataset.train.texts[row])}\n  → {'; '.join(shown)}")
    return "\n".join(lines)


def _quote(text: str) -> str:
    return f"“{escape(text, _EXAMPLE_WIDTH)}”"


def _settings(dataset: PreparedDataset) -> str:
    settings = dict(dataset.info["settings"])
    lines = {
        "source": settings.pop("source")["path"],
        **settings,
        "content_hash": dataset.content_hash,
    }
    return _list([f"{key}: {value}" for key, value in lines.items() if value not in ("", None)])
