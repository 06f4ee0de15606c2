"""Clusters: even, as good as plain 2-means run to convergence, and the same every time."""

import itertools
import threading

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from vixml_jax import errors
from vixml_jax.structs import Share
from vixml_jax.training import clustering
from vixml_jax.training.clustering import numbered_by_first_row


def balanced_clusters(x, num_clusters, *, seed):
    return clustering.balanced_clusters(
        Share(np.arange(len(x)), x), len(x), num_clusters, seed=seed
    )


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
