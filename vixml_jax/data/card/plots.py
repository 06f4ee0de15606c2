"""The figure of the data card: its panels below each other, legible on the width of a phone."""

import textwrap
from typing import Any

import numpy as np

from vixml_jax.data.card import panels
from vixml_jax.data.card.panels import MAX_BARS, Histogram, Ranking
from vixml_jax.data.store import PARTS, PreparedDataset

WIDTH, PANEL_HEIGHT = 750, 375  # Pixels.
_DPI = 100
_TITLE_WIDTH = 54  # Characters on a line of a title.
# Colours that colour-blind readers can distinguish (Okabe & Ito, Color Universal Design, 2008).
_COLOURS = {"train": "#0072B2", "valid": "#009E73", "test": "#E69F00", "labels": "#D55E00"}
_GROUP_COLOURS = {"head": "#0072B2", "torso": "#009E73", "tail": "#E69F00", "unseen": "#CC79A7"}
_FEW = 20  # Histograms with fewer numbers have bars side by side.


def draw(dataset: PreparedDataset, path: str) -> None:
    """Writes the figure, WIDTH pixels wide and PANEL_HEIGHT pixels high per panel.

    Args:
      dataset: The prepared data set.
      path: File name that ends in .png.
    """
    import matplotlib
    from matplotlib.figure import Figure

    measured = panels.measure(dataset)
    shown = [panel for panel in measured if panel is not None]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # Independent of the user's settings.
        matplotlib.rcParams.update(
            {"font.size": 14, "axes.titlesize": 15, "legend.fontsize": 13}
            | {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
        )
        size = WIDTH / _DPI, PANEL_HEIGHT * len(shown) / _DPI
        figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
        figure.get_layout_engine().set(hspace=0.04)
        for axes, panel in zip(figure.subplots(len(shown), 1), shown, strict=True):
            title = textwrap.fill(panel.title, _TITLE_WIDTH)
            axes.set(title=title, xlabel=panel.xlabel, ylabel=panel.ylabel)
            if panel is measured.tokens:
                limit = f"{dataset.max_tokens} tokens"
                axes.axvline(dataset.max_tokens + 0.5, color="black", linestyle="--", label=limit)
            if isinstance(panel, Histogram):
                _draw_histogram(axes, panel)
            else:
                _draw_ranking(axes, panel)
        figure.suptitle(_title(dataset), fontsize=16, parse_math=False)
        figure.savefig(path)


def _title(dataset: PreparedDataset) -> str:
    sizes = ", ".join(
        f"{len(items):,} {name if name == 'labels' else f'{name} queries'}"
        for name in PARTS
        if (items := getattr(dataset, name)) is not None
    )
    # The font lacks other letters.
    name = f"{dataset.name}: " if dataset.name.isascii() else ""
    return textwrap.fill(f"{name}{sizes}", _TITLE_WIDTH)


def _draw_histogram(axes: Any, panel: Histogram) -> None:
    """Draws bars side by side; if there are many numbers, outlines on top of each other."""
    for i, (name, heights) in enumerate(panel.heights.items()):
        starts = np.arange(len(heights)) * panel.width
        if panel.end < _FEW:
            bar = 0.8 / len(panel.heights)
            places = starts + (i - (len(panel.heights) - 1) / 2) * bar
            axes.bar(places, heights, bar, color=_COLOURS[name], label=name)
        else:
            edges = np.append(starts, starts[-1] + panel.width) - 0.5
            axes.stairs(heights, edges, color=_COLOURS[name], linewidth=2, label=name)
            axes.stairs(heights, edges, color=_COLOURS[name], fill=True, alpha=0.2)
    if panel.end < _FEW:
        names = [str(number) for number in range(panel.end + 1)]
        names += panel.overflow * [f"{panel.end + 1}+"]
        axes.set_xticks(range(len(names)), names)
    axes.legend(frameon=False)


def _draw_ranking(axes: Any, panel: Ranking) -> None:
    """Draws labels ranked by their number of training queries, with shaded groups."""
    first = 1
    for name, (labels, described) in panel.groups.items():
        axes.axvspan(
            first - 0.5,
            first + labels - 0.5,
            color=_GROUP_COLOURS[name],
            alpha=0.25,
            linewidth=0,
            label=described,
        )
        first += labels
    marker = "o" if len(panel.ranks) < 2 * MAX_BARS else None  # A single label has no line.
    axes.plot(panel.ranks, panel.queries, color="black", linewidth=2, marker=marker, markersize=4)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(0.8, first),
        ylim=(0.7, 1.6 * max(panel.queries, default=1)),
    )
    axes.legend(loc="lower left", framealpha=0.9)
