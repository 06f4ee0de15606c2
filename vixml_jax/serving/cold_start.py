"""Vectors of new labels without training: by their text, near labels, and example queries."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vixml_jax.serving.predictor import Predictor

NEAR = 10  # Labels of the run whose centroids stand for that of a new one.
THEY_COUNT = 3.0  # As so many examples.


def place(
    predictor: Predictor,
    texts: Sequence[str],
    images: Sequence[Any] | None = None,
    examples: Sequence[Sequence[str]] | None = None,
) -> Float[np.ndarray, "m e"]:
    """Unit vectors of new labels, to be searched beside the prototypes of the run's.

    A label without examples is what the tower reads of it. One with examples is a prototype, of
    which the combiner takes two more inputs that training would have made: a free vector, which is
    that of the nearest label's cluster, and a centroid. The centroid is the mean of the example
    queries' vectors, as it is of training queries for the run's labels, drawn to the mean centroid
    of the nearest labels, the more so the fewer examples there are: that of a single query is
    found by hardly another.

    Args:
      predictor: Of the run.
      texts: Of the labels.
      images: Embeddings of their pictures, as a predictor takes them.
      examples: Texts of queries that each label is right for; may be empty.
    """
    vectors = predictor.encode(texts, images)
    counts = np.array([len(queries) for queries in examples or [()] * len(texts)])
    if not counts.any():
        return vectors
    encoded = predictor.encode([query for queries in examples for query in queries])
    return place_vectors(
        predictor, texts, images, vectors, np.split(encoded, np.cumsum(counts)[:-1])
    )


def place_vectors(
    predictor: Predictor,
    texts: Sequence[str],
    images: Sequence[Any] | None,
    vectors: Float[np.ndarray, "m e"],
    examples: Sequence[Float[np.ndarray, "_ e"]],
) -> Float[np.ndarray, "m e"]:
    """As `place`, where labels (`vectors`) and their example queries are encoded already."""
    counts = np.array([len(queries) for queries in examples], np.float32)
    taught = np.flatnonzero(counts)
    if predictor.model.combiner is None or not len(taught):
        return vectors
    free, centroids = predictor.known_of(predictor.nearest_labels(vectors[taught], NEAR))
    means = np.stack([examples[label].mean(axis=0) for label in taught])
    weights = (counts / (counts + THEY_COUNT))[taught, None]
    placed = vectors.copy()
    placed[taught] = predictor.prototypes(
        [texts[label] for label in taught],
        None if images is None else [images[label] for label in taught],
        free[:, 0],
        weights * means + (1 - weights) * centroids.mean(axis=1),
    )
    return placed
