"""The nearest training queries of each query."""

import numpy as np
from jaxtyping import Float, Int

from vixml_jax.search import index as index_lib
from vixml_jax.search.index import Index
from vixml_jax.structs import SearchResult


def nearest(
    train_index: Index,
    queries: Float[np.ndarray, "q e"],
    k: int,
    itself: Int[np.ndarray, " q"] | None = None,
) -> SearchResult:
    """Returns the k nearest training queries of each query; no query is its own neighbour.

    Args:
      train_index: Over unit vectors of the training queries.
      queries: Unit vectors.
      k: Columns of the result; rows are shorter where there are fewer training queries.
      itself: Row of each query among the training queries; None: they are not training queries.
    """
    if itself is None:
        return train_index.search(queries, k)
    pairs = np.stack([np.arange(len(queries)), itself], axis=1)
    return index_lib.drop_filtered(train_index.search(queries, k + 1), pairs, k)
