"""ScaNN against exact search, saving and loading, and indexes that are refused."""

import json
import os
import sys

import numpy as np
import pytest

from vixml_jax.errors import InputError
from vixml_jax.search import index, scann
from vixml_jax.search.scann import ScannIndex
from vixml_jax.storage import atomic, sealed
from vixml_jax.structs import SearchResult


def unit_vectors(rng, n, width=16, topics=50):
    """Unit vectors clustered around topics, like embeddings of texts."""
    x = rng.normal(size=(topics, width))[rng.integers(topics, size=n)]
    x += 0.5 * rng.normal(size=(n, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def exact(vectors, queries, k):
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return SearchResult(np.take_along_axis(scores, ids, axis=1), ids)


@pytest.fixture(scope="module")
def vectors():
    return unit_vectors(np.random.default_rng(0), 12_000)


@pytest.fixture(scope="module")
def queries():
    return unit_vectors(np.random.default_rng(0), 12_200)[12_000:]  # Of the same topics.


@pytest.fixture(scope="module")
def tree(vectors):
    return ScannIndex.build(vectors)


def assert_valid(result, vectors, queries, k):
    """Checks shapes, order, distinct labels, scores, and that absent labels come last."""
    assert result.ids.shape == result.scores.shape == (len(queries), k)
    assert result.ids.dtype == np.int32 and result.scores.dtype == np.float32
    absent = result.ids < 0
    assert (np.diff(absent.astype(int), axis=1) >= 0).all()
    np.testing.assert_array_equal(absent, np.isneginf(result.scores))
    for row, ids, scores in zip(queries, result.ids, result.scores, strict=True):
        ids, scores = ids[ids >= 0], scores[ids >= 0]
        assert len(set(ids)) == len(ids)
        assert (np.diff(scores) <= 0).all()
        np.testing.assert_allclose(scores, vectors[ids] @ row, atol=1e-5)


@pytest.mark.parametrize("k", [1, 10, 100, 1000])
def test_tree_has_high_recall(tree, vectors, queries, k):
    assert tree.settings["leaves"] == 110
    result = tree.search(queries, k)
    assert_valid(result, vectors, queries, k)
    assert (result.ids >= 0).all()
    assert index.recall_against(exact(vectors, queries, k), result, k) > 0.95


def test_equal_vectors_give_equal_indexes(tree, vectors, queries):
    again = ScannIndex.build(vectors.copy()).search(queries, 20)
    np.testing.assert_array_equal(again.ids, tree.search(queries, 20).ids)


def test_labels_are_absent_if_the_leaves_hold_too_few(vectors, queries, tree):
    """Short rows end in id -1 and score -inf, and id 0 does not stand for an absent label."""
    few_leaves = ScannIndex(tree._searcher, tree.settings | {"leaves": 1}, "", vectors)
    result = few_leaves.search(queries, 200)  # Searches one leaf of about 110 vectors.
    assert_valid(result, vectors, queries, 200)
    assert (result.ids < 0).any()


@pytest.mark.parametrize("num_labels", [1, 5, 300])
def test_few_labels_are_searched_exactly(num_labels):
    rng = np.random.default_rng(1)
    vectors, queries = unit_vectors(rng, num_labels), unit_vectors(rng, 7)
    brute = ScannIndex.build(vectors)
    assert brute.settings == {"kind": "scann", "leaves": 0}
    for k in (1, num_labels, num_labels + 3):
        result = brute.search(queries, k)
        assert_valid(result, vectors, queries, k)
        few = min(k, num_labels)
        np.testing.assert_array_equal(result.ids[:, :few], exact(vectors, queries, k).ids)
        assert (result.ids[:, few:] == -1).all()


def test_no_queries(tree):
    result = tree.search(np.zeros((0, 16), np.float32), 4)
    assert result.ids.shape == result.scores.shape == (0, 4)


@pytest.mark.parametrize("num_labels", [scann.FEW - 1, scann.FEW, 131_073, 1_305_265])
def test_settings_grow_with_the_labels(num_labels):
    settings = scann.settings_for(num_labels)
    assert json.loads(json.dumps(settings)) == settings
    if num_labels < scann.FEW:
        assert settings == {"kind": "scann", "leaves": 0}
    else:
        assert abs(settings["leaves"] - num_labels**0.5) < 1
        assert settings["leaves"] / 5 - 1 < settings["leaves_searched"] <= settings["leaves"]
        assert settings["dimensions_per_block"] == 2
        coarse = scann.settings_for(num_labels, dimensions_per_block=4)
        assert coarse["dimensions_per_block"] == 4
        assert coarse["reordered"] > settings["reordered"]


def test_an_index_can_be_moved_and_loaded(tree, vectors, queries, tmp_path):
    tree.save(tmp_path / "runs" / "scann")
    os.rename(tmp_path / "runs", tmp_path / "moved")
    loaded = ScannIndex.load(tmp_path / "moved" / "scann", vectors)
    assert loaded.settings == tree.settings
    for found, expected in zip(loaded.search(queries, 9), tree.search(queries, 9), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_save_replaces_an_older_index(vectors, tmp_path):
    for part in (vectors[:50], vectors[50:90]):
        ScannIndex.build(part).save(str(tmp_path / "scann"))
        result = ScannIndex.load(str(tmp_path / "scann"), part).search(part[:3], 5)
        np.testing.assert_array_equal(result.ids, exact(part, part[:3], 5).ids)
    assert os.listdir(tmp_path) == ["scann"]


@pytest.mark.parametrize("step", ["writing", "renaming"])
def test_a_failed_save_keeps_the_older_index(step, vectors, tmp_path, monkeypatch):
    old, new = ScannIndex.build(vectors[:50]), ScannIndex.build(vectors[50:90])
    old.save(tmp_path / "scann")

    def fail(*_, **__):
        raise OSError("disk full")

    if step == "writing":
        monkeypatch.setattr(sealed, "write", fail)
    else:
        monkeypatch.setattr(atomic, "_replace", fail)
    with pytest.raises(OSError, match="disk full"):
        new.save(tmp_path / "scann")
    assert os.listdir(tmp_path) == ["scann"]
    ScannIndex.load(tmp_path / "scann", vectors[:50])


def change_one_value(vectors):
    changed = vectors.copy()
    changed[7, 3] += 1e-6
    return changed


@pytest.mark.parametrize(
    "other", [change_one_value, lambda v: v[:-1], lambda v: v[::-1], lambda v: v.reshape(25, -1)]
)
def test_refuses_an_index_of_other_vectors(other, vectors, tmp_path):
    ScannIndex.build(vectors[:50]).save(tmp_path / "scann")
    with pytest.raises(InputError, match="other label vectors") as error:
        ScannIndex.load(tmp_path / "scann", other(vectors[:50]))
    assert "\n" not in str(error.value)


def damage(directory, kind):
    about = directory / scann.ABOUT
    if kind == "missing":
        about.unlink()
    elif kind == "truncated":
        about.write_text(about.read_text()[:-20])
    elif kind == "format":
        about.write_text(json.dumps(json.loads(about.read_text()) | {"format": 99}))
    elif kind == "list":
        about.write_text("[1]")
    elif kind == "no assets":
        (directory / "scann_assets.pbtxt").unlink()
    elif kind == "no data":
        (directory / "dataset.npy").unlink()
    elif kind == "pickle":
        (directory / "scann_docids.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


@pytest.mark.parametrize(
    "kind", ["missing", "truncated", "format", "list", "no assets", "no data", "pickle"]
)
def test_refuses_a_damaged_index(kind, vectors, tmp_path):
    ScannIndex.build(vectors[:50]).save(tmp_path / "scann")
    damage(tmp_path / "scann", kind)
    with pytest.raises(InputError, match=str(tmp_path / "scann")) as error:
        ScannIndex.load(tmp_path / "scann", vectors[:50])
    assert "\n" not in str(error.value)


def test_without_scann_the_error_names_the_alternative(vectors, monkeypatch):
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)
    with pytest.raises(InputError, match="--search=exact") as error:
        ScannIndex.build(vectors[:50])
    assert "\n" not in str(error.value)
