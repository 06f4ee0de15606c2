"""Metrics against plain loops, at their bounds, and in edge cases."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from vixml_jax.errors import InputError
from vixml_jax.evaluation import metrics

KS, RECALL_KS = (1, 3, 5), (4, 8)


def expected_metrics(ids, truth, weights, ks, recall_ks):
    """Returns the metrics by their definitions, one query and one rank at a time.

    Args:
      ids: Retrieved labels of each query; -1 = absent.
      truth: Set of true labels of each query.
      weights: Weight of each label.
      ks, recall_ks: Cut-offs.
    """

    def discounted(gains):
        return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains, start=1))

    def mean(values):
        return sum(values) / len(ids)

    result = {}
    queries = list(zip(ids, truth, strict=True))
    for k in ks:
        hits = [[1.0 if i in true else 0.0 for i in row[:k]] for row, true in queries]
        gains = [[weights[i] if i in true else 0.0 for i in row[:k]] for row, true in queries]
        best = [sorted((weights[i] for i in true), reverse=True)[:k] for _, true in queries]
        ideal = [discounted([1.0] * min(k, len(true))) or 1.0 for _, true in queries]
        result[f"P@{k}"] = mean([sum(h) / k for h in hits])
        result[f"nDCG@{k}"] = mean([discounted(h) / z for h, z in zip(hits, ideal, strict=True)])
        possible = mean([sum(b) for b in best])
        result[f"PSP@{k}"] = mean([sum(g) for g in gains]) / possible if possible else 0.0
        possible = mean([discounted(b) / z for b, z in zip(best, ideal, strict=True)])
        reached = mean([discounted(g) / z for g, z in zip(gains, ideal, strict=True)])
        result[f"PSnDCG@{k}"] = reached / possible if possible else 0.0
        average = []
        for h, (_, true) in zip(hits, queries, strict=True):
            precisions = [sum(h[: j + 1]) / (j + 1) for j in range(k) if h[j]]
            average.append(sum(precisions) / min(k, len(true)) if true else 0.0)
        result[f"MAP@{k}"] = mean(average)
    for k in recall_ks:
        recalls = [len(true & set(row[:k])) / len(true) if true else 0.0 for row, true in queries]
        result[f"R@{k}"] = mean(recalls)
    occurring = set().union(*truth)
    for k in (*ks, *recall_ks):
        covered = set().union(*(true & set(row[:k]) for row, true in queries))
        result[f"coverage@{k}"] = len(covered) / len(occurring) if occurring else 0.0
    ranks = [[j for j, i in enumerate(row, start=1) if i in true] for row, true in queries]
    result["MRR"] = mean([1.0 / r[0] if r else 0.0 for r in ranks])
    return {name: 100.0 * value for name, value in result.items()}


def matrix(truth, num_labels):
    indptr = np.cumsum([0, *map(len, truth)])
    indices = np.array([i for true in truth for i in sorted(true)], np.int32)
    ones = np.ones(len(indices), np.float32)
    return sparse.csr_matrix((ones, indices, indptr), shape=(len(truth), num_labels))


def random_case(rng, num_queries, num_labels, num_columns, *, density=0.2, absent=0.1):
    """Returns retrieved labels (distinct, some absent), true labels, and label weights."""
    ids = np.argsort(rng.random((num_queries, num_labels)), axis=1)[:, :num_columns]
    ids[rng.random(ids.shape) < absent] = -1
    truth = [set(np.flatnonzero(rng.random(num_labels) < density)) for _ in range(num_queries)]
    return ids, truth, 1.0 + 5.0 * rng.random(num_labels)


def compute(ids, truth, weights, ks=KS, recall_ks=RECALL_KS):
    relevance = matrix(truth, len(weights))
    return metrics.compute_metrics(ids, relevance, weights, ks=ks, recall_ks=recall_ks)


@st.composite
def cases(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_labels = draw(st.integers(8, 40))
    return random_case(
        rng, draw(st.integers(1, 12)), num_labels, draw(st.integers(8, num_labels)),
        density=draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])),
        absent=draw(st.sampled_from([0.0, 0.3, 1.0])),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_matches_loops(seed, dtype, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", 7)  # Several blocks, the last one partial.
    ids, truth, weights = random_case(np.random.default_rng(seed), 50, 30, 8, density=0.1)
    truth[3] = truth[20] = set()  # Queries without labels.
    ids[4] = -1  # A query without results.
    weights = weights.astype(np.float32)
    found = compute(ids.astype(dtype), truth, weights)
    expected = expected_metrics(ids, truth, weights.tolist(), KS, RECALL_KS)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name


@settings(max_examples=60, deadline=None)
@given(cases())
def test_matches_loops_for_random_cases(case):
    expected = expected_metrics(*case, KS, RECALL_KS)
    assert compute(*case) == pytest.approx(expected, abs=1e-9)


def test_default_metric_names():
    ids, truth, weights = random_case(np.random.default_rng(0), 5, 150, 100)
    found = metrics.compute_metrics(ids, matrix(truth, 150), weights)
    kinds = ("P", "nDCG", "PSP", "PSnDCG", "MAP")
    names = {f"{kind}@{k}" for kind in kinds for k in (1, 3, 5)} | {"R@10", "R@100", "MRR"}
    names |= {f"coverage@{k}" for k in (1, 3, 5, 10, 100)}
    assert found.keys() == names
    assert all(type(value) is float for value in found.values())


@settings(max_examples=40, deadline=None)
@given(cases())
def test_values_are_percentages(case):
    for name, value in compute(*case).items():
        assert 0.0 <= value <= 100.0 + 1e-9, name


@settings(max_examples=40, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_order_of_queries_does_not_matter(case, random):
    ids, truth, weights = case
    order = list(range(len(ids)))
    random.shuffle(order)
    found = compute(ids[order], [truth[i] for i in order], weights)
    assert found == pytest.approx(compute(*case), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(cases())
def test_perfect_ranking_reaches_the_maximum(case):
    ids, truth, weights = case
    truth[0] = truth[0] or {1}
    ids = np.full(ids.shape, -1)
    for row, true in zip(ids, truth, strict=True):
        best = sorted(true, key=lambda i: -weights[i])[: len(row)]
        row[: len(best)] = best
    found = compute(ids, truth, weights)
    with_labels = 100.0 * np.mean([bool(true) for true in truth])
    for k in KS:
        assert found[f"PSP@{k}"] == pytest.approx(100.0)
        assert found[f"PSnDCG@{k}"] == pytest.approx(100.0)
        assert found[f"nDCG@{k}"] == pytest.approx(with_labels)
        assert found[f"MAP@{k}"] == pytest.approx(with_labels)
        hits = np.mean([min(k, len(true)) / k for true in truth])
        assert found[f"P@{k}"] == pytest.approx(100.0 * hits)
    assert found["MRR"] == pytest.approx(with_labels)
    if max(map(len, truth)) <= 4:
        assert found["R@4"] == pytest.approx(with_labels)


def test_values_computed_by_hand():
    # Three queries: hits at ranks 1 and 3 for three true labels; no hit; no true labels.
    ids = np.array([[4, 0, 2], [1, 3, -1], [0, 1, 2]])
    truth = [{4, 2, 1}, {0}, set()]
    weights = np.array([8.0, 4.0, 2.0, 1.0, 1.0])
    found = compute(ids, truth, weights, ks=(1, 3), recall_ks=(2,))
    third = 100.0 / 3
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    expected = {
        "P@1": third,
        "nDCG@1": third,
        "MAP@1": third,
        "PSP@1": 100.0 * 1 / (4 + 8),
        "PSnDCG@1": 100.0 * 1 / (4 + 8),
        "P@3": third * 2 / 3,
        "nDCG@3": third * (1 + 1 / 2) / ideal,
        "MAP@3": third * (1 + 2 / 3) / 3,
        "PSP@3": 100.0 * (1 + 2) / (4 + 2 + 1 + 8),
        "PSnDCG@3": 100.0 * (1 + 2 / 2) / ideal / ((4 + 2 / math.log2(3) + 1 / 2) / ideal + 8),
        "R@2": third * 1 / 3,
        "coverage@1": 25.0,  # Of the true labels 0, 1, 2, 4, only 4 is ranked first.
        "coverage@2": 25.0,
        "coverage@3": 50.0,
        "MRR": third,  # One query of three; the two without a hit count as 0.
    }
    assert found == pytest.approx(expected)


def test_queries_without_labels_give_zero():
    found = compute(np.array([[0, 1, 2]]), [set()], np.ones(5), ks=(1, 3), recall_ks=(3,))
    assert set(found.values()) == {0.0}


def test_any_csr_form_of_relevance_gives_the_same_metrics():
    """Entries may be unsorted, repeated or explicitly zero, in read-only arrays."""
    ids, truth, weights = random_case(np.random.default_rng(1), 20, 15, 8)
    expected = compute(ids, truth, weights)
    rows, columns = map(list, matrix(truth, 15).nonzero())
    values = [1.0] * len(rows)
    rows, columns, values = rows + rows[:5], columns + columns[:5], values + values[:5]
    absent = [(i, j) for i in range(20) for j in range(15) if j not in truth[i]][:30]
    rows, columns = rows + [i for i, _ in absent], columns + [j for _, j in absent]
    values = np.array(values + [0.0] * len(absent), np.float32)
    order = np.lexsort((np.random.default_rng(2).random(len(rows)), rows))
    indices = np.array(columns, np.int32)[order]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=20))])
    data = values[order]
    for array in (indices, indptr, data):
        array.setflags(write=False)
    messy = sparse.csr_matrix((data, indices, indptr), shape=(20, 15))
    before = indices.copy()
    found = metrics.compute_metrics(ids, messy, weights, ks=KS, recall_ks=RECALL_KS)
    assert found == pytest.approx(expected)
    np.testing.assert_array_equal(messy.indices, before)


def test_memory_does_not_grow_with_the_number_of_queries(monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK", 200)
    peaks = []
    for num_queries in (400, 4000):
        ids, truth, weights = random_case(np.random.default_rng(3), num_queries, 60, 40)
        relevance = matrix(truth, 60)
        tracemalloc.start()
        metrics.compute_metrics(ids, relevance, weights, recall_ks=(40,))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_hits_of_absent_ids_and_the_last_label():
    relevance = matrix([{4}, {0}, {4}], 5)
    hits = metrics.find_hits(np.array([[4, -1], [-1, 4], [0, 4]]), relevance)
    np.testing.assert_array_equal(hits, [[True, False], [False, False], [False, True]])


@pytest.mark.parametrize(
    "ids,shape,num_weights,ks,message",
    [
        (np.zeros((0, 5), int), (0, 9), 9, (1,), "no queries"),
        (np.zeros((2, 5), int), (2, 9), 9, (1, 7), "metrics at 7: found 5 results"),
        (np.zeros((2, 5), int), (2, 9), 9, (0, 1), "metrics at 0"),
        (np.zeros((2, 5), int), (3, 9), 9, (1,), "results of 2 queries, expected 3"),
        (np.zeros((2, 5), int), (2, 9), 8, (1,), "8 weights"),
        (np.full((2, 5), 9), (2, 9), 9, (1,), "ids from 9 to 9"),
        (np.full((2, 5), -2), (2, 9), 9, (1,), "ids from -2"),
    ],
)
def test_invalid_arguments_are_rejected(ids, shape, num_weights, ks, message):
    relevance = sparse.csr_matrix(shape, dtype=np.float32)
    with pytest.raises(InputError, match=message) as error:
        metrics.compute_metrics(ids, relevance, np.ones(num_weights), ks=ks, recall_ks=())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_results", [1, 2, 3, 4, 5, 9, 10, 99, 100, 300])
def test_cuts_are_those_that_the_results_have(num_results):
    found = metrics.cuts(num_results)
    assert found["ks"] == tuple(k for k in (1, 3, 5) if k <= num_results)
    assert found["recall_ks"] == tuple(k for k in (10, 100) if k <= num_results)


@pytest.mark.parametrize("num_labels", [1, 2, 3, 4])
def test_fewer_labels_than_5_have_the_metrics_that_there_are(num_labels):
    rng = np.random.default_rng(num_labels)
    truth = rng.random((40, num_labels)) < 0.5
    ids = np.argsort(rng.random((40, num_labels)), axis=1)
    found = metrics.compute_metrics(
        ids, sparse.csr_matrix(truth.astype(float)), np.ones(num_labels), **metrics.cuts(num_labels)
    )
    cuts = {int(name.partition("@")[2]) for name in found if "@" in name}
    assert cuts == {k for k in (1, 3) if k <= num_labels}
    for k in cuts:
        hits = np.take_along_axis(truth, ids[:, :k], axis=1)
        assert found[f"P@{k}"] == pytest.approx(100 * hits.sum(axis=1).mean() / k)
