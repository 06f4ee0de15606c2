"""What stands in each section of the report, as HTML; nothing where there is nothing to say."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vixml_jax.data.card import card as data_card
from vixml_jax.data.card import stats
from vixml_jax.report import markdown, svg, tables
from vixml_jax.report.examples import Example
from vixml_jax.report.page import Page

_TILES = ("P@1", "P@5", "nDCG@5", "PSP@5", "R@100", "coverage@5")
_GROUP_COLUMNS = ("P@1", "P@5", "nDCG@5", "PSP@5", "R@10", "R@100", "coverage@5")
_TEXT_WIDTH = 240  # Characters of a query or label shown.
_HIT = ' class="hit"'
_POINTS = 300  # Of a curve, at most.


def escape(text: str) -> str:
    """Text as HTML that shows it as it is."""
    return html.escape(text)


def _quote(text: str) -> str:
    """A text of the data, cut where it is very long; its direction turns nothing beside it."""
    if len(text) > _TEXT_WIDTH:
        text = text[: _TEXT_WIDTH - 1] + "…"
    return f"<bdi>{escape(text)}</bdi>"


def _pairs(values: Mapping[str, str]) -> str:
    """Names and values, one a line."""
    lines = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in values.items())
    return f'<dl class="facts">{"".join(lines)}</dl>'


def _interval(page: Page, row: str, metric: str) -> str:
    found = page.intervals.get(row, {}).get(metric)
    return f"[{found[0]:.2f}, {found[1]:.2f}]" if found else ""


def metrics(page: Page) -> str:
    tiles = ""
    for metric in _TILES:
        if metric not in page.rows[page.run]:
            continue
        tiles += (
            f"<div><dt>{metric}</dt><dd>{page.rows[page.run][metric]:.2f}"
            f"<small>{_interval(page, page.run, metric)}</small></dd></div>"
        )
    shown = [c for c in (*tables.COLUMNS, "coverage@5") if c in page.rows[page.run]]
    rows = []
    for name, values in page.rows.items():
        cells = [f"{values[c]:.2f}" if c in values else "–" for c in shown]
        rows.append([escape(name), *cells])
    every = []
    for metric in page.rows[page.run]:
        cells = []
        for name, values in page.rows.items():
            cell = f"{values[metric]:.2f}" if metric in values else "–"
            if interval := _interval(page, name, metric):
                cell += f" <small>{interval}</small>"
            cells.append(cell)
        every.append([metric, *cells])
    headline = markdown.table(["", *shown], rows, label="metrics of all rows")
    full = markdown.table(["", *map(escape, page.rows)], every, label="all metrics")
    return (
        f'<dl class="tiles">{tiles}</dl>{headline}'
        f"<details><summary>All metrics, with intervals</summary>{full}</details>"
    )


def _group_table(groups: Mapping[str, Mapping[str, Any]], first: str, extra: Sequence[str]) -> str:
    shown = [c for c in _GROUP_COLUMNS if any(c in told["metrics"] for told in groups.values())]
    rows = []
    for name, told in groups.items():
        counts = [f"{told[part]:,}" for part in extra]
        values = [f"{told['metrics'][c]:.2f}" if told["metrics"] else "–" for c in shown]
        rows.append([escape(name), *counts, *values])
    return markdown.table([escape(first), *extra, *shown], rows, label=f"metrics by {first}")


def _series(
    page: Page, kind: str, metric: str, names: Iterable[str]
) -> dict[str, dict[str, float | None]]:
    """A metric of each row that was judged by groups."""
    return {
        row: {name: groups[kind][name]["metrics"].get(metric) for name in names}
        for row, groups in page.groups.items()
        if kind in groups
    }


def _recall(page: Page) -> str:
    """R at the largest cut that was judged; none where fewer than ten labels are kept."""
    cuts = [name for name in page.rows[page.run] if name.startswith("R@")]
    return max(cuts, key=lambda name: int(name[2:]), default="coverage@5")


def by_frequency(page: Page) -> str:
    groups = page.groups[page.run]
    kinds, deciles = groups["label frequency"], groups["frequency decile"]
    recall = _recall(page)
    judged = [name for name, told in kinds.items() if told["metrics"]]
    names = list(map(str, range(1, 11)))
    charts = [
        svg.bars(
            f"{metric}{what}",
            f"{metric} of head, torso, tail and unseen labels; the table below has the numbers.",
            _series(page, "label frequency", metric, judged),
            unit=" %",
        )
        for metric, what in ((recall, " within the group"), ("P@5", ", what the group adds"))
    ]
    for metric, what in ((recall, " within the decile"), ("P@5", ", what the decile adds")):
        series = {
            row: [values.get(name) for name in names]
            for row, values in _series(page, "frequency decile", metric, deciles).items()
        }
        charts.append(
            svg.columns(
                f"{metric}{what}",
                f"{metric} of ten groups of labels, the most frequent in training first; the "
                "table below has the numbers.",
                series,
                names,
                xlabel="decile, the most frequent labels first",
                ylabel="percent",
            )
        )
    extra = ("labels", "pairs", "queries")
    return (
        "<p>To a group belong the hits with its labels. P, nDCG and PSP are what these add to the "
        "whole, so that groups sum to it; R and coverage are within the group, as if its labels "
        "were the only true ones. Training queries of a label: "
        f"{_bounds()}. Deciles: labels seen in training, ordered by their training queries, in ten "
        "groups of about as many true pairs (empty where one label has more than a tenth of all)."
        "</p>"
        f"<p>{_unseen(kinds, recall)}</p>"
        f'<div class="charts">{"".join(charts)}</div>'
        f"{_group_table(kinds, 'labels', extra)}"
        f"<details><summary>Deciles as a table</summary>{_group_table(deciles, 'decile', extra)}"
        "</details>"
    )


def _bounds() -> str:
    return "; ".join(
        f"{name} {least}" + (" or more" if most is None else f" to {most}" if most else "")
        for name, least, most in stats.GROUPS
    )


def _unseen(kinds: Mapping[str, Mapping[str, Any]], recall: str) -> str:
    unseen = kinds.get("unseen")
    pairs = sum(told["pairs"] for told in kinds.values())
    if not unseen or not unseen["pairs"]:
        return "No true label of these queries is unseen in training."
    return (
        f"Never seen in training: {unseen['labels']:,} labels, which are in {unseen['pairs']:,} of "
        f"{pairs:,} true pairs; {recall} of them: {unseen['metrics'][recall]:.2f}."
    )


def by_query(page: Page) -> str:
    parts = ""
    for kind, first in (("pictures", "queries"), ("text length", "text length")):
        groups = page.groups[page.run].get(kind, {})
        if len(groups) < 2:
            continue
        charts = "".join(
            svg.bars(
                f"{metric} by {kind}",
                f"{metric} of groups of queries; the table below has the numbers.",
                _series(page, kind, metric, groups),
                unit=" %",
            )
            for metric in ("P@1", _recall(page))
        )
        parts += (
            f"<h3>{escape(kind.capitalize())}</h3>"
            f'<div class="charts">{charts}</div>'
            f"{_group_table(groups, first, ('queries', 'pairs'))}"
        )
    if not parts:
        return ""
    return (
        "<p>Metrics of some of the queries alone. Lengths are of whole texts, in quarters of the "
        f"queries.</p>{parts}"
    )


def curves(page: Page) -> str:
    charts = ""
    if len(page.losses) > 1:
        charts += svg.lines(
            "Loss in training",
            f"The loss over {len(page.losses)} measurements.",
            {"loss": _thinned(page.losses)},
            xlabel="step",
            ylabel="loss",
        )
    curves = {name: points for name, points in page.curves.items() if len(points) > 1}
    if curves:
        charts += svg.lines(
            f"Metrics on {page.curves_split} while training",
            f"{', '.join(curves)} in percent, by step.",
            {name: _thinned(points) for name, points in curves.items()},
            xlabel="step",
            ylabel="percent",
        )
    return charts and f'<div class="charts">{charts}</div>'


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbouring points, where there are more than a chart can show."""
    size = -(-len(points) // _POINTS)
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def recall_curve(page: Page) -> str:
    if not page.recall_curve:
        return ""
    points = sorted((point["queries_per_s"], point["recall"]) for point in page.recall_curve)
    chart = svg.lines(
        "Recall against exact search",
        "Recall of the index by queries a second, one point a setting.",
        {"settings tried": points},
        xlabel="queries a second",
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
    table = markdown.table(
        ["leaves searched", "reordered", "recall", "queries a second"], rows, label="settings tried"
    )
    return f'<div class="charts">{chart}<div>{table}</div></div>'


def examples(page: Page) -> str:
    def one(example: Example) -> str:
        pictures = f"{example.pictures} picture" + ("" if example.pictures == 1 else "s")
        found = "".join(
            f"<li{' class=hit' if p.hit else ''}><span>{'✓' if p.hit else '·'}"
            f'<span class="unseen-by-eye">{"true" if p.hit else "not true"}: </span></span>'
            f"<span>{_quote(p.text)}</span><span>{p.score:.3f}</span></li>"
            for p in example.predicted
        )
        true = "".join(
            f"<li{' class=hit' if w.rank else ''}><span>{'✓' if w.rank else '–'}</span>"
            f"<span>{_quote(w.text)}</span>"
            f"<span>{f'at {w.rank}' if w.rank else 'not found'}</span></li>"
            for w in example.wanted
        )
        more = example.num_wanted - len(example.wanted)
        rest = f"<p>and {more:,} more</p>" if more else ""
        text = _quote(example.text) if example.text.strip() else "(no text)"
        seen = "".join(
            f'<img src="{url}" alt="picture {i}">' if url else f"<p>picture {i}: not readable</p>"
            for i, url in enumerate(page.thumbnails.get(example.id, ()), 1)
        )
        return (
            f'<article><h4>{text}</h4>{seen}<p class="muted">{pictures}, {escape(page.chosen_by)} '
            f"{example.value:.1f}</p><h5>Predicted, with scores</h5><ol>{found}</ol>"
            f"<h5>True</h5><ul>{true}</ul>{rest}</article>"
        )

    parts = ""
    for title, chosen in (("Worst", page.worst), ("Best", page.best)):
        if chosen:
            cards = "".join(map(one, chosen))
            parts += f'<h3>{title}</h3><div class="examples">{cards}</div>'
    return parts and (
        f"<p>The worst and the best by {escape(page.chosen_by)}, then by MRR; where many are "
        f"equal, some of them at random. ✓ marks what is both predicted and true.</p>{parts}"
    )


def neighbours(page: Page) -> str:
    rows = [
        [
            _quote(found.text),
            f"{found.frequency:,}",
            "<br>".join(f"{_quote(text)} {cosine:.2f}" for text, cosine in found.near),
        ]
        for found in page.neighbours
    ]
    if not rows:
        return ""
    table = markdown.table(
        ["label", "training queries", "nearest labels, cosine"], rows, label="label neighbours"
    )
    return (
        "<p>Labels from the most frequent to the rarest, and those whose vectors are nearest.</p>"
        f'<div class="words">{table}</div>'
    )


def card(page: Page) -> str:
    if page.card is None:
        return f"<p>The prepared data have no card ({data_card.TEXT}).</p>"
    pictures = {}
    if page.card_picture is not None:
        encoded = base64.b64encode(page.card_picture).decode()
        pictures[data_card.PICTURE] = f"data:image/png;base64,{encoded}"
    return f'<div class="card">{markdown.to_html(page.card, pictures=pictures)}</div>'


def made(page: Page) -> str:
    return (
        f"<pre>{escape(page.command)}</pre>{_pairs(page.facts)}<h3>Versions</h3>"
        f"{_pairs(page.versions)}<details><summary>All flags of the run</summary>"
        f"<pre>{escape(page.settings)}</pre></details>"
    )
