"""Filter pairs and recall, against loops over sets."""

import numpy as np
import pytest

from vixml_jax.search import index
from vixml_jax.structs import SearchResult


def random_result(rng, num_queries, num_labels, k, absent=0):
    """A result with descending scores and distinct ids; the last `absent` labels are absent."""
    ids = np.argsort(rng.random((num_queries, num_labels)), axis=1)[:, :k].astype(np.int32)
    scores = -np.sort(-rng.normal(size=ids.shape).astype(np.float32), axis=1)
    if absent:
        ids[:, -absent:], scores[:, -absent:] = -1, -np.inf
    return SearchResult(scores, ids)


def random_pairs(rng, num_queries, num_labels, count):
    cells = rng.choice(num_queries * num_labels, count, replace=False)
    return np.stack([cells // num_labels, cells % num_labels], axis=1).astype(np.int64)


@pytest.mark.parametrize("absent", [0, 3])
@pytest.mark.parametrize("k", [1, 6, 12, 15])
def test_drop_filtered_against_loops(k, absent, monkeypatch):
    monkeypatch.setattr(index, "_BLOCK", 60)  # Pairs of a query fall into several blocks.
    rng = np.random.default_rng(0)
    result = random_result(rng, 20, 30, 12, absent)
    pairs = random_pairs(rng, 20, 30, 150)
    before = SearchResult(result.scores.copy(), result.ids.copy())
    found = index.drop_filtered(result, pairs, k)
    assert found.ids.shape == found.scores.shape == (20, k)
    assert found.ids.dtype == np.int32 and found.scores.dtype == np.float32
    unwanted = set(map(tuple, pairs))
    for i in range(20):
        kept = [
            (label, score)
            for label, score in zip(result.ids[i], result.scores[i], strict=True)
            if label >= 0 and (i, label) not in unwanted
        ][:k]
        kept += [(-1, -np.inf)] * (k - len(kept))
        np.testing.assert_array_equal(found.ids[i], [label for label, _ in kept])
        np.testing.assert_array_equal(found.scores[i], [score for _, score in kept])
    np.testing.assert_array_equal(result.ids, before.ids)
    np.testing.assert_array_equal(result.scores, before.scores)


@pytest.mark.parametrize("k", [2, 4, 6])
def test_without_pairs_rows_are_cut_or_padded(k):
    result = random_result(np.random.default_rng(1), 3, 9, 4)
    found = index.drop_filtered(result, np.zeros((0, 2), np.int64), k)
    np.testing.assert_array_equal(found.ids[:, :4], result.ids[:, :k])
    assert (found.ids[:, 4:] == -1).all() and (found.scores[:, 4:] == -np.inf).all()


def test_over_fetch_leaves_k():
    rng = np.random.default_rng(2)
    pairs = random_pairs(rng, 10, 40, 60)
    counts = [sum(query == i for query, _ in pairs) for i in range(10)]
    assert index.over_fetch(pairs) == max(counts)
    result = random_result(rng, 10, 40, 5 + max(counts))
    assert (index.drop_filtered(result, pairs, 5).ids >= 0).all()
    assert index.over_fetch(np.zeros((0, 2), np.int64)) == 0


def test_recall_against_sets():
    rng = np.random.default_rng(3)
    exact, result = random_result(rng, 15, 20, 10, absent=2), random_result(rng, 15, 20, 7)
    for k in (1, 5, 10):
        wanted = [set(row[:k]) - {-1} for row in exact.ids]
        found = [set(row[:k]) for row in result.ids]
        hits = sum(len(a & b) for a, b in zip(wanted, found, strict=True))
        expected = hits / sum(map(len, wanted))
        assert index.recall_against(exact, result, k) == pytest.approx(expected)
    assert index.recall_against(exact, exact, 10) == 1.0


def test_recall_of_an_empty_result_is_one():
    empty = SearchResult(np.full((2, 3), -np.inf), np.full((2, 3), -1))
    assert index.recall_against(empty, empty, 3) == 1.0


class SortingIndex:
    """An index that sorts all scores, and records the sizes of its searches."""

    def __init__(self, scores):
        self.settings, self.scores, self.calls = {}, scores, []

    def search(self, queries, k):
        self.calls.append((len(queries), k))
        scores = self.scores[queries[:, 0].astype(int)]
        ids = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)
        found = SearchResult(np.take_along_axis(scores, ids, axis=1), ids)
        return index.pad_columns(found, k)


@pytest.mark.parametrize("k", [1, 5, 50, 70])
@pytest.mark.parametrize("most", [0, 1, 9, 50])
def test_search_filtered_against_loops(k, most):
    """Some queries have no pairs, some a few, some all labels; k exceeds the labels in one case."""
    rng = np.random.default_rng((4, k, most))
    scores = rng.normal(size=(30, 50)).astype(np.float32)
    pairs = [
        (i, label)
        for i in range(30)
        for label in rng.choice(50, rng.integers(most + 1) * (i % 3 > 0), replace=False)
    ]
    pairs = rng.permutation(np.array(pairs + pairs[:3], np.int64).reshape(-1, 2))
    found = index.search_filtered(SortingIndex(scores), np.arange(30)[:, None], pairs, k)
    assert found.ids.dtype == np.int32 and found.scores.dtype == np.float32
    unwanted = set(map(tuple, pairs))
    for i in range(30):
        kept = [x for x in np.argsort(-scores[i], kind="stable") if (i, x) not in unwanted][:k]
        missing = k - len(kept)
        np.testing.assert_array_equal(found.ids[i], [*kept, *[-1] * missing])
        np.testing.assert_array_equal(found.scores[i], [*scores[i, kept], *[-np.inf] * missing])


def test_one_query_with_thousands_of_pairs_does_not_slow_down_the_others():
    scores = np.random.default_rng(5).normal(size=(200, 6000)).astype(np.float32)
    pairs = np.stack([np.full(5000, 7), np.arange(5000)], axis=1)
    pairs = np.concatenate([pairs, [[3, 5]]])
    recorded = SortingIndex(scores)
    found = index.search_filtered(recorded, np.arange(200)[:, None], pairs, 10)
    assert recorded.calls == [(199, 18), (1, 10 + 8192)]
    np.testing.assert_array_equal(found.ids[7], 5000 + np.argsort(-scores[7, 5000:])[:10])
    unfiltered = SortingIndex(scores)
    index.search_filtered(unfiltered, np.arange(200)[:, None], pairs[:0], 10)
    assert unfiltered.calls == [(200, 10)]
