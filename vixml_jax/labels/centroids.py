"""Centroids of labels: the mean of the unit embeddings of their training queries."""

import os
from concurrent import futures

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax.parallel.distributed import ALONE, Group
from vixml_jax.structs import Share

# Entries are rounded to multiples of 1 / _GRID, far below the last digit of a centroid's: a sum of
# them is exact in a float64, so that who adds what, and in which order, makes no difference.
_GRID = 2.0**30
_SUMS = 1 << 23  # Entries of sums held at a time, for all processes.
_PAIRS = 1 << 9  # Pairs of a query and a label taken at a time: rows that stay in the cache.


def exact_centroids(
    relevance: sparse.csr_matrix,
    share: Share,
    wanted: list[Int[np.ndarray, " m"]],
    *,
    group: Group = ALONE,
) -> Float[np.ndarray, "m e"]:
    """The mean of the embeddings of each label's queries, not re-normalised (paper, section 3).

    Each process sums over the queries that it keeps and sends the sums to those who want them; the
    same bits come out however many there are.

    Args:
      relevance: [n, l] of ones.
      share: Unit embeddings of the queries that this process keeps, float32; each is kept by one.
      wanted: The labels that each process asks for.
      group: The processes.

    Returns:
      float32, the labels of `wanted[group.index]`; zero for a label without queries.
    """
    counts = np.bincount(relevance.indices, minlength=relevance.shape[1])
    by_label = relevance[share.ids].T.tocsr()
    mine, width = wanted[group.index], share.values.shape[1]
    centroids = np.empty((len(mine), width), np.float32)
    step = max(1, _SUMS // (width * group.count))
    # As many of each process's labels at a time, so that all send and get alike.
    with futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, max(map(len, wanted)), step):
            at = slice(start, start + step)
            parts = [_sums(by_label[labels[at]], share.values, pool) for labels in wanted]
            sums = sum(group.exchange(parts))
            centroids[at] = sums / _GRID / np.maximum(counts[mine[at]], 1)[:, None]
    return centroids


def _sums(
    by_label: sparse.csr_matrix, queries: Float[np.ndarray, "n e"], pool: futures.Executor
) -> Float[np.ndarray, "l e"]:
    """Of the queries of each label, in multiples of 1 / _GRID, float64."""
    sums = np.zeros((by_label.shape[0], queries.shape[1]))

    def add(start: int) -> tuple[slice, Float[np.ndarray, "m e"]]:
        stop = min(start + _PAIRS, by_label.nnz)
        first = np.searchsorted(by_label.indptr, start, side="right") - 1
        last = np.searchsorted(by_label.indptr, stop)
        ends = np.clip(by_label.indptr[first : last + 1], start, stop) - start
        rows = np.multiply(queries[by_label.indices[start:stop]], _GRID, dtype=np.float64)
        pairs = np.ones(stop - start), np.arange(stop - start), ends
        summing = sparse.csr_matrix(pairs, shape=(last - first, len(rows)))
        return slice(first, last), summing @ np.rint(rows, out=rows)

    # A label may be in more than one piece: only this thread writes.
    for labels, found in pool.map(add, range(0, by_label.nnz, _PAIRS)):
        sums[labels] += found
    return sums
