"""The load benchmark on a few labels: every query is answered, by each program."""

import pytest

from tests import tiny
from vixml_jax.benchmarks.serving import service
from vixml_jax.models import published_towers as towers

SETTINGS = {
    "tower": "all-minilm-l6", "labels": 50, "search": "exact", "batch": 4, "threads": 1,
    "queries": 30, "timeout_s": 60.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("program", service.PROGRAMS)
def test_a_round_of_load(data, program, monkeypatch):
    small = {**towers.about("all-minilm-l6"), "num_hidden_layers": 1}
    monkeypatch.setitem(towers.CONFIGS, "sentence-transformers/all-MiniLM-L6-v2", small)
    names = [f"{program}, 1 client", f"{program}, 6 clients"]
    prepared = service.prepare(names, {**SETTINGS, "data": data})
    for about, run in prepared.values():
        assert about == {"queries": 30}
        report = run()
        assert len(report["each"]) == 30 and report["refused"] == 0
        assert 0 < min(report["each"]) <= max(report["each"]) <= report["seconds"]
