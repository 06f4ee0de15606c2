"""Centroids of labels: the mean of the unit embeddings of their training queries."""

import numpy as np
from jaxtyping import Float
from scipy import sparse


def exact_centroids(
    relevance: sparse.csr_matrix, queries: Float[np.ndarray, "n e"], block: int = 65536
) -> Float[np.ndarray, "l e"]:
    """The mean of the embeddings of each label's queries, not re-normalised (paper, section 3).

    Args:
      relevance: [n, l] of ones.
      queries: Unit embeddings, float32.
      block: Labels taken at a time; bounds the transposed copy in memory.

    Returns:
      float32 [l, e]; zero for a label without queries.
    """
    num_labels = relevance.shape[1]
    by_label = relevance.T.tocsr().astype(np.float32)
    counts = np.diff(by_label.indptr)
    centroids = np.zeros((num_labels, queries.shape[1]), np.float32)
    for start in range(0, num_labels, block):
        rows = slice(start, min(start + block, num_labels))
        centroids[rows] = by_label[rows] @ queries
        centroids[rows] /= np.maximum(counts[rows, None], 1)
    return centroids
