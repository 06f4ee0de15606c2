"""Which query meets which label: positives, relevance of a batch, the order of an epoch."""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from vixml_jax.data.store import ranges


def sample_positives(
    relevance: sparse.csr_matrix,
    query_ids: Int[np.ndarray, " b"],
    weights: Float[np.ndarray, " l"] | None,
    rng: np.random.Generator,
    pair_weights: Float[np.ndarray, " nnz"] | None = None,
) -> Int[np.ndarray, " b"]:
    """One label of each query, drawn in proportion to the weights (paper, supplement).

    Args:
      relevance: [n, l]; every query asked for has a label.
      query_ids: Rows; -1 gives -1.
      weights: Inverse propensities; None: uniform.
      rng: Draws.
      pair_weights: What each entry of `relevance` counts beside its label's weight; None: one.
    """
    real = query_ids >= 0
    at = np.where(real, query_ids, 0)
    starts = relevance.indptr[at].astype(np.int64)
    counts = np.where(real, relevance.indptr[at + 1] - starts, 0)
    entries = ranges(starts, counts)
    labels = relevance.indices[entries]
    mass = np.ones(len(labels)) if weights is None else weights[labels].astype(np.float64)
    if pair_weights is not None:
        mass *= pair_weights[entries]
        # Sums run over the batch: of a query whose pairs are small beside another's little would
        # be left of them.
        owner = np.repeat(np.arange(len(at)), counts)
        mass /= np.maximum(np.bincount(owner, mass, len(at)), np.finfo(float).tiny)[owner]
    ends = np.cumsum(mass)
    last = np.cumsum(counts) - 1  # Last label of each query among `labels`.
    first = last - counts + 1
    low = np.where(first > 0, ends[np.maximum(first - 1, 0)], 0.0)
    high = ends[np.maximum(last, 0)] if len(ends) else np.zeros(len(at))
    drawn = np.searchsorted(ends, low + rng.random(len(at)) * (high - low), side="right")
    if not len(labels):
        return np.full(len(at), -1, np.int32)
    drawn = np.clip(drawn, np.maximum(first, 0), np.maximum(last, 0))
    return np.where(real, labels[drawn], -1).astype(np.int32)


def relevance_block(
    relevance: sparse.csr_matrix,
    query_ids: Int[np.ndarray, " b"],
    label_ids: Int[np.ndarray, " c"],
) -> Bool[np.ndarray, "b c"]:
    """Whether each candidate is a label of each query; False for ids -1. Duplicates are kept."""
    real = query_ids >= 0
    at = np.where(real, query_ids, 0)
    starts = relevance.indptr[at].astype(np.int64)
    counts = np.where(real, relevance.indptr[at + 1] - starts, 0)
    labels = relevance.indices[ranges(starts, counts)]
    rows = np.repeat(np.arange(len(at)), counts)
    distinct, column_of = np.unique(label_ids, return_inverse=True)
    where = np.searchsorted(distinct, labels)
    hit = distinct[np.minimum(where, len(distinct) - 1)] == labels
    block = np.zeros((len(at), len(distinct)), bool)
    block[rows[hit], where[hit]] = True
    return block[:, column_of] & (label_ids >= 0)


def shuffled_order(n: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """All queries in random order."""
    return rng.permutation(n)


def clustered_order(
    cluster_of: Int[np.ndarray, " n"], rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """All queries, cluster after cluster in random order (NGAME), so that near ones meet."""
    rank = rng.permutation(int(cluster_of.max()) + 1)
    return np.argsort(rank[cluster_of], kind="stable")
