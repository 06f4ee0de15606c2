"""Cold start of labels: vectors of new labels without training, from text and example queries."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vixml_jax.serving.predictor import Predictor

NUM_NEAREST = 10  # Labels of the run whose mean centroid is the prior of a new label's centroid.
PRIOR_COUNT = 3.0  # Weight of the prior, in example queries.


def label_vectors(
    predictor: Predictor,
    texts: Sequence[str],
    images: Sequence[Any] | None = None,
    examples: Sequence[Sequence[str]] | None = None,
) -> Float[np.ndarray, "m e"]:
    """Returns unit vectors of new labels, which are searched together with the run's prototypes.

    A label without examples gets the tower's vector of its text and images; see `with_examples` for
    the others.

    Args:
      predictor: Of the run.
      texts: Texts of the labels.
      images: Embeddings of their images, as a predictor takes them.
      examples: Texts of queries for which each label is relevant; may be empty.
    """
    vectors = predictor.encode(texts, images)
    counts = np.array([len(queries) for queries in examples or [()] * len(texts)])
    if not counts.any():
        return vectors
    encoded = predictor.encode([query for queries in examples for query in queries])
    return with_examples(
        predictor, texts, images, vectors, np.split(encoded, np.cumsum(counts)[:-1])
    )


def with_examples(
    predictor: Predictor,
    texts: Sequence[str],
    images: Sequence[Any] | None,
    vectors: Float[np.ndarray, "m e"],
    examples: Sequence[Float[np.ndarray, "_ e"]],
) -> Float[np.ndarray, "m e"]:
    """Returns vectors of new labels in which those with example queries are prototypes.

    The combiner takes two inputs that training would have learnt: a free vector, here that of the
    nearest label's cluster, and a centroid. The centroid is the mean of the vectors of the example
    queries, as it is the mean of training queries for the run's labels, but shrunk towards the mean
    centroid of the nearest labels, the more so the fewer examples there are: hardly any other query
    lies near the vector of a single one.

    Args:
      predictor: Of the run.
      texts, images: Of the labels; see `label_vectors`.
      vectors: The tower's unit vectors of the labels.
      examples: Unit vectors of the example queries of each label; may be empty.
    """
    counts = np.array([len(queries) for queries in examples], np.float32)
    rows = np.flatnonzero(counts)
    if predictor.model.combiner is None or not len(rows):
        return vectors
    nearest = predictor.nearest_labels(vectors[rows], NUM_NEAREST)
    free, centroids = predictor.free_and_centroids(nearest)
    means = np.stack([examples[row].mean(axis=0) for row in rows])
    weights = (counts / (counts + PRIOR_COUNT))[rows, None]
    result = vectors.copy()
    result[rows] = predictor.prototypes(
        [texts[row] for row in rows],
        None if images is None else [images[row] for row in rows],
        free[:, 0],
        weights * means + (1 - weights) * centroids.mean(axis=1),
    )
    return result
