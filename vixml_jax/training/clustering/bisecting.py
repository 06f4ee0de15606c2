"""Splits a group of vectors in two parts of given sizes by spherical 2-means, in numpy."""

from concurrent import futures
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Int

from vixml_jax.parallel.distributed import Group
from vixml_jax.runtime import progress

_STARTS = 8  # Random starts of each split; only the best one after a few iterations continues.
_ROUGH_ITERATIONS = 8
_MAX_ITERATIONS = 30
_MIN_GAIN = 2e-5  # Iterations end when the mean similarity rises by less than this.
_SAMPLE = 4096  # Rows on which the starts of a large group are compared.
# Entries of unit vectors are rounded to multiples of 1 / _GRID where sums must be exact.
_GRID = 2.0**24
_BLOCK = 1 << 20  # Entries converted at a time.


class Rows(Protocol):
    """The m vectors of a group; only their directions matter.

    Attributes:
      num: The number of vectors, m.
    """

    num: int

    def take(self, index: Int[np.ndarray, " k"]) -> "LocalRows":
        """The rows at these indices, on this process."""

    def scores(self, directions: Float[np.ndarray, "r d"]) -> Float[np.ndarray, "r m"]:
        """Products of r directions with all unit vectors."""

    def sums(self, part: Bool[np.ndarray, "r m"]) -> Float[np.ndarray, "r d"]:
        """The sums of the unit vectors of r parts."""


