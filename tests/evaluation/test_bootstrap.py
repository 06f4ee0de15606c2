"""Intervals and p-values against closed forms, plain loops and scipy; files per query."""

import itertools
import math
import os
import tracemalloc

import numpy as np
import pytest
import scipy.stats

from vixml_jax.errors import InputError
from vixml_jax.evaluation import bootstrap, per_query
from vixml_jax.evaluation.per_query import About, PerQuery

ABOUT = About("glyphs", "abc", "test", "exact")


def table(rng, num, *, shift=0.0):
    """Returns three metrics: a mean of normal values, a rate, and a ratio of two sums."""
    values = np.stack(
        [
            rng.normal(0.5 + shift, 0.2, num),
            rng.binomial(1, 0.3 + shift, num),
            rng.gamma(2.0, 1.0 + shift, num),
        ],
        axis=1,
    ).astype(np.float32)
    possible = np.linspace(2.0, 5.0, num, dtype=np.float32)[:, None]
    return PerQuery(("mean", "rate", "PSP@1"), values, ("PSP@1",), possible)


def test_metrics_are_means_and_ratios():
    found = table(np.random.default_rng(0), 40)
    metrics = found.metrics()
    assert metrics["mean"] == pytest.approx(100 * found.values[:, 0].mean(), rel=1e-6)
    ratio = 100 * found.values[:, 2].sum() / found.possible.sum()
    assert metrics["PSP@1"] == pytest.approx(ratio, rel=1e-6)


def test_gain_and_its_standard_error():
    """The gain is the difference of the metrics; the error that of bootstrap resamples."""
    rng = np.random.default_rng()
    one, other = table(rng, 400, shift=0.02), table(rng, 400)
    gain, error = per_query.gain(one, other, ["rate", "PSP@1"])
    names = [one.names.index(name) for name in ("rate", "PSP@1")]
    expected = [(x.metrics()["rate"] + x.metrics()["PSP@1"]) / 2 for x in (one, other)]
    assert gain == pytest.approx(expected[0] - expected[1], rel=1e-5, abs=1e-4)
    drawn = rng.integers(400, size=(4000, 400))
    values = (one.values - other.values)[drawn].mean(axis=1)[:, names]
    values[:, 1] /= one.possible.mean()
    assert error == pytest.approx(100 * values.mean(axis=1).std(), rel=0.1)
    assert per_query.gain(one, one, ["mean"]) == (0.0, 0.0)


@pytest.mark.parametrize("num", [1, 3, 1024, 1025, 5000])
def test_every_resample_has_as_many_queries(num):
    counts = np.concatenate([w for _, w in bootstrap._draws(num, 300, 7)], axis=1)
    assert counts.shape == (300, num)
    assert (counts.sum(axis=1) == num).all() and (counts >= 0).all()
    if num > 1:  # Counts of a multinomial: variance 1 - 1 / n, covariance -1 / n of any two.
        assert counts.var() == pytest.approx(1 - 1 / num, abs=0.1)


def test_draws_do_not_depend_on_blocks(monkeypatch):
    """Covariances of the counts are those of one multinomial draw, whatever the block size."""
    monkeypatch.setattr(bootstrap, "_BLOCK", 4)
    counts = np.concatenate([w for _, w in bootstrap._draws(10, 40_000, 1)], axis=1)
    expected = np.eye(10) - 0.1
    np.testing.assert_allclose(np.cov(counts.T, bias=True), expected, atol=0.03)
    np.testing.assert_allclose(counts.mean(axis=0), 1.0, atol=0.03)


@pytest.mark.parametrize("num", [200, 4000])
def test_standard_errors_match_closed_forms(num):
    found = table(np.random.default_rng(num), num)
    spread = bootstrap.resample(found, resamples=4000, seed=3).std(axis=0)
    x = found.values.astype(np.float64)
    possible = found.possible[:, 0].astype(np.float64)
    ratio = x[:, 2].sum() / possible.sum()
    ratio_error = (x[:, 2] - ratio * possible).std() / possible.mean()  # Linearised.
    expected = [x[:, 0].std(), x[:, 1].std(), ratio_error]
    # With 4000 resamples the relative error of a standard deviation is 1.1 %.
    np.testing.assert_allclose(spread, 100 * np.array(expected) / math.sqrt(num), rtol=0.06)


def test_many_resamples_take_little_memory():
    found = table(np.random.default_rng(), 1024)
    tracemalloc.start()
    try:
        values = bootstrap.resample(found, resamples=30_000)
        assert tracemalloc.get_traced_memory()[1] < 250e6
    finally:
        tracemalloc.stop()
    few = bootstrap.resample(found, resamples=10_000)
    np.testing.assert_array_equal(values[:10_000], few)
    means, error = values[:, 0].reshape(3, 10_000).mean(axis=1), values[:, 0].std()
    np.testing.assert_allclose(means, 100 * found.values[:, 0].mean(), atol=0.06 * error)
    assert (values[:10_000] != values[10_000:20_000]).mean() > 0.9  # No part repeats another one.


def test_intervals_approach_the_normal_interval():
    found = table(np.random.default_rng(9), 3000)
    low, high = bootstrap.intervals(found, resamples=4000)["mean"]
    error = 100 * float(found.values[:, 0].std()) / math.sqrt(3000)
    mean = found.metrics()["mean"]
    assert low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)


def test_intervals_have_nominal_coverage():
    rng = np.random.default_rng(11)
    inside = np.zeros(2)
    for _ in range(300):
        low_high = bootstrap.intervals(table(rng, 150), resamples=400, seed=int(rng.integers(9**9)))
        for i, (name, truth) in enumerate((("mean", 50.0), ("rate", 30.0))):
            inside[i] += low_high[name][0] <= truth <= low_high[name][1]
    # Expected are 95 % of 300, 285, with a standard deviation of 3.8.
    assert (np.abs(inside - 285) < 16).all()


