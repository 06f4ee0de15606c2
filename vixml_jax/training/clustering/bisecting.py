"""Halves of a group of vectors, by spherical 2-means of given sizes: numpy alone."""

from concurrent import futures
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from vixml_jax.parallel.distributed import Group

_STARTS = 8  # Random starts of each split; the best after a few iterations goes on.
_ROUGH_ITERATIONS = 8
_MAX_ITERATIONS = 30
_MIN_GAIN = 2e-5  # Mean similarity that an iteration must add to be followed by another.
_SAMPLE = 4096  # Rows on which the starts of a large group are compared.
# Entries of unit vectors are rounded to multiples of 1 / _GRID where sums must be exact.
_GRID = 2.0**24
_BLOCK = 1 << 20  # Entries converted at a time.


class Rows(Protocol):
    """The m vectors of a group, of which the directions count.

    Attributes:
      num: m.
    """

    num: int

    def take(self, at: Int[np.ndarray, " k"]) -> "HeldRows":
        """Some of them, on this process."""

    def scores(self, directions: Float[np.ndarray, "r d"]) -> Float[np.ndarray, "r m"]:
        """Products of the unit vectors with r others."""

    def sums(self, part: Bool[np.ndarray, "r m"]) -> Float[np.ndarray, "r d"]:
        """Of the unit vectors of r parts."""