class LocalRows:
    """Rows that are all on this process; sums are float32, rounded as BLAS does.

    Args:
      x: The vectors, [m, d]; they are not copied to normalise them.
      inverse: The inverse of their lengths, [m].
    """

    def __init__(self, x: Float[np.ndarray, "m d"], inverse: Float[np.ndarray, " m"]):
        self.num, self._x, self._inverse = len(x), x, inverse

    def take(self, index: Int[np.ndarray, " k"]) -> "LocalRows":
        return LocalRows(self._x[index], self._inverse[index])

    def unit(self, index: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k d"]:
        """The unit vectors of the rows at these indices."""
        return self._x[index] * self._inverse[index][:, None]

    def scores(self, directions: Float[np.ndarray, "r d"]) -> Float[np.ndarray, "r m"]:
        return (directions @ self._x.T) * self._inverse

    def sums(self, part: Bool[np.ndarray, "r m"]) -> Float[np.ndarray, "r d"]:
        return np.where(part, self._inverse, np.float32(0.0)) @ self._x


class ShardedRows:
    """Rows that are sharded over processes; all processes call each method together.

    Sums and products are exact: entries are multiples of 1 / 2^24, products of 1 / 2^48, and
    neither a sum of 2^28 rows nor a product needs more than the 53 bits of a float64. The result
    therefore depends neither on how the rows are sharded nor on the order of additions, and is the
    same on all processes.

    Args:
      x: The vectors on this process, of this group and others, [n, d].
      inverse: The inverse of their lengths, [n].
      local: Indices into `x` of this group's rows, in the group's order, [k].
      holders: The process of each row of the group, [m].
      group: The processes.
      pool: Threads that process blocks of rows.
    """

    def __init__(
        self,
        x: Float[np.ndarray, "n d"],
        inverse: Float[np.ndarray, " n"],
        local: Int[np.ndarray, " k"],
        holders: Int[np.ndarray, " m"],
        group: Group,
        pool: futures.Executor,
    ):
        self.num = len(holders)
        self._x, self._inverse, self._local = x, inverse, local
        self._holders, self._group, self._pool = holders, group, pool
        self._is_local = holders == group.index
        self._order = np.argsort(holders, kind="stable")  # Rows in the order of `Group.gather`.
        self._counts = np.bincount(holders, minlength=group.count)
        # Sums are exact, so they can be updated by the rows that changed parts.
        self._part = np.zeros((1, len(local)), bool)
        self._sums = np.zeros((1, x.shape[1]))

    def _gather(self, x: np.ndarray) -> np.ndarray:
        """An array in the group's order from the local rows of all processes."""
        by_process = np.concatenate(self._group.gather(x, self._counts))
        gathered = np.empty_like(by_process)
        gathered[self._order] = by_process
        return gathered

    def take(self, index: Int[np.ndarray, " k"]) -> LocalRows:
        local = self._local[np.cumsum(self._is_local)[index[self._is_local[index]]] - 1]
        holders = self._holders[index]
        taken = ShardedRows(self._x, self._inverse, local, holders, self._group, self._pool)
        return LocalRows(taken._gather(self._x[local]), taken._gather(self._inverse[local]))

    def _on_grid(self, index: Int[np.ndarray, " k"]) -> Float[np.ndarray, "k d"]:
        """Unit vectors times _GRID, rounded."""
        scale = self._inverse[index] * np.float32(_GRID)
        rows = np.multiply(self._x[index], scale[:, None], dtype=np.float64)
        return np.rint(rows, out=rows)

    def _blocks(self, index: Int[np.ndarray, " k"]) -> list[slice]:
        step = max(1, _BLOCK // self._x.shape[1])
        return [slice(start, start + step) for start in range(0, len(index), step)]

    def scores(self, directions: Float[np.ndarray, "r d"]) -> Float[np.ndarray, "r m"]:
        progress.check(together=True)
        # All use the directions of process 0, as the last bits may differ between processors.
        counts = [len(directions)] * self._group.count
        directions = self._group.gather(directions.astype(np.float64), counts)[0]
        directions = np.rint(directions * _GRID).T / _GRID**2

        def score(block: slice) -> Float[np.ndarray, "k r"]:
            return self._on_grid(self._local[block]) @ directions

        scores = list(progress.checked_map(self._pool, score, self._blocks(self._local)))
        empty = np.zeros((0, directions.shape[1]))
        return self._gather(np.concatenate([empty, *scores])).T

    def sums(self, part: Bool[np.ndarray, "r m"]) -> Float[np.ndarray, "r d"]:
        part = part[:, self._is_local]
        moved = part.astype(np.int8) - self._part
        rows = np.flatnonzero(moved.any(axis=0))

        def add(block: slice) -> Float[np.ndarray, "r d"]:
            index = rows[block]
            return moved[:, index].astype(np.float64) @ self._on_grid(self._local[index])

        self._sums = self._sums + sum(progress.checked_map(self._pool, add, self._blocks(rows)))
        self._part = part
        counts = [len(part)] * self._group.count
        return sum(self._group.gather(self._sums, counts)) / _GRID


def bisect(rows: Rows, size: int, rng: np.random.Generator) -> Bool[np.ndarray, " m"]:
    """The first part of a large group: a mask with `size` true entries."""
    index = np.arange(rows.num)
    if rows.num > _SAMPLE:
        index = np.sort(rng.choice(rows.num, _SAMPLE, replace=False))
    sample = rows.take(index)
    pairs = np.stack([rng.choice(sample.num, 2, replace=False) for _ in range(_STARTS)])
    one, two = (sample.unit(ends) for ends in pairs.T)
    sample_size = round(sample.num * size / rows.num)
    _, directions, means = _improve(sample, sample_size, one - two, _ROUGH_ITERATIONS)
    best = np.argmax(means)
    part, _, _ = _improve(rows, size, directions[best : best + 1], _MAX_ITERATIONS)
    return part[0]


def _improve(
    rows: Rows, size: int, directions: Float[np.ndarray, "r d"], max_iterations: int
) -> tuple[Bool[np.ndarray, "r m"], Float[np.ndarray, "r d"], Float[np.ndarray, " r"]]:
    """Iterates 2-means from r starts in parallel.

    A split depends only on the difference of the two centres, the direction.

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
        directions = _divide_by_length(one, one_length) - _divide_by_length(two, two_length)
        # The similarities of a part's rows to its centre add up to the length of the rows' sum.
        means = (one_length + two_length)[:, 0] / rows.num
        if np.max(means - before) < _MIN_GAIN:
            break
        before = means
    return part, directions, means


def first_part_sizes(num_rows: int, num_clusters: int) -> tuple[int, int]:
    """Numbers of rows and clusters of the first part of a group, for clusters of even sizes."""
    count = (num_clusters + 1) // 2
    size, num_larger = divmod(num_rows, num_clusters)
    num_larger_first = -(-num_larger * count // num_clusters)
    return size * count + num_larger_first, count


def divide(
    similarities: Float[np.ndarray, "g m m"], num_clusters: int, rng: np.random.Generator
) -> Int[np.ndarray, "g m"]:
    """The clusters, numbered from 0, of g small groups of m rows each."""
    num_groups, num_rows, _ = similarities.shape
    clusters = np.zeros((num_groups, num_rows), np.int32)
    if num_clusters == 1:
        return clusters
    size, count = first_part_sizes(num_rows, num_clusters)
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
    """The first part of each group: masks with `size` true entries."""
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
    """`_improve` for g groups at once, from the similarities of their rows alone.

    Iterates until the mean gain over the groups is small.

    Args:
      similarities: Products of the unit vectors of each group.
      size: Rows of the first part.
      scores: Products of the rows with the directions of r starts.
      max_iterations: Iterations at most.

    Returns:
      The first part, the scores and the mean similarity of each start.
    """
    total = np.sum(similarities, axis=2)[:, None]  # Product of each row with the sum of all rows.
    before = -np.inf
    for _ in range(max_iterations):
        part = _largest(scores, size)
        to_one = np.matmul(part.astype(np.float32), similarities)
        to_two = total - to_one
        one_length = _length(to_one, part)
        two_length = _length(to_two, ~part)
        scores = _divide_by_length(to_one, one_length) - _divide_by_length(to_two, two_length)
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
    """The length of the sum of a part's rows, from the product of each row with that sum."""
    square = np.sum(to_sum, axis=2, keepdims=True, where=part)
    return np.sqrt(np.maximum(square, 0.0))


def _divide_by_length(
    x: Float[np.ndarray, "... m"], length: Float[np.ndarray, "... 1"]
) -> Float[np.ndarray, "... m"]:
    return x / np.maximum(length, 1e-12)
