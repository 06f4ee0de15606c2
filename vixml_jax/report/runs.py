"""Content of the page that compares runs, read from their directories alone."""

import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from etils import epath

from vixml_jax import config as config_lib
from vixml_jax.errors import InputError
from vixml_jax.evaluation import bootstrap, compare
from vixml_jax.evaluation.bootstrap import Comparison
from vixml_jax.report import curves
from vixml_jax.runtime import console, flag_fields
from vixml_jax.storage import json_files

# Scorings of an evaluation: the end of the name of its file of metrics per query; the names of its
# metrics in the JSON file, in this version and version 0.1; and of its intervals.
SCORINGS = {
    "without neighbours": ("", (), "run"),
    "with neighbours": ("-neighbours", ("with_neighbours", "with_memory"), "neighbours"),
}
_LARGEST = 1e9  # Numbers that are drawn; a chart of others would show nothing else.
_Percent = Annotated[float, msgspec.Meta(ge=-_LARGEST, le=_LARGEST)]


class Point(NamedTuple):
    """A value that was logged during training.

    Attributes:
      epochs: Epochs done; 1.5 in the middle of the second epoch.
      minutes: Time that the run had been running, over all of its starts and without the time
        between them; None: versions up to 0.2 did not log it.
      value: The value.
    """

    epochs: float
    minutes: float | None
    value: float


class Curve(NamedTuple):
    """A metric during training.

    Attributes:
      split: On which it was evaluated.
      points: Its values in percent.
    """

    split: str
    points: list[Point]


class Scores(NamedTuple):
    """Metrics of a run on the split.

    Attributes:
      metrics: In percent, by name.
      intervals: Their 95 % intervals; some metrics may have none.
    """

    metrics: dict[str, _Percent]
    intervals: dict[str, tuple[_Percent, _Percent]]


class Run(NamedTuple):
    """A run of the page.

    Attributes:
      letter: What it is called in tables.
      name: The end of its path that no other run of the page has.
      path: Its directory.
      data: Directory of its data, as it was given.
      content_hash: Of the data.
      settings: Values of its flags, by name, under the names of this version.
      is_logged: Whether it has a metrics.jsonl.
      losses: Loss in training.
      head_losses: Likewise, of the epochs in which the label head is trained alone.
      curves: Metrics during training, by name.
      scores: By scoring; empty: the run was not evaluated on the split.
    """

    letter: str
    name: str
    path: str
    data: str
    content_hash: str
    settings: dict[str, Any]
    is_logged: bool
    losses: list[Point]
    head_losses: list[Point]
    curves: dict[str, Curve]
    scores: dict[str, Scores]


class Difference(NamedTuple):
    """How a run differs from another one on the same queries.

    Attributes:
      one, other: Their letters.
      metrics: `one` minus `other`, by metric; empty if there is a reason why not.
      reason: Why they are not compared; empty: they are.
    """

    one: str
    other: str
    metrics: Mapping[str, Comparison]
    reason: str = ""


class Runs(NamedTuple):
    """Everything that the page shows.

    Attributes:
      split: The split.
      search: Kind of search, 'exact' or 'scann'.
      runs: In the given order.
      differences: Of each run from the first one on the same data, by scoring.
    """

    split: str
    search: str
    runs: list[Run]
    differences: dict[str, list[Difference]]


def read(paths: Sequence[str], split: str, search: str) -> Runs:
    """Returns the content of the page.

    Args:
      paths: Run directories, all different.
      split: The split whose evaluations are shown.
      search: Likewise, their kind of search.

    Raises:
      InputError: If a directory holds no run, or a file of it is damaged.
    """
    runs = [
        _read_run(letter, name, path, f"{split}-{search}")
        for letter, name, path in zip("ABCDEFGHIJ", short_names(paths), paths, strict=False)
    ]
    return Runs(
        split,
        search,
        runs,
        {scoring: _differences(runs, f"{split}-{search}", scoring) for scoring in SCORINGS},
    )


