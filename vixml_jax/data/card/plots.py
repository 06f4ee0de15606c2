"""The figure of the data card: text lengths, labels per query, images, and label frequencies."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vixml_jax.data.card.stats import GROUPS, DatasetStats, Distribution, percent
from vixml_jax.data.store import PreparedDataset

# Colours that colour-blind readers can distinguish (Okabe & Ito, Color Universal Design, 2008).
_COLOURS = {"train": "#0072B2", "valid": "#009E73", "test": "#E69F00", "labels": "#D55E00"}
_GROUP_COLOURS = {"head": "#0072B2", "torso": "#009E73", "tail": "#E69F00", "unseen": "#CC79A7"}
_BARS = 40  # Maximum number of bars of a histogram.
_FEW = 20  # Histograms with fewer numbers have bars side by side.
_SHOWN = 99  # Percent of the items with bars of their own; the others are in the last bar.


def draw(dataset: PreparedDataset, measured: DatasetStats, path: str) -> None:
    """Writes the figure, 1500 by 900 pixels.

    Args:
      dataset: The prepared data set.
      measured: Its statistics.
      path: File name that ends in .png.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # Independent of the user's settings.
        matplotlib.rcParams.update(
            {"font.size": 12, "axes.titlesize": 14, "axes.spines.top": False}
            | {"axes.spines.right": False, "axes.titlelocation": "left"}
        )
        figure = Figure(figsize=(15, 9), dpi=100, layout="constrained")
        have_images = any(part.images is not None for part in measured.parts.values())
        figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
        panels = figure.subplot_mosaic(
            [["tokens", "frequency"], ["labels", "images" if have_images else "frequency"]]
        )
        _draw_tokens(panels["tokens"], measured, dataset.max_tokens)
        _draw_labels(panels["labels"], measured)
        _draw_frequency(panels["frequency"], measured)
        if have_images:
            _draw_images(panels["images"], measured)
        sizes = ", ".join(
            f"{part.tokens.items:,} {name if name == 'labels' else f'{name} queries'}"
            for name, part in measured.parts.items()
        )
        # The font lacks other letters.
        name = f"{dataset.name}: " if dataset.name.isascii() else ""
        figure.suptitle(f"{name}{sizes}", fontsize=16, parse_math=False)
        figure.savefig(path)


def _draw_tokens(panel: Any, measured: DatasetStats, max_tokens: int) -> None:
    shown = {name: measured.parts[name].tokens for name in ("train", "test", "labels")}
    _histogram(panel, shown, least_end=max_tokens + 1)
    panel.axvline(max_tokens + 0.5, color="black", linestyle="--", label=f"{max_tokens} tokens")
    truncated = [
        f"{percent(measured.parts[name].truncated_texts, shown[name].items)} of {kind}"
        for name, kind in (("train", "training queries"), ("labels", "labels"))
    ]
    panel.set(
        title=f"{max_tokens} tokens truncate {' and '.join(truncated)}",
        ylabel="percent of texts",
        xlabel=f"tokens before truncation{_overflow(shown, max_tokens + 1)}",
    )
    panel.legend(frameon=False)


def _draw_labels(panel: Any, measured: DatasetStats) -> None:
    shown = {name: split.labels for name, split in measured.splits.items()}
    _histogram(panel, shown)
    train, test = shown["train"], shown["test"]
    without = percent(int(test.counts[0]), test.items)
    panel.set(
        title=f"{train.mean:.1f} labels per training query; {without} of test queries have none",
        ylabel="percent of queries",
        xlabel=f"labels per query{_overflow(shown)}",
    )
    panel.legend(frameon=False)


def _draw_images(panel: Any, measured: DatasetStats) -> None:
    shown = {name: part.images for name, part in measured.parts.items() if part.images is not None}
    _histogram(panel, shown)
    with_images = ", ".join(
        f"{percent(images.items - int(images.counts[0]), images.items)} of {name}"
        for name, images in shown.items()
    )
    panel.set(
        title=f"Items with images: {with_images}",
        ylabel="percent of items",
        xlabel=f"images per item{_overflow(shown)}",
    )
    panel.legend(frameon=False)


