"""The prediction benchmark on a few labels: both programs find the same."""

import numpy as np
import pytest

from tests import tiny
from vixml_jax.benchmarks.serving import predict
from vixml_jax.models import published_towers as towers

SETTINGS = {
    "tower": "all-minilm-l6",
    "labels": 50,
    "search": "exact",
    "batch": 3,
    "singles": 2,
    "threads": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("programs", [predict.PROGRAMS[:3], predict.PROGRAMS[3:]])
def test_a_round_of_predictions(data, programs, monkeypatch):
    small = {**towers.about("all-minilm-l6"), "num_hidden_layers": 1}
    monkeypatch.setitem(towers.CONFIGS, "sentence-transformers/all-MiniLM-L6-v2", small)
    prepared = predict.prepare(list(programs), {**SETTINGS, "data": data})
    if "ours, tower" in prepared:
        _, encode = prepared.pop("ours, tower")
        assert len(encode()["each"]) == 2
    (alone, one_by_one), (many, together) = prepared.values()
    assert (alone, many) == ({"queries": 2}, {"queries": 3})
    each = one_by_one()["each"]
    assert len(each) == 2 and all(np.isfinite(each)) and min(each) > 0
    assert together() == {}
