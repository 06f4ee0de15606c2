"""Queries to look at, the best and the worst of an evaluation, and labels near each other."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax.data.store import Items
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.structs import SearchResult

_BLOCK = 1 << 16  # Labels compared at a time.


class Predicted(NamedTuple):
    """A label that was found."""

    text: str
    score: float
    hit: bool


class Wanted(NamedTuple):
    """A true label, and where it was found."""

    text: str
    rank: int | None  # From 1; None: not among the results.


class Example(NamedTuple):
    """A query, what was found, and what is true."""

    id: str
    text: str
    pictures: int
    value: float  # In percent, of the metric that it was chosen by.
    predicted: list[Predicted]
    wanted: list[Wanted]
    num_wanted: int  # Of which `wanted` are the first.


class Neighbours(NamedTuple):
    """A label, and those whose vectors are nearest, with their cosines."""

    text: str
    frequency: int  # Training queries.
    near: list[tuple[str, float]]


def choose(
    found: PerQuery, labels: Int[np.ndarray, " q"], *, by: str, count: int, seed: int = 0
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """The worst and the best queries by a metric; of equal ones, any.

    Args:
      found: What each query reached.
      labels: True labels of each query; who has none is no example.
      by: Name of the metric. Ties are judged by MRR.
      count: Of each; fewer where there are not twice as many queries.
    """
    judged = np.flatnonzero(labels)
    chance = np.random.default_rng(seed).random(len(judged))
    order = judged[np.lexsort((chance, found.column("MRR")[judged], found.column(by)[judged]))]
    count = min(count, len(order) // 2)
    return order[:count], order[len(order) - count :][::-1]


def describe(
    rows: Int[np.ndarray, " n"],
    queries: Items,
    labels: Items,
    relevance: sparse.csr_matrix,
    result: SearchResult,
    values: Float[np.ndarray, " q"],
    *,
    shown: int = 6,
) -> list[Example]:
    """What there is to see of queries.

    Args:
      rows: Of the queries.
      queries, labels: Their texts and pictures.
      relevance: [q, l], an entry where the label is true.
      result: Labels found of all queries, best first; -1 = absent.
      values: What each query reached, in [0, 1].
      shown: Labels found, and true ones, of each.
    """
    examples = []
    for row in map(int, rows):
        true = relevance.indices[relevance.indptr[row] : relevance.indptr[row + 1]]
        ids = np.asarray(result.ids[row])
        ranks = {label: j for j, label in enumerate(ids.tolist(), start=1) if label >= 0}
        wanted = sorted(
            (Wanted(labels.texts[i], ranks.get(i)) for i in true.tolist()),
            key=lambda found: (found.rank is None, found.rank),
        )
        predicted = [
            Predicted(labels.texts[i], float(score), i in set(true.tolist()))
            for i, score in zip(ids[:shown].tolist(), result.scores[row], strict=False)
            if i >= 0
        ]
        pictures = (
            0 if queries.images is None else int(np.diff(queries.images.offsets[row : row + 2])[0])
        )
        examples.append(
            Example(
                str(row) if queries.ids is None else queries.ids[row],
                queries.texts[row],
                pictures,
                100.0 * float(values[row]),
                predicted,
                wanted[:shown],
                len(wanted),
            )
        )
    return examples


def spread(frequency: Int[np.ndarray, " l"], count: int) -> Int[np.ndarray, " n"]:
    """Labels from the most frequent to the rarest, about evenly by the logarithm of their rank."""
    order = np.argsort(-frequency, kind="stable")
    ranks = np.unique(np.geomspace(1, len(order), count).round().astype(np.int64)) - 1
    return order[ranks]


def nearest(
    rows: Int[np.ndarray, " n"],
    vectors: Float[np.ndarray, "l e"],
    labels: Items,
    frequency: Int[np.ndarray, " l"],
    *,
    count: int = 5,
) -> list[Neighbours]:
    """The labels with the largest cosine to some of them, by unit vectors, a block at a time."""
    count = min(count, len(vectors) - 1)
    scores = np.full((len(rows), count), -np.inf, np.float32)
    ids = np.zeros((len(rows), count), np.int64)
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[rows] @ vectors[start : start + _BLOCK].T
        here = start + np.arange(block.shape[1])
        block[rows[:, None] == here] = -np.inf  # None is its own neighbour.
        scores = np.concatenate([scores, block], axis=1)
        ids = np.concatenate([ids, np.broadcast_to(here, block.shape)], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :count]
        scores = np.take_along_axis(scores, best, axis=1)
        ids = np.take_along_axis(ids, best, axis=1)
    return [
        Neighbours(
            labels.texts[int(row)],
            int(frequency[row]),
            [(labels.texts[i], s) for i, s in zip(near.tolist(), cosines.tolist(), strict=True)],
        )
        for row, near, cosines in zip(rows, ids, scores, strict=True)
    ]
