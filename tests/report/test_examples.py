"""Worst and best queries, what is shown of them, and neighbours of labels."""

import numpy as np
import pytest
from scipy import sparse

from vixml_jax.data.store import Items, Ragged
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.report import examples
from vixml_jax.structs import SearchResult


def values(nd, mrr):
    columns = np.stack([nd, mrr], axis=1).astype(np.float32)
    return PerQuery(("nDCG@5", "MRR"), columns, (), columns[:, :0])


def test_chosen_are_the_worst_and_the_best():
    rng = np.random.default_rng(0)
    nd, mrr = rng.integers(0, 5, 60) / 4, rng.random(60)
    labels = rng.integers(0, 3, 60)
    worst, best = examples.choose(values(nd, mrr), labels, by="nDCG@5", count=7)
    judged = sorted((nd[i], mrr[i], i) for i in range(60) if labels[i])
    assert worst.tolist() == [i for *_, i in judged[:7]]
    assert best.tolist() == [i for *_, i in judged[-7:][::-1]]


def test_few_queries_are_not_both():
    worst, best = examples.choose(values(np.zeros(3), np.zeros(3)), np.ones(3), by="MRR", count=8)
    assert len(worst) == len(best) == 1 and worst[0] != best[0]
    worst, best = examples.choose(values(np.zeros(2), np.zeros(2)), np.zeros(2), by="MRR", count=8)
    assert len(worst) == len(best) == 0


def test_ties_are_broken_by_chance_of_a_seed():
    found = values(np.zeros(500), np.zeros(500))
    some = [examples.choose(found, np.ones(500), by="MRR", count=5, seed=s)[0] for s in (0, 0, 1)]
    assert (some[0] == some[1]).all() and (some[0] != some[2]).any()
    assert np.ptp(some[0]) > 20


def test_descriptions():
    queries = Items(["q0", "q1"], None, Ragged(np.zeros((2, 3), np.float16), np.array([0, 0, 2])))
    labels = Items([f"label {i}" for i in range(6)], None, None)
    relevance = sparse.csr_matrix(np.array([[1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 1]]))
    result = SearchResult(
        np.array([[0.9, 0.8, 0.7, -np.inf], [0.6, 0.5, 0.4, 0.3]], np.float32),
        np.array([[3, 1, 2, -1], [4, 1, 0, 3]]),
    )
    one, none = examples.describe(
        np.array([1, 0]), queries, labels, relevance, result, np.array([0.0, 0.5]), shown=3
    )
    assert one[:4] == ("1", "q1", 2, 50.0) and one.num_wanted == 4
    assert [(p.text, p.hit) for p in one.predicted] == [
        ("label 4", True), ("label 1", False), ("label 0", True),
    ]  # fmt: skip
    assert one.predicted[1].score == pytest.approx(0.5)
    assert one.wanted == [("label 4", 1), ("label 0", 3), ("label 2", None)]
    assert (none.pictures, none.value, len(none.predicted)) == (0, 0.0, 3)
    assert none.wanted == [("label 0", None)]


@pytest.mark.parametrize("block", [3, 1000])
def test_nearest_against_all_pairs(block, monkeypatch):
    monkeypatch.setattr(examples, "_BLOCK", block)
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(20, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = Items([str(i) for i in range(20)], None, None)
    rows, frequency = np.array([3, 17, 0]), rng.integers(0, 50, 20)
    for row, found in zip(rows, examples.nearest(rows, vectors, labels, frequency), strict=True):
        cosines = {j: float(vectors[row] @ vectors[j]) for j in range(20) if j != row}
        expected = sorted(cosines, key=lambda j: -cosines[j])[:5]
        assert (found.text, found.frequency) == (str(row), frequency[row])
        assert [int(text) for text, _ in found.near] == expected
        assert [c for _, c in found.near] == pytest.approx([cosines[j] for j in expected], abs=1e-5)


def test_one_label_has_no_neighbours():
    labels = Items(["only"], None, None)
    (found,) = examples.nearest(np.array([0]), np.ones((1, 2), np.float32), labels, np.array([4]))
    assert found.near == []


def test_labels_are_spread_over_frequencies():
    frequency = np.array([5, 100, 0, 7, 1, 1, 50, 3])
    found = examples.spread(frequency, 4)
    assert frequency[found[0]] == 100 and frequency[found[-1]] == 0
    assert (np.diff(frequency[found]) <= 0).all() and len(set(found.tolist())) == 4
    assert len(examples.spread(frequency, 99)) == 8