def short_names(paths: Sequence[str]) -> list[str]:
    """Returns the shortest ends of paths in which all of them differ."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def evaluate_command(path: str, split: str, search: str) -> str:
    """Returns the command that evaluates a run on a split."""
    flags = [f"--workdir={path}", f"--split={split}"]
    if search != "exact":
        flags.append(f"--search={search}")
    return shlex.join(["vixml_jax", "evaluate", *flags])


def _read_run(letter: str, name: str, path: str, evaluation: str) -> Run:
    config = config_lib.load(os.path.join(path, "config.json"))
    is_logged = json_files.is_there(os.path.join(path, "metrics.jsonl"))
    lines = curves.read_lines(path) if is_logged else []
    if not all("step" in line and "epoch" in line for line in lines):
        raise InputError(
            f"{os.path.join(path, 'metrics.jsonl')}: has lines without step or epoch; expected a "
            "file that train wrote"
        )
    losses: tuple[list, list] = ([], [])
    for line in lines:
        if "loss" in line:
            losses[curves.is_of_head(line)].append((line["step"], line["loss"]))
    drawn = {}
    for metric in curves.METRICS if is_logged else ():
        split, steps, values = curves.read_curve(path, metric)
        if steps:
            points = _points(lines, list(zip(steps, values, strict=True)))
            drawn[metric] = Curve(split, points)
    return Run(
        letter=letter,
        name=console.printable(name),
        path=path,
        data=config.data,
        content_hash=compare.content_hash(path) or "",
        settings={name: value for name, _, value in flag_fields.leaves(config)},
        is_logged=is_logged,
        losses=_points(lines, losses[False]),
        head_losses=_points(lines, losses[True]),
        curves=drawn,
        scores=_scores(path, evaluation),
    )


def _points(
    lines: Sequence[Mapping[str, float]], values: Sequence[tuple[int, float]]
) -> list[Point]:
    """The points of pairs of step and value, but for values that are not finite."""
    values = [(step, value) for step, value in values if abs(value) <= _LARGEST]
    steps = [step for step, _ in values]
    minutes: Sequence[float | None] = [None] * len(steps)
    if all("seconds" in line for line in lines):
        minutes = curves.minutes_at(lines, steps)
    return [
        Point(epochs, at, value)
        for epochs, at, (_, value) in zip(
            curves.epochs_at(lines, steps), minutes, values, strict=True
        )
    ]


def _scores(path: str, evaluation: str) -> dict[str, Scores]:
    """Metrics in the JSON file of an evaluation, by scoring; empty if there is no such file."""
    file = os.path.join(path, "evaluation", f"{evaluation}.json")
    if not json_files.is_there(file):
        return {}
    results = json_files.read(file, dict[str, Any], "evaluate the run again")
    found = {}
    for scoring, (_, keys, of_intervals) in SCORINGS.items():
        values = next((results[key] for key in keys if key in results), {} if keys else results)
        metrics = {name: values[name] for name in values if "@" in name or name == "MRR"}
        if metrics:
            try:
                intervals = msgspec.convert(results.get("intervals", {}), dict[str, dict])
                bounds = intervals.get(of_intervals, {})
                bounds = {name: bounds[name] for name in bounds if name in metrics}
                found[scoring] = msgspec.convert((metrics, bounds), Scores)
            except msgspec.ValidationError as error:
                raise InputError(f"{file}: {error}; evaluate the run again") from None
    return found


def _differences(runs: Sequence[Run], evaluation: str, scoring: str) -> list[Difference]:
    """Differences of each run that has the scoring from the first one that has it, too."""
    evaluated = [run for run in runs if scoring in run.scores]
    found = []
    for at, run in enumerate(evaluated):
        before = evaluated[:at]
        first = next((one for one in before if one.content_hash == run.content_hash), None)
        if first is not None:
            found.append(_difference(run, first, evaluation + SCORINGS[scoring][0]))
        elif before:
            reason = "trained and evaluated on other data, so they are not subtracted"
            found.append(Difference(run.letter, before[0].letter, {}, reason))
    return found


def _difference(run: Run, first: Run, evaluation: str) -> Difference:
    paths = [compare.find(one.path, evaluation) for one in (run, first)]
    missing = [path for path in paths if not epath.Path(path).exists()]
    if missing:
        reason = f"{' and '.join(missing)} not found; evaluate the run again"
        return Difference(run.letter, first.letter, {}, reason)
    try:
        (one, _), (other, _) = compare.read_both(paths)
        metrics = bootstrap.compare(one, other)
    except InputError as error:  # Of other queries or metrics, say; each may be right by itself.
        return Difference(run.letter, first.letter, {}, str(error))
    return Difference(run.letter, first.letter, metrics)
