"""Mixing of training neighbours against the formula, evaluated for one query at a time."""

import numpy as np
import pytest
from scipy import sparse

from vixml_jax.augmentation import mixing as mixing_lib
from vixml_jax.augmentation.mixing import Mixing
from vixml_jax.augmentation.settings import LEAST_TEMPERATURE
from vixml_jax.structs import SearchResult


def best(vectors, queries, k):
    scores = queries @ vectors.T
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)
    return SearchResult(np.take_along_axis(scores, ids, axis=1).astype(np.float32), ids)


@pytest.mark.parametrize("weight", [0.0, 0.1, 0.7, 1.0])
def test_scores_follow_the_formula(weight, monkeypatch):
    monkeypatch.setattr(mixing_lib, "_BLOCK", 7)
    rng = np.random.default_rng(3)
    labels, train, queries = (rng.normal(size=(n, 6)) / 2.5 for n in (30, 40, 20))
    relevance = sparse.random(40, 30, 0.15, "csr", random_state=rng, data_rvs=np.ones)
    near_labels, near_queries = best(labels, queries, 9), best(train, queries, 5)
    near_labels.ids[0, -2:], near_labels.scores[0, -2:] = -1, -np.inf
    found = mixing_lib.mix_neighbours(
        near_labels, near_queries, relevance, Mixing(weight, 5, 0.3), 12
    )
    dense = relevance.toarray()
    for q in range(20):
        expected = np.zeros(30)
        scores = np.concatenate([near_labels.scores[q], near_queries.scores[q]])
        softmax = np.exp(scores.astype(np.float64) / 0.3)
        softmax /= softmax.sum()
        for probability, label in zip(softmax[:9], near_labels.ids[q], strict=True):
            if label >= 0:
                expected[label] += (1 - weight) * probability
        for probability, query in zip(softmax[9:], near_queries.ids[q], strict=True):
            expected += weight * probability * dense[query]
        candidates = set(np.flatnonzero(expected))
        real = found.ids[q] >= 0
        assert real.sum() == min(12, len(candidates))
        assert set(found.ids[q][real]) <= candidates and len(set(found.ids[q][real])) == real.sum()
        np.testing.assert_allclose(found.scores[q][real], expected[found.ids[q][real]], rtol=1e-5)
        assert (np.diff(found.scores[q][real]) <= 0).all()
        left = sorted(candidates - set(found.ids[q][real]))
        assert not left or expected[left].max() <= found.scores[q][real].min() + 1e-7
        assert (found.scores[q][~real] == -np.inf).all()


@pytest.mark.parametrize("temperature", [LEAST_TEMPERATURE, 0.002, 0.05])
def test_no_label_found_is_lost_at_a_low_temperature(temperature):
    scores = np.sort(np.random.default_rng().uniform(-1, 1, (3, 8)).astype(np.float32))[:, ::-1]
    ids = np.stack([np.random.default_rng(i).permutation(8) for i in range(3)])
    scores[2, 6:], ids[2, 6:] = -np.inf, -1
    relevance = sparse.csr_matrix((4, 8))
    near = SearchResult(np.full((3, 2), -1.0, np.float32), np.zeros((3, 2), np.int32))
    found = mixing_lib.mix_neighbours(
        SearchResult(scores, ids), near, relevance, Mixing(0.1, 2, temperature), 8
    )
    np.testing.assert_array_equal(found.ids, ids)


def test_ties_go_to_the_lower_id():
    labels = SearchResult(np.zeros((1, 3), np.float32), np.array([[5, 2, 4]], np.int32))
    no_queries = SearchResult(np.full((1, 1), -np.inf, np.float32), np.array([[-1]], np.int32))
    found = mixing_lib.mix_neighbours(
        labels, no_queries, sparse.csr_matrix((1, 6)), Mixing(0.5, 1, 1.0), 4
    )
    np.testing.assert_array_equal(found.ids, [[2, 4, 5, -1]])