class HeldRows:
    """Rows that this process has, in float32: BLAS adds as it likes.

    Args:
      x: The vectors, [m, d]. They are never copied to be normalised.
      inverse: Of their lengths, [m].
    """

    def __init__(self, x: Float[np.ndarray, "m d"], inverse: Float[np.ndarray, " m"]):
        self.num, self._x, self._inverse = len(x), x, inverse

    def take(self, at: Int[np.ndarray, " k"]) -> "HeldRows":
        return HeldRows(self._x[at], self._inverse[at])

    def unit(self, at: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k d"]:
        """Some of them at length one."""
        return self._x[at] * self._inverse[at][:, None]

    def scores(self, directions: Float[np.ndarray, "r d"]) -> Float[np.ndarray, "r m"]:
        return (directions @ self._x.T) * self._inverse

    def sums(self, part: Bool[np.ndarray, "r m"]) -> Float[np.ndarray, "r d"]:
        return np.where(part, self._inverse, np.float32(0.0)) @ self._x


class SpreadRows:
    """Rows of which each process has some; what it asks for, all ask for together.

    Sums and products are exact: entries are multiples of 1 / 2^24, products of 1 / 2^48, and
    neither a sum of 2^28 rows nor a product needs more than the 53 bits of a float64. So who adds
    what, and in which order, makes no difference, and all find the same.

    Args:
      x: The vectors that this process has, of this group or not, [n, d].
      inverse: Of their lengths, [n].
      here: Those of this group, in the group's order.
      holders: The process of each row of the group, [m].
      group: The processes.
      pool: Takes blocks of rows.
    """

    def __init__(
        self,
        x: Float[np.ndarray, "n d"],
        inverse: Float[np.ndarray, " n"],
        here: Int[np.ndarray, " k"],
        holders: Int[np.ndarray, " m"],
        group: Group,
        pool: futures.Executor,
    ):
        self.num = len(holders)
        self._x, self._inverse, self._here = x, inverse, here
        self._holders, self._group, self._pool = holders, group, pool
        self._mine = holders == group.index
        self._order = np.argsort(holders, kind="stable")  # As processes, one after another, give.
        self._counts = np.bincount(holders, minlength=group.count)
        # An exact sum may follow its part by what came and went.
        self._part = np.zeros((1, len(here)), bool)
        self._sums = np.zeros((1, x.shape[1]))

    def _from_all(self, x: np.ndarray) -> np.ndarray:
        """An array in the group's order from the rows of this process."""
        given = np.concatenate(self._group.gather(x, self._counts))
        found = np.empty_like(given)
        found[self._order] = given
        return found

    def take(self, at: Int[np.ndarray, " k"]) -> HeldRows:
        here = self._here[np.cumsum(self._mine)[at[self._mine[at]]] - 1]
        some = SpreadRows(self._x, self._inverse, here, self._holders[at], self._group, self._pool)
        return HeldRows(some._from_all(self._x[here]), some._from_all(self._inverse[here]))

    def _fixed(self, at: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k d"]:
        """Rows in multiples of 1 / _GRID."""
        scale = self._inverse[at] * np.float32(_GRID)
        rows = np.multiply(self._x[at], scale[:, None], dtype=np.float64)
        return np.rint(rows, out=rows)

    def _blocks(self, at: Int[np.ndarray, " k"]) -> list[slice]:
        step = max(1, _BLOCK // self._x.shape[1])
        return [slice(start, start + step) for start in range(0, len(at), step)]

    def scores(self, directions: Float[np.ndarray, "r d"]) -> Float[np.ndarray, "r m"]:
        # Those of the first process, should the last bits differ: not all processors are of a kind.
        each = [len(directions)] * self._group.count
        directions = self._group.gather(directions.astype(np.float64), each)[0]
        directions = np.rint(directions * _GRID).T / _GRID**2

        def score(block: slice) -> Float[np.ndarray, "k r"]:
            return self._fixed(self._here[block]) @ directions

        found = list(self._pool.map(score, self._blocks(self._here)))
        empty = np.zeros((0, directions.shape[1]))
        return self._from_all(np.concatenate([empty, *found])).T

    def sums(self, part: Bool[np.ndarray, "r m"]) -> Float[np.ndarray, "r d"]:
        part = part[:, self._mine]
        moved = part.astype(np.int8) - self._part
        rows = np.flatnonzero(moved.any(axis=0))

        def add(block: slice) -> Float[np.ndarray, "r d"]:
            at = rows[block]
            return moved[:, at].astype(np.float64) @ self._fixed(self._here[at])

        self._sums = self._sums + sum(self._pool.map(add, self._blocks(rows)))
        self._part = part
        each = [len(part)] * self._group.count
        return sum(self._group.gather(self._sums, each)) / _GRID


def bisect(rows: Rows, size: int, rng: np.random.Generator) -> Bool[np.ndarray, " m"]:
    """Which `size` rows make the first part of a large group."""
    few = np.arange(rows.num)
    if rows.num > _SAMPLE:
        few = np.sort(rng.choice(rows.num, _SAMPLE, replace=False))
    few = rows.take(few)
    ends = np.stack([rng.choice(few.num, 2, replace=False) for _ in range(_STARTS)])
    one, two = (few.unit(end) for end in ends.T)
    few_size = round(few.num * size / rows.num)
    _, directions, means = _improve(few, few_size, one - two, _ROUGH_ITERATIONS)
    best = np.argmax(means)
    part, _, _ = _improve(rows, size, directions[best : best + 1], _MAX_ITERATIONS)
    return part[0]


def _improve(
    rows: Rows, size: int, directions: Float[np.ndarray, "r d"], max_iterations: int
) -> tuple[Bool[np.ndarray, "r m"], Float[np.ndarray, "r d"], Float[np.ndarray, " r"]]:
    """Iterates 2-means from r starts side by side.

    All that a split takes of two centres is their difference, the direction.

    Returns:
      The first part, the direction and the mean similarity of each start.
    """
    total = rows.sums(np.ones((1, rows.num), bool))
    before = -np.inf
    for _ in range(max_iterations):
        part = _largest(rows.scores(directions), size)
        one = rows.sums(part)
        two = total - one
        one_length = np.linalg.norm(one, axis=1, keepdims=True)
        two_length = np.linalg.norm(two, axis=1, keepdims=True)
        directions = _over(one, one_length) - _over(two, two_length)
        # The similarities of a part's rows to its centre add up to the length of their sum.
        means = (one_length + two_length)[:, 0] / rows.num
        if np.max(means - before) < _MIN_GAIN:
            break
        before = means
    return part, directions, means


def share_out(num_rows: int, num_clusters: int) -> tuple[int, int]:
    """Rows and clusters of the first part of a group, such that all clusters come out even."""
    count = (num_clusters + 1) // 2
    size, larger = divmod(num_rows, num_clusters)
    larger_here = -(-larger * count // num_clusters)
    return size * count + larger_here, count


def divide(
    similarities: Float[np.ndarray, "g m m"], num_clusters: int, rng: np.random.Generator
) -> Int[np.ndarray, "g m"]:
    """The clusters, from 0, of g groups of m rows each."""
    num_groups, num_rows, _ = similarities.shape
    clusters = np.zeros((num_groups, num_rows), np.int32)
    if num_clusters == 1:
        return clusters
    size, count = share_out(num_rows, num_clusters)
    part = _bisect_small(similarities, size, rng)
    order = np.argsort(~part, axis=1, kind="stable")  # The first part's rows, then the second's.
    one, two = order[:, :size], order[:, size:]
    group = np.arange(num_groups)[:, None, None]
    halves = [similarities[group, rows[:, :, None], rows[:, None, :]] for rows in (one, two)]
    if 2 * size == num_rows and 2 * count == num_clusters:
        in_one, in_two = np.split(divide(np.concatenate(halves), count, rng), 2)
    else:
        in_one = divide(halves[0], count, rng)
        in_two = divide(halves[1], num_clusters - count, rng)
    np.put_along_axis(clusters, one, in_one, axis=1)
    np.put_along_axis(clusters, two, in_two + count, axis=1)
    return clusters


def _bisect_small(
    similarities: Float[np.ndarray, "g m m"], size: int, rng: np.random.Generator
) -> Bool[np.ndarray, "g m"]:
    """Which `size` rows make the first part of each group."""
    num_groups, num_rows, _ = similarities.shape
    group = np.arange(num_groups)[:, None]
    one = rng.integers(num_rows, size=(num_groups, _STARTS))
    two = (one + rng.integers(1, num_rows, size=one.shape)) % num_rows
    scores = similarities[group, one] - similarities[group, two]  # [g, r, m]
    _, scores, means = _improve_small(similarities, size, scores, _ROUGH_ITERATIONS)
    best = np.argmax(means, axis=1)[:, None]
    part, _, _ = _improve_small(similarities, size, scores[group, best], _MAX_ITERATIONS)
    return part[:, 0]


def _improve_small(
    similarities: Float[np.ndarray, "g m m"],
    size: int,
    scores: Float[np.ndarray, "g r m"],
    max_iterations: int,
) -> tuple[Bool[np.ndarray, "g r m"], Float[np.ndarray, "g r m"], Float[np.ndarray, "g r"]]:
    """`_improve` in terms of similarities alone; `scores` are those to the directions.

    Iterates until the groups gain little on average.
    """
    total = np.sum(similarities, axis=2)[:, None]  # Of each row to the sum of all rows.
    before = -np.inf
    for _ in range(max_iterations):
        part = _largest(scores, size)
        to_one = np.matmul(part.astype(np.float32), similarities)
        to_two = total - to_one
        one_length = _length(to_one, part)
        two_length = _length(to_two, ~part)
        scores = _over(to_one, one_length) - _over(to_two, two_length)
        means = (one_length + two_length)[:, :, 0] / part.shape[2]
        if np.max(np.mean(means - before, axis=0)) < _MIN_GAIN:
            break
        before = means
    return part, scores, means


def _largest(scores: Float[np.ndarray, "... m"], size: int) -> Bool[np.ndarray, "... m"]:
    part = np.zeros(scores.shape, bool)
    first = np.argpartition(-scores, size - 1, axis=-1)[..., :size]
    np.put_along_axis(part, first, True, axis=-1)
    return part


def _length(
    to_sum: Float[np.ndarray, "g r m"], part: Bool[np.ndarray, "g r m"]
) -> Float[np.ndarray, "g r 1"]:
    """The length of the sum of a part's rows, from each row's similarity to that sum."""
    square = np.sum(to_sum, axis=2, keepdims=True, where=part)
    return np.sqrt(np.maximum(square, 0.0))


def _over(
    x: Float[np.ndarray, "... m"], length: Float[np.ndarray, "... 1"]
) -> Float[np.ndarray, "... m"]:
    return x / np.maximum(length, 1e-12)
