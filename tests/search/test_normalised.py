"""Log-sums over all labels, and probabilities, against float64 on dense scores."""

import numpy as np
import pytest
import scipy.special

from vixml_jax.parallel import sharding
from vixml_jax.search import exact, fusion, index, scann
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.factory import open_index
from vixml_jax.search.fusion import Fusion
from vixml_jax.search.scann import ScannIndex
from vixml_jax.search.updates import UpdatedIndex


def scores_of(vectors, queries):
    return queries.astype(np.float64) @ vectors.T.astype(np.float64)


def log_sum_of(scores):
    return scipy.special.logsumexp(scores, axis=1)


def made(rng, num_labels, num_queries, width=24, scale=2.0):
    vectors = rng.normal(size=(num_labels, width)).astype(np.float32)
    return vectors, scale * rng.normal(size=(num_queries, width)).astype(np.float32)


@pytest.mark.parametrize("query_block,label_block", [(4, 7), (1024, 4096), (5, 256)])
@pytest.mark.parametrize("num_labels,k", [(61, 5), (61, 70), (1000, 20)])
def test_exact_sums_on_the_host(query_block, label_block, num_labels, k):
    vectors, queries = made(np.random.default_rng(k), num_labels, 13)
    searched = ExactIndex(vectors, query_block=query_block, label_block=label_block)
    found = searched.search_normalised(queries, k)
    expected = searched.search(queries, k)
    np.testing.assert_array_equal(found.best.ids, expected.ids)
    np.testing.assert_array_equal(found.best.scores, expected.scores)
    assert found.log_sum.dtype == np.float32 and searched.log_sum == "exact"
    np.testing.assert_allclose(found.log_sum, log_sum_of(scores_of(vectors, queries)), rtol=2e-6)


