"""Sliced metrics against plain loops over queries and labels, and the groups themselves."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.evaluation.test_metrics import (
    KS,
    RECALL_KS,
    cases,
    expected_metrics,
    matrix,
    random_case,
)
from vixml_jax.data.card import stats
from vixml_jax.data.store import Items, Ragged
from vixml_jax.evaluation import metrics, sliced_metrics, slices
from vixml_jax.evaluation.slices import Groups

# Metrics whose values over groups of labels sum to the value over all labels.
ADDITIVE = ("P", "nDCG", "PSP", "PSnDCG", "MAP", "MRR")


def compute(ids, truth, weights, label_groups=None, query_groups=None):
    return sliced_metrics.compute(
        ids,
        matrix(truth, len(weights)),
        weights,
        label_groups=label_groups or {},
        query_groups=query_groups or {},
        ks=KS,
        recall_ks=RECALL_KS,
    )


def expected_of_group(ids, truth, weights, group, ks, recall_ks):
    """Returns the metrics of a group of labels by their definitions, one query at a time."""
    result = {}
    queries = list(zip(ids, truth, strict=True))

    def ideal(n):
        return sum(1 / math.log2(j + 1) for j in range(1, n + 1)) or 1.0

    for k in ks:
        sums = dict.fromkeys(ADDITIVE, 0.0)
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
            total = best.get(name, len(ids))
            result[f"{name}@{k}"] = sums[name] / total if total else 0.0
    for k in recall_ks:
        recalls = [len(true & group & set(row[:k])) / len(true & group)
                   for row, true in queries if true & group]  # fmt: skip
        result[f"R@{k}"] = sum(recalls) / len(recalls) if recalls else 0.0
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
def test_groups_of_labels_match_loops(case, seed, count):
    ids, truth, weights = case
    group_ids = np.random.default_rng(seed).integers(-1, count, len(weights)).astype(np.int8)
    names = tuple(f"group {i}" for i in range(count))
    found = compute(ids, truth, weights, {"some": Groups(names, group_ids)}).groups["some"]
    for i, name in enumerate(names):
        group = set(np.flatnonzero(group_ids == i).tolist())
        if not group:
            assert name not in found
            continue
        pairs = sum(len(true & group) for true in truth)
        assert found[name]["labels"] == len(group)
        assert found[name]["pairs"] == pairs
        assert found[name]["queries"] == sum(bool(true & group) for true in truth)
        expected = expected_of_group(ids, truth, weights, group, KS, RECALL_KS) if pairs else {}
        assert found[name]["metrics"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_groups_of_queries_match_loops(seed, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", 7)
    rng = np.random.default_rng(seed)
    ids, truth, weights = random_case(rng, 50, 30, 8, density=0.1)
    truth[3] = set()
    group_ids = rng.integers(-1, 3, 50).astype(np.int8)
    found = compute(ids, truth, weights, None, {"q": Groups(("a", "b", "c", "empty"), group_ids)})
    assert list(found.groups["q"]) == ["a", "b", "c"]
    for i, group in enumerate(found.groups["q"].values()):
        rows = np.flatnonzero(group_ids == i)
        part = [truth[row] for row in rows]
        expected = expected_metrics(ids[rows], part, weights, KS, RECALL_KS)
        assert group["metrics"] == pytest.approx(expected, abs=1e-9)
        assert group["queries"] == len(rows)
        assert group["pairs"] == sum(map(len, part))
        assert group["labels"] == len(set().union(*part))


@pytest.mark.parametrize("seed", range(3))
def test_groups_of_labels_sum_to_the_metrics(seed):
    rng = np.random.default_rng(seed)
    ids, truth, weights = random_case(rng, 40, 60, 20)
    group_ids = rng.integers(0, 4, 60).astype(np.int8)
    groups = compute(ids, truth, weights, {"some": Groups(tuple("abcd"), group_ids)}).groups["some"]
    overall = metrics.compute_metrics(ids, matrix(truth, 60), weights, recall_ks=())
    for name, value in overall.items():
        if name.split("@")[0] in ADDITIVE:
            summed = sum(group["metrics"][name] for group in groups.values())
            assert summed == pytest.approx(value, abs=1e-9), name
    assert sum(group["pairs"] for group in groups.values()) == sum(map(len, truth))


def test_terms_per_query(monkeypatch):
    """The row of each query gives the metrics of that query alone."""
    monkeypatch.setattr(metrics, "_BLOCK", 5)
    ids, truth, weights = random_case(np.random.default_rng(5), 23, 30, 8, density=0.1)
    found = compute(ids, truth, weights).queries
    assert found.values.dtype == np.float32 and found.possible.dtype == np.float32
    for i in range(len(ids)):
        expected = expected_metrics(ids[i : i + 1], truth[i : i + 1], weights, KS, RECALL_KS)
        alone = found._replace(values=found.values[i : i + 1], possible=found.possible[i : i + 1])
        expected = {name: expected[name] for name in found.names}
        assert alone.metrics() == pytest.approx(expected, rel=1e-5)
    overall = expected_metrics(ids, truth, weights, KS, RECALL_KS)
    assert found.metrics() == pytest.approx({n: overall[n] for n in found.names}, rel=1e-5)


def test_frequency_groups_match_the_data_card():
    frequency = np.array([0, 1, 5, 6, 100, 101, 5000])
    found = slices.by_frequency(frequency)
    named = [found.names[i] for i in found.group_ids]
    assert named == ["unseen", "tail", "tail", "torso", "torso", "head", "head"]
    for name, least, most in stats.GROUPS:
        inside = stats.Distribution.of(frequency).between(least, most).items
        assert named.count(name) == inside


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300))
def test_deciles_have_equal_pairs_and_descending_frequency(seed, num):
    rng = np.random.default_rng(seed)
    frequency = rng.zipf(1.5, num).clip(0, 10**6) - 1
    pairs = rng.poisson(frequency**0.7 + 0.3)
    found = slices.by_decile(frequency, pairs)
    group_ids = found.group_ids
    assert ((group_ids < 0) == (frequency == 0)).all()
    total = pairs[frequency > 0].sum()
    counts = np.bincount(group_ids[frequency > 0], weights=pairs[frequency > 0], minlength=10)
    assert counts.sum() == total and len(counts) == 10
    largest = pairs[frequency > 0].max(initial=0)
    if total:
        assert np.abs(counts - total / 10).max() <= max(largest, 1)
    for i in range(9):  # No label of a later group is more frequent than one of an earlier group.
        rest = frequency[group_ids > i]
        assert frequency[group_ids == i].min(initial=10**9) >= rest.max(initial=0)


def test_deciles_computed_by_hand():
    # 20 labels of different frequencies with one pair each, and one unseen label.
    frequency, pairs = np.append(np.arange(20) + 1, 0), np.ones(21, int)
    group_ids = slices.by_decile(frequency, pairs).group_ids
    np.testing.assert_array_equal(group_ids[:20], 9 - np.arange(20) // 2)
    assert group_ids[20] == -1


def items(lengths, offsets):
    images = None if offsets is None else Ragged(np.zeros((0, 2), np.float16), np.array(offsets))
    return Items([""] * len(lengths), None, images, full_lengths=np.array(lengths))


def test_query_groups():
    found = slices.by_images(items([1, 1, 1], [0, 2, 2, 3]))
    assert [found.names[i] for i in found.group_ids] == ["with images", "without", "with images"]
    assert (slices.by_images(items([1, 1], None)).group_ids == 1).all()
    found = slices.by_length(np.array([3, 9, 4, 4, 8, 5, 12, 4]))
    assert found.names == ("3 to 4 tokens", "5 to 8 tokens", "9 to 12 tokens")
    assert found.group_ids.tolist() == [0, 2, 0, 0, 1, 1, 2, 0]
    assert slices.by_length(np.array([7, 7])).names == ("7 tokens",)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=200))
def test_quarters_by_length_have_equal_sizes(lengths):
    lengths = np.array(lengths)
    found = slices.by_length(lengths)
    assert found.group_ids.min() == 0 and found.group_ids.max() == len(found.names) - 1 <= 3
    for i, name in enumerate(found.names):
        inside = lengths[found.group_ids == i]
        assert str(inside.max()) in name.split() and len(inside)
    if len(set(lengths.tolist())) == len(lengths) and len(lengths) >= 4:
        sizes = np.bincount(found.group_ids)
        assert sizes.max() - sizes.min() <= 1