def _draw_frequency(panel: Any, measured: DatasetStats) -> None:
    """Labels ranked by their number of training queries, with shaded groups."""
    ranks, frequency = _ranked(measured.frequencies.counts)
    first, pairs = 1, measured.splits["train"].group_pairs
    for name, least, most in GROUPS:
        labels = measured.frequencies.between(least, most).items
        if not labels:
            continue
        of_pairs = f", {percent(pairs[name], sum(pairs.values()))} of pairs" if least else ""
        number = f"{least}+" if most is None else f"{least} to {most}" if least else "0"
        panel.axvspan(
            first - 0.5,
            first + labels - 0.5,
            color=_GROUP_COLOURS[name],
            alpha=0.25,
            linewidth=0,
            label=f"{name} ({number}): {labels:,} labels{of_pairs}",
        )
        first += labels
    marker = "o" if len(ranks) < 2 * _BARS else None  # A single label has no line.
    panel.plot(ranks, frequency, color="black", linewidth=2, marker=marker, markersize=4)
    rare = percent(measured.frequencies.between(0, 5).items, measured.frequencies.items)
    panel.set(
        title=f"{rare} of labels have 5 training queries or fewer",
        xscale="log",
        yscale="log",
        xlim=(0.8, first),
        ylim=(0.7, 1.6 * max(measured.frequencies.maximum, 1)),
        xlabel="labels, most frequent first",
        ylabel="training queries of the label",
    )
    panel.legend(loc="lower left", framealpha=0.9)


def _ranked(
    counts: Int[np.ndarray, " v"],
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    """First and last rank, from 1, of the labels with each number of queries, and the numbers."""
    numbers = np.flatnonzero(counts[1:])[::-1] + 1
    last = np.cumsum(counts[numbers])
    ranks = np.stack([last - counts[numbers] + 1, last], axis=1)
    return ranks.reshape(-1), np.repeat(numbers, 2)


def _end(shown: dict[str, Distribution], least_end: int = 1) -> int:
    """The largest number that has a bar of its own."""
    return max(least_end, *(counts.percentile(_SHOWN) for counts in shown.values()))


def _overflow(shown: dict[str, Distribution], least_end: int = 1) -> str:
    """A note on the last bar, if it has all numbers above the end."""
    above = any(counts.maximum > _end(shown, least_end) for counts in shown.values())
    return " (last bar: all larger numbers)" if above else ""


def _histogram(panel: Any, shown: dict[str, Distribution], least_end: int = 1) -> None:
    """Draws bars side by side; if there are many numbers, outlines on top of each other."""
    end = _end(shown, least_end)
    width = -(-(end + 1) // _BARS)
    above = bool(_overflow(shown, least_end))
    for i, (name, distribution) in enumerate(shown.items()):
        heights = _binned(distribution.counts, width, end)[: None if above else -1]
        starts = np.arange(len(heights)) * width
        if end < _FEW:
            bar = 0.8 / len(shown)
            places = starts + (i - (len(shown) - 1) / 2) * bar
            panel.bar(places, heights, bar, color=_COLOURS[name], label=name)
        else:
            edges = np.append(starts, starts[-1] + width) - 0.5
            panel.stairs(heights, edges, color=_COLOURS[name], linewidth=2, label=name)
            panel.stairs(heights, edges, color=_COLOURS[name], fill=True, alpha=0.2)
    if end < _FEW:
        names = [str(number) for number in range(end + 1)] + above * [f"{end + 1}+"]
        panel.set_xticks(range(len(names)), names)


def _binned(counts: Int[np.ndarray, " v"], width: int, end: int) -> Float[np.ndarray, " b"]:
    """Percent of the items in each bar from 0 to `end`, and in one more bar for all above."""
    bars = end // width + 1
    numbers = np.flatnonzero(counts)
    items = np.bincount(
        np.minimum(numbers // width, bars), weights=counts[numbers], minlength=bars + 1
    )
    return 100 * items / max(counts.sum(), 1)
