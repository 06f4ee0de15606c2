"""What figures of a data set show: text lengths, labels, images and label frequencies.

The data card draws these panels as an image (`plots`), the report as charts. No text is read.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vixml_jax.data.card.stats import GROUPS, Distribution, label_counts, percent
from vixml_jax.data.store import PARTS, Items, PreparedDataset

MAX_BARS = 40  # Of a histogram, without the one for all larger numbers.
_SHOWN = 99  # Percent of the items with bars of their own; the others are in the last bar.


class Histogram(NamedTuple):
    """How often numbers occur, in bars of equally many numbers.

    Attributes:
      title, xlabel, ylabel: What is shown.
      distributions: Of each part of the data, by name.
      width: Numbers in a bar; the first bar starts at 0.
      end: Largest number with a bar of its own.
      overflow: Whether a last bar has all larger numbers.
      heights: Percent of the items in each bar, by part.
    """

    title: str
    xlabel: str
    ylabel: str
    distributions: Mapping[str, Distribution]
    width: int
    end: int
    overflow: bool
    heights: Mapping[str, Float[np.ndarray, " b"]]


class Ranking(NamedTuple):
    """Labels ranked by their number of training queries.

    Attributes:
      title, xlabel, ylabel: What is shown.
      ranks: First and last rank, from 1, of the labels with each number of queries; labels without
        training queries are left out.
      queries: These numbers, descending, each twice.
      groups: By group of labels that has any, its number of labels and a description.
    """

    title: str
    xlabel: str
    ylabel: str
    ranks: Int[np.ndarray, " p"]
    queries: Int[np.ndarray, " p"]
    groups: Mapping[str, tuple[int, str]]


class Panels(NamedTuple):
    """The panels of a data set.

    Attributes:
      tokens: Tokens of the texts before truncation.
      labels: Labels of the queries.
      images: Images of the items; None: the data have none.
      frequencies: Training queries of the labels.
    """

    tokens: Histogram
    labels: Histogram
    images: Histogram | None
    frequencies: Ranking


def measure(dataset: PreparedDataset) -> Panels:
    """Returns the panels of a data set."""
    parts = {name: items for name in PARTS if (items := getattr(dataset, name)) is not None}
    images = {
        name: Distribution.of(np.diff(items.images.offsets))
        for name, items in parts.items()
        if items.images is not None
    }
    return Panels(
        _tokens(parts, dataset.max_tokens),
        _labels(
            {
                name: Distribution.of(np.diff(getattr(dataset, f"{name}_relevance").indptr))
                for name in parts
                if name != "labels"
            }
        ),
        _images(images) if images else None,
        _frequencies(Distribution.of(label_counts(dataset.train_relevance))),
    )


def _tokens(parts: Mapping[str, Items], max_tokens: int) -> Histogram:
    shown = {
        name: Distribution.of(parts[name].full_lengths) for name in ("train", "test", "labels")
    }
    truncated = (
        f"{percent(shown[name].between(max_tokens + 1, None).items, shown[name].items)} of {kind}"
        for name, kind in (("train", "training queries"), ("labels", "labels"))
    )
    return _histogram(
        f"{max_tokens} tokens truncate {' and '.join(truncated)}",
        "tokens before truncation",
        "percent of texts",
        shown,
        least_end=max_tokens + 1,
    )


def _labels(shown: Mapping[str, Distribution]) -> Histogram:
    test = shown["test"]
    without = percent(int(test.counts[0]), test.items)
    return _histogram(
        f"{shown['train'].mean:.1f} labels per training query; {without} of test queries have none",
        "labels per query",
        "percent of queries",
        shown,
    )


def _images(shown: Mapping[str, Distribution]) -> Histogram:
    with_images = ", ".join(
        f"{percent(images.between(1, None).items, images.items)} of {name}"
        for name, images in shown.items()
    )
    return _histogram(
        f"Items with images: {with_images}", "images per item", "percent of items", shown
    )


def _frequencies(frequencies: Distribution) -> Ranking:
    groups = {}
    for name, least, most in GROUPS:
        group = frequencies.between(least, most)
        if group.items:
            of_pairs = f", {percent(group.total, frequencies.total)} of pairs" if least else ""
            number = f"{least}+" if most is None else f"{least} to {most}" if least else "0"
            described = f"{name} ({number}): {group.items:,} labels{of_pairs}"
            groups[name] = group.items, described
    numbers = np.flatnonzero(frequencies.counts[1:])[::-1] + 1
    labels = frequencies.counts[numbers]
    last = np.cumsum(labels)
    rare = percent(frequencies.between(0, 5).items, frequencies.items)
    return Ranking(
        f"{rare} of labels have 5 training queries or fewer",
        "labels, most frequent first",
        "training queries of the label",
        np.stack([last - labels + 1, last], axis=1).reshape(-1),
        np.repeat(numbers, 2),
        groups,
    )


def _histogram(
    title: str, xlabel: str, ylabel: str, shown: Mapping[str, Distribution], least_end: int = 1
) -> Histogram:
    """Returns the histogram of some distributions; `end` is at least `least_end`."""
    end = max(least_end, *(counts.percentile(_SHOWN) for counts in shown.values()))
    width = -(-(end + 1) // MAX_BARS)
    overflow = any(counts.maximum > end for counts in shown.values())
    heights = {
        name: _binned(counts.counts, width, end)[: None if overflow else -1]
        for name, counts in shown.items()
    }
    note = " (last bar: all larger numbers)" if overflow else ""
    return Histogram(title, xlabel + note, ylabel, shown, width, end, overflow, heights)


def _binned(counts: Int[np.ndarray, " v"], width: int, end: int) -> Float[np.ndarray, " b"]:
    """Percent of the items in each bar from 0 to `end`, and in one more bar for all above."""
    bars = end // width + 1
    numbers = np.flatnonzero(counts)
    items = np.bincount(
        np.minimum(numbers // width, bars), weights=counts[numbers], minlength=bars + 1
    )
    return 100 * items / max(counts.sum(), 1)
