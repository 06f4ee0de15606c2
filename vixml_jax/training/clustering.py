"""Balanced clusters of embeddings, by recursive spherical 2-means: numpy alone."""

import collections
import os
from concurrent import futures
from typing import NamedTuple

import numpy as np
import threadpoolctl
from jaxtyping import Bool, Float, Int

from vixml_jax.errors import InputError
from vixml_jax.processes import ALONE, Group, whole
from vixml_jax.structs import Share

_STARTS = 8  # Random starts of each split; the best after a few iterations goes on.
_ROUGH_ITERATIONS = 8
_MAX_ITERATIONS = 30
_MIN_GAIN = 2e-5  # Mean similarity that an iteration must add to be followed by another.
_SAMPLE = 4096  # Rows on which the starts of a large group are compared.
_SMALL = 256  # Up to so many rows, a group is split by its rows' similarities, many groups at once.
_SIMILARITIES = 1 << 22  # As many as are held at a time.


class _Group(NamedTuple):
    """Rows that are to become `count` clusters, numbered from `first`."""

    ids: Int[np.ndarray, " m"]
    count: int
    first: int


def numbered_by_first_row(clusters: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The same clusters, numbered in the order in which they first occur, int32.

    Which half of a group is called the first can hang on the last bit of a product: where numbers
    decide (on a free vector, on the order of an epoch) they shall depend on the clusters alone.
    """
    _, first, inverse = np.unique(clusters, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def balanced_clusters(
    share: Share, num_rows: int, num_clusters: int, *, seed: int, group: Group = ALONE
) -> Int[np.ndarray, " n"]:
    """The cluster of each row; clusters differ in size by at most one row.

    A group of rows is halved by spherical 2-means of balanced sizes, as are its halves, down to
    single clusters (paper arXiv 2511.13189, section 3; the split is that of
    https://github.com/kunaldahiya/pyxclib). Any number of clusters will do: a group that is to
    become k of them is split in proportion ceil(k/2) : floor(k/2). Clusters near in number are
    near in the tree.

    Args:
      share: Vectors of any length that this process keeps; their directions are clustered. Zero
        rows and equal rows are allowed.
      num_rows: Of all processes.
      num_clusters: From 1 to the number of rows.
      seed: Same seed, same clusters.
      group: The processes.

    Returns:
      int32, from 0 to num_clusters - 1.

    Raises:
      InputError: If there are fewer rows than clusters, or a row is not finite.
    """
    x = np.asarray(whole(share, num_rows, group), np.float32)
    num = len(x)
    if not 1 <= num_clusters <= num:
        raise InputError(
            f"{num_clusters} clusters asked of {num} vectors: expected from 1 to {num}"
        )
    lengths = np.sqrt(np.einsum("nd,nd->n", x, x))
    if not np.all(np.isfinite(lengths)):
        row = np.flatnonzero(~np.isfinite(lengths))[0]
        raise InputError(
            f"vector {row} of {num} to cluster has length {lengths[row]}: expected finite numbers; "
            "look for what made it so, a diverged run or a bad file"
        )
    # The rows are never copied to be normalised: `inverse` goes wherever they go.
    inverse = 1.0 / np.maximum(lengths, 1e-12)

    clusters = np.zeros(num, np.int32)
    small: dict[tuple[int, int], list[_Group]] = {}

    def split(group: _Group) -> tuple[_Group, _Group]:
        ids, count, first = group
        size, count_one = _shares(len(ids), count)
        rng = np.random.default_rng((seed, first, count))
        part = _bisect(x if len(ids) == num else x[ids], inverse[ids], size, rng)
        return (
            _Group(ids[part], count_one, first),
            _Group(ids[~part], count - count_one, first + count_one),
        )

    def place(batch: list[_Group]) -> None:
        ids = np.stack([group.ids for group in batch])  # [g, m]
        firsts = np.array([group.first for group in batch])
        rows = x[ids] * inverse[ids][:, :, None]
        similarities = np.matmul(rows, rows.transpose(0, 2, 1))
        rng = np.random.default_rng((seed, firsts[0], batch[0].count))
        clusters[ids] = firsts[:, None] + _divide(similarities, batch[0].count, rng)

    # Our threads take groups, so those of BLAS would only be in the way: on a busy machine they
    # wait for each other at every product, and took ten times as long. It also makes the result
    # independent of the number of cores.
    with (
        threadpoolctl.threadpool_limits(1, user_api="blas"),
        futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        groups = [_Group(np.arange(num), num_clusters, 0)]
        while groups:
            large = []
            for group in groups:
                if group.count == 1:
                    clusters[group.ids] = group.first
                elif len(group.ids) <= _SMALL:
                    small.setdefault((len(group.ids), group.count), []).append(group)
                else:
                    large.append(group)
            groups = [half for halves in pool.map(split, large) for half in halves]
        batches = []
        for (size, _), found in small.items():
            step = max(1, _SIMILARITIES // size**2)
            batches += [found[start : start + step] for start in range(0, len(found), step)]
        collections.deque(pool.map(place, batches), maxlen=0)
    return clusters


def _shares(num_rows: int, num_clusters: int) -> tuple[int, int]:
    """Rows and clusters of the first part of a group, such that all clusters come out even."""
    count = (num_clusters + 1) // 2
    size, larger = divmod(num_rows, num_clusters)
    larger_here = -(-larger * count // num_clusters)
    return size * count + larger_here, count


def _bisect(
    rows: Float[np.ndarray, "m d"],
    inverse: Float[np.ndarray, " m"],
    size: int,
    rng: np.random.Generator,
) -> Bool[np.ndarray, " m"]:
    """Which `size` rows make the first part of a large group."""
    num = len(rows)
    few, few_inverse = rows, inverse
    if num > _SAMPLE:
        sample = np.sort(rng.choice(num, _SAMPLE, replace=False))
        few, few_inverse = rows[sample], inverse[sample]
    ends = np.stack([rng.choice(len(few), 2, replace=False) for _ in range(_STARTS)])
    one, two = (few[end] * few_inverse[end][:, None] for end in ends.T)
    _, directions, means = _improve(
        few, few_inverse, round(len(few) * size / num), one - two, _ROUGH_ITERATIONS
    )
    best = np.argmax(means)
    part, _, _ = _improve(rows, inverse, size, directions[best : best + 1], _MAX_ITERATIONS)
    return part[0]


def _improve(
    rows: Float[np.ndarray, "m d"],
    inverse: Float[np.ndarray, " m"],
    size: int,
    directions: Float[np.ndarray, "r d"],
    max_iterations: int,
) -> tuple[Bool[np.ndarray, "r m"], Float[np.ndarray, "r d"], Float[np.ndarray, " r"]]:
    """Iterates 2-means from r starts side by side.

    All that a split takes of two centres is their difference, the direction.

    Returns:
      The first part, the direction and the mean similarity of each start.
    """
    total = inverse @ rows
    before = -np.inf
    for _ in range(max_iterations):
        part = _largest((directions @ rows.T) * inverse, size)
        one = np.where(part, inverse, np.float32(0.0)) @ rows
        two = total - one
        one_length = np.linalg.norm(one, axis=1, keepdims=True)
        two_length = np.linalg.norm(two, axis=1, keepdims=True)
        directions = _over(one, one_length) - _over(two, two_length)
        # The similarities of a part's rows to its centre add up to the length of their sum.
        means = (one_length + two_length)[:, 0] / len(rows)
        if np.max(means - before) < _MIN_GAIN:
            break
        before = means
    return part, directions, means


def _divide(
    similarities: Float[np.ndarray, "g m m"], num_clusters: int, rng: np.random.Generator
) -> Int[np.ndarray, "g m"]:
    """The clusters, from 0, of g groups of m rows each."""
    num_groups, num_rows, _ = similarities.shape
    clusters = np.zeros((num_groups, num_rows), np.int32)
    if num_clusters == 1:
        return clusters
    size, count = _shares(num_rows, num_clusters)
    part = _bisect_small(similarities, size, rng)
    order = np.argsort(~part, axis=1, kind="stable")  # The first part's rows, then the second's.
    one, two = order[:, :size], order[:, size:]
    group = np.arange(num_groups)[:, None, None]
    halves = [similarities[group, rows[:, :, None], rows[:, None, :]] for rows in (one, two)]
    if 2 * size == num_rows and 2 * count == num_clusters:
        in_one, in_two = np.split(_divide(np.concatenate(halves), count, rng), 2)
    else:
        in_one = _divide(halves[0], count, rng)
        in_two = _divide(halves[1], num_clusters - count, rng)
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
