"""The sections of the report: for each a title, a template and the data that the template shows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vixml_jax.data.card import card, stats
from vixml_jax.data.card.panels import Histogram, Panels
from vixml_jax.report import examples, markdown, svg, tables
from vixml_jax.report.page import Page, largest_cutoff

_TILES = ("P@1", "P@5", "nDCG@5", "PSP@5", "R@100", "coverage@5")
_GROUP_COLUMNS = ("P@1", "P@5", "nDCG@5", "PSP@5", "R@10", "R@100", "coverage@5")
_MAX_POINTS = 300  # Points of a line in a chart.


class Section(NamedTuple):
    """A section of the report.

    Attributes:
      title: Heading of the section.
      template: File in templates/.
      data: Variables of the template; None: there is nothing to show.
    """

    title: str
    template: str
    data: Mapping[str, Any] | None


def summary(page: Page) -> str:
    """Returns what was evaluated, in a few sentences."""
    unlabelled = (
        f" ({page.unlabelled:,} of them without labels, which count as misses)"
        if page.unlabelled
        else ""
    )
    return (
        f"{page.queries:,} queries{unlabelled}, {page.labels:,} labels, {page.search} search. "
        "Values are in percent; brackets show 95 % bootstrap intervals over queries."
    )


def all_sections(page: Page) -> list[Section]:
    """Returns the sections that have something to show."""
    sections = [
        Section("Metrics", "metrics.html.j2", _metrics(page)),
        Section("By label frequency", "by_frequency.html.j2", _by_frequency(page)),
        Section("By query", "by_query.html.j2", _by_query(page)),
        Section("Learning curves", "learning_curves.html.j2", _learning_curves(page)),
        Section("Recall and speed of the index", "recall_curve.html.j2", _recall_curve(page)),
        Section("Queries", "queries.html.j2", _queries(page)),
        Section("Label neighbours", "label_neighbours.html.j2", _label_neighbours(page)),
        Section("Data", "data_card.html.j2", _data_card(page)),
        Section("How this was made", "provenance.html.j2", _provenance(page)),
    ]
    return [section for section in sections if section.data]


def _metrics(page: Page) -> Mapping[str, Any]:
    run = page.rows[page.run]
    columns = [c for c in (*tables.COLUMNS, "coverage@5") if c in run]

    def interval(row: str, metric: str) -> tuple[float, float] | None:
        return page.intervals.get(row, {}).get(metric)

    return {
        "run": page.run,
        "propensity": page.propensity,
        "tiles": [(m, run[m], interval(page.run, m)) for m in _TILES if m in run],
        "columns": columns,
        "rows": [[name, *map(values.get, columns)] for name, values in page.rows.items()],
        "names": list(page.rows),
        "all_metrics": [
            [
                metric,
                *(
                    {"value": values.get(metric), "interval": interval(name, metric)}
                    for name, values in page.rows.items()
                ),
            ]
            for metric in run
        ],
    }


def _by_frequency(page: Page) -> Mapping[str, Any]:
    groups = page.groups[page.run]
    by_frequency, by_decile = groups["label frequency"], groups["frequency decile"]
    recall, precision = _largest_recall(page), largest_cutoff("P", page.rows[page.run])
    evaluated = [name for name, group in by_frequency.items() if group["metrics"]]
    charts = [
        svg.bars(
            f"{metric}{what}",
            f"{metric} of head, torso, tail and unseen labels; the table below has the numbers.",
            _series(page, "label frequency", metric, evaluated),
            unit=" %",
        )
        for metric, what in (
            (recall, " within the group"),
            (precision, ", contribution of the group"),
        )
    ]
    deciles = list(map(str, range(1, 11)))
    for metric, what in (
        (recall, " within the decile"),
        (precision, ", contribution of the decile"),
    ):
        series = _series(page, "frequency decile", metric, by_decile)
        charts.append(
            svg.columns(
                f"{metric}{what}",
                f"{metric} of ten groups of labels, the most frequent in training first; the "
                "table below has the numbers.",
                {row: list(map(values.get, deciles)) for row, values in series.items()},
                deciles,
                xlabel="decile, the most frequent labels first",
                ylabel="percent",
            )
        )
    unseen = by_frequency.get("unseen")
    counts = ("labels", "pairs", "queries")
    return {
        "bounds": [
            f"{name} {least}" + (" or more" if most is None else f" to {most}" if most else "")
            for name, least, most in stats.GROUPS
        ],
        "unseen": unseen if unseen and unseen["pairs"] else None,
        "pairs": sum(group["pairs"] for group in by_frequency.values()),
        "recall": recall,
        "charts": charts,
        "groups": _group_table("group", by_frequency, counts),
        "deciles": _group_table("decile", by_decile, counts),
    }


def _by_query(page: Page) -> Mapping[str, Any] | None:
    parts = []
    for kind, heading in (("images", "queries"), ("text length", "text length")):
        groups = page.groups[page.run].get(kind, {})
        if len(groups) < 2:
            continue
        charts = [
            svg.bars(
                f"{metric} by {kind}",
                f"{metric} of groups of queries; the table below has the numbers.",
                _series(page, kind, metric, groups),
                unit=" %",
            )
            for metric in ("P@1", _largest_recall(page))
        ]
        table = _group_table(heading, groups, ("queries", "pairs"))
        parts.append({"title": kind.capitalize(), "charts": charts, "groups": table})
    return {"parts": parts} if parts else None


def _group_table(
    heading: str, groups: Mapping[str, Mapping[str, Any]], counts: Sequence[str]
) -> Mapping[str, Any]:
    """Returns the header and rows of a table: name, counts and metrics of each group."""
    columns = [c for c in _GROUP_COLUMNS if any(c in g["metrics"] for g in groups.values())]
    return {
        "header": [heading, *counts, *columns],
        "rows": [
            [name, *(group[count] for count in counts), *map(group["metrics"].get, columns)]
            for name, group in groups.items()
        ],
    }


def _series(
    page: Page, kind: str, metric: str, names: Iterable[str]
) -> dict[str, dict[str, float | None]]:
    """Returns a metric of each group, by row, for the rows that have groups of this kind."""
    return {
        row: {name: groups[kind][name]["metrics"].get(metric) for name in names}
        for row, groups in page.groups.items()
        if kind in groups
    }


def _largest_recall(page: Page) -> str:
    """Returns the name of R at its largest cut-off; that of coverage if there is no R."""
    names = page.rows[page.run]
    return largest_cutoff("R", names) or largest_cutoff("coverage", names)


def _learning_curves(page: Page) -> Mapping[str, Any] | None:
    losses = {
        ("Loss in training", "The training loss"): page.losses,
        ("Loss of the label head", "The loss of epochs that train it alone"): page.head_losses,
    }
    charts = [
        svg.lines(
            title,
            f"{what} at {len(points)} steps.",
            {"loss": thinned(points)},
            xlabel="step",
            ylabel="loss",
        )
        for (title, what), points in losses.items()
        if len(points) > 1
    ]
    curves = {name: points for name, points in page.curves.items() if len(points) > 1}
    if curves:
        charts.append(
            svg.lines(
                f"Metrics on {page.curves_split} during training",
                f"{', '.join(curves)} in percent, by step.",
                {name: thinned(points) for name, points in curves.items()},
                xlabel="step",
                ylabel="percent",
            )
        )
    return {"charts": charts} if charts else None


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns means of consecutive points, so that at most _MAX_POINTS are left."""
    size = -(-len(points) // _MAX_POINTS)
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def _recall_curve(page: Page) -> Mapping[str, Any] | None:
    if not page.recall_curve:
        return None
    points = sorted((point["queries_per_s"], point["recall"]) for point in page.recall_curve)
    chart = svg.lines(
        "Recall against exact search",
        "Recall of the index by queries per second, one point per setting.",
        {"settings tried": points},
        xlabel="queries per second",
        ylabel="recall",
        log_x=True,
    )
    rows = [
        [
            f"{point['leaves_searched']:,}",
            f"{point['reordered']:,}",
            f"{point['recall']:.4f}",
            f"{point['queries_per_s']:,.0f}",
        ]
        for point in sorted(page.recall_curve, key=lambda point: point["recall"])
    ]
    return {"chart": chart, "rows": rows}


def _queries(page: Page) -> Mapping[str, Any] | None:
    parts = [(title, part) for title, part in (("Worst", page.worst), ("Best", page.best)) if part]
    if not parts:
        return None
    return {
        "parts": parts,
        "run": page.run,
        "retrieved": page.retrieved,
        "shown": examples.SHOWN,
        "chosen_by": page.chosen_by,
        "score": page.score,
        "thumbnails": page.thumbnails,
    }


def _label_neighbours(page: Page) -> Mapping[str, Any] | None:
    rows = [[label.text, label.frequency, label.nearest] for label in page.neighbours]
    return {"rows": rows} if rows else None


def _data_card(page: Page) -> Mapping[str, Any]:
    charts = _data_charts(page.panels)
    if page.card is None:
        return {"html": None, "file": card.TEXT, "charts": charts}
    figure = f'<div class="charts">{"".join(charts)}</div>'
    return {"html": markdown.to_html(page.card, figures={card.IMAGE: figure})}


def _data_charts(panels: Panels) -> list[str]:
    """Returns the panels of the data card's figure as charts, in the colours of the page."""
    charts = [_histogram(panels.tokens), _histogram(panels.labels)]
    if panels.images is not None:
        shown = panels.images.distributions
        with_images = {
            name: 100.0 * images.between(1, None).items / max(images.items, 1)
            for name, images in shown.items()
        }
        charts.append(
            svg.bars(
                "Items with images",
                "Percent of the items of each part with at least one image.",
                {"items": with_images},
                unit=" %",
            )
        )
    ranking = panels.frequencies
    if len(ranking.ranks):
        charts.append(
            svg.lines(
                ranking.title,
                f"{ranking.ylabel.capitalize()}, by rank; a table below has groups of labels.",
                {"labels": list(zip(ranking.ranks, ranking.queries, strict=True))},
                xlabel=ranking.xlabel,
                ylabel=ranking.ylabel,
                log_x=True,
                log_y=True,
            )
        )
    return charts


def _histogram(panel: Histogram) -> str:
    """Returns a line for each part of the data, through the middles of the bars."""
    middles = {
        name: [(i * panel.width + (panel.width - 1) / 2, y) for i, y in enumerate(heights)]
        for name, heights in panel.heights.items()
    }
    return svg.lines(
        panel.title,
        f"{panel.ylabel.capitalize()} by {panel.xlabel}.",
        middles,
        xlabel=panel.xlabel,
        ylabel=panel.ylabel,
        from_zero=True,
    )


def _provenance(page: Page) -> Mapping[str, Any]:
    return {
        "command": page.command,
        "facts": page.facts,
        "versions": page.versions,
        "settings": page.settings,
    }
