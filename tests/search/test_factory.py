"""Opening an index: built, tuned against a sort of all scores, saved, loaded, refused."""

import json
import os
import sys

import numpy as np
import pytest

from vixml_jax.errors import InputError
from vixml_jax.search import cost, factory, index, scann, tuning
from vixml_jax.search.exact import ExactIndex
from vixml_jax.search.scann import ScannIndex
from vixml_jax.structs import SearchResult


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    return unit(rng.normal(size=(300, 24))[np.arange(12_000) % 300] + rng.normal(size=(12_000, 24)))


@pytest.fixture(scope="module")
def queries(vectors):
    rng = np.random.default_rng(1)
    near = vectors[rng.integers(len(vectors), size=700)]
    return unit(near + 0.1 * rng.normal(size=(700, 24)))


def truth(vectors, queries, k):
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return SearchResult(np.take_along_axis(scores, ids, axis=1), ids)


@pytest.fixture(scope="module")
def saved(vectors, queries, tmp_path_factory):
    """Directory of an index tuned for two values of k."""
    directory = tmp_path_factory.mktemp("saved") / "scann"
    for k, recall in ((20, 0.9), (5, 0.98)):
        factory.open_index(
            vectors, kind="scann", directory=directory, queries=queries, k=k, recall=recall
        )
    return directory


def test_tuning_reaches_the_wanted_recall(vectors, queries, tmp_path, capsys):
    exact = truth(vectors, queries, 20)
    costs = []
    for recall in (0.7, 0.95, 0.999):
        found = factory.open_index(
            vectors,
            kind="scann",
            directory=tmp_path / "scann",
            queries=queries,
            k=20,
            recall=recall,
            sample=len(queries),
        )
        reached = index.recall_against(exact, found.search(queries, 20), 20)
        assert reached >= recall
        settings = found.settings
        assert settings["kind"] == "scann"
        assert (settings["k"], settings["recall_wanted"]) == (20, recall)
        assert settings["recall"] == pytest.approx(reached)
        assert json.loads(json.dumps(settings)) == settings
        costs.append(
            cost.search_cost(
                settings,
                *vectors.shape,
                leaves_searched=settings["leaves_searched"],
                reordered=settings["reordered"],
            )
        )
        # Each point of the curve is reproduced by its settings, and none is dominated.
        assert len(settings["curve"]) > 3
        for point in settings["curve"][::4]:
            result = found.search_with(
                queries, 20, leaves_searched=point["leaves_searched"], reordered=point["reordered"]
            )
            assert index.recall_against(exact, result, 20) == pytest.approx(point["recall"])
        recalls = [point["recall"] for point in settings["curve"]]
        assert recalls == sorted(set(recalls))
    assert costs == sorted(set(costs))
    printed = capsys.readouterr().out
    assert printed.count("building") == 2  # Built once; printed before and after.
    assert printed.count("\n> ") == 3


def test_a_saved_index_is_loaded_with_its_tuning(saved, vectors, queries, capsys, monkeypatch):
    monkeypatch.setattr(ScannIndex, "build", None)
    monkeypatch.setattr(factory, "_tune", None)
    points = {point["k"]: point for point in ScannIndex.load(saved, vectors).points}
    for k, recall in ((20, 0.9), (5, 0.98)):
        again = factory.open_index(
            vectors, kind="scann", directory=saved, queries=queries, k=k, recall=recall
        )
        assert (again.settings["k"], again.settings["recall_wanted"]) == (k, recall)
        for name in ("leaves_searched", "reordered", "recall"):
            assert again.settings[name] == points[k][name]
    assert "index loaded in" in capsys.readouterr().out


@pytest.mark.parametrize("k,nearest", [(1, 5), (5, 5), (9, 20), (20, 20), (50, 20)])
def test_without_queries_the_nearest_tuning_is_used(k, nearest, saved, vectors):
    found = factory.open_index(vectors, kind="scann", directory=saved, k=k, recall=0.99)
    assert found.settings["k"] == nearest


def test_auto_takes_an_index_that_is_there_and_large_enough(saved, vectors, monkeypatch, tmp_path):
    monkeypatch.setattr(ScannIndex, "build", None)  # Nothing is built.

    def chosen(labels, directory, **more):
        found = factory.open_index(labels, kind="auto", directory=directory, k=5, **more)
        return found.settings["kind"]

    assert chosen(vectors, saved) == "exact"  # Fewer labels than SCANN_FROM.
    monkeypatch.setattr(factory, "SCANN_FROM", len(vectors))
    assert chosen(vectors, saved) == "scann"
    assert chosen(vectors, saved, dtype="int8") == "exact"
    assert chosen(vectors, saved, width=8) == "exact"  # No index of this width.
    assert chosen(vectors, str(tmp_path / "none")) == "exact"
    assert chosen(vectors[::-1], saved) == "exact"  # The index is one of other vectors.


