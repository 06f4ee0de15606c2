"""Retrieval-augmented inference: training queries remember their labels (paper, supplement)."""

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax.structs import SearchResult

_BLOCK = 4096  # Queries mixed at a time.


def mix_in_memory(
    labels: SearchResult,
    memory: SearchResult,
    relevance: sparse.csr_matrix,
    *,
    weight: float,
    temperature: float,
    k: int,
) -> SearchResult:
    """Labels found by their own vectors and by those of training queries, as one ranking.

    The scores of both go through one softmax; a label's final score is
    `(1 - weight) * (its own share) + weight * (shares of the training queries that have it)`.

    Args:
      labels: The best labels of each query.
      memory: The best training queries of each query, by the same kind of score.
      relevance: [training queries, labels], ones.
      weight: What memory counts, in [0, 1].
      temperature: Scores are divided by it before the softmax.
      k: Columns of what is returned.

    Returns:
      Best first, of equal scores the lower id first; short rows end in id -1, score -inf.
    """
    logits = np.concatenate([labels.scores, memory.scores], axis=1).astype(np.float64)
    logits = (logits - logits.max(axis=1, keepdims=True)) / temperature
    shares = np.exp(logits)
    shares /= shares.sum(axis=1, keepdims=True)
    own, remembered = np.split(shares, [labels.ids.shape[1]], axis=1)
    ids = np.full((len(own), k), -1, np.int32)
    scores = np.full((len(own), k), -np.inf, np.float32)
    num_queries, num_labels = relevance.shape
    for start in range(0, len(own), _BLOCK):
        rows = slice(start, start + _BLOCK)
        mixed = (1.0 - weight) * _as_rows(own[rows], labels.ids[rows], num_labels)
        mixed += weight * (_as_rows(remembered[rows], memory.ids[rows], num_queries) @ relevance)
        mixed = mixed.tocsr()
        row = np.repeat(np.arange(mixed.shape[0]), np.diff(mixed.indptr))
        order = np.lexsort((mixed.indices, -mixed.data, row))
        rank = np.arange(len(order)) - mixed.indptr[row]
        order, row, rank = order[rank < k], row[rank < k], rank[rank < k]
        ids[start + row, rank] = mixed.indices[order]
        scores[start + row, rank] = mixed.data[order]
    return SearchResult(scores, ids)


def _as_rows(
    shares: Float[np.ndarray, "q j"], ids: Int[np.ndarray, "q j"], width: int
) -> sparse.csr_matrix:
    """[q, width], the share of an id in its column; absent ids nowhere."""
    row, column = np.nonzero(ids >= 0)
    found = shares[row, column], (row, ids[row, column])
    return sparse.csr_matrix(found, shape=(len(ids), width))
