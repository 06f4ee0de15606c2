"""Balanced clusters of embeddings, by recursive spherical 2-means, on all processes of a run."""

import collections
import os
from concurrent import futures
from typing import NamedTuple

import numpy as np
import threadpoolctl
from jaxtyping import Float, Int

from vixml_jax.errors import InputError
from vixml_jax.parallel.distributed import ALONE, Group
from vixml_jax.structs import Share
from vixml_jax.training.clustering import bisecting

STEM = 1 << 16  # Groups of more rows than that are halved by all processes, the rest by one each.
_SMALL = 256  # Up to so many rows, a group is split by its rows' similarities, many groups at once.
_SIMILARITIES = 1 << 22  # As many as are held at a time.


class _Rows(NamedTuple):
    """Rows that are to become `count` clusters, numbered from `first`."""

    ids: Int[np.ndarray, " m"]
    count: int
    first: int

    def halves(self, rows: bisecting.Rows, seed: int) -> tuple["_Rows", "_Rows"]:
        """The two groups that make up this one."""
        size, count = bisecting.share_out(len(self.ids), self.count)
        rng = np.random.default_rng((seed, self.first, self.count))
        part = bisecting.bisect(rows, size, rng)
        return (
            _Rows(self.ids[part], count, self.first),
            _Rows(self.ids[~part], self.count - count, self.first + count),
        )


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

    Rows stay where they are until a group has 65,536 at most: up to then a process gives the
    products and sums of its rows, which are exact, so that nothing depends on who has which. Then
    each process is brought some of the groups and divides them alone.

    Args:
      share: Vectors of any length that this process keeps; their directions are clustered. Zero
        rows and equal rows are allowed.
      num_rows: Of all processes, 2^28 at most.
      num_clusters: From 1 to the number of rows.
      seed: Same seed, same clusters, whatever the number of processes.
      group: The processes; each row is kept by one of them.

    Returns:
      int32, from 0 to num_clusters - 1, the same on all processes.

    Raises:
      InputError: If there are fewer rows than clusters, or a row is not finite.
    """
    if not 1 <= num_clusters <= num_rows:
        raise InputError(
            f"{num_clusters} clusters asked of {num_rows} vectors: expected from 1 to {num_rows}"
        )
    x = np.asarray(share.values, np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", x, x))
    if not np.all(np.isfinite(lengths)):
        row = np.flatnonzero(~np.isfinite(lengths))[0]
        raise InputError(
            f"vector {share.ids[row]} of {num_rows} to cluster has length {lengths[row]}: expected "
            "finite numbers; look for what made it so, a diverged run or a bad file"
        )
    # The rows are never copied to be normalised: `inverse` goes wherever they go.
    inverse = 1.0 / np.maximum(lengths, 1e-12)
    # Our threads take groups, so those of BLAS would only be in the way: on a busy machine they
    # wait for each other at every product, and took ten times as long. It also makes the result
    # independent of the number of cores.
    with (
        threadpoolctl.threadpool_limits(1, user_api="blas"),
        futures.ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        root = _Rows(np.arange(num_rows), num_clusters, 0)
        stems = _halve_together(root, Share(share.ids, x), inverse, seed, group, pool)
        ids, x, inverse, stems = _bring(stems, Share(share.ids, x), inverse, group)
        found = _divide_alone(stems, x, inverse, seed, pool)
    clusters = np.empty(num_rows, np.int32)
    for rows, numbers in zip(group.gather(ids), group.gather(found), strict=True):
        clusters[rows] = numbers
    return clusters


def _halve_together(
    root: _Rows,
    share: Share,
    inverse: Float[np.ndarray, " n"],
    seed: int,
    group: Group,
    pool: futures.Executor,
) -> list[_Rows]:
    """The groups that are small enough for one process, in the order of their clusters."""
    num_rows = len(root.ids)
    holders, place = np.zeros(num_rows, np.intp), np.zeros(num_rows, np.intp)
    for process, ids in enumerate(group.gather(share.ids)):
        holders[ids] = process
    place[share.ids] = np.arange(len(share.ids))

    def stems(rows: _Rows) -> list[_Rows]:
        if rows.count == 1 or len(rows.ids) <= STEM:
            return [rows]
        of = holders[rows.ids]
        here = place[rows.ids[of == group.index]]
        spread = bisecting.SpreadRows(share.values, inverse, here, of, group, pool)
        return [stem for half in rows.halves(spread, seed) for stem in stems(half)]

    return stems(root)


def _bring(
    stems: list[_Rows], share: Share, inverse: Float[np.ndarray, " n"], group: Group
) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, "m d"], Float[np.ndarray, " m"], list[_Rows]]:
    """Ids, vectors and inverse lengths of the groups that fall to this process, and those groups,
    their rows now counted here."""
    if group.count == 1:
        return share.ids, share.values, inverse, stems
    owners = np.arange(len(stems)) * group.count // len(stems)
    nobody = [np.zeros(0, np.intp)]

    def ids_of(process: int) -> Int[np.ndarray, " m"]:
        of = np.flatnonzero(owners == process)
        return np.sort(np.concatenate(nobody + [stems[stem].ids for stem in of]))

    places = [np.flatnonzero(np.isin(share.ids, ids_of(to))) for to in range(group.count)]
    ids, x, inverse = (
        np.concatenate(group.exchange([rows[at] for at in places]))
        for rows in (share.ids, share.values, inverse)
    )
    order = np.argsort(ids)
    ids, x, inverse = ids[order], x[order], inverse[order]
    mine = [stem for stem, owner in zip(stems, owners, strict=True) if owner == group.index]
    return ids, x, inverse, [stem._replace(ids=np.searchsorted(ids, stem.ids)) for stem in mine]


def _divide_alone(
    stems: list[_Rows],
    x: Float[np.ndarray, "m d"],
    inverse: Float[np.ndarray, " m"],
    seed: int,
    pool: futures.Executor,
) -> Int[np.ndarray, " m"]:
    """The clusters of rows that this process has all of."""
    clusters = np.zeros(len(x), np.int32)
    # Of one stem: which small groups meet must not depend on who else is here.
    small: dict[tuple[int, int, int], list[_Rows]] = {}

    def split(found: tuple[int, _Rows]) -> list[tuple[int, _Rows]]:
        stem, rows = found
        held = bisecting.HeldRows(x[rows.ids], inverse[rows.ids])
        return [(stem, half) for half in rows.halves(held, seed)]

    def place(batch: list[_Rows]) -> None:
        ids = np.stack([rows.ids for rows in batch])  # [g, m]
        firsts = np.array([rows.first for rows in batch])
        units = x[ids] * inverse[ids][:, :, None]
        similarities = np.matmul(units, units.transpose(0, 2, 1))
        rng = np.random.default_rng((seed, firsts[0], batch[0].count))
        clusters[ids] = firsts[:, None] + bisecting.divide(similarities, batch[0].count, rng)

    groups = list(enumerate(stems))
    while groups:
        large = []
        for stem, rows in groups:
            if rows.count == 1:
                clusters[rows.ids] = rows.first
            elif len(rows.ids) <= _SMALL:
                small.setdefault((stem, len(rows.ids), rows.count), []).append(rows)
            else:
                large.append((stem, rows))
        groups = [half for halves in pool.map(split, large) for half in halves]
    batches = []
    for (_, size, _), found in small.items():
        step = max(1, _SIMILARITIES // size**2)
        batches += [found[start : start + step] for start in range(0, len(found), step)]
    collections.deque(pool.map(place, batches), maxlen=0)
    return clusters
