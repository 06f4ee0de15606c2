"""The data card: `dataset.md` and `dataset.png`, one page on a prepared data set."""

import os
import re
import textwrap
import unicodedata
from collections.abc import Sequence

from vixml_jax.data import filters
from vixml_jax.data.card import plots, stats
from vixml_jax.data.card.stats import Facts, percent
from vixml_jax.data.store import PreparedDataset

TEXT, PICTURE = "dataset.md", "dataset.png"
_BINS = (0, 1, 2, 3, 4, 5, 6, 11, 21, 51, 101)  # Labels per query: where each line begins.
_LINE = 100
_EXAMPLES = 5
_EXAMPLE_LABELS = 5
_EXAMPLE_WIDTH = 80
# What Markdown would take for a mark; an underscore within a word is none.
_MARKS = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])")
_FIRST_MARKS = re.compile(r"^(\d*)([#+=.)-])")  # At the start of a line.


def write(dataset: PreparedDataset, directory: str) -> None:
    """Writes `dataset.md` and `dataset.png` into a directory; the same for the same data set."""
    known = stats.measure(dataset)
    with open(os.path.join(directory, TEXT), "w", encoding="utf-8") as file:
        file.write(describe(dataset, known))
    plots.draw(dataset, known, os.path.join(directory, PICTURE))


def describe(dataset: PreparedDataset, known: Facts) -> str:
    """The card as Markdown that reads as plain text too."""
    return (
        "\n\n".join(
            [
                f"# {escape(dataset.name)}",
                *_describe_sizes(dataset, known),
                f"![In pictures]({PICTURE})",
                *_describe_labels_of_queries(dataset, known),
                *_describe_queries_of_labels(dataset, known),
                *_describe_pictures(dataset, known),
                *_describe_repeats(known),
                "## Filter pairs",
                _list(filters.describe(dataset.info["filters"])),
                "## Warnings",
                _list(dataset.info["warnings"]),
                "## Examples",
                _examples(dataset),
                "## Made from",
                _settings(dataset),
            ]
        )
        + "\n"
    )


