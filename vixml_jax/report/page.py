"""What a report shows: gathered from an evaluation, a run directory and prepared data."""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float, Int

from vixml_jax.data.card import card
from vixml_jax.data.store import PreparedDataset
from vixml_jax.evaluation.sliced_metrics import Judgement
from vixml_jax.report import curves, examples, thumbnails
from vixml_jax.report.examples import Example, Neighbours
from vixml_jax.structs import SearchResult

EXAMPLES = 8  # Worst and best queries, and labels with neighbours.
CHOSEN_BY = "nDCG@5"  # These queries.

Groups = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """All that a report shows.

    Attributes:
      dataset, split, search: What was judged, and how.
      queries, labels: How many.
      run: Name of the row of this run.
      rows: Metrics in percent, by name of the row.
      intervals: By name of the row, of each metric; rows without are left out.
      groups: By name of the row, as `breakdown.Judgement` has them.
      losses: Step and loss, in training.
      curves: By metric, step and value, on `curves_split`.
      curves_split: 'valid' or 'test'.
      recall_curve: Settings of the index tried: recall, and queries a second.
      thumbnails: Pictures of these queries by their ids, as `data:` urls; empty: it is broken.
      worst, best: Queries to look at, chosen by the metric `chosen_by`.
      neighbours: Labels, and those near them.
      card, card_picture: The data card, Markdown and PNG; None: the data have none.
      command: What was run.
      versions: Of programs, and the device.
      settings: Flags of the run, as JSON.
      facts: What else there is to say in a word or number: by name.
    """

    dataset: str
    split: str
    search: str
    queries: int
    labels: int
    run: str
    rows: Mapping[str, Mapping[str, float]]
    intervals: Mapping[str, Mapping[str, tuple[float, float]]]
    groups: Mapping[str, Groups]
    losses: Sequence[tuple[float, float]]
    curves: Mapping[str, Sequence[tuple[float, float]]]
    curves_split: str
    recall_curve: Sequence[Mapping[str, float]]
    thumbnails: Mapping[str, Sequence[str]]
    worst: Sequence[Example]
    best: Sequence[Example]
    chosen_by: str
    neighbours: Sequence[Neighbours]
    card: str | None
    card_picture: bytes | None
    command: str
    versions: Mapping[str, str]
    settings: str
    facts: Mapping[str, str]


def assemble(
    workdir: str,
    dataset: PreparedDataset,
    split: str,
    *,
    results: Mapping[str, Any],
    kept: SearchResult,
    label_vectors: Float[np.ndarray, "l e"],
    frequency: Int[np.ndarray, " l"],
    judged: Mapping[str, Judgement],
    intervals: Mapping[str, Mapping[str, tuple[float, float]]],
    rows: Mapping[str, Mapping[str, float]],
    command: str,
    versions: Mapping[str, str],
    settings: str,
    pictures: str = "",
) -> Page:
    """Reads what is not given: curves of the run, the data card, texts of queries and labels.

    Args:
      workdir, dataset, split: Of the run.
      results: What is written of the evaluation as json.
      kept: Labels found of each query, filter pairs taken out.
      label_vectors: Unit vectors of all labels.
      frequency: Training queries of each label.
      judged, intervals: By name of the row; the first is the run, of which are the examples.
      rows, command, versions, settings: As of `Page`.
      pictures: A table that names those of the queries (see `thumbnails.find`); empty: none.
    """
    run = next(iter(judged))
    queries, relevance, _ = dataset.split(split)
    by_query = judged[run].queries
    chosen = examples.choose(by_query, np.diff(relevance.indptr), by=CHOSEN_BY, count=EXAMPLES)
    worst, best = (
        examples.describe(
            some, queries, dataset.labels, relevance, kept, by_query.column(CHOSEN_BY)
        )
        for some in chosen
    )
    shown = {}
    if pictures:
        named = thumbnails.find(pictures, [one.id for one in [*worst, *best]])
        shown = {name: list(map(thumbnails.draw, paths)) for name, paths in named.items()}
    lines = curves.read_lines(workdir)
    read = {n: curves.read_curve(workdir, n) for n in curves.METRICS if n in rows[run]}
    text, picture = (epath.Path(dataset.path) / name for name in (card.TEXT, card.PICTURE))
    search = {name: value for name, value in results["search"].items() if name != "curve"}
    return Page(
        dataset=dataset.name,
        split=split,
        search=results["search"]["kind"],
        queries=len(queries),
        labels=dataset.num_labels,
        run=run,
        rows=rows,
        intervals=intervals,
        groups={name: judgement.groups for name, judgement in judged.items()},
        losses=[(line["step"], line["loss"]) for line in lines if "loss" in line],
        curves={
            name: list(zip(steps, values, strict=True)) for name, (_, steps, values) in read.items()
        },
        curves_split=next((judged_on for judged_on, *_ in read.values()), ""),
        recall_curve=results["search"].get("curve", []),
        worst=worst,
        thumbnails=shown,
        best=best,
        chosen_by=CHOSEN_BY,
        neighbours=examples.nearest(
            examples.spread(frequency, EXAMPLES), label_vectors, dataset.labels, frequency
        ),
        card=text.read_text() if text.exists() else None,
        card_picture=picture.read_bytes() if picture.exists() else None,
        command=command,
        versions=versions,
        settings=settings,
        facts={
            "run": workdir,
            "data": dataset.path,
            "content": dataset.content_hash,
            "search": _words(search),
            **({"memory": _words(results["mixing"])} if "mixing" in results else {}),
            "seconds": _words(results["seconds"]),
            "peak memory": f"{results['peak_memory_gb']} GB",
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        },
    )


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
