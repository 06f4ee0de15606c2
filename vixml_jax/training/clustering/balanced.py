"""Balanced clusters of embeddings by recursive spherical 2-means, on all processes of a run."""

import collections
import os
from concurrent import futures
from typing import NamedTuple

import numpy as np
import threadpoolctl
from jaxtyping import Float, Int

from vixml_jax.errors import InputError
from vixml_jax.parallel.distributed import ALONE, Group
from vixml_jax.runtime import progress
from vixml_jax.structs import Shard
from vixml_jax.training.clustering import bisecting

# Larger groups are split by all processes together, the others by one process each.
MAX_LOCAL_ROWS = 1 << 16
_SMALL = 256  # Groups of at most this many rows are split by similarities, many groups at a time.
_MAX_SIMILARITIES = 1 << 22  # Entries of the similarity matrices in memory at a time.


class _RowGroup(NamedTuple):
    """Rows that are split into `count` clusters, numbered from `first`."""

    ids: Int[np.ndarray, " m"]
    count: int
    first: int

    def halves(self, rows: bisecting.Rows, seed: int) -> tuple["_RowGroup", "_RowGroup"]:
        """The two parts of this group.

        Args:
          rows: The vectors of the group, in the order of `ids`.
          seed: Seed of the clusters.
        """
        size, count = bisecting.first_part_sizes(len(self.ids), self.count)
        rng = np.random.default_rng((seed, self.first, self.count))
        part = bisecting.bisect(rows, size, rng)
        return (
            _RowGroup(self.ids[part], count, self.first),
            _RowGroup(self.ids[~part], self.count - count, self.first + count),
        )


