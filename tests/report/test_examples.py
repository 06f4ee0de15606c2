"""Choice and description of example queries, and nearest labels of labels."""

import numpy as np
import pytest
from scipy import sparse

from vixml_jax.data.store import Items, Ragged
from vixml_jax.evaluation.per_query import PerQuery
from vixml_jax.report import examples
from vixml_jax.structs import SearchResult


def per_query(ndcg, mrr):
    columns = np.stack([ndcg, mrr], axis=1).astype(np.float32)
    return PerQuery(("nDCG@5", "MRR"), columns, (), columns[:, :0])


def test_worst_and_best_queries_are_chosen():
    rng = np.random.default_rng(0)
    ndcg, mrr = rng.integers(0, 5, 60) / 4, rng.random(60)
    labels = rng.integers(0, 3, 60)
    worst, best = examples.choose(per_query(ndcg, mrr), labels, by="nDCG@5", count=7)
    expected = sorted((ndcg[i], mrr[i], i) for i in range(60) if labels[i])
    assert worst.tolist() == [i for *_, i in expected[:7]]
    assert best.tolist() == [i for *_, i in expected[-7:][::-1]]


def test_no_query_is_both_worst_and_best():
    ties = per_query(np.zeros(3), np.zeros(3))
    worst, best = examples.choose(ties, np.ones(3), by="MRR", count=8)
    assert len(worst) == len(best) == 1 and worst[0] != best[0]
    ties = per_query(np.zeros(2), np.zeros(2))
    worst, best = examples.choose(ties, np.zeros(2), by="MRR", count=8)
    assert len(worst) == len(best) == 0


def test_ties_are_broken_at_random_by_seed():
    ties = per_query(np.zeros(500), np.zeros(500))
    worst = [examples.choose(ties, np.ones(500), by="MRR", count=5, seed=s)[0] for s in (0, 0, 1)]
    assert (worst[0] == worst[1]).all() and (worst[0] != worst[2]).any()
    assert np.ptp(worst[0]) > 20


def test_describe():
    queries = Items(["q0", "q1"], None, Ragged(np.zeros((2, 3), np.float16), np.array([0, 0, 2])))
    labels = Items([f"label {i}" for i in range(6)], None, None)
    relevance = sparse.csr_matrix(np.array([[1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 1, 1]]))
    result = SearchResult(
        np.array([[0.9, 0.8, 0.7, -np.inf], [0.6, 0.5, 0.4, 0.3]], np.float32),
        np.array([[3, 1, 2, -1], [4, 1, 0, 3]]),
    )
    with_images, without = examples.describe(
        np.array([1, 0]), queries, labels, relevance, result, np.array([0.0, 0.5]), shown=3
    )
    assert with_images[:4] == ("1", "q1", 2, 50.0) and with_images.num_true_labels == 4
    assert [(p.text, p.hit) for p in with_images.predictions] == [
        ("label 4", True), ("label 1", False), ("label 0", True),
    ]  # fmt: skip
    assert with_images.predictions[1].score == pytest.approx(0.5)
    assert with_images.true_labels == [("label 4", 1), ("label 0", 3), ("label 2", None)]
    assert (without.num_images, without.value, len(without.predictions)) == (0, 0.0, 3)
    assert without.true_labels == [("label 0", None)]
    # Ranks 1 and 3 are among the three predictions; the label that was not found is not.
    assert [with_images.predicts(label) for label in with_images.true_labels] == [True, True, False]
    (shorter,) = examples.describe(
        np.array([1]), queries, labels, relevance, result, np.array([0.0, 0.5]), shown=2
    )
    assert [shorter.predicts(label) for label in shorter.true_labels] == [True, False]


@pytest.mark.parametrize("block", [3, 1000])
def test_nearest_matches_all_pairs(block, monkeypatch):
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
        assert [int(text) for text, _ in found.nearest] == expected
        expected_cosines = pytest.approx([cosines[j] for j in expected], abs=1e-5)
        assert [cosine for _, cosine in found.nearest] == expected_cosines


def test_single_label_has_no_neighbours():
    labels = Items(["only"], None, None)
    (found,) = examples.nearest(np.array([0]), np.ones((1, 2), np.float32), labels, np.array([4]))
    assert found.nearest == []


def test_spread_covers_frequent_and_rare_labels():
    frequency = np.array([5, 100, 0, 7, 1, 1, 50, 3])
    found = examples.spread(frequency, 4)
    assert frequency[found[0]] == 100 and frequency[found[-1]] == 0
    assert (np.diff(frequency[found]) <= 0).all() and len(set(found.tolist())) == 4
    assert len(examples.spread(frequency, 99)) == 8