def escape(text: str, width: int | None = None) -> str:
    """The text on one line, cut at so many characters, that Markdown and HTML leave as it is."""
    plain = (" " if unicodedata.category(c) == "Cc" else c for c in text)
    line = " ".join("".join(plain).split())
    if width is not None and len(line) > width:
        line = line[: width - 1] + "…"
    return _FIRST_MARKS.sub(r"\1\\\2", _MARKS.sub(r"\\\g<0>", line))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns stand below each other in plain text."""
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


def _describe_sizes(dataset: PreparedDataset, known: Facts) -> list[str]:
    rows = []
    for name, part in known.parts.items():
        tokens, split = part.tokens, known.splits.get(name)
        rows.append(
            [
                name,
                f"{tokens.items:,}",
                f"{split.labels.total:,}" if split else "",
                f"{part.empty:,}",
                f"{tokens.mean:.1f}",
                *(f"{n:,}" for n in (tokens.percentile(50), tokens.percentile(95), tokens.maximum)),
                percent(part.cut, tokens.items),
                percent(part.lost, tokens.total),
            ]
        )
    lengths = ("tokens: mean", "median", "95 %", "max", "texts cut", "tokens lost")
    return [
        _table(["", "items", "pairs", "empty", *lengths], rows),
        _paragraph(
            "Pairs: a query and a label relevant to it. Empty: without a text. Tokens: of whole "
            f"texts, special ones included; they are cut at {dataset.max_tokens}. "
            f"`--max_tokens={known.suggested_max_tokens}` keeps {stats.KEPT_WHOLE} % of the "
            "training queries and of the labels whole."
        ),
    ]


def _describe_labels_of_queries(dataset: PreparedDataset, known: Facts) -> list[str]:
    labels = {name: split.labels for name, split in known.splits.items()}
    figures = [
        [name, f"{found.mean:.2f}", f"{found.percentile(50):,}", f"{found.maximum:,}"]
        for name, found in labels.items()
    ]
    histogram = []
    for least, following in zip(_BINS, (*_BINS[1:], None), strict=True):
        most = None if following is None else following - 1
        inside = [found.between(least, most).items for found in labels.values()]
        if any(inside) or not least:
            shares = map(percent, inside, (found.items for found in labels.values()))
            histogram.append([_range(least, most), *shares])
    lines = [
        "## Labels of a query",
        _table(["", "mean", "median", "most"], figures),
        _table(["queries with", *labels], histogram),
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


def _describe_queries_of_labels(dataset: PreparedDataset, known: Facts) -> list[str]:
    frequencies, test = known.frequencies, known.splits["test"]
    rows = []
    for name, least, most in stats.GROUPS:
        labels = frequencies.between(least, most).items
        shares = [
            percent(split.group_pairs[name], split.labels.total) for split in known.splits.values()
        ]
        rows.append([name, _range(least, most), f"{labels:,}"])
        rows[-1] += [percent(labels, frequencies.items), *shares]
    header = ["group", "training queries", "labels", "of labels"]
    header += [f"of {name} pairs" for name in known.splits]
    if unseen := int(frequencies.counts[0]):
        seen = (
            f"{unseen:,} labels are never seen in training. They are in "
            f"{test.group_pairs['unseen']:,} of the {test.labels.total:,} test pairs, and are all "
            f"labels of {test.hopeless:,} test queries: who predicts labels of training alone has "
            f"a recall on test of {100 * test.recall_ceiling:.2f} % at most (a query without "
            "labels counts as 0)."
        )
    else:
        seen = "Every label is seen in training."
    least_weight, largest_weight = known.inverse_propensity
    return [
        "## Queries of a label",
        f"A label has {frequencies.mean:.1f} training queries in the mean, "
        f"{frequencies.percentile(50):,} in the median, {frequencies.maximum:,} at most.",
        _table(header, rows),
        _paragraph(seen),
        f"Inverse propensities (A = {dataset.propensity_a:g}, B = {dataset.propensity_b:g}) from "
        f"{least_weight:.2f}, the most frequent label, to {largest_weight:.2f}, the rarest.",
    ]


def _describe_pictures(dataset: PreparedDataset, known: Facts) -> list[str]:
    """A row for each kind of items that has pictures at all."""
    rows = []
    for name, part in known.parts.items():
        if (found := part.pictures) is None:
            continue
        have = found.items - int(found.counts[0])
        rows.append([name, f"{found.total:,}", f"{have:,}", percent(have, found.items)])
        rows[-1] += [f"{found.total / max(have, 1):.2f}", f"{found.maximum:,}"]
    if not rows:
        return ["## Pictures", "None."]
    without = [name for name, part in known.parts.items() if part.pictures is None]
    header = ["", "pictures", "items with any", "of items", "pictures of these: mean", "most"]
    note = f"Each is a vector {dataset.image_width} wide."
    note += f" Without any: {', '.join(without)}." if without else ""
    return ["## Pictures", _table(header, rows), note]


def _describe_repeats(known: Facts) -> list[str]:
    rows = []
    for name, part in known.parts.items():
        items, overlap = part.tokens.items, ["", ""]
        if name in known.splits and name != "train":
            in_train = known.splits[name].in_train
            overlap = [f"{in_train:,}", percent(in_train, items)]
        rows.append([name, f"{part.repeated:,}", percent(part.repeated, items)])
        rows[-1] += [f"{part.distinct:,}", *overlap]
    return [
        "## Repeated texts",
        "Equal: but for case, width, accents' form and white space. Empty texts do not count.",
        _table(
            [
                "",
                "have an equal",
                "of items",
                "different ones",
                "equal to one of train",
                "of items",
            ],
            rows,
        ),
    ]


def _examples(dataset: PreparedDataset) -> str:
    """Training queries, as far apart as can be, and their first labels."""
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
    told = dict(dataset.info["settings"])
    told["source"] = told["source"]["path"]
    said = {"source": told.pop("source"), **told, "content_hash": dataset.content_hash}
    return _list([f"{key}: {value}" for key, value in said.items() if value not in ("", None)])
