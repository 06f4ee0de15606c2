"""Exact search on eight devices against a full sort; ScaNN against exact; filters and recall."""

import numpy as np
import pytest

from vixml_jax import sharding
from vixml_jax.errors import InputError
from vixml_jax.search import index, scann
from vixml_jax.search.exact import ExactIndex
from vixml_jax.structs import SearchResult


def unit(rng, n, e):
    x = rng.normal(size=(n, e)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(
    "num_labels,k,label_block", [(61, 5, 3), (64, 1, 100), (9, 9, 1), (500, 100, 16)]
)
def test_exact_search_matches_a_sort(num_labels, k, label_block):
    rng = np.random.default_rng(num_labels)
    labels, queries = unit(rng, num_labels, 8), unit(rng, 23, 8)
    found = ExactIndex(
        labels, mesh=sharding.create_mesh(2, 4, 1), query_block=10, label_block=label_block
    ).search(queries, k)
    scores = queries.astype(np.float64) @ labels.T.astype(np.float64)
    np.testing.assert_array_equal(found.ids, np.argsort(-scores, axis=1)[:, :k])
    np.testing.assert_allclose(found.scores, -np.sort(-scores, axis=1)[:, :k], atol=1e-6)


def test_exact_search_of_ties_and_of_more_than_there_are():
    labels = np.ones((6, 4), np.float32)
    found = ExactIndex(labels, mesh=sharding.create_mesh(), label_block=1).search(labels[:2], 8)
    np.testing.assert_array_equal(found.ids, [[0, 1, 2, 3, 4, 5, -1, -1]] * 2)
    assert np.isneginf(found.scores[:, 6:]).all()


@pytest.mark.parametrize("n", [300, scann.FEW])
def test_scann_finds_what_exact_search_finds(tmp_path, n):
    rng = np.random.default_rng(0)
    centres = unit(rng, 100, 16)
    labels = centres[rng.integers(0, 100, n)] + 0.3 * unit(rng, n, 16)
    labels /= np.linalg.norm(labels, axis=1, keepdims=True)
    queries = labels[rng.integers(0, n, 50)] + 0.1 * unit(rng, 50, 16)
    exact = ExactIndex(labels, mesh=sharding.create_mesh()).search(queries, 10)
    built = scann.ScannIndex.build(labels)
    found = built.search(queries, 10)
    assert index.recall_against(exact, found, 10) > 0.95
    built.save(str(tmp_path / "index"))
    built.save(str(tmp_path / "index"))  # Replaces.
    loaded = scann.ScannIndex.load(str(tmp_path / "index"), labels)
    assert loaded.settings == built.settings
    np.testing.assert_array_equal(loaded.search(queries, 10).ids, found.ids)
    with pytest.raises(InputError, match="other label vectors"):
        scann.ScannIndex.load(str(tmp_path / "index"), labels + 1)
    with pytest.raises(InputError, match="expected a saved index"):
        scann.ScannIndex.load(str(tmp_path / "none"), labels)


def test_filtered_pairs_are_dropped_not_lost():
    rng = np.random.default_rng(1)
    ids = np.stack([rng.permutation(20)[:9] for _ in range(40)])
    ids[3, 5:] = -1
    scores = -np.sort(-rng.random((40, 9)).astype(np.float32), axis=1)
    pairs = np.stack([rng.integers(0, 40, 60), rng.integers(0, 20, 60)], axis=1)
    found = index.drop_filtered(SearchResult(scores, ids), pairs, 5)
    gone = {tuple(pair) for pair in pairs}
    for q in range(40):
        kept = [
            (s, i) for s, i in zip(scores[q], ids[q], strict=True) if i >= 0 and (q, i) not in gone
        ][:5]
        assert list(found.ids[q][: len(kept)]) == [i for _, i in kept]
        np.testing.assert_array_equal(found.scores[q][: len(kept)], [s for s, _ in kept])
        assert (found.ids[q][len(kept) :] == -1).all()
    assert index.over_fetch(pairs) == np.bincount(pairs[:, 0]).max()
    assert index.over_fetch(np.zeros((0, 2), np.int64)) == 0


def test_recall():
    exact = SearchResult(np.zeros((2, 3)), np.array([[1, 2, 3], [4, 5, -1]]))
    found = SearchResult(np.zeros((2, 3)), np.array([[3, 9, 1], [5, -1, -1]]))
    assert index.recall_against(exact, found, 3) == 3 / 5
