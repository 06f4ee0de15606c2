"""Clusters: even, as good as plain 2-means run to convergence, and the same every time."""

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
from vixml_jax.structs import Share
from vixml_jax.training.clustering import balanced, bisecting
from vixml_jax.training.clustering.balanced import numbered_by_first_row


def balanced_clusters(x, num_clusters, *, seed):
    return balanced.balanced_clusters(Share(np.arange(len(x)), x), len(x), num_clusters, seed=seed)


def normalised(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def topics(num, width, num_topics, noise, seed):
    rng = np.random.default_rng((seed, num))
    centres = rng.normal(size=(num_topics, width))
    x = centres[rng.integers(num_topics, size=num)] + noise * rng.normal(size=(num, width))
    return x.astype(np.float32)


def plain_split(rows, rng):
    """Halves the rows: two random ones as centres, then assign and average until it is still."""
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


def plain_similarity(x, num_levels, seed):
    rng = np.random.default_rng(seed)
    groups = [normalised(x)]
    for _ in range(num_levels):
        groups = [rows[part] for rows in groups for part in plain_split(rows, rng)]
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
def test_sizes_differ_by_one_at_most(data):
    num = data.draw(strategies.integers(1, 900), label="rows")
    num_clusters = data.draw(strategies.integers(1, num), label="clusters")
    width = data.draw(strategies.integers(1, 5), label="width")
    x = np.random.default_rng((num, num_clusters)).normal(size=(num, width)).astype(np.float32)
    check_even(balanced_clusters(x, num_clusters, seed=0), num, num_clusters)


@pytest.mark.parametrize("num,num_clusters", [(9000, 7), (9001, 562), (5000, 5000), (12289, 2)])
def test_large_groups_are_even_too(num, num_clusters):
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
def test_quality_matches_plain_reference(case, leaf):
    """Within half a percent; both as a mean over seeds, for either may be lucky."""
    num = 16384
    x, num_levels = CASES[case](num), int(np.log2(num // leaf))
    reference = [plain_similarity(x, num_levels, seed) for seed in range(2)]
    ours = [similarity(x, balanced_clusters(x, num // leaf, seed=seed)) for seed in range(2)]
    assert np.mean(ours) > 0.995 * np.mean(reference)


def test_near_the_best_of_all_halvings():
    """Ten rows: against all 126 ways of halving them."""
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
def test_two_plain_clusters_are_found(sizes):
    rng = np.random.default_rng(6)
    truth = rng.permutation(np.repeat([0, 1], sizes))
    centres = np.array([[1, 0, 0, 0.0], [0, 1, 0, 0.0]])
    x = (centres[truth] + 0.1 * rng.normal(size=(sum(sizes), 4))).astype(np.float32)
    differ = np.sum(balanced_clusters(x, 2, seed=0) != truth)
    # Which of the two becomes the larger part is a matter of the start: one row may have to move.
    assert min(differ, sum(sizes) - differ) <= sizes[0] - sizes[1]


def test_length_of_a_row_does_not_matter():
    x = topics(3000, 12, 50, 0.8, seed=7)
    lengths = 2.0 ** np.random.default_rng(7).integers(-8, 8, size=(3000, 1))
    np.testing.assert_array_equal(
        balanced_clusters(x * lengths.astype(np.float32), 200, seed=0),
        balanced_clusters(x, 200, seed=0),
    )


@pytest.mark.parametrize("num_clusters", [1, 3, 40, 600])
@pytest.mark.parametrize("kind", ["equal", "zero", "few distinct", "some zero"])
def test_degenerate_rows(kind, num_clusters):
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


def test_duplicates_meet():
    """Four rows, each 16 times: whatever the order, a row's copies end in one cluster."""
    rng = np.random.default_rng(9)
    which = rng.permutation(np.repeat(np.arange(4), 16))
    clusters = balanced_clusters(np.eye(4, 6, dtype=np.float32)[which], 4, seed=0)
    assert all(len(np.unique(clusters[which == row])) == 1 for row in range(4))


def test_same_seed_same_clusters_whatever_else_runs():
    x = topics(6000, 16, 300, 0.8, seed=10)
    kept = x.copy()
    alone = balanced_clusters(x, 300, seed=5)
    stop = threading.Event()

    def disturb():
        while not stop.is_set():
            np.matmul(np.ones((64, 64)), np.ones((64, 64)))

    threads = [threading.Thread(target=disturb) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            np.testing.assert_array_equal(balanced_clusters(x, 300, seed=5), alone)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    np.testing.assert_array_equal(x, kept)
    assert np.any(balanced_clusters(x, 300, seed=6) != alone)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("kept", ["at random", "one after another", "by one alone"])
def test_any_number_of_processes_finds_the_same(count, kept, monkeypatch):
    num, rng = 6000, np.random.default_rng()
    x = topics(num, 16, 300, 0.8, seed=int(rng.integers(1 << 30)))
    x[::50] = x[0]
    monkeypatch.setattr(balanced, "STEM", 900)
    monkeypatch.setattr(bisecting, "_SAMPLE", 500)
    monkeypatch.setattr(bisecting, "_BLOCK", 16 * 700)
    expected = balanced_clusters(x, 350, seed=5)
    holders = {
        "at random": rng.integers(count, size=num),
        "one after another": np.arange(num) * count // num,
        "by one alone": np.full(num, count - 1),
    }[kept]

    def work(group):
        ids = np.flatnonzero(holders == group.index)
        return balanced.balanced_clusters(Share(ids, x[ids]), num, 350, seed=5, group=group)

    # Its limit on BLAS is the program's, not a thread's: here threads are processes.
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        for found in together(count, work):
            np.testing.assert_array_equal(found, expected)
    check_even(expected, num, 350)


def test_spread_rows_are_exact():
    """Products and sums: those of numbers on the grid, in any order."""
    rng = np.random.default_rng()
    x, parts = rng.normal(size=(50, 12)).astype(np.float32), rng.random((4, 3, 50)) < 0.5
    inverse = (1 / np.linalg.norm(x, axis=1)).astype(np.float32)
    directions = rng.normal(size=(3, 12)) / 4
    holders = rng.integers(3, size=40)
    on_grid = np.rint(x.astype(np.float64) * inverse[:, None] * 2**24)[10:]

    def work(group):
        here = 10 + np.flatnonzero(holders == group.index)
        rows = bisecting.SpreadRows(x, inverse, here, holders, group, futures.ThreadPoolExecutor(2))
        picked = rows.take(np.array([3, 7, 31]))
        sums = [rows.sums(part[:, :40]) for part in parts]
        return rows.scores(directions), sums, picked.unit(np.array([2, 0]))

    for scores, sums, units in together(3, work):
        exact = [[fractions(row, np.rint(d * 2**24)) for row in on_grid] for d in directions]
        np.testing.assert_array_equal(scores, exact)
        for part, found in zip(parts, sums, strict=True):
            np.testing.assert_array_equal(found, part[:, :40] @ on_grid / 2**24)
        np.testing.assert_allclose(units, on_grid[[31, 3]] / 2**24, atol=2**-24)


def fractions(one, two):
    """The product of vectors of whole numbers over 2^48, by integers of any length."""
    return sum(int(a) * int(b) for a, b in zip(one, two, strict=True)) / 2**48


def test_float16_rows_are_read_as_float32():
    x = topics(500, 8, 20, 0.5, seed=11).astype(np.float16)
    np.testing.assert_array_equal(
        balanced_clusters(x, 31, seed=0), balanced_clusters(x.astype(np.float32), 31, seed=0)
    )


@pytest.mark.parametrize("num,num_clusters", [(3, 4), (0, 1), (3, 0), (3, -1)])
def test_impossible_counts_are_refused(num, num_clusters):
    with pytest.raises(errors.InputError, match=f"{num_clusters} clusters asked of {num} vectors"):
        balanced_clusters(np.ones((num, 2), np.float32), num_clusters, seed=0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_rows_are_refused(value):
    x = np.ones((50, 4), np.float32)
    x[17, 2] = value
    with pytest.raises(errors.InputError, match="vector 17 of 50"):
        balanced_clusters(x, 5, seed=0)


def test_numbers_follow_the_first_row_of_a_cluster():
    rng = np.random.default_rng(8)
    clusters = rng.permutation(np.repeat(rng.permutation(9), 4))
    found = numbered_by_first_row(clusters)
    names = {}
    expected = [names.setdefault(cluster, len(names)) for cluster in clusters]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int32
    swapped = rng.permutation(9)[clusters]  # The same clusters by other numbers.
    np.testing.assert_array_equal(numbered_by_first_row(swapped), expected)
