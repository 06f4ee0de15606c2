"""Metrics by groups against plain loops over queries and labels; how groups are made."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics import KS, RECALL_KS, cases, expected_metrics, matrix, random_case

from vixml_jax.data.card import stats
from vixml_jax.data.store import Items, Ragged
from vixml_jax.evaluation import metrics, sliced_metrics, slices
from vixml_jax.evaluation.slices import Groups

ADDING = ("P", "nDCG", "PSP", "PSnDCG", "MAP", "MRR")  # Groups of labels sum to the whole.


def judge(ids, truth, weights, label_groups=None, query_groups=None):
    return sliced_metrics.judge(
        ids,
        matrix(truth, len(weights)),
        weights,
        label_groups=label_groups or {},
        query_groups=query_groups or {},
        ks=KS,
        recall_ks=RECALL_KS,
    )


def expected_of_labels(ids, truth, weights, group, ks, recall_ks):
    """What the hits with labels of a group add, by their definitions, a query at a time."""
    result = {}
    queries = list(zip(ids, truth, strict=True))

    def ideal(n):
        return sum(1 / math.log2(j + 1) for j in range(1, n + 1)) or 1.0

    for k in ks:
        sums = dict.fromkeys(ADDING, 0.0)
        best = {"PSP": 0.0, "PSnDCG": 0.0}
        for row, true in queries:
            z = ideal(min(k, len(true)))
            hits = 0
            for j, label in enumerate(row[:k], start=1):
                if label not in true:
                    continue
                hits += 1
                if label in group:
                    sums["P"] += 1 / k
                    sums["nDCG"] += 1 / math.log2(j + 1) / z
                    sums["PSP"] += weights[label]
                    sums["PSnDCG"] += weights[label] / math.log2(j + 1) / z
                    sums["MAP"] += hits / j / min(k, len(true))
            largest = sorted((weights[i] for i in true), reverse=True)[:k]
            best["PSP"] += sum(largest)
            best["PSnDCG"] += sum(w / math.log2(j + 1) / z for j, w in enumerate(largest, 1))
        for name in ("P", "nDCG", "PSP", "PSnDCG", "MAP"):
            of = best.get(name, len(ids))
            result[f"{name}@{k}"] = sums[name] / of if of else 0.0
    for k in recall_ks:
        shares = [len(true & group & set(row[:k])) / len(true & group)
                  for row, true in queries if true & group]  # fmt: skip
        result[f"R@{k}"] = sum(shares) / len(shares) if shares else 0.0
    first = []
    for row, true in queries:
        ranks = [(j, i) for j, i in enumerate(row, start=1) if i in true]
        first.append(1 / ranks[0][0] if ranks and ranks[0][1] in group else 0.0)
    result["MRR"] = sum(first) / len(ids)
    occurring = set().union(*truth) & group
    for k in (*ks, *recall_ks):
        covered = set().union(*(true & group & set(row[:k]) for row, true in queries))
        result[f"coverage@{k}"] = len(covered) / len(occurring) if occurring else 0.0
    return {name: 100.0 * value for name, value in result.items()}


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 2**32), st.integers(1, 5))
def test_groups_of_labels_against_loops(case, seed, count):
    ids, truth, weights = case
    of = np.random.default_rng(seed).integers(-1, count, len(weights))
    names = tuple(f"group {i}" for i in range(count))
    found = judge(ids, truth, weights, {"some": Groups(names, of.astype(np.int8))}).groups["some"]
    for i, name in enumerate(names):
        group = set(np.flatnonzero(of == i).tolist())
        if not group:
            assert name not in found
            continue
        pairs = sum(len(true & group) for true in truth)
        assert found[name]["labels"] == len(group)
        assert found[name]["pairs"] == pairs
        assert found[name]["queries"] == sum(bool(true & group) for true in truth)
        expected = expected_of_labels(ids, truth, weights, group, KS, RECALL_KS) if pairs else {}
        assert found[name]["metrics"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_groups_of_queries_against_loops(seed, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", 7)
    rng = np.random.default_rng(seed)
    ids, truth, weights = random_case(rng, 50, 30, 8, density=0.1)
    truth[3] = set()
    of = rng.integers(-1, 3, 50).astype(np.int8)
    found = judge(ids, truth, weights, None, {"q": Groups(("a", "b", "c", "empty"), of)})
    assert list(found.groups["q"]) == ["a", "b", "c"]
    for i, told in enumerate(found.groups["q"].values()):
        rows = np.flatnonzero(of == i)
        part = [truth[row] for row in rows]
        expected = expected_metrics(ids[rows], part, weights, KS, RECALL_KS)
        assert told["metrics"] == pytest.approx(expected, abs=1e-9)
        assert told["queries"] == len(rows)
        assert told["pairs"] == sum(map(len, part))
        assert told["labels"] == len(set().union(*part))


@pytest.mark.parametrize("seed", range(3))
def test_groups_of_labels_sum_to_the_whole(seed):
    rng = np.random.default_rng(seed)
    ids, truth, weights = random_case(rng, 40, 60, 20)
    of = rng.integers(0, 4, 60).astype(np.int8)
    told = judge(ids, truth, weights, {"some": Groups(tuple("abcd"), of)}).groups["some"]
    whole = metrics.compute_metrics(ids, matrix(truth, 60), weights, recall_ks=())
    for name, value in whole.items():
        if name.split("@")[0] in ADDING:
            summed = sum(group["metrics"][name] for group in told.values())
            assert summed == pytest.approx(value, abs=1e-9), name
    assert sum(group["pairs"] for group in told.values()) == sum(map(len, truth))


def test_each_query_alone(monkeypatch):
    """Every row of the table holds what the metrics of that query alone are."""
    monkeypatch.setattr(metrics, "_BLOCK", 5)
    ids, truth, weights = random_case(np.random.default_rng(5), 23, 30, 8, density=0.1)
    found = judge(ids, truth, weights).queries
    assert found.values.dtype == np.float32 and found.possible.dtype == np.float32
    for i in range(len(ids)):
        expected = expected_metrics(ids[i : i + 1], truth[i : i + 1], weights, KS, RECALL_KS)
        alone = found._replace(values=found.values[i : i + 1], possible=found.possible[i : i + 1])
        expected = {name: expected[name] for name in found.names}
        assert alone.metrics() == pytest.approx(expected, rel=1e-5)
    whole = expected_metrics(ids, truth, weights, KS, RECALL_KS)
    assert found.metrics() == pytest.approx({n: whole[n] for n in found.names}, rel=1e-5)


def test_frequency_groups_are_those_of_the_data_card():
    frequency = np.array([0, 1, 5, 6, 100, 101, 5000])
    found = slices.by_frequency(frequency)
    named = [found.names[i] for i in found.of]
    assert named == ["unseen", "tail", "tail", "torso", "torso", "head", "head"]
    for name, least, most in stats.GROUPS:
        inside = stats.Distribution.of(frequency).between(least, most).items
        assert named.count(name) == inside


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300))
def test_deciles(seed, num):
    rng = np.random.default_rng(seed)
    frequency = rng.zipf(1.5, num).clip(0, 10**6) - 1
    pairs = rng.poisson(frequency**0.7 + 0.3)
    found = slices.by_decile(frequency, pairs)
    assert ((found.of < 0) == (frequency == 0)).all()
    total = pairs[frequency > 0].sum()
    held = np.bincount(found.of[frequency > 0], weights=pairs[frequency > 0], minlength=10)
    assert held.sum() == total and len(held) == 10
    largest = pairs[frequency > 0].max(initial=0)
    if total:
        assert np.abs(held - total / 10).max() <= max(largest, 1)
    for i in range(9):  # No label of a later group is more frequent than one of an earlier.
        rest = frequency[found.of > i]
        assert frequency[found.of == i].min(initial=10**9) >= rest.max(initial=0)


def test_deciles_by_hand():
    # 20 labels, each in one pair, frequencies all different and one unseen label.
    frequency, pairs = np.append(np.arange(20) + 1, 0), np.ones(21, int)
    of = slices.by_decile(frequency, pairs).of
    np.testing.assert_array_equal(of[:20], 9 - np.arange(20) // 2)
    assert of[20] == -1


def items(whole, offsets):
    images = None if offsets is None else Ragged(np.zeros((0, 2), np.float16), np.array(offsets))
    return Items([""] * len(whole), None, images, whole=np.array(whole))


def test_query_groups():
    found = slices.by_pictures(items([1, 1, 1], [0, 2, 2, 3]))
    assert [found.names[i] for i in found.of] == ["with pictures", "without", "with pictures"]
    assert (slices.by_pictures(items([1, 1], None)).of == 1).all()
    found = slices.by_length(np.array([3, 9, 4, 4, 8, 5, 12, 4]))
    assert found.names == ("3 to 4 tokens", "5 to 8 tokens", "9 to 12 tokens")
    assert found.of.tolist() == [0, 2, 0, 0, 1, 1, 2, 0]
    assert slices.by_length(np.array([7, 7])).names == ("7 tokens",)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=200))
def test_quarters_are_quarters(lengths):
    lengths = np.array(lengths)
    found = slices.by_length(lengths)
    assert found.of.min() == 0 and found.of.max() == len(found.names) - 1 <= 3
    for i, name in enumerate(found.names):
        inside = lengths[found.of == i]
        assert str(inside.max()) in name.split() and len(inside)
    if len(set(lengths.tolist())) == len(lengths) and len(lengths) >= 4:
        sizes = np.bincount(found.of)
        assert sizes.max() - sizes.min() <= 1
