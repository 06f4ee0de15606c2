"""The picture of the data card: how long texts are, how many labels, how labels are spread."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vixml_jax.data.card.stats import GROUPS, Distribution, Facts, percent
from vixml_jax.data.store import PreparedDataset

# Colours that are told apart by the colour-blind (Okabe & Ito, Color Universal Design, 2008).
_COLOURS = {"train": "#0072B2", "valid": "#009E73", "test": "#E69F00", "labels": "#D55E00"}
_GROUP_COLOURS = {"head": "#0072B2", "torso": "#009E73", "tail": "#E69F00", "unseen": "#CC79A7"}
_BARS = 40  # In a histogram, at most.
_FEW = 20  # Numbers that have bars side by side.
_SHOWN = 99  # Percent of the items for which a histogram has room; the others are in its last bar.


def draw(dataset: PreparedDataset, known: Facts, path: str) -> None:
    """Writes the picture, 1500 by 900.

    Args:
      dataset: Prepared.
      known: Measured of it.
      path: Ends in .png.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # Whatever a user's own settings are.
        matplotlib.rcParams.update(
            {"font.size": 12, "axes.titlesize": 14, "axes.spines.top": False}
            | {"axes.spines.right": False, "axes.titlelocation": "left"}
        )
        figure = Figure(figsize=(15, 9), dpi=100, layout="constrained")
        have_pictures = any(part.pictures is not None for part in known.parts.values())
        figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
        panels = figure.subplot_mosaic(
            [["tokens", "frequency"], ["labels", "pictures" if have_pictures else "frequency"]]
        )
        _draw_tokens(panels["tokens"], known, dataset.max_tokens)
        _draw_labels(panels["labels"], known)
        _draw_frequency(panels["frequency"], known)
        if have_pictures:
            _draw_pictures(panels["pictures"], known)
        sizes = ", ".join(
            f"{part.tokens.items:,} {name if name == 'labels' else f'{name} queries'}"
            for name, part in known.parts.items()
        )
        # The font has not every letter.
        name = f"{dataset.name}: " if dataset.name.isascii() else ""
        figure.suptitle(f"{name}{sizes}", fontsize=16, parse_math=False)
        figure.savefig(path)


def _draw_tokens(panel: Any, known: Facts, max_tokens: int) -> None:
    shown = {name: known.parts[name].tokens for name in ("train", "test", "labels")}
    _histogram(panel, shown, least_end=max_tokens + 1)
    panel.axvline(max_tokens + 0.5, color="black", linestyle="--", label=f"cut at {max_tokens}")
    said = [
        f"{percent(known.parts[name].cut, shown[name].items)} of {kind}"
        for name, kind in (("train", "training queries"), ("labels", "labels"))
    ]
    panel.set(
        title=f"{max_tokens} tokens cut {' and '.join(said)}",
        ylabel="percent of texts",
        xlabel=f"tokens of the whole text{_overflow(shown, max_tokens + 1)}",
    )
    panel.legend(frameon=False)


def _draw_labels(panel: Any, known: Facts) -> None:
    shown = {name: split.labels for name, split in known.splits.items()}
    _histogram(panel, shown)
    train, test = shown["train"], shown["test"]
    bare = percent(int(test.counts[0]), test.items)
    panel.set(
        title=f"A training query has {train.mean:.1f} labels; {bare} of test have none",
        ylabel="percent of queries",
        xlabel=f"labels per query{_overflow(shown)}",
    )
    panel.legend(frameon=False)


def _draw_pictures(panel: Any, known: Facts) -> None:
    shown = {name: part.pictures for name, part in known.parts.items() if part.pictures is not None}
    _histogram(panel, shown)
    have = {name: found.items - int(found.counts[0]) for name, found in shown.items()}
    said = ", ".join(f"{percent(have[name], shown[name].items)} of {name}" for name in shown)
    panel.set(
        title=f"With pictures: {said}",
        ylabel="percent of items",
        xlabel=f"pictures per item{_overflow(shown)}",
    )
    panel.legend(frameon=False)


def _draw_frequency(panel: Any, known: Facts) -> None:
    """Labels ranked by their training queries; the groups are shaded."""
    ranks, frequency = _ranked(known.frequencies.counts)
    first, pairs = 1, known.splits["train"].group_pairs
    for name, least, most in GROUPS:
        labels = known.frequencies.between(least, most).items
        if not labels:
            continue
        held = f", {percent(pairs[name], sum(pairs.values()))} of pairs" if least else ""
        number = f"{least}+" if most is None else f"{least} to {most}" if least else "0"
        panel.axvspan(
            first - 0.5,
            first + labels - 0.5,
            color=_GROUP_COLOURS[name],
            alpha=0.25,
            linewidth=0,
            label=f"{name} ({number}): {labels:,} labels{held}",
        )
        first += labels
    marker = "o" if len(ranks) < 2 * _BARS else None  # One label alone has no line.
    panel.plot(ranks, frequency, color="black", linewidth=2, marker=marker, markersize=4)
    rare = percent(known.frequencies.between(0, 5).items, known.frequencies.items)
    panel.set(
        title=f"{rare} of labels have 5 training queries or fewer",
        xscale="log",
        yscale="log",
        xlim=(0.8, first),
        ylim=(0.7, 1.6 * max(known.frequencies.maximum, 1)),
        xlabel="labels, the most frequent first",
        ylabel="training queries of the label",
    )
    panel.legend(loc="lower left", framealpha=0.9)


def _ranked(
    counts: Int[np.ndarray, " v"],
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
    """First and last rank of the labels of each number of queries, from 1, and these numbers."""
    numbers = np.flatnonzero(counts[1:])[::-1] + 1
    last = np.cumsum(counts[numbers])
    ranks = np.stack([last - counts[numbers] + 1, last], axis=1)
    return ranks.reshape(-1), np.repeat(numbers, 2)


def _end(shown: dict[str, Distribution], least_end: int = 1) -> int:
    """The last number that has a bar of its own."""
    return max(least_end, *(found.percentile(_SHOWN) for found in shown.values()))


def _overflow(shown: dict[str, Distribution], least_end: int = 1) -> str:
    """What to say of a last bar for all that is above the end, if there is one."""
    above = any(found.maximum > _end(shown, least_end) for found in shown.values())
    return " (last bar: all that is above)" if above else ""


def _histogram(panel: Any, shown: dict[str, Distribution], least_end: int = 1) -> None:
    """Bars side by side; where numbers are many, outlines one over the other."""
    end = _end(shown, least_end)
    width = -(-(end + 1) // _BARS)
    above = bool(_overflow(shown, least_end))
    for i, (name, found) in enumerate(shown.items()):
        heights = _binned(found.counts, width, end)[: None if above else -1]
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
    """Percent of the items in each bar from 0 to the end; one more bar for all above."""
    bars = end // width + 1
    numbers = np.flatnonzero(counts)
    found = np.bincount(
        np.minimum(numbers // width, bars), weights=counts[numbers], minlength=bars + 1
    )
    return 100 * found / max(counts.sum(), 1)
