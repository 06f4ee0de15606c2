"""Exact top-k on the host over scores that arrive in blocks, at a tenth of the usual cost.

XLA's top-k on a CPU keeps a heap for each row and takes up to a third of the time of the scores
themselves. Here the maximum of each small group of columns is known; it shows which few groups
can hold one of the k best, and only these groups are examined.
"""

import numpy as np
from jaxtyping import Bool, Float

from vixml_jax.search import index
from vixml_jax.structs import SearchResult

GROUP = 32  # Largest number of columns that share one maximum; a power of two.


def group_size(k: int, columns: int) -> int:
    """Returns the columns per group: a power of two, at least 4k groups where that is possible."""
    return 1 << max(1, min(GROUP, columns // (4 * k))).bit_length() - 1


def add_block(
    best: SearchResult,
    scores: Float[np.ndarray, "q n"],
    maxima: Float[np.ndarray, "q g"],
    *,
    first: int,
    real: int,
) -> SearchResult:
    """Returns the k best among those found so far and a block of columns with higher ids.

    Args:
      best: [q, k], best first, ties by the lower id; absent entries have id -1 and score -inf.
      scores: Scores of the block, C-contiguous.
      maxima: Maximum of each group of columns; all groups have the same size.
      first: Id of the first column of the block.
      real: Number of columns that are labels. The columns after them are padding: those in the
        group of the last label must be copies of it, and later groups are ignored.
    """
    k, size = best.ids.shape[1], scores.shape[1] // maxima.shape[1]
    maxima = maxima[:, : -(-real // size)]
    # A score must exceed the k-th best so far, whose id is lower, and reach the k-th maximum.
    least = np.nextafter(best.scores[:, -1:], np.float32(np.inf))
    if k <= maxima.shape[1]:
        least = np.maximum(least, np.partition(maxima, -k, axis=1)[:, -k, None])
    row, group = _nonzero(_candidate_groups(maxima, least, k))
    # Flat positions: indexing by pairs takes four times as long.
    at = row * (scores.shape[1] // size) + group
    found = np.take(scores.reshape(-1, size), at, axis=0)
    entry, within = _nonzero(found >= least[row])
    column = group[entry] * size + within
    row, column, found = (x[column < real] for x in (row[entry], column, found[entry, within]))
    if not len(row):
        return best
    # Rows are ragged. Ids ascend after the best so far, so a stable sort keeps ties in order.
    count = np.bincount(row, minlength=len(scores))
    position = k + np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    both = index.empty_result(len(scores), k + count.max())
    both.scores[:, :k], both.ids[:, :k] = best
    both.scores[row, position], both.ids[row, position] = found, first + column
    order = np.argsort(-both.scores, axis=1, kind="stable")[:, :k]
    return SearchResult(*(np.take_along_axis(x, order, axis=1) for x in both))


def _candidate_groups(
    maxima: Float[np.ndarray, "q g"], least: Float[np.ndarray, "q 1"], k: int
) -> Bool[np.ndarray, "q g"]:
    """Marks the groups of each row that can hold one of the k best scores: fewer than 2k.

    The k groups with the largest maxima (ties: the earlier group) are sufficient, because each
    group that precedes the group of one of the k best scores holds a score that precedes it.

    Args:
      maxima: The largest score of each group.
      least: Smallest score that can be one of the k best; at most k - 1 maxima are larger.
      k: Scores wanted per row.
    """
    above = maxima >= least
    if (np.count_nonzero(above, axis=1) > k).any():  # Ties, of which there may be thousands.
        above &= (maxima > least) | (np.cumsum(maxima == least, axis=1) <= k)
    return above


def _nonzero(mask: Bool[np.ndarray, "a b"]) -> tuple[np.ndarray, np.ndarray]:
    """`np.nonzero`, three times as fast on sparse masks."""
    return np.divmod(np.flatnonzero(mask), mask.shape[1])