@pytest.mark.parametrize("sizes", [None, (1, 8, 1), (4, 2, 1), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("num_labels,k", [(61, 5), (3, 20), (200, 40)])
def test_exact_sums_on_devices(sizes, num_labels, k):
    vectors, queries = made(np.random.default_rng((1, num_labels)), num_labels, 7)
    if sizes is None:
        searched = ExactIndex(vectors, query_block=4)
        shard = sharding.Shard(np.arange(num_labels), vectors)
        searched._rows = exact._DeviceRows(shard, num_labels, 16, None)  # As on an accelerator.
    else:
        mesh = sharding.create_mesh(*sizes)
        searched = ExactIndex(vectors, mesh=mesh, query_block=4, label_block=8)
    found = searched.search_normalised(queries, k)
    np.testing.assert_array_equal(found.best.ids, searched.search(queries, k).ids)
    np.testing.assert_allclose(found.log_sum, log_sum_of(scores_of(vectors, queries)), rtol=2e-6)


@pytest.mark.parametrize("num_queries,num_labels", [(0, 9), (3, 0)])
def test_no_queries_or_no_labels(num_queries, num_labels):
    searched = ExactIndex(np.zeros((num_labels, 4), np.float32))
    found = searched.search_normalised(np.zeros((num_queries, 4), np.float32), 2)
    np.testing.assert_array_equal(found.log_sum, np.full(num_queries, -np.inf))
    assert found.best.ids.shape == (num_queries, 2)


def test_scores_beyond_the_range_of_exp():
    vectors, queries = made(np.random.default_rng(2), 300, 9, scale=300.0)
    found = ExactIndex(vectors, label_block=64).search_normalised(queries, 3)
    expected = log_sum_of(scores_of(vectors, queries))
    assert expected.max() > 1000
    np.testing.assert_allclose(found.log_sum, expected, rtol=1e-6)


def test_probabilities_without_filter_pairs():
    rng = np.random.default_rng(3)
    vectors, queries = made(rng, 200, 30, scale=0.5)
    pairs = np.stack([rng.integers(0, 30, 90), rng.integers(0, 200, 90)], axis=1)
    found = index.search_filtered(ExactIndex(vectors), queries, pairs, 12, as_probabilities=True)
    scores = scores_of(vectors, queries)
    p = np.exp(scores - log_sum_of(scores)[:, None])  # Labels of filter pairs keep their share.
    allowed = p.copy()
    allowed[pairs[:, 0], pairs[:, 1]] = -1
    np.testing.assert_array_equal(found.ids, np.argsort(-allowed, axis=1)[:, :12])
    np.testing.assert_allclose(found.scores, np.take_along_axis(p, found.ids, axis=1), rtol=2e-5)


def test_probabilities_of_labels_found_stay_positive_and_at_most_one():
    searched = ExactIndex(np.array([[200.0], [0.0], [-200.0]], np.float32))
    found = index.probabilities(searched.search_normalised(np.ones((1, 1), np.float32), 4))
    np.testing.assert_array_equal(found.ids, [[0, 1, 2, -1]])
    assert found.scores[0, 0] == 1 and (found.scores[0, 1:3] > 0).all()
    assert found.scores[0, 3] == -np.inf


@pytest.mark.parametrize("scale", [0.3, 3.0], ids=["flat", "peaked"])
def test_updates_count_added_labels_and_not_removed_ones(scale):
    rng = np.random.default_rng(4)
    vectors, queries = made(rng, 120, 11, scale=scale)
    removed = rng.permutation(120)[:30]  # Original and added ones.
    updated = UpdatedIndex(ExactIndex(vectors[:90]), ExactIndex(vectors[90:]), 90, removed)
    kept = np.setdiff1d(np.arange(120), removed)
    found = updated.search_normalised(queries, 10)
    np.testing.assert_array_equal(found.best.ids, updated.search(queries, 10).ids)
    expected = log_sum_of(scores_of(vectors[kept], queries))
    assert updated.log_sum == "exact"
    np.testing.assert_allclose(found.log_sum, expected, rtol=2e-6, atol=2e-6)


def test_removed_labels_that_held_nearly_everything():
    vectors = np.array([[60.0], [1.0], [0.5]], np.float32)
    updated = UpdatedIndex(ExactIndex(vectors), None, 3, np.array([0]))
    found = updated.search_normalised(np.ones((1, 1), np.float32), 2)
    np.testing.assert_allclose(found.log_sum, np.log(np.exp(1.0) + np.exp(0.5)), rtol=1e-6)
    assert index.probabilities(found).scores.sum() == pytest.approx(1.0)
    gone = UpdatedIndex(ExactIndex(vectors), None, 3, np.arange(3))
    assert gone.search_normalised(np.ones((1, 1), np.float32), 2).log_sum == -np.inf


@pytest.mark.parametrize("kind", ["host", "one device", "eight devices", "int8", "scann"])
def test_sums_without_the_best_labels(kind):
    """The labels removed are those of the largest scores, which hold nearly all of the sum."""
    rng = np.random.default_rng()
    vectors, queries = made(rng, 700, 9, scale=3.0)
    if kind in ("int8", "scann"):
        if kind == "scann":
            pytest.importorskip("scann")
            searched = ScannIndex.build(vectors)
        else:
            searched = open_index(vectors, kind="exact", embedding=24, dtype="int8", k=10)
    else:
        mesh = sharding.create_mesh(2, 4, 1) if kind == "eight devices" else None
        searched = ExactIndex(vectors, mesh=mesh, query_block=4, label_block=64)
        if kind == "one device":
            shard = sharding.Shard(np.arange(700), vectors)
            searched._rows = exact._DeviceRows(shard, 700, 64, None)
    scores = scores_of(vectors, queries)
    nearly_all = np.setdiff1d(np.arange(700), rng.integers(0, 600, 4))  # The last one, too.
    of_the_best = [np.unique(np.argsort(-scores, axis=1)[:, :count]) for count in (1, 5, 40)]
    for removed in (*of_the_best, nearly_all, np.arange(700)):
        kept = np.setdiff1d(np.arange(700), removed)
        found = searched.search_normalised(queries, 10, removed)
        np.testing.assert_array_equal(found.best.ids, searched.search(queries, 10, removed).ids)
        best = kept[np.argsort(-scores[:, kept], axis=1)[:, :10]]
        assert found.best.ids.shape == (9, 10)
        np.testing.assert_array_equal(found.best.ids[:, : best.shape[1]], best)
        assert (found.best.ids[:, best.shape[1] :] == -1).all()
        expected = log_sum_of(scores[:, kept]) if len(kept) else np.full(9, -np.inf)
        atol = 0.3 if kind == "int8" else 2e-5  # Others than the best are rounded.
        np.testing.assert_allclose(found.log_sum, expected, atol=atol)


def fused(rng, num_labels, num_queries, e=16, topics=60):
    """Fused vectors of clustered labels and queries, as a trained head has them."""
    centres = rng.normal(size=(topics, e))

    def unit(count):
        x = centres[rng.integers(topics, size=count)] + 0.6 * rng.normal(size=(count, e))
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

    z, q = unit(num_labels), unit(num_queries)
    w = z + 0.3 * rng.normal(size=z.shape).astype(np.float32) / np.sqrt(e)
    g = q + 0.3 * rng.normal(size=q.shape).astype(np.float32) / np.sqrt(e)
    bias = rng.normal(size=num_labels).astype(np.float32)
    head = fusion.HeadRows(w, bias, np.zeros_like(bias))
    return fusion.label_vectors(z, head), q, g / np.linalg.norm(g, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def large():
    return fused(np.random.default_rng(5), 24_000, 300)


def test_sampled_sums_are_accurate(large):
    vectors, q, g = large
    tree = ScannIndex.build(vectors)
    assert tree.log_sum == "sampled"
    queries = fusion.query_vectors(q, g, Fusion(10.0, 1.0))
    found = tree.search_normalised(queries, 5)
    np.testing.assert_array_equal(found.best.ids, tree.search(queries, 100).ids[:, :5])
    expected = log_sum_of(scores_of(vectors, queries))
    error = found.log_sum - expected  # Of the logarithm, so relative errors of probabilities.
    assert np.abs(error).mean() < 0.02 and np.abs(error).max() < 0.2
    # The labels found alone leave out a good part of the sum; the sample restores it.
    alone = log_sum_of(tree.search(queries, 100).scores.astype(np.float64)) - expected
    assert np.abs(error).mean() < 0.2 * np.abs(alone).mean()
    # On average over the draw of the sample, the estimated sum is right: its bias is small.
    assert abs(np.mean(np.exp(error)) - 1) < 0.01


def test_a_tree_from_which_most_labels_are_removed(large):
    vectors, q, g = large
    tree = ScannIndex.build(vectors)
    queries = fusion.query_vectors(q, g, Fusion(10.0, 1.0))[:50]
    best = np.unique(ExactIndex(vectors).search(queries, 300).ids)
    for removed in (best, np.setdiff1d(np.arange(len(vectors)), best[:30])):
        wanted = ExactIndex(vectors).search(queries, 20, removed)
        found = tree.search(queries, 20, removed)
        np.testing.assert_array_equal(np.sort(found.ids >= 0), np.sort(wanted.ids >= 0))
        assert not np.isin(found.ids, removed).any()
        assert index.recall_against(wanted, found, 20) > 0.95


def test_the_sample_is_fixed(large, tmp_path):
    vectors, q, g = large
    queries = fusion.query_vectors(q, g, Fusion(2.0, 1.0))[:20]
    tree = ScannIndex.build(vectors)
    tree.save(tmp_path / "index")
    again = ScannIndex.load(tmp_path / "index", vectors)
    one, other = (x.search_normalised(queries, 10) for x in (tree, again))
    np.testing.assert_array_equal(one.log_sum, other.log_sum)


def test_few_labels_are_summed_exactly_by_scann():
    vectors, q, g = fused(np.random.default_rng(6), 3000, 20)
    tree = ScannIndex.build(vectors)
    queries = fusion.query_vectors(q, g, Fusion(10.0, 1.0))
    found = tree.search_normalised(queries, 10)
    assert tree.log_sum == "exact" and found.best.ids.shape == (20, 10)
    expected = log_sum_of(scores_of(vectors, queries))
    np.testing.assert_allclose(found.log_sum, expected, rtol=1e-5)


@pytest.mark.parametrize("num_removed", [0, 15])
def test_a_sample_without_labels_found_is_unbiased(monkeypatch, num_removed):
    """All samples of a few labels: the mean of the estimates is the sum itself."""
    monkeypatch.setattr(scann, "SUM_SAMPLE", 12)
    rng = np.random.default_rng(7)
    vectors, queries = made(rng, 60, 3, width=4, scale=0.3)
    removed = rng.permutation(60)[:num_removed]
    sums = []
    for seed in range(400):
        tree = ScannIndex(None, {"leaves": 0}, "", vectors)
        chosen = np.random.default_rng(seed).permutation(60)[:12]
        tree._sample = np.sort(chosen)
        tree._sample_vectors = vectors[tree._sample]
        found = ExactIndex(vectors).search(queries, 5, removed)
        sums.append(np.exp(tree._log_sum(queries, found, removed)))
    kept = np.setdiff1d(np.arange(60), removed)
    expected = np.exp(log_sum_of(scores_of(vectors[kept], queries)))
    np.testing.assert_allclose(np.mean(sums, axis=0), expected, rtol=0.02)


def test_fused_vectors_are_tuned_to_the_recall(large, tmp_path, capsys):
    """Vectors of norm 20 and more, of which the part of the prototypes is small."""
    vectors, q, g = large
    for weights in (Fusion(10.0, 1.0), Fusion(0.0, 1.0)):
        queries = fusion.query_vectors(q, g, weights)
        searched = open_index(
            vectors,
            kind="scann",
            directory=str(tmp_path),
            queries=queries,
            weights=weights,
            k=20,
            recall=0.95,
        )
        recall = index.recall_against(
            ExactIndex(vectors).search(queries, 20), searched.search(queries, 20), 20
        )
        assert searched.settings["recall"] >= 0.95 and recall >= 0.95
        assert searched.settings["leaves_searched"] < searched.settings["leaves"]
        assert "tuned on 300 queries" in capsys.readouterr().out  # For each of the weights.
