"""The k best of scores that come block after block, on the host: exact, and a tenth of their cost.

XLA's top-k on a CPU keeps a heap a row, which takes up to a third as long as the scores. Here the
largest score of each small group of columns is known; it tells which few groups can hold one of the
k best at all, and only those are looked at.
"""

import numpy as np
from jaxtyping import Bool, Float

from vixml_jax.search import index
from vixml_jax.structs import SearchResult

GROUP = 32  # Columns at most of which one maximum is taken; a power of two.


def group_size(k: int, columns: int) -> int:
    """Columns of a group, a power of two: so few that groups are many beside the k looked for."""
    return 1 << max(1, min(GROUP, columns // (4 * k))).bit_length() - 1


def add_block(
    best: SearchResult,
    scores: Float[np.ndarray, "q n"],
    maxima: Float[np.ndarray, "q g"],
    *,
    first: int,
    real: int,
) -> SearchResult:
    """The k best of those so far and of a block of columns with higher ids.

    Args:
      best: [q, k], best first, of equal scores the lower id first; absent = -1 and -inf.
      scores: Of the block, one row after another in memory.
      maxima: Of groups of equal size of its columns.
      first: The id of its first column.
      real: Columns that are labels. Those behind, in the group of the last of them, copy it; groups
        further behind are not looked at.
    """
    k, size = best.ids.shape[1], scores.shape[1] // maxima.shape[1]
    maxima = maxima[:, : -(-real // size)]
    # A score must surpass the k-th best so far, whose id is lower, and reach the k-th maximum.
    least = np.nextafter(best.scores[:, -1:], np.float32(np.inf))
    if k <= maxima.shape[1]:
        least = np.maximum(least, np.partition(maxima, -k, axis=1)[:, -k, None])
    row, group = _nonzero(_promising(maxima, least, k))
    # Flat positions: indexing by pairs takes four times as long.
    at = row * (scores.shape[1] // size) + group
    found = np.take(scores.reshape(-1, size), at, axis=0)
    entry, within = _nonzero(found >= least[row])
    column = group[entry] * size + within
    row, column, found = (x[column < real] for x in (row[entry], column, found[entry, within]))
    if not len(row):
        return best
    # Rows are ragged. Ids ascend behind the best so far, so a stable sort keeps ties in order.
    count = np.bincount(row, minlength=len(scores))
    place = k + np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    both = index.nothing(len(scores), k + count.max())
    both.scores[:, :k], both.ids[:, :k] = best
    both.scores[row, place], both.ids[row, place] = found, first + column
    order = np.argsort(-both.scores, axis=1, kind="stable")[:, :k]
    return SearchResult(*(np.take_along_axis(x, order, axis=1) for x in both))


def _promising(
    maxima: Float[np.ndarray, "q g"], least: Float[np.ndarray, "q 1"], k: int
) -> Bool[np.ndarray, "q g"]:
    """Which groups can hold one of the k best of a row: less than 2k.

    The k groups of largest maxima, of equal ones the first, suffice: each group that comes before
    that of one of the k best scores holds a score that comes before it.

    Args:
      maxima: The largest score of each group.
      least: What one of the k best must reach; at most k - 1 maxima are larger.
      k: Scores wanted of each row.
    """
    above = maxima >= least
    if (np.count_nonzero(above, axis=1) > k).any():  # Equal ones, even by the thousand.
        above &= (maxima > least) | (np.cumsum(maxima == least, axis=1) <= k)
    return above


def _nonzero(mask: Bool[np.ndarray, "a b"]) -> tuple[np.ndarray, np.ndarray]:
    """`np.nonzero`, three times as fast where little is."""
    return np.divmod(np.flatnonzero(mask), mask.shape[1])
