"""Centroids: means of unit embeddings, bit-identical for any number of processes."""

import numpy as np
import pytest
from scipy import sparse

from tests.thread_group import together
from vixml_jax.labels import centroids
from vixml_jax.structs import Shard

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
def test_centroids_are_means_of_unit_queries(relevance, queries, pairs, monkeypatch):
    monkeypatch.setattr(centroids, "_PAIRS", pairs)
    monkeypatch.setattr(centroids, "_SUMS", 9 * WIDTH)
    shard = Shard(np.arange(QUERIES), queries)
    found = centroids.exact_centroids(relevance, shard, [np.arange(LABELS)])
    assert found.dtype == np.float32 and not found[4].any()
    for label in set(range(LABELS)) - {4}:
        rows = relevance[:, label].toarray()[:, 0] > 0
        expected = queries[rows].astype(np.float64).mean(axis=0)
        np.testing.assert_allclose(found[label], expected, rtol=1e-7, atol=2e-9)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_result_does_not_depend_on_the_number_of_processes(
    relevance, queries, count, rng, monkeypatch
):
    shard = Shard(np.arange(QUERIES), queries)
    expected = centroids.exact_centroids(relevance, shard, [np.arange(LABELS)])
    monkeypatch.setattr(centroids, "_PAIRS", 11)
    monkeypatch.setattr(centroids, "_SUMS", 13 * WIDTH)
    kept, wanted = (rng.integers(count, size=num) for num in (QUERIES, LABELS))
    # Every ninth label is requested by several processes, as replicas do.
    wanted = [np.flatnonzero((wanted == p) | (np.arange(LABELS) % 9 == p)) for p in range(count)]

    def work(group):
        ids = np.flatnonzero(kept == group.index)
        local = Shard(ids, queries[ids])
        return centroids.exact_centroids(relevance, local, wanted, group=group)

    for labels, found in zip(wanted, together(count, work), strict=True):
        np.testing.assert_array_equal(found, expected[labels])