def test_intervals_are_determined_by_the_seed():
    found = table(np.random.default_rng(0), 50)
    assert bootstrap.intervals(found) == bootstrap.intervals(found)
    assert bootstrap.intervals(found) != bootstrap.intervals(found, seed=1)


def test_p_values_match_exact_permutation_test():
    rng = np.random.default_rng(2)
    one, other = table(rng, 11), table(rng, 11, shift=0.1)
    found = bootstrap.compare(one, other, permutations=40_000)
    for column, name in enumerate(one.names):
        a, b = one.values[:, column].astype(float), other.values[:, column].astype(float)
        exact = scipy.stats.permutation_test(
            (a, b),
            lambda x, y: np.sum(x - y),
            permutation_type="samples",
            n_resamples=np.inf,
        ).pvalue
        error = math.sqrt(exact * (1 - exact) / 40_000)
        assert found[name].p_value == pytest.approx(exact, abs=5 * error + 1e-4), name


def test_many_permutations_take_little_memory(monkeypatch):
    differences = np.random.default_rng(3).normal(0.02, 1.0, (1024, 2)).astype(np.float32)
    tracemalloc.start()
    try:
        found = bootstrap._randomisation_test(differences, 40_000, 0)
        assert tracemalloc.get_traced_memory()[1] < 150e6
    finally:
        tracemalloc.stop()
    monkeypatch.setattr(bootstrap, "_PERMUTATIONS_BLOCK", 40_000)
    np.testing.assert_array_equal(bootstrap._randomisation_test(differences, 40_000, 0), found)


def test_p_value_with_ties_matches_all_sign_flips():
    """With few distinct differences, many sums are equal and must count as equal."""
    differences = np.array([1, 1, 0, -1, 1, 0, 1, 1], np.float32) / 3
    sums = [sum(s * d for s, d in zip(signs, differences.tolist(), strict=True))
            for signs in itertools.product((1, -1), repeat=8)]  # fmt: skip
    exact = np.mean([abs(s) >= abs(sum(differences.tolist())) - 1e-6 for s in sums])
    zero = np.zeros((8, 1), np.float32)
    one = PerQuery(("P@3",), differences[:, None], (), zero[:, :0])
    found = bootstrap.compare(one, one._replace(values=zero), permutations=50_000)["P@3"]
    assert found.p_value == pytest.approx(exact, abs=0.012)


def test_p_values_are_uniform_for_equally_good_runs():
    rng = np.random.default_rng(4)
    p_values = []
    for _ in range(400):
        one, other = table(rng, 60), table(rng, 60)
        found = bootstrap.compare(one, other, resamples=100, permutations=499)
        p_values.append([found["mean"].p_value, found["PSP@1"].p_value])
    for column in np.array(p_values).T:
        # 400 uniform numbers exceed a distance of 0.097 once in a thousand times.
        assert scipy.stats.kstest(column, "uniform").statistic < 0.097


def test_true_difference_is_significant():
    rng = np.random.default_rng(6)
    one = table(rng, 500)
    other = one._replace(values=one.values - rng.normal(0.05, 0.02, (500, 3)).astype(np.float32))
    found = bootstrap.compare(one, other)
    for name in one.names:
        c = found[name]
        assert c.p_value == pytest.approx(1 / 10_001) and 0 < c.low < c.difference < c.high
        assert c.difference == pytest.approx(c.one - c.other, abs=1e-3)
    swapped = bootstrap.compare(other, one)["mean"]
    assert swapped.difference == pytest.approx(-found["mean"].difference)


def test_run_does_not_differ_from_itself():
    found = table(np.random.default_rng(8), 30)
    for c in bootstrap.compare(found, found).values():
        assert (c.difference, c.low, c.high, c.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_different_queries_or_true_labels_are_rejected():
    found = table(np.random.default_rng(0), 30)
    with pytest.raises(InputError, match=r"30 queries .* 29 with"):
        bootstrap.compare(found, found._replace(values=found.values[:29]))
    with pytest.raises(InputError, match="different true labels"):
        bootstrap.compare(found, found._replace(possible=found.possible + 1))


def test_file_per_query_round_trip(tmp_path):
    path = tmp_path / "evaluation" / "test-exact.queries.npz"
    found = table(np.random.default_rng(0), 30)
    per_query.save(path, found, ABOUT)
    loaded, about = per_query.load(path)
    assert (loaded.names, loaded.ratios, about) == (found.names, found.ratios, ABOUT)
    np.testing.assert_array_equal(loaded.values, found.values)
    np.testing.assert_array_equal(loaded.possible, found.possible)
    assert os.listdir(path.parent) == [path.name]
    bare = PerQuery(("P@1",), found.values[:, :1], (), found.values[:, :0])
    per_query.save(path, bare, ABOUT)
    assert per_query.load(path)[0].ratios == ()


@pytest.mark.parametrize("broken", ["missing", "text", "cut", "other", "pickle"])
def test_damaged_file_is_rejected(tmp_path, broken):
    path = tmp_path / "x.queries.npz"
    if broken == "text":
        path.write_text("no archive")
    elif broken == "cut":
        per_query.save(path, table(np.random.default_rng(0), 30), ABOUT)
        path.write_bytes(path.read_bytes()[:-40])
    elif broken == "other":
        np.savez(path, a=np.zeros(3))
    elif broken == "pickle":
        np.savez(path, names=np.array([object()]), allow_pickle=True)
    with pytest.raises(InputError, match=r"x\.queries\.npz: not (found|readable)") as error:
        per_query.load(path)
    assert "\n" not in str(error.value)
