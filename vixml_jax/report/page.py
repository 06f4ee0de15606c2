"""Content of the report, gathered from an evaluation, a run directory and prepared data."""

import dataclasses
import datetime
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vixml_jax import run_data
from vixml_jax.data.card import card, panels
from vixml_jax.data.card.panels import Panels
from vixml_jax.data.store import PreparedDataset
from vixml_jax.evaluation.sliced_metrics import SlicedMetrics
from vixml_jax.report import curves, examples, thumbnails
from vixml_jax.report.examples import Example, Neighbours
from vixml_jax.storage import json_files
from vixml_jax.structs import SearchResult

NUM_EXAMPLES = 8  # Worst queries, best queries, and labels with their nearest labels.

Groups = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """Everything that a report shows.

    Attributes:
      dataset, split, search: What was evaluated, and the kind of search.
      queries, labels: Numbers of queries and labels.
      unlabelled: Number of queries without labels.
      propensity: The constants A and B of PSP and PSnDCG.
      run: Name of the row that predict serves: tiles, groups and examples are of it.
      rows: Metrics in percent, by name of the row.
      intervals: 95 % interval of each metric, by name of the row; some rows may have none.
      groups: Metrics of groups as in `SlicedMetrics.groups`, by name of the row.
      losses: Step and training loss.
      head_losses: Likewise, of the epochs in which the label head is trained alone.
      curves: Step and value on `curves_split`, by metric.
      curves_split: 'valid' or 'test'.
      recall_curve: Index settings tried, each with its recall and queries per second.
      thumbnails: Images of queries as `data:` URLs, by id of the query; "" = unreadable.
      worst, best: Example queries, chosen by the metric `chosen_by`.
      retrieved: Number of labels found for each query.
      score: What the score of a prediction is: 'probability', 'cosine', or 'mixed' for a weighted
        sum of softmax values of labels and training neighbours.
      chosen_by: Name of that metric.
      neighbours: Labels with their nearest labels.
      card: The data card as Markdown; None: the data have none.
      panels: What the figure of the data card shows.
      command: Command line of the evaluation.
      versions: Versions of libraries, and the devices.
      settings: Configuration of the run, as JSON.
      facts: Other facts about the evaluation, by name.
    """

    dataset: str
    split: str
    search: str
    queries: int
    labels: int
    unlabelled: int
    propensity: tuple[float, float]
    run: str
    rows: Mapping[str, Mapping[str, float]]
    intervals: Mapping[str, Mapping[str, tuple[float, float]]]
    groups: Mapping[str, Groups]
    losses: Sequence[tuple[float, float]]
    head_losses: Sequence[tuple[float, float]] = ()
    curves: Mapping[str, Sequence[tuple[float, float]]]
    curves_split: str
    recall_curve: Sequence[Mapping[str, float]]
    thumbnails: Mapping[str, Sequence[str]]
    worst: Sequence[Example]
    best: Sequence[Example]
    retrieved: int
    score: str = "cosine"
    chosen_by: str
    neighbours: Sequence[Neighbours]
    card: str | None
    panels: Panels
    command: str
    versions: Mapping[str, str]
    settings: str
    facts: Mapping[str, str]


def largest_cutoff(metric: str, names: Iterable[str]) -> str | None:
    """Returns a metric at its largest cut-off, such as 'P@5' for 'P'; None: no name is of it."""
    cuts = [int(cut) for kind, _, cut in (name.partition("@") for name in names) if kind == metric]
    return f"{metric}@{max(cuts)}" if cuts else None


