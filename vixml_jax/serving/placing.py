"""Vectors of new labels without training: by their text, near labels, and example queries."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vixml_jax.serving.predictor import Predictor

NEAR = 10  # Labels of the run from which a new one takes what only training could have taught.


def place(
    predictor: Predictor,
    texts: Sequence[str],
    images: Sequence[Any] | None = None,
    examples: Sequence[Sequence[str]] | None = None,
) -> Float[np.ndarray, "m e"]:
    """Unit prototypes of new labels.

    The tower reads a label as it reads the run's own. The two other inputs of the combiner are what
    training would have made of it: its free vector, and its centroid. The free vector is that of
    the cluster of the nearest label (nearest by the tower's vectors of the new labels to the
    prototypes of the run's). The centroid is the mean of the unit vectors of the example queries,
    as it is of the training queries of the run's labels; without examples, the mean of the
    centroids of the NEAR nearest labels.

    Args:
      predictor: Of the run.
      texts: Of the labels.
      images: Embeddings of their pictures, as a predictor takes them.
      examples: Texts of queries that each label is right for; may be empty.
    """
    if predictor.model.combiner is None:
        return predictor.encode(texts, images)
    near = predictor.nearest_labels(predictor.encode(texts, images), NEAR)
    free, centroids = predictor.known_of(near)
    centroids = centroids.mean(axis=1)
    for label, queries in enumerate(examples or ()):
        if queries:
            centroids[label] = predictor.encode(queries).mean(axis=0)
    return predictor.prototypes(texts, images, free[:, 0], centroids)
