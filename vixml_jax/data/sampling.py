"""Sampling of training batches: a positive per query, labels of a batch, order of an epoch."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from vixml_jax.data.store import ranges
from vixml_jax.structs import Positives


def sample_positives(
    relevance: sparse.csr_matrix,
    query_ids: Int[np.ndarray, " b"],
    weights: Float[np.ndarray, " l"] | None,
    rng: np.random.Generator,
    pair_weights: Float[np.ndarray, " nnz"] | None = None,
) -> Int[np.ndarray, " b"]:
    """Draws one label of each query in proportion to the weights (paper, supplement).

    Args:
      relevance: Relevance matrix [n, l]; every requested query must have a label.
      query_ids: Rows of `relevance`; -1 for padding.
      weights: Inverse propensities of the labels; None means uniform.
      rng: Random generator.
      pair_weights: A factor for each entry of `relevance`, in its order; None means 1.

    Returns:
      The label ids, int32; -1 for padding.
    """
    uniform = rng.random(len(query_ids))
    real, starts, counts = _row_ranges(relevance, query_ids)
    entries = ranges(starts, counts)
    labels = relevance.indices[entries]
    if not len(labels):
        return np.full(len(query_ids), -1, np.int32)
    mass = np.ones(len(labels)) if weights is None else weights[labels].astype(np.float64)
    if pair_weights is not None:
        mass *= pair_weights[entries]
        # The cumulative sum below runs over the whole batch. Normalising the mass of each query
        # keeps the precision of queries whose weights are much smaller than those of others.
        rows = np.repeat(np.arange(len(query_ids)), counts)
        total = np.bincount(rows, mass, len(query_ids))
        mass /= np.maximum(total, np.finfo(float).tiny)[rows]
    ends = np.cumsum(mass)
    last = np.cumsum(counts) - 1  # Last label of each query among `labels`.
    first = last - counts + 1
    low = np.where(first > 0, ends[np.maximum(first - 1, 0)], 0.0)
    high = ends[np.maximum(last, 0)]
    drawn = np.searchsorted(ends, low + uniform * (high - low), side="right")
    drawn = np.clip(drawn, np.maximum(first, 0), np.maximum(last, 0))
    return np.where(real, labels[drawn], -1).astype(np.int32)


def usual_positives(counts: Int[np.ndarray, " n"], batch_size: int, shards: int) -> int:
    """Number of labels of all queries of a shard of a batch, which few batches exceed.

    Args:
      counts: Number of labels of each query.
      batch_size: Number of queries of a batch.
      shards: Number of shards of a batch.
    """
    queries = -(-batch_size // shards)
    labels = np.mean(counts) * queries + 4.0 * np.std(counts) * queries**0.5
    return -(-max(1, int(np.ceil(labels))) // 8) * 8


def positives_of(
    relevance: sparse.csr_matrix,
    query_ids: Int[np.ndarray, " b"],
    usual: int,
    shards: int = 1,
    read: Sequence[int] | None = None,
    among: Int[np.ndarray, " c"] | None = None,
) -> Positives:
    """Labels of the queries of a batch, in parts of equal size for its shards.

    Args:
      relevance: Relevance matrix [n, l].
      query_ids: Rows of `relevance` in all shards; -1 for padding.
      usual: Size of a part. It is doubled until the largest part fits, so sizes are few.
      shards: Number of shards; each has the same number of queries.
      read: The shards to return, ascending; None: all.
      among: The labels that are listed; None: all.
    """
    _, starts, counts = _row_ranges(relevance, query_ids)
    labels = relevance.indices[ranges(starts, counts)]
    queries = np.repeat(np.arange(len(query_ids)), counts)
    if among is not None:
        listed = np.isin(labels, among)
        labels, queries = labels[listed], queries[listed]
    bounds = np.searchsorted(queries, np.arange(shards + 1) * (len(query_ids) // shards))
    size, largest = usual, int(np.diff(bounds).max())
    while size < largest:
        size *= 2
    read = range(shards) if read is None else read
    positives = Positives(*(np.full((len(read), size), -1, np.int32) for _ in range(2)))
    for part, shard in enumerate(read):
        own = slice(bounds[shard], bounds[shard + 1])
        positives.queries[part, : own.stop - own.start] = queries[own]
        positives.labels[part, : own.stop - own.start] = labels[own]
    return Positives(*(x.reshape(-1) for x in positives))


def _row_ranges(
    relevance: sparse.csr_matrix, query_ids: Int[np.ndarray, " b"]
) -> tuple[Bool[np.ndarray, " b"], Int[np.ndarray, " b"], Int[np.ndarray, " b"]]:
    """Whether each query is real, and the start and number of its entries in `relevance`."""
    real = query_ids >= 0
    rows = np.where(real, query_ids, 0)
    starts = relevance.indptr[rows].astype(np.int64)
    counts = np.where(real, relevance.indptr[rows + 1] - starts, 0)
    return real, starts, counts


def shuffled_order(n: int, rng: np.random.Generator) -> Int[np.ndarray, " n"]:
    """All `n` queries in random order."""
    return rng.permutation(n)


def clustered_order(
    cluster_of: Int[np.ndarray, " n"], rng: np.random.Generator
) -> Int[np.ndarray, " n"]:
    """All queries, cluster by cluster in random order, so that similar ones share batches (NGAME).

    Args:
      cluster_of: Cluster of each query.
      rng: Random generator.
    """
    rank = rng.permutation(int(cluster_of.max()) + 1)
    return np.argsort(rank[cluster_of], kind="stable")