def assemble(
    workdir: str,
    dataset: PreparedDataset,
    split: str,
    *,
    run: str,
    results: Mapping[str, Any],
    result: SearchResult,
    label_vectors: Float[np.ndarray, "l e"],
    frequency: Int[np.ndarray, " l"],
    sliced: Mapping[str, SlicedMetrics],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]],
    rows: Mapping[str, Mapping[str, float]],
    command: str,
    versions: Mapping[str, str],
    settings: str,
    images: str = "",
) -> Page:
    """Returns the content of a report; curves, data card and texts are read from the directories.

    Args:
      workdir, dataset, split: The run directory, its data, and the evaluated split.
      run: Name of the row that predict serves.
      results: Contents of the evaluation's JSON file.
      result: Labels found for each query in that row, filter pairs removed.
      label_vectors: Unit vectors of all labels.
      frequency: Number of training queries of each label.
      sliced: Metrics per query and per group, by name of the row, `run` among them.
      intervals, rows, command, versions, settings: As in `Page`.
      images: Table with the image files of the queries (see `thumbnails.find`); empty: none.
    """
    queries, relevance, _ = dataset.split(split)
    per_query = sliced[run].queries
    labels_per_query = np.diff(relevance.indptr)
    chosen_by = largest_cutoff("nDCG", per_query.names)
    worst, best = (
        examples.describe(
            chosen, queries, dataset.labels, relevance, result, per_query.column(chosen_by)
        )
        for chosen in examples.choose(per_query, labels_per_query, by=chosen_by, count=NUM_EXAMPLES)
    )
    drawn = {}
    if images:
        ids = [example.id for example in [*worst, *best]]
        files = thumbnails.find(images, ids, run_data.read_reading(workdir))
        drawn = {id: [thumbnails.draw(path) for path in paths] for id, paths in files.items()}
    lines = curves.read_lines(workdir)
    read = {n: curves.read_curve(workdir, n) for n in curves.METRICS if n in rows[run]}
    losses: tuple[list[tuple[float, float]], ...] = ([], [])
    for line in lines:
        if "loss" in line:
            losses[curves.is_of_head(line)].append((line["step"], line["loss"]))
    search = {name: value for name, value in results["search"].items() if name != "curve"}
    return Page(
        dataset=dataset.name,
        split=split,
        search=results["search"]["kind"],
        queries=len(queries),
        labels=dataset.num_labels,
        unlabelled=int(np.count_nonzero(labels_per_query == 0)),
        propensity=(dataset.propensity_a, dataset.propensity_b),
        run=run,
        rows=rows,
        intervals=intervals,
        groups={name: metrics.groups for name, metrics in sliced.items()},
        losses=losses[False],
        head_losses=losses[True],
        curves={
            name: list(zip(steps, values, strict=True)) for name, (_, steps, values) in read.items()
        },
        curves_split=next((curve_split for curve_split, *_ in read.values()), ""),
        recall_curve=results["search"].get("curve", []),
        thumbnails=drawn,
        worst=worst,
        best=best,
        retrieved=result.ids.shape[1],
        score=_score(results),
        chosen_by=chosen_by,
        neighbours=examples.nearest(
            examples.spread(frequency, NUM_EXAMPLES), label_vectors, dataset.labels, frequency
        ),
        card=_card(dataset.path),
        panels=panels.measure(dataset),
        command=command,
        versions=versions,
        settings=settings,
        facts={
            "run": workdir,
            "data": dataset.path,
            "content hash": dataset.content_hash,
            "search": _join(search),
            **{
                name: _join(results[key])
                for name, key in (
                    ("weights", "fusion"),
                    ("weights with training neighbours", "fusion_with_neighbours"),
                    ("training neighbours", "mixing"),
                )
                if key in results
            },
            "seconds": _join(results["seconds"]),
            "peak memory": f"{results['peak_memory_gib']:.2f} GiB",
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        },
    )


def _card(data: str) -> str | None:
    """The data card of a prepared data set; None if there is none."""
    path = os.path.join(data, card.TEXT)
    if not json_files.is_there(path):
        return None
    return json_files.read_bytes(path, "prepare the data again").decode(errors="replace")


def _score(results: Mapping[str, Any]) -> str:
    """What the scores of the labels that predict serves are; see `Page.score`."""
    if "fusion" in results:
        return "probability"
    return "mixed" if "mixing" in results else "cosine"


def _join(values: Mapping[str, Any]) -> str:
    shown = {name: ("no", "yes")[x] if isinstance(x, bool) else x for name, x in values.items()}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
