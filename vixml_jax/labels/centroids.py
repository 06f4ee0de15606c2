"""Centroids of labels: the mean of the unit embeddings of their training queries."""

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax.processes import ALONE, Group, whole
from vixml_jax.structs import Share


def exact_centroids(
    relevance: sparse.csr_matrix,
    share: Share,
    wanted: list[Int[np.ndarray, " m"]],
    *,
    group: Group = ALONE,
    block: int = 65536,
) -> Float[np.ndarray, "m e"]:
    """The mean of the embeddings of each label's queries, not re-normalised (paper, section 3).

    Args:
      relevance: [n, l] of ones.
      share: Unit embeddings of the queries that this process keeps, float32.
      wanted: The labels that each process asks for.
      group: The processes.
      block: Labels taken at a time; bounds the transposed copy in memory.

    Returns:
      float32, the labels of `wanted[group.index]`; zero for a label without queries.
    """
    queries = whole(share, relevance.shape[0], group)
    num_labels = relevance.shape[1]
    by_label = relevance.T.tocsr().astype(np.float32)
    counts = np.diff(by_label.indptr)
    centroids = np.zeros((num_labels, queries.shape[1]), np.float32)
    for start in range(0, num_labels, block):
        rows = slice(start, min(start + block, num_labels))
        centroids[rows] = by_label[rows] @ queries
        centroids[rows] /= np.maximum(counts[rows, None], 1)
    return centroids[wanted[group.index]]
