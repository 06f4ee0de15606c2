"""The search benchmark on a few labels."""

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from vixml_jax.benchmarks import search
from vixml_jax.benchmarks.baselines import search_indexes
from vixml_jax.errors import InputError

SMALL = {"n": ["12000"], "width": 16, "queries": 64, "k": 100, "rounds": 1}


@pytest.fixture(autouse=True)
def defined_flags():
    search.define_flags()
    flags.FLAGS.mark_as_parsed()


def test_vectors_are_clustered_and_queries_near_them():
    labels, queries = search_indexes.labels_and_queries(20_000, 256, 50)
    assert labels.ctypes.data % 64 == 0
    np.testing.assert_allclose(np.linalg.norm(labels, axis=1), 1.0, atol=1e-5)
    scores = queries @ labels.T
    assert 0.7 < scores.max(axis=1).mean() < 0.9
    # Twenty of 20,000 vectors without clusters would have 3.1 / sqrt(256) = 0.19.
    assert np.sort(scores, axis=1)[:, -20].mean() > 0.3
    again = search_indexes.labels_and_queries(20_000, 256, 50)
    np.testing.assert_array_equal(queries, again[1])


def test_exact_programs_take_turns(capfd):
    with flagsaver.flagsaver(**SMALL):
        search.main([])
    printed = capfd.readouterr().out
    for name in ("exact, ours", "exact, product, XLA", "exact, product, numpy", "exact, torch"):
        assert f"\n{name} " in printed
    assert "exact, ours : exact, torch = " in printed


def test_latencies_of_exact_search_and_scann(capfd):
    pytest.importorskip("scann")
    with flagsaver.flagsaver(**SMALL, what="latency", removed=3000):
        search.main([])
    lines = [line for line in capfd.readouterr().out.splitlines() if ": exact" in line]
    assert [", 3,000 removed" in line for line in lines] == [False, True] * 3
    for count, line in zip((1, 1, 16, 16, 128, 128), lines, strict=True):
        assert line.split()[0] == str(count)
        own, scann, ratio = (
            float(line.split(name)[1].split()[0].strip(","))
            for name in (" exact", "ScaNN", "ratio")
        )
        assert own > 0 and ratio == pytest.approx(own / scann, rel=0.3, abs=0.2)


@pytest.mark.parametrize("name", list(search_indexes.BUILD))
def test_each_baseline_reaches_its_recall(name, tmp_path, capfd):
    pytest.importorskip(search_indexes.MODULES.get(name, name))
    out = str(tmp_path / "out.json")
    with flagsaver.flagsaver(**SMALL, what="approximate", baselines=[name], out=out):
        search.main([])
    assert f"\n  {name} " in capfd.readouterr().out
    with open(out, encoding="utf-8") as file:
        found = json.load(file)["12000 x 16, 64 queries"][name]
    assert found["build_s"] > 0 and found["search_gib"] > 0
    assert [(row["k"], row["wanted"]) for row in found["rows"]] == [
        (k, wanted) for k in (5, 100) for wanted in (0.95, 0.99, 0.999)
    ]
    for row in found["rows"]:
        assert row["recall"] >= row["wanted"] or "queries_per_s" not in row
    assert sum("queries_per_s" in row for row in found["rows"]) >= 4


def test_results_are_gathered(tmp_path):
    out = tmp_path / "out.json"
    kept = {"12000 x 16, 64 queries": {"older": {"baseline": "older", "queries_per_s": 1.0}}}
    out.write_text(json.dumps(kept))
    found = search.measure_baselines(["scann"], 12_000, 16, 64, str(out))
    assert [one["baseline"] for one in found] == ["older", "exact", "scann"]
    assert len(search.table(found).split("\n")) == 4


@pytest.mark.parametrize(
    "baselines,expected", [(["annoyed"], "expected some of scann"), (["faiss"], "not installed")]
)
def test_baselines_that_cannot_be_measured(baselines, expected, monkeypatch):
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    with (
        flagsaver.flagsaver(**SMALL, what="approximate", baselines=baselines),
        pytest.raises(InputError, match=expected),
    ):
        search.main([])