@pytest.mark.parametrize("weight", [0.1, 0.6])
def test_joint_mixing_equals_one_search_over_labels_and_training_queries(weight):
    rng = np.random.default_rng(5)
    labels, train, queries = (rng.normal(size=(n, 6)) for n in (30, 40, 20))
    relevance = sparse.random(40, 30, 0.15, "csr", random_state=rng, data_rvs=np.ones)
    k, temperature = 9, 0.4
    found = mixing_lib.mix_neighbours(
        best(labels, queries, k),
        best(train, queries, k + 3),  # More than are used.
        relevance,
        Mixing(weight, 2, temperature, joint=True),
        30,
    )
    stacked = np.concatenate([labels, train])
    scores = queries @ stacked.T
    for q in range(20):
        nearest = np.argsort(-scores[q])[:k]
        softmax = np.exp(scores[q, nearest] / temperature)
        softmax /= softmax.sum()
        expected = np.zeros(30)
        for probability, row in zip(softmax, nearest, strict=True):
            if row < 30:
                expected[row] += (1 - weight) * probability
            else:
                expected += weight * probability * relevance.toarray()[row - 30]
        real = found.ids[q] >= 0
        assert real.sum() == np.count_nonzero(expected)
        np.testing.assert_allclose(found.scores[q][real], expected[found.ids[q][real]], rtol=1e-5)


def test_only_the_first_k_training_queries_are_used():
    rng = np.random.default_rng(6)
    labels, train, queries = (rng.normal(size=(n, 6)) for n in (30, 40, 20))
    relevance = sparse.random(40, 30, 0.15, "csr", random_state=rng, data_rvs=np.ones)
    mixed = [
        mixing_lib.mix_neighbours(
            best(labels, queries, 9), best(train, queries, many), relevance, Mixing(0.4, 4, 0.3), 9
        )
        for many in (4, 11)
    ]
    np.testing.assert_array_equal(mixed[0].ids, mixed[1].ids)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_probabilities_mix_to_probabilities(weight, monkeypatch):
    monkeypatch.setattr(mixing_lib, "_BLOCK", 7)
    rng = np.random.default_rng(8)
    num_labels, k, temperature = 30, 4, 0.2
    train, queries = (rng.normal(size=(n, 6)) / 2.5 for n in (40, 20))
    relevance = sparse.random(40, num_labels, 0.15, "csr", random_state=rng, data_rvs=np.ones)
    logits = 3 * rng.normal(size=(20, num_labels))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = np.argsort(-p, axis=1)[:, :9].astype(np.int32)
    labels = SearchResult(np.take_along_axis(p, ids, axis=1).astype(np.float32), ids)
    labels.ids[0, -2:], labels.scores[0, -2:] = -1, -np.inf
    near = best(train, queries, 6)
    near.ids[1], near.scores[1] = -1, -np.inf  # A query without any neighbour.
    found = mixing_lib.mix_neighbours(
        labels, near, relevance, Mixing(weight, k, temperature), 30, as_probabilities=True
    )
    dense = relevance.toarray()
    for q in range(20):
        expected = np.zeros(num_labels)
        for label in labels.ids[q][labels.ids[q] >= 0]:
            expected[label] += (1 - weight) * p[q, label]
        cosines = (queries[q] @ train.T)[near.ids[q, :k]]
        pi = np.exp(cosines / temperature) / np.exp(cosines / temperature).sum()
        for probability, t in zip(pi, near.ids[q, :k], strict=True):
            if t >= 0 and dense[t].any():
                expected += weight * probability * dense[t] / dense[t].sum()
        real = found.ids[q] >= 0
        assert set(found.ids[q][real]) == set(np.flatnonzero(expected))
        np.testing.assert_allclose(found.scores[q][real], expected[found.ids[q][real]], rtol=1e-5)
        assert (np.diff(found.scores[q][real]) <= 0).all()
        assert expected.sum() <= 1 + 1e-9


def test_the_grid_starts_with_the_published_setting():
    mixings = mixing_lib.grid(12)
    assert mixings[0] == Mixing(0.1, 12, 0.05) and len(set(mixings)) == len(mixings)
    assert {mixing.k for mixing in mixings} == {3, 5, 10, 12}
    assert any(mixing.joint for mixing in mixings)
    separate = mixing_lib.grid(12, joint=False)
    assert separate == [mixing for mixing in mixings if not mixing.joint]
