"""Retrieval-augmented inference against the formula written out, a query at a time."""

import numpy as np
import pytest
from scipy import sparse

from vixml_jax.search import augmented
from vixml_jax.structs import SearchResult


def best(vectors, queries, k):
    scores = queries @ vectors.T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)
    return SearchResult(np.take_along_axis(scores, ids, axis=1).astype(np.float32), ids)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.7, 1.0])
def test_against_the_formula(weight, monkeypatch):
    monkeypatch.setattr(augmented, "_BLOCK", 7)
    rng = np.random.default_rng(3)
    labels, memory, queries = (rng.normal(size=(n, 6)) / 2.5 for n in (30, 40, 20))
    relevance = sparse.random(40, 30, 0.15, "csr", random_state=rng, data_rvs=np.ones)
    near_labels, near_memory = best(labels, queries, 9), best(memory, queries, 5)
    near_labels.ids[0, -2:], near_labels.scores[0, -2:] = -1, -np.inf
    found = augmented.mix_in_memory(
        near_labels, near_memory, relevance, weight=weight, temperature=0.3, k=12
    )
    dense = relevance.toarray()
    for q in range(20):
        expected = np.zeros(30)
        both = np.exp(
            np.concatenate([near_labels.scores[q], near_memory.scores[q]]).astype(np.float64) / 0.3
        )
        both /= both.sum()
        for share, label in zip(both[:9], near_labels.ids[q], strict=True):
            if label >= 0:
                expected[label] += (1 - weight) * share
        for share, query in zip(both[9:], near_memory.ids[q], strict=True):
            expected += weight * share * dense[query]
        candidates = set(np.flatnonzero(expected))
        real = found.ids[q] >= 0
        assert real.sum() == min(12, len(candidates))
        assert set(found.ids[q][real]) <= candidates and len(set(found.ids[q][real])) == real.sum()
        np.testing.assert_allclose(found.scores[q][real], expected[found.ids[q][real]], rtol=1e-5)
        assert (np.diff(found.scores[q][real]) <= 0).all()
        left = sorted(candidates - set(found.ids[q][real]))
        assert not left or expected[left].max() <= found.scores[q][real].min() + 1e-7
        assert (found.scores[q][~real] == -np.inf).all()


def test_of_equal_scores_the_lower_id_comes_first():
    one = SearchResult(np.zeros((1, 3), np.float32), np.array([[5, 2, 4]], np.int32))
    nothing = SearchResult(np.full((1, 1), -np.inf, np.float32), np.array([[-1]], np.int32))
    found = augmented.mix_in_memory(
        one, nothing, sparse.csr_matrix((1, 6)), weight=0.5, temperature=1.0, k=4
    )
    np.testing.assert_array_equal(found.ids, [[2, 4, 5, -1]])
