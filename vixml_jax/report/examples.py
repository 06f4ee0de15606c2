"""Example queries with their predictions, and labels with their nearest labels, for the report."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax.data.store import Items
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.structs import SearchResult

SHOWN = 5  # Predictions of an example, as many as the largest cut-off of nDCG counts.
_BLOCK = 1 << 16  # Labels compared at a time.


class Prediction(NamedTuple):
    """A predicted label.

    Attributes:
      text: Text of the label.
      score: Its score.
      hit: Whether it is a true label of the query.
    """

    text: str
    score: float
    hit: bool


class TrueLabel(NamedTuple):
    """A true label of a query.

    Attributes:
      text: Text of the label.
      rank: Its rank among the labels found, from 1; None: not among them.
    """

    text: str
    rank: int | None


class Example(NamedTuple):
    """A query with its predictions and true labels.

    Attributes:
      id: Id of the query, or its row if the data have no ids.
      text: Text of the query.
      num_images: Number of its images.
      value: The metric by which the example was chosen, in percent.
      predictions: The first predictions, best first.
      true_labels: The first true labels, those of the best rank first.
      num_true_labels: Number of all true labels.
    """

    id: str
    text: str
    num_images: int
    value: float
    predictions: list[Prediction]
    true_labels: list[TrueLabel]
    num_true_labels: int

    def predicts(self, label: TrueLabel) -> bool:
        """Whether a true label is among the predictions shown."""
        return label.rank is not None and label.rank <= len(self.predictions)


class Neighbours(NamedTuple):
    """A label and its nearest labels.

    Attributes:
      text: Text of the label.
      frequency: Number of its training queries.
      nearest: Text and cosine of each of its nearest labels, nearest first.
    """

    text: str
    frequency: int
    nearest: list[tuple[str, float]]


def choose(
    queries: PerQuery, labels: Int[np.ndarray, " q"], *, by: str, count: int, seed: int = 0
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]:
    """Returns the rows of the worst and of the best queries by a metric.

    Args:
      queries: Metrics per query.
      labels: Number of true labels of each query; queries without are never chosen.
      by: Name of the metric. Ties are broken by MRR, then at random.
      count: Number of worst and of best queries; fewer if there are not twice as many queries.
      seed: Seed of the random choice.
    """
    labelled = np.flatnonzero(labels)
    random = np.random.default_rng(seed).random(len(labelled))
    order = labelled[
        np.lexsort((random, queries.column("MRR")[labelled], queries.column(by)[labelled]))
    ]
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
    shown: int = SHOWN,
) -> list[Example]:
    """Returns the examples of some queries.

    Args:
      rows: Rows of the queries.
      queries, labels: All queries of the split, and all labels.
      relevance: [q, l], with an entry where the label is true.
      result: Labels found for all queries, best first; -1 = absent.
      values: The metric of each query, in [0, 1].
      shown: Number of predictions and of true labels to keep per query.
    """
    examples = []
    for row in map(int, rows):
        true = relevance.indices[relevance.indptr[row] : relevance.indptr[row + 1]].tolist()
        ids = np.asarray(result.ids[row])
        ranks = {label: j for j, label in enumerate(ids.tolist(), start=1) if label >= 0}
        true_labels = sorted(
            (TrueLabel(labels.texts[i], ranks.get(i)) for i in true),
            key=lambda label: (label.rank is None, label.rank),
        )
        predictions = [
            Prediction(labels.texts[i], float(score), i in true)
            for i, score in zip(ids[:shown].tolist(), result.scores[row], strict=False)
            if i >= 0
        ]
        num_images = (
            0 if queries.images is None else int(np.diff(queries.images.offsets[row : row + 2])[0])
        )
        examples.append(
            Example(
                str(row) if queries.ids is None else queries.ids[row],
                queries.texts[row],
                num_images,
                100.0 * float(values[row]),
                predictions,
                true_labels[:shown],
                len(true_labels),
            )
        )
    return examples


def spread(frequency: Int[np.ndarray, " l"], count: int) -> Int[np.ndarray, " n"]:
    """Returns labels from the most frequent to the rarest, evenly spaced in the log of their rank.

    Args:
      frequency: Number of training queries of each label.
      count: Number of labels; fewer if their ranks coincide.
    """
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
    """Returns the nearest labels, by cosine, of some labels.

    Args:
      rows: Rows of these labels.
      vectors: Unit vectors of all labels. They are compared in blocks, to bound the memory used.
      labels: All labels.
      frequency: Number of training queries of each label.
      count: Number of nearest labels per label.
    """
    count = min(count, len(vectors) - 1)
    scores = np.full((len(rows), count), -np.inf, np.float32)
    ids = np.zeros((len(rows), count), np.int64)
    for start in range(0, len(vectors), _BLOCK):
        block = vectors[rows] @ vectors[start : start + _BLOCK].T
        block_ids = start + np.arange(block.shape[1])
        block[rows[:, None] == block_ids] = -np.inf  # A label is not its own neighbour.
        scores = np.concatenate([scores, block], axis=1)
        ids = np.concatenate([ids, np.broadcast_to(block_ids, block.shape)], axis=1)
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
