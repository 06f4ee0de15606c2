"""Label centroids: the mean of the unit embeddings of each label's training queries."""

import os
from concurrent import futures

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax.parallel.distributed import ALONE, Group
from vixml_jax.runtime import progress
from vixml_jax.structs import Shard

# Entries are rounded to multiples of 1 / _GRID, far below the precision of a float32 centroid. Sums
# of them are exact in float64, so the result does not depend on the order of the additions, nor on
# which process does them.
_GRID = 2.0**30
_SUMS = 1 << 23  # Entries of sums held in memory at a time, over all processes.
_PAIRS = 1 << 9  # (query, label) pairs processed at a time; their rows stay in the CPU cache.


def exact_centroids(
    relevance: sparse.csr_matrix,
    shard: Shard,
    wanted: list[Int[np.ndarray, " m"]],
    *,
    group: Group = ALONE,
) -> Float[np.ndarray, "m e"]:
    """Mean embedding of the queries of each label, not re-normalised (paper, section 3).

    Each process sums over its own queries and sends the sums to the processes that need them. The
    result has the same bits for any number of processes.

    Args:
      relevance: [n, l] matrix of ones.
      shard: Unit embeddings of this process's queries, float32; each query belongs to exactly one
        process.
      wanted: Label ids that each process needs.
      group: The processes.

    Returns:
      Centroids of the labels in `wanted[group.index]`, float32; zero for a label without queries.
    """
    counts = np.bincount(relevance.indices, minlength=relevance.shape[1])
    by_label = relevance[shard.ids].T.tocsr()
    labels_here, width = wanted[group.index], shard.values.shape[1]
    centroids = np.empty((len(labels_here), width), np.float32)
    step = max(1, _SUMS // (width * group.count))
    # Every process takes part in every exchange, also once its own labels are done.
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, max(map(len, wanted)), step):
            progress.check(together=True)
            chunk = slice(start, start + step)
            parts = [_sums(by_label[labels[chunk]], shard.values, pool) for labels in wanted]
            sums = sum(group.exchange(parts))
            centroids[chunk] = sums / _GRID / np.maximum(counts[labels_here[chunk]], 1)[:, None]
    return centroids


def _sums(
    by_label: sparse.csr_matrix, queries: Float[np.ndarray, "n e"], pool: futures.Executor
) -> Float[np.ndarray, "l e"]:
    """Sum of the queries of each label, in units of 1 / _GRID, float64."""
    sums = np.zeros((by_label.shape[0], queries.shape[1]))

    def add(start: int) -> tuple[slice, Float[np.ndarray, "m e"]]:
        stop = min(start + _PAIRS, by_label.nnz)
        first = np.searchsorted(by_label.indptr, start, side="right") - 1
        last = np.searchsorted(by_label.indptr, stop)
        ends = np.clip(by_label.indptr[first : last + 1], start, stop) - start
        rows = np.multiply(queries[by_label.indices[start:stop]], _GRID, dtype=np.float64)
        pairs = np.ones(stop - start), np.arange(stop - start), ends
        summation = sparse.csr_matrix(pairs, shape=(last - first, len(rows)))
        return slice(first, last), summation @ np.rint(rows, out=rows)

    # A label's queries may be in more than one chunk, so only this thread writes.
    for labels, partial_sums in pool.map(add, range(0, by_label.nnz, _PAIRS)):
        sums[labels] += partial_sums
    return sums