def test_without_tuning_and_queries_the_default_settings_are_used(vectors, capsys):
    found = factory.open_index(vectors, kind="scann", k=7)
    assert found.settings == scann.settings_for(len(vectors))
    assert "not tuned for recall@7" in capsys.readouterr().out


def test_an_index_of_other_vectors_is_built_again(vectors, queries, tmp_path, capsys):
    directory = tmp_path / "scann"
    ScannIndex.build(vectors[:100]).save(directory)
    found = factory.open_index(
        vectors[:200], kind="scann", directory=directory, queries=queries, k=3
    )
    np.testing.assert_array_equal(
        found.search(queries, 3).ids, truth(vectors[:200], queries, 3).ids
    )
    assert "100 other label vectors" in capsys.readouterr().out
    assert found.settings["recall"] == 1.0  # Too few for a tree.
    ScannIndex.load(directory, vectors[:200])


def test_an_unreachable_recall_is_tried_with_finer_codes_then_reported(
    vectors, queries, tmp_path, capsys, monkeypatch
):
    """Recall is halved artificially, so that even the widest search does not reach it."""
    recall_against = index.recall_against
    monkeypatch.setattr(index, "recall_against", lambda *a: 0.5 * recall_against(*a))
    found = factory.open_index(
        vectors, kind="scann", directory=tmp_path / "scann", queries=queries, k=5, recall=0.9
    )
    assert found.settings["dimensions_per_block"] == 1
    assert found.settings["recall"] == pytest.approx(0.5, abs=0.01)
    printed = capsys.readouterr().out
    assert "building the index again with finer codes" in printed
    assert f"reached: searching with recall {found.settings['recall']:.4f}" in printed
    loaded = ScannIndex.load(tmp_path / "scann", vectors)
    assert loaded.settings == found.settings


def test_exact_search_is_used_where_scann_cannot_be_imported(vectors, queries, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "scann.scann_ops.py", None)
    found = factory.open_index(vectors[:50], kind="scann", queries=queries, k=5)
    assert isinstance(found, ExactIndex)
    assert found.settings["kind"] == "exact" and found.settings["wanted"] == "scann"
    assert found.settings["recall"] == 1.0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "scann cannot be imported (" in printed
    assert printed.endswith("; exact search is used instead\n")


def test_a_processor_on_which_scann_would_crash_is_detected(monkeypatch):
    monkeypatch.setattr(scann.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(scann, "_processor_flags", lambda: {"avx", "sse4_2"})
    assert scann.unavailable_reason() == "scann cannot be used: this processor lacks avx2 and fma"
    with pytest.raises(InputError, match="lacks avx2 and fma; use --search=exact"):
        ScannIndex.build(np.ones((3, 2), np.float32))


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_insufficient_memory_is_reported_before_any_work(kind, vectors, queries, monkeypatch):
    for name in ("ExactIndex", "_build", "_load"):
        monkeypatch.setattr(factory, name, None)
    with pytest.raises(InputError) as error:
        factory.open_index(vectors, kind=kind, queries=queries, k=5, memory_gb=0.001)
    message = str(error.value)
    assert message.startswith(f"--search={kind}: 12,000 labels x 24 need about ")
    assert "0.00 GB are allowed by --search.memory_gb" in message and "\n" not in message


def test_exact_search_uses_the_given_blocks(vectors, queries):
    found = factory.open_index(vectors, kind="exact", k=4, query_block=64, label_block=1000)
    expected = {"kind": "exact", "query_block": 64, "label_block": 1000, "k": 4, "recall": 1.0}
    expected |= {"dtype": "float32", "bytes_per_label": 4 * 24}
    assert found.settings == expected
    np.testing.assert_array_equal(found.search(queries, 4).ids, truth(vectors, queries, 4).ids)


def test_a_full_disk_is_reported(vectors, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(ScannIndex, "save", fail)
    with pytest.raises(InputError, match="No space left on device while writing"):
        factory.open_index(vectors[:50], kind="scann", directory=tmp_path / "scann", k=5)


def test_the_choice_does_not_depend_on_measured_times(vectors, queries, monkeypatch):
    chosen = []
    for clock in (1.0, 1e-3):  # Times per query differ by a factor of 1000.
        now = iter(np.arange(1e6) * clock)
        monkeypatch.setattr(factory.time, "perf_counter", lambda now=now: float(next(now)))
        found = factory.open_index(vectors, kind="scann", queries=queries, k=10, recall=0.95)
        chosen.append((found.settings["leaves_searched"], found.settings["reordered"]))
    assert chosen[0] == chosen[1]
    assert tuning.steps(1, 110)[0] <= chosen[0][0] <= 110
