"""Why a query has its labels: the parts of their scores, and the training queries nearest to it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vixml_jax.serving.label_view import LabelView
from vixml_jax.serving.predictor import K, Prediction, Predictor

_MAX_LABELS = 20  # Of a training query.


class Explained(NamedTuple):
    """A label that was found, and the parts of its score.

    Attributes:
      label: The label.
      prototype: In a run with a label head, the part of the prototype in the logit of the label,
        with its weight; else the cosine of the vectors of query and label.
      head: The part of the label head in the logit, and of the label's frequency where it has a
        weight; None: the run has no head.
      neighbours: What training neighbours add to the score or take from it; None: they are not
        used, or the run has no head, so that scores with and without them have other meanings.
    """

    label: Prediction
    prototype: float
    head: float | None
    neighbours: float | None


class Neighbour(NamedTuple):
    """A training query.

    Attributes:
      row: Among the training queries.
      similarity: Cosine of its vector and that of the query.
      labels: Texts of its labels that can still be found.
    """

    row: int
    similarity: float
    labels: list[str]


class Explanation(NamedTuple):
    """Why a query has its labels.

    Attributes:
      labels: The best labels.
      neighbours: The nearest training queries, nearest first; none if the run keeps no vectors of
        them, because it uses neither them nor a label head.
    """

    labels: list[Explained]
    neighbours: list[Neighbour]


def explain(
    predictor: Predictor,
    text: str,
    images: Any | None = None,
    *,
    k: int = K,
    never: Sequence[str] = (),
    num_neighbours: int = 5,
) -> Explanation:
    """Explains the labels of one query.

    exp(prototype + head), divided by its sum over all labels, is the probability of a label without
    training neighbours.

    Args:
      predictor: Of the run.
      text: Of the query.
      images: Embeddings of its images, as a predictor takes them.
      k: Labels to explain.
      never: Ids of labels that must not be predicted.
      num_neighbours: Training queries to return.

    Raises:
      InputError: If the query is malformed, or an id of `never` is unknown.
    """
    view = predictor.view  # Of one moment, whatever is refreshed meanwhile.
    queries = predictor.queries([text], [images] if images is not None else None)
    pairs = view.filter_pairs([never], 1)
    found = predictor.search(queries, min(k, view.num_labels), pairs, view=view)
    kept = found.ids[0] >= 0
    rows, scores = found.ids[0][kept], found.scores[0][kept]
    whole = predictor.query_vectors(queries)
    vectors = predictor.prefix.labels(view.label_vectors(rows))
    query, width = predictor.prefix.queries(whole)[0], predictor.prefix.used
    prototypes = vectors[:, :width] @ query[:width]
    heads: Sequence[float | None] = [None] * len(rows)
    added: Sequence[float | None] = [None] * len(rows)
    if predictor.fusion is not None:
        heads = vectors[:, width:] @ query[width:]
        if predictor.mixing is not None:
            log_sum = view.index.search_normalised(whole, 1).log_sum[0]
            added = scores - np.exp(prototypes + heads - log_sum)
    labels = [
        Explained(
            Prediction(*view.label(row), float(score)),
            float(prototype),
            None if head is None else float(head),
            None if more is None else float(more),
        )
        for row, score, prototype, head, more in zip(
            rows, scores, prototypes, heads, added, strict=True
        )
    ]
    return Explanation(labels, _neighbours(predictor, view, queries.vectors, num_neighbours))


def _neighbours(
    predictor: Predictor, view: LabelView, vectors: np.ndarray, count: int
) -> list[Neighbour]:
    index = predictor.train_index
    if index is None:
        return []
    found = index.search(vectors, min(count, view.relevance.shape[0]))
    neighbours = []
    for row, similarity in zip(found.ids[0], found.scores[0], strict=True):
        start, end = view.relevance.indptr[row : row + 2]
        labels = view.relevance.indices[start:end][:_MAX_LABELS]
        names = [view.label(label)[1] for label in labels]
        neighbours.append(Neighbour(int(row), float(similarity), names))
    return neighbours