def numbered_by_first_row(clusters: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The same clusters, numbered in the order of their first rows, int32.

    Which part of a group comes first may depend on the last bit of a product. Cluster numbers
    determine free vectors and the order of an epoch, so they must depend on the clusters only.
    """
    _, first, inverse = np.unique(clusters, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def balanced_clusters(
    shard: Shard, num_rows: int, num_clusters: int, *, seed: int, group: Group = ALONE
) -> Int[np.ndarray, " n"]:
    """The cluster of each row; clusters differ in size by at most one row.

    A group of rows is split by spherical 2-means of balanced sizes, and so are its parts, down to
    single clusters (paper arXiv 2511.13189, section 3; the split is that of
    https://github.com/kunaldahiya/pyxclib). The number of clusters need not be a power of two: a
    group of k clusters is split in the proportion ceil(k/2) : floor(k/2). Clusters with close
    numbers are close in the tree.

    Rows stay on their processes until a group has at most 65,536 rows. Until then each process
    contributes the products and sums of its own rows. These are exact, so the result does not
    depend on how the rows are sharded. Then every process receives some of the groups and splits
    them alone.

    The work may be ended early, as `progress.checking` describes: a single process is asked after
    each block of rows and each group, several processes while they split rows together.

    Args:
      shard: Vectors that belong to this process. Only their directions are clustered; zero rows
        and equal rows are allowed.
      num_rows: Number of rows of all processes, at most 2^28.
      num_clusters: From 1 to the number of rows.
      seed: The same seed gives the same clusters on any number of processes.
      group: The processes; each row belongs to one of them.

    Returns:
      int32, from 0 to num_clusters - 1, the same on all processes.

    Raises:
      InputError: If there are fewer rows than clusters, or a row is not finite.
    """
    if not 1 <= num_clusters <= num_rows:
        raise InputError(
            f"{num_clusters} clusters of {num_rows} vectors: expected a number of clusters from 1 "
            f"to {num_rows}"
        )
    x = np.asarray(shard.values, np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", x, x))
    if not np.all(np.isfinite(lengths)):
        row = np.flatnonzero(~np.isfinite(lengths))[0]
        raise InputError(
            f"cannot cluster vector {shard.ids[row]} of {num_rows}: its length is {lengths[row]}, "
            "expected finite numbers; check the run for divergence and the input files for bad "
            "values"
        )
    # Rows are not copied to normalise them: `inverse` is passed along with them.
    inverse = 1.0 / np.maximum(lengths, 1e-12)
    # Groups are already split in parallel by our threads. BLAS threads beside them wait for each
    # other at every product on a busy machine, which took ten times as long. With one BLAS thread
    # the result does not depend on the number of cores either.
    with (
        threadpoolctl.threadpool_limits(1, user_api="blas"),
        futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        root = _RowGroup(np.arange(num_rows), num_clusters, 0)
        subtrees = _split_together(root, Shard(shard.ids, x), inverse, seed, group, pool)
        ids, x, inverse, subtrees = _exchange_rows(subtrees, Shard(shard.ids, x), inverse, group)
        local_clusters = _split_locally(subtrees, x, inverse, seed, pool)
    clusters = np.empty(num_rows, np.int32)
    for rows, numbers in zip(group.gather(ids), group.gather(local_clusters), strict=True):
        clusters[rows] = numbers
    return clusters


def _split_together(
    root: _RowGroup,
    shard: Shard,
    inverse: Float[np.ndarray, " n"],
    seed: int,
    group: Group,
    pool: futures.Executor,
) -> list[_RowGroup]:
    """Splits rows on all processes until each group is small enough for one of them.

    Returns:
      The groups in the order of their clusters, the same on all processes.
    """
    num_rows = len(root.ids)
    holders, local_index = np.zeros(num_rows, np.intp), np.zeros(num_rows, np.intp)
    for process, ids in enumerate(group.gather(shard.ids)):
        holders[ids] = process
    local_index[shard.ids] = np.arange(len(shard.ids))

    def subtrees(rows: _RowGroup) -> list[_RowGroup]:
        if rows.count == 1 or len(rows.ids) <= MAX_LOCAL_ROWS:
            return [rows]
        row_holders = holders[rows.ids]
        local = local_index[rows.ids[row_holders == group.index]]
        sharded = bisecting.ShardedRows(shard.values, inverse, local, row_holders, group, pool)
        return [subtree for half in rows.halves(sharded, seed) for subtree in subtrees(half)]

    return subtrees(root)


def _exchange_rows(
    subtrees: list[_RowGroup], shard: Shard, inverse: Float[np.ndarray, " n"], group: Group
) -> tuple[
    Int[np.ndarray, " m"], Float[np.ndarray, "m d"], Float[np.ndarray, " m"], list[_RowGroup]
]:
    """Assigns each group to a process and sends its rows there.

    Returns:
      Ids, vectors and inverse lengths of this process's rows, and its groups, whose ids are now
      indices into these rows.
    """
    if group.count == 1:
        return shard.ids, shard.values, inverse, subtrees
    owners = np.arange(len(subtrees)) * group.count // len(subtrees)
    no_rows = [np.zeros(0, np.intp)]

    def ids_of(process: int) -> Int[np.ndarray, " m"]:
        assigned = np.flatnonzero(owners == process)
        return np.sort(np.concatenate(no_rows + [subtrees[i].ids for i in assigned]))

    sent = [np.flatnonzero(np.isin(shard.ids, ids_of(to))) for to in range(group.count)]
    ids, x, inverse = (
        np.concatenate(group.exchange([rows[index] for index in sent]))
        for rows in (shard.ids, shard.values, inverse)
    )
    order = np.argsort(ids)
    ids, x, inverse = ids[order], x[order], inverse[order]
    local = [rows for rows, owner in zip(subtrees, owners, strict=True) if owner == group.index]
    return ids, x, inverse, [rows._replace(ids=np.searchsorted(ids, rows.ids)) for rows in local]


def _split_locally(
    subtrees: list[_RowGroup],
    x: Float[np.ndarray, "m d"],
    inverse: Float[np.ndarray, " m"],
    seed: int,
    pool: futures.Executor,
) -> Int[np.ndarray, " m"]:
    """The clusters of groups that are entirely on this process."""
    clusters = np.zeros(len(x), np.int32)
    # Small groups are batched within a subtree, so that batches do not depend on which subtrees a
    # process has.
    small: dict[tuple[int, int, int], list[_RowGroup]] = {}

    def split(numbered: tuple[int, _RowGroup]) -> list[tuple[int, _RowGroup]]:
        subtree, rows = numbered
        local = bisecting.LocalRows(x[rows.ids], inverse[rows.ids])
        return [(subtree, half) for half in rows.halves(local, seed)]

    def split_small(batch: list[_RowGroup]) -> None:
        ids = np.stack([rows.ids for rows in batch])  # [g, m]
        firsts = np.array([rows.first for rows in batch])
        units = x[ids] * inverse[ids][:, :, None]
        similarities = np.matmul(units, units.transpose(0, 2, 1))
        rng = np.random.default_rng((seed, firsts[0], batch[0].count))
        clusters[ids] = firsts[:, None] + bisecting.divide(similarities, batch[0].count, rng)

    groups = list(enumerate(subtrees))
    while groups:
        large = []
        for subtree, rows in groups:
            if rows.count == 1:
                clusters[rows.ids] = rows.first
            elif len(rows.ids) <= _SMALL:
                small.setdefault((subtree, len(rows.ids), rows.count), []).append(rows)
            else:
                large.append((subtree, rows))
        groups = [half for halves in progress.checked_map(pool, split, large) for half in halves]
    batches = []
    for (_, size, _), alike in small.items():
        step = max(1, _MAX_SIMILARITIES // size**2)
        batches += [alike[start : start + step] for start in range(0, len(alike), step)]
    collections.deque(progress.checked_map(pool, split_small, batches), maxlen=0)
    return clusters
