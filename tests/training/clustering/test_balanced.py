"""Tests of balanced clusters: even sizes, quality, and equal results on any processes."""

import itertools
import threading
from concurrent import futures

import hypothesis
import numpy as np
import pytest
import threadpoolctl
from hypothesis import strategies

from tests.thread_group import together
from vixml_jax import errors
from vixml_jax.structs import Shard
from vixml_jax.training.clustering import balanced, bisecting
from vixml_jax.training.clustering.balanced import numbered_by_first_row


def balanced_clusters(x, num_clusters, *, seed):
    return balanced.balanced_clusters(Shard(np.arange(len(x)), x), len(x), num_clusters, seed=seed)


def normalised(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def topics(num, width, num_topics, noise, seed):
    rng = np.random.default_rng((seed, num))
    centres = rng.normal(size=(num_topics, width))
    x = centres[rng.integers(num_topics, size=num)] + noise * rng.normal(size=(num, width))
    return x.astype(np.float32)


def reference_split(rows, rng):
    """Halves the rows by 2-means from two random rows, until it converges."""
    half = (len(rows) + 1) // 2
    centres, before = rows[rng.choice(len(rows), 2, replace=False)], -np.inf
    while True:
        to_one, to_two = (rows @ centre for centre in centres)
        order = np.argsort(to_two - to_one)
        one, two = order[:half], order[half:]
        mean = (to_one[one].sum() + to_two[two].sum()) / len(rows)
        if mean - before < 1e-4:
            return one, two
        before = mean
        centres = [normalised(rows[part].mean(axis=0)) for part in (one, two)]


def reference_similarity(x, num_levels, seed):
    rng = np.random.default_rng(seed)
    groups = [normalised(x)]
    for _ in range(num_levels):
        groups = [rows[part] for rows in groups for part in reference_split(rows, rng)]
    return sum((rows @ normalised(rows.mean(axis=0))).sum() for rows in groups) / len(x)


def similarity(x, clusters):
    rows, total = normalised(x), 0.0
    for cluster in np.unique(clusters):
        members = rows[clusters == cluster]
        total += (members @ normalised(members.mean(axis=0))).sum()
    return total / len(x)


def check_even(clusters, num, num_clusters):
    assert clusters.dtype == np.int32 and clusters.shape == (num,)
    sizes = np.bincount(clusters, minlength=num_clusters)
    assert len(sizes) == num_clusters
    assert sizes.min() >= num // num_clusters and sizes.max() <= -(-num // num_clusters)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(strategies.data())
def test_cluster_sizes_differ_by_at_most_one(data):
    num = data.draw(strategies.integers(1, 900), label="rows")
    num_clusters = data.draw(strategies.integers(1, num), label="clusters")
    width = data.draw(strategies.integers(1, 5), label="width")
    x = np.random.default_rng((num, num_clusters)).normal(size=(num, width)).astype(np.float32)
    check_even(balanced_clusters(x, num_clusters, seed=0), num, num_clusters)


@pytest.mark.parametrize("num,num_clusters", [(9000, 7), (9001, 562), (5000, 5000), (12289, 2)])
def test_large_groups_have_even_clusters(num, num_clusters):
    x = topics(num, 6, 40, 0.7, seed=0)
    check_even(balanced_clusters(x, num_clusters, seed=1), num, num_clusters)


CASES = {
    "topics": lambda num: topics(num, 48, num // 24, 0.7, seed=0),
    "few, wide": lambda num: topics(num, 48, 11, 1.5, seed=1),
    "tight": lambda num: topics(num, 24, num // 20, 0.1, seed=2),
    "noise": lambda num: topics(num, 48, 1, 1e6, seed=3),
    "one direction": lambda num: topics(num, 32, 64, 1.0, seed=4) + np.float32(2.0),
    "plane": lambda num: topics(num, 2, 64, 1.0, seed=5),
}


@pytest.mark.parametrize("leaf", [16, 1024])
@pytest.mark.parametrize("case", CASES)
def test_similarity_matches_reference(case, leaf):
    """Within half a percent, as means over seeds, since single results vary."""
    num = 16384
    x, num_levels = CASES[case](num), int(np.log2(num // leaf))
    reference = [reference_similarity(x, num_levels, seed) for seed in range(2)]
    ours = [similarity(x, balanced_clusters(x, num // leaf, seed=seed)) for seed in range(2)]
    assert np.mean(ours) > 0.995 * np.mean(reference)


def test_split_is_close_to_the_best_possible():
    """Ten rows, compared with all 126 ways to halve them."""
    reached = []
    for seed in range(30):
        x = topics(10, 3, 4, 0.8, seed)
        best = max(
            similarity(x, np.isin(np.arange(10), [0, *rest]).astype(int))
            for rest in itertools.combinations(range(1, 10), 4)
        )
        ours = similarity(x, balanced_clusters(x, 2, seed=seed))
        assert ours <= best + 1e-6
        reached.append(ours / best)
    assert np.mean(reached) > 0.995


@pytest.mark.parametrize("sizes", [(10, 10), (11, 10), (700, 700), (5001, 5000)])
def test_two_separate_clusters_are_found(sizes):
    rng = np.random.default_rng(6)
    truth = rng.permutation(np.repeat([0, 1], sizes))
    centres = np.array([[1, 0, 0, 0.0], [0, 1, 0, 0.0]])
    x = (centres[truth] + 0.1 * rng.normal(size=(sum(sizes), 4))).astype(np.float32)
    differ = np.sum(balanced_clusters(x, 2, seed=0) != truth)
    # Random starts determine which part is the larger one, so one row may be in the other part.
    assert min(differ, sum(sizes) - differ) <= sizes[0] - sizes[1]


def test_clusters_do_not_depend_on_row_lengths():
    x = topics(3000, 12, 50, 0.8, seed=7)
    lengths = 2.0 ** np.random.default_rng(7).integers(-8, 8, size=(3000, 1))
    np.testing.assert_array_equal(
        balanced_clusters(x * lengths.astype(np.float32), 200, seed=0),
        balanced_clusters(x, 200, seed=0),
    )


@pytest.mark.parametrize("num_clusters", [1, 3, 40, 600])
@pytest.mark.parametrize("kind", ["equal", "zero", "few distinct", "some zero"])
def test_degenerate_rows_have_even_clusters(kind, num_clusters):
    rng = np.random.default_rng(8)
    x = rng.normal(size=(600, 5)).astype(np.float32)
    if kind == "equal":
        x[:] = x[0]
    elif kind == "zero":
        x[:] = 0.0
    elif kind == "few distinct":
        x = x[rng.integers(4, size=600)]
    else:
        x[::3] = 0.0
    with np.errstate(all="raise", under="ignore"):
        check_even(balanced_clusters(x, num_clusters, seed=0), 600, num_clusters)


def test_duplicates_share_a_cluster():
    """Four rows, each 16 times in random order: all copies of a row are in one cluster."""
    rng = np.random.default_rng(9)
    which = rng.permutation(np.repeat(np.arange(4), 16))
    clusters = balanced_clusters(np.eye(4, 6, dtype=np.float32)[which], 4, seed=0)
    assert all(len(np.unique(clusters[which == row])) == 1 for row in range(4))


def test_same_seed_gives_same_clusters_under_load():
    x = topics(6000, 16, 300, 0.8, seed=10)
    original = x.copy()
    expected = balanced_clusters(x, 300, seed=5)
    stop = threading.Event()

    def load():
        while not stop.is_set():
            np.matmul(np.ones((64, 64)), np.ones((64, 64)))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            np.testing.assert_array_equal(balanced_clusters(x, 300, seed=5), expected)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    np.testing.assert_array_equal(x, original)
    assert np.any(balanced_clusters(x, 300, seed=6) != expected)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("held", ["at random", "in contiguous shards", "by the last process"])
def test_clusters_are_equal_on_any_number_of_processes(count, held, monkeypatch):
    num, rng = 6000, np.random.default_rng()
    x = topics(num, 16, 300, 0.8, seed=int(rng.integers(1 << 30)))
    x[::50] = x[0]
    monkeypatch.setattr(balanced, "MAX_LOCAL_ROWS", 900)
    monkeypatch.setattr(bisecting, "_SAMPLE", 500)
    monkeypatch.setattr(bisecting, "_BLOCK", 16 * 700)
    expected = balanced_clusters(x, 350, seed=5)
    holders = {
        "at random": rng.integers(count, size=num),
        "in contiguous shards": np.arange(num) * count // num,
        "by the last process": np.full(num, count - 1),
    }[held]

    def work(group):
        ids = np.flatnonzero(holders == group.index)
        return balanced.balanced_clusters(Shard(ids, x[ids]), num, 350, seed=5, group=group)

    # The limit on BLAS threads is global, and here threads take the place of processes.
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        for clusters in together(count, work):
            np.testing.assert_array_equal(clusters, expected)
    check_even(expected, num, 350)


def test_sharded_rows_have_exact_products_and_sums():
    """Products and sums are those of the rounded rows, in any order of additions."""
    rng = np.random.default_rng()
    x, parts = rng.normal(size=(50, 12)).astype(np.float32), rng.random((4, 3, 50)) < 0.5
    inverse = (1 / np.linalg.norm(x, axis=1)).astype(np.float32)
    directions = rng.normal(size=(3, 12)) / 4
    holders = rng.integers(3, size=40)
    on_grid = np.rint(x.astype(np.float64) * inverse[:, None] * 2**24)[10:]

    def work(group):
        local = 10 + np.flatnonzero(holders == group.index)
        rows = bisecting.ShardedRows(
            x, inverse, local, holders, group, futures.ThreadPoolExecutor(2)
        )
        taken = rows.take(np.array([3, 7, 31]))
        sums = [rows.sums(part[:, :40]) for part in parts]
        return rows.scores(directions), sums, taken.unit(np.array([2, 0]))

    for scores, sums, units in together(3, work):
        exact = [[exact_product(row, np.rint(d * 2**24)) for row in on_grid] for d in directions]
        np.testing.assert_array_equal(scores, exact)
        for part, part_sums in zip(parts, sums, strict=True):
            np.testing.assert_array_equal(part_sums, part[:, :40] @ on_grid / 2**24)
        np.testing.assert_allclose(units, on_grid[[31, 3]] / 2**24, atol=2**-24)


def exact_product(one, two):
    """The product of two vectors of integers, over 2^48, in Python integers."""
    return sum(int(a) * int(b) for a, b in zip(one, two, strict=True)) / 2**48


def test_float16_rows_are_converted_to_float32():
    x = topics(500, 8, 20, 0.5, seed=11).astype(np.float16)
    np.testing.assert_array_equal(
        balanced_clusters(x, 31, seed=0), balanced_clusters(x.astype(np.float32), 31, seed=0)
    )


@pytest.mark.parametrize("num,num_clusters", [(3, 4), (0, 1), (3, 0), (3, -1)])
def test_impossible_numbers_of_clusters_are_refused(num, num_clusters):
    with pytest.raises(errors.InputError, match=f"{num_clusters} clusters of {num} vectors: exp"):
        balanced_clusters(np.ones((num, 2), np.float32), num_clusters, seed=0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_rows_are_refused(value):
    x = np.ones((50, 4), np.float32)
    x[17, 2] = value
    with pytest.raises(errors.InputError, match="vector 17 of 50"):
        balanced_clusters(x, 5, seed=0)


def test_clusters_are_numbered_by_their_first_rows():
    rng = np.random.default_rng(8)
    clusters = rng.permutation(np.repeat(rng.permutation(9), 4))
    numbered = numbered_by_first_row(clusters)
    names = {}
    expected = [names.setdefault(cluster, len(names)) for cluster in clusters]
    np.testing.assert_array_equal(numbered, expected)
    assert numbered.dtype == np.int32
    renumbered = rng.permutation(9)[clusters]
    np.testing.assert_array_equal(numbered_by_first_row(renumbered), expected)
