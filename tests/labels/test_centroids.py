"""Centroids: means of unit embeddings, the same bits from any number of processes."""

import numpy as np
import pytest
from scipy import sparse

from tests.thread_group import together
from vixml_jax.labels import centroids
from vixml_jax.structs import Share

QUERIES, LABELS, WIDTH = 300, 70, 6


@pytest.fixture
def relevance(rng):
    dense = rng.random((QUERIES, LABELS)) < 0.1
    dense[:, 4] = False
    dense[:, 5] = True
    return sparse.csr_matrix(dense, dtype=np.float32)


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.fixture
def queries(rng):
    x = rng.normal(size=(QUERIES, WIDTH)) * 10.0 ** rng.integers(-3, 1, size=(QUERIES, WIDTH))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("pairs", [7, 1 << 14])
def test_they_are_means_of_unit_queries(relevance, queries, pairs, monkeypatch):
    monkeypatch.setattr(centroids, "_PAIRS", pairs)
    monkeypatch.setattr(centroids, "_SUMS", 9 * WIDTH)
    share = Share(np.arange(QUERIES), queries)
    found = centroids.exact_centroids(relevance, share, [np.arange(LABELS)])
    assert found.dtype == np.float32 and not found[4].any()
    for label in set(range(LABELS)) - {4}:
        rows = relevance[:, label].toarray()[:, 0] > 0
        expected = queries[rows].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(found[label], expected, rtol=1e-7, atol=2e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number_of_processes_finds_the_same(relevance, queries, count, rng, monkeypatch):
    share = Share(np.arange(QUERIES), queries)
    expected = centroids.exact_centroids(relevance, share, [np.arange(LABELS)])
    monkeypatch.setattr(centroids, "_PAIRS", 11)
    monkeypatch.setattr(centroids, "_SUMS", 13 * WIDTH)
    kept, wanted = (rng.integers(count, size=num) for num in (QUERIES, LABELS))
    # What two ask for both get: replicas do.
    wanted = [np.flatnonzero((wanted == p) | (np.arange(LABELS) % 9 == p)) for p in range(count)]

    def work(group):
        ids = np.flatnonzero(kept == group.index)
        mine = Share(ids, queries[ids])
        return centroids.exact_centroids(relevance, mine, wanted, group=group)

    for labels, found in zip(wanted, together(count, work), strict=True):
        np.testing.assert_array_equal(found, expected[labels])
