"""The sections of the page that compares runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from vixml_jax.evaluation import compare
from vixml_jax.report import runs as runs_lib
from vixml_jax.report import svg, tables
from vixml_jax.report.runs import Curve, Difference, Point, Run, Runs
from vixml_jax.report.sections import Section, thinned

_HOURS_FROM = 180.0  # Minutes from which on time is in hours.


def title(page: Runs) -> str:
    """Returns the title of the page."""
    names = [run.name for run in page.runs]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def summary(page: Runs) -> str:
    """Returns what the page compares, in a few sentences."""
    count = len(page.runs)
    data = len({run.content_hash for run in page.runs})
    same = "" if count == 1 else " on the same data" if data == 1 else f" on {data} data sets"
    return (
        f"{count} run{'s' * (count > 1)}{same}, {page.split} split, {page.search} search. Metrics "
        "are in percent; brackets show 95 % bootstrap intervals over queries."
    )


def all_sections(page: Runs, *, command: str, facts: Mapping[str, str]) -> list[Section]:
    """Returns the sections that have something to show.

    Args:
      page: Content of the page.
      command: Command line that made it.
      facts: Other facts about it, by name.
    """
    sections = [
        Section("Runs", "run_list.html.j2", _run_list(page)),
        Section(f"Metrics on {page.split}", "run_metrics.html.j2", _metrics(page)),
        Section("Differences", "run_differences.html.j2", _differences(page)),
        Section("Learning curves", "run_curves.html.j2", _learning_curves(page.runs)),
        Section("Flags", "run_flags.html.j2", _flags(page.runs)),
        Section("How this was made", "run_made.html.j2", {"command": command, "facts": facts}),
    ]
    return [section for section in sections if section.data]


def _run_list(page: Runs) -> Mapping[str, Any]:
    data = list(dict.fromkeys(run.content_hash for run in page.runs))
    rows = []
    for i, run in enumerate(page.runs):
        points = [*run.losses, *run.head_losses]
        minutes = [point.minutes for point in points if point.minutes is not None]
        facts = {
            "directory": run.path,
            "data": f"{run.data} (content {run.content_hash[:12]})",
            "training": _duration(max(minutes)) if minutes else "",
            "epochs": f"{max(point.epochs for point in points):.4g}" if points else "",
        }
        rows.append((run.letter, run.name, svg.key(i), {k: v for k, v in facts.items() if v}))
    return {"rows": rows, "data_sets": len(data)}


def _duration(minutes: float) -> str:
    return f"{minutes:.1f} minutes" if minutes < _HOURS_FROM else f"{minutes / 60:.1f} hours"


def _metrics(page: Runs) -> Mapping[str, Any]:
    columns = [
        (i, run.letter + suffix, run.scores[scoring])
        for i, run in enumerate(page.runs)
        for scoring, suffix in zip(runs_lib.SCORINGS, ("", " + kNN"), strict=True)
        if scoring in run.scores
    ]
    names = list(dict.fromkeys(name for *_, scores in columns for name in scores.metrics))
    rows = [
        [
            name,
            *(
                {"value": scores.metrics.get(name), "interval": scores.intervals.get(name)}
                for *_, scores in columns
            ),
        ]
        for name in names
    ]
    charts = []
    for name in ("P@1", "PSP@5", "R@100"):
        shown = [column for column in columns if name in column[2].intervals]
        if shown:
            charts.append(
                svg.intervals(
                    f"{name} with its interval",
                    f"{name} of each run; the table below has the numbers.",
                    {
                        letter: (scores.metrics[name], *scores.intervals[name])
                        for _, letter, scores in shown
                    },
                    xlabel="percent",
                    series=[i for i, *_ in shown],
                )
            )
    return {
        "missing": [
            (run.letter, runs_lib.evaluate_command(run.path, page.split, page.search))
            for run in page.runs
            if not run.scores
        ],
        "header": ["", *(letter for _, letter, _ in columns)],
        "main": [row for row in rows if row[0] in tables.COLUMNS],
        "rows": rows,
        "charts": charts,
        "data_sets": len({run.content_hash for run in page.runs}),
        "split": page.split,
    }


def _differences(page: Runs) -> Mapping[str, Any] | None:
    parts = []
    for scoring, differences in page.differences.items():
        if not differences:
            continue
        measured = [one for one in differences if one.metrics]
        names = list(dict.fromkeys(name for one in measured for name in one.metrics))
        rows = [[name, *(one.metrics.get(name) for one in measured)] for name in names]
        letters = [run.letter for run in page.runs]
        parts.append(
            {
                "scoring": scoring,
                "reasons": [(one.one, one.other, one.reason) for one in differences if one.reason],
                "header": ["", *(f"{one.one} − {one.other}" for one in measured)],
                "main": [row for row in rows if row[0] in tables.COLUMNS],
                "rows": rows,
                "charts": [_chart_of(one, letters.index(one.one)) for one in measured],
            }
        )
    return {"parts": parts} if parts else None


def _chart_of(difference: Difference, series: int) -> str:
    rows = {
        name: (found.difference, found.low, found.high)
        for name, found in difference.metrics.items()
        if name in tables.COLUMNS
    }
    name = f"{difference.one} − {difference.other}"
    return svg.intervals(
        name,
        f"Differences with their intervals, {name}; the table below has the numbers.",
        rows,
        xlabel="percentage points",
        series=[series] * len(rows),
        with_zero=True,
    )


def _learning_curves(runs: Sequence[Run]) -> Mapping[str, Any] | None:
    names = [run.letter + " " + run.name for run in runs]
    losses = zip(names, (run.losses for run in runs), strict=True)
    head_losses = zip(names, (run.head_losses for run in runs), strict=True)
    charts = _pair("Loss in training", "loss", list(losses))
    charts += _pair("Loss of the label head", "loss", list(head_losses))
    for metric in dict.fromkeys(metric for run in runs for metric in run.curves):
        drawn = [run.curves.get(metric, Curve("", [])) for run in runs]
        series = [
            (f"{name} on {curve.split}", curve.points)
            for name, curve in zip(names, drawn, strict=True)
        ]
        charts += _pair(f"{metric} during training", "percent", series)
    drawn = [run for run in runs if run.losses or run.head_losses]
    notes = [f"{run.letter}: {run.path} has no metrics.jsonl." for run in runs if not run.is_logged]
    notes += [
        f"{run.letter} has no times, which versions up to 0.2 did not log."
        for run in drawn
        if any(point.minutes is None for point in [*run.losses, *run.head_losses])
    ]
    return {"charts": charts, "notes": notes} if charts or notes else None


def _pair(title: str, ylabel: str, series: Sequence[tuple[str, Sequence[Point]]]) -> list[str]:
    """Returns charts against epochs and against time; none without two points of some run.

    Args:
      title, ylabel: Of the charts.
      series: Name and points of each run, which may be none.
    """
    if max(len(points) for _, points in series) < 2:
        return []
    longest = max((p.minutes for _, points in series for p in points if p.minutes), default=0.0)
    unit, size = ("hours", 60.0) if longest > _HOURS_FROM else ("minutes", 1.0)
    by_epoch = {
        i: [(point.epochs, point.value) for point in points]
        for i, (_, points) in enumerate(series)
        if points
    }
    by_time = {
        i: [(p.minutes / size, p.value) for p in points if p.minutes is not None]
        for i, (_, points) in enumerate(series)
        if any(p.minutes is not None for p in points)
    }
    return [
        svg.lines(
            f"{title}, by {xlabel}",
            f"{title} of each run, by {xlabel}.",
            {series[i][0]: thinned(points) for i, points in shown.items()},
            xlabel=xlabel,
            ylabel=ylabel,
            numbers=list(shown),
        )
        for xlabel, shown in (("epochs", by_epoch), (f"{unit} of running", by_time))
        if shown
    ]


def _flags(runs: Sequence[Run]) -> Mapping[str, Any] | None:
    if len(runs) < 2:
        return None
    values = compare.differing_values([run.settings for run in runs])
    return {
        "header": ["flag", *(run.letter for run in runs)],
        "rows": [[f"--{name}", *row] for name, row in values.items()],
    }
