"""Retrieval-augmented inference of a run: told, tuned, kept; training queries but oneself."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from absl import flags

from tests import tiny
from vixml_jax import evaluate, evaluator, train, workdir
from vixml_jax.augmentation import neighbors
from vixml_jax.augmentation.mixing import PUBLISHED, Mixing
from vixml_jax.config import EvalConfig
from vixml_jax.errors import InputError
from vixml_jax.search import index
from vixml_jax.search.exact import ExactIndex


def told(**values):
    found = flags.FlagValues()
    for name in Mixing._fields:
        flags.DEFINE_string(f"memory_{name}", None, "", flag_values=found)
    found(["door"])
    for name, value in values.items():
        found[f"memory_{name}"].value = value
    return found


def test_flags_stand_before_what_was_tuned_and_that_before_what_was_trained(tmp_path, capsys):
    trained = EvalConfig(memory_weight=0.3, memory_k=7, memory_temperature=0.2, memory_joint=True)
    where = str(tmp_path)
    assert neighbors.as_told(trained, told(), where, 5) == Mixing(0.3, 7, 0.2, True)
    assert neighbors.as_told(EvalConfig(), told(), where, 5) is None
    assert neighbors.as_told(EvalConfig(), told(weight=0.4), where, 5) == Mixing(
        0.4, *PUBLISHED[1:]
    )
    assert neighbors.as_told(trained, told(weight=0.0), where, 5) is None
    with pytest.raises(InputError, match="--memory_k: nothing says that memory counts"):
        neighbors.as_told(EvalConfig(), told(k=3), where, 5)
    tried = [{**Mixing(0.5, 20, 0.1)._asdict(), "value": 3.0}]
    neighbors.keep_tuned(where, 5, ["P@1"], tried)
    assert neighbors.as_told(EvalConfig(), told(), where, 5) == Mixing(0.5, 20, 0.1)
    assert "memory as tuned: --memory_weight=0.5 --memory_k=20" in capsys.readouterr().out
    assert neighbors.as_told(trained, told(k=3), where, 5) == Mixing(0.5, 3, 0.1)
    assert neighbors.as_told(trained, told(), where, 6) == Mixing(
        0.3, 7, 0.2, True
    )  # Another step.
    path = pathlib.Path(where, neighbors.TUNED)
    path.write_text('{"step": 5}')
    with pytest.raises(InputError, match=r"mixing.json: .*remove it, or tune again"):
        neighbors.as_told(trained, told(), where, 5)


def test_a_training_query_is_not_near_itself():
    vectors = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    memory = ExactIndex(vectors)
    itself = np.array([4, 9, 9])
    found = neighbors.nearest(memory, vectors[itself], 6, itself)
    order = np.argsort(-(vectors[itself] @ vectors.T), axis=1)
    for row, own, ids in zip(order, itself, found.ids, strict=True):
        np.testing.assert_array_equal(ids, row[row != own][:6])
    assert neighbors.nearest(memory, vectors[:2], 40).ids.shape == (2, 40)


def test_pairs_of_some_queries():
    rng = np.random.default_rng(1)
    pairs = rng.integers(0, 20, (50, 2))
    rows = np.sort(rng.permutation(20)[:6])
    expected = sorted([list(rows).index(q), label] for q, label in pairs if q in rows)
    assert sorted(index.pairs_of(pairs, rows).tolist()) == expected
    assert index.pairs_of(pairs[:0], rows).shape == (0, 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    config = tiny.configuration(tiny.make_data(root, train=120, valid=0.2), root / "run")
    train.train(dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=1)))
    return config


@pytest.mark.parametrize("search", ["exact", "scann"])
def test_tuning_on_valid_then_judging(run, search, monkeypatch):
    dataset = workdir.open_dataset(run)
    model = workdir.build_model(
        run, *workdir.read_tower(run.workdir), dataset.num_labels, workdir.make_mesh(run)
    )
    params, labels, _ = workdir.restore_model(run.workdir, model)
    mixings = [Mixing(0.1, 24, 0.05), Mixing(0.5, 4, 0.1), Mixing(0.9, 24, 0.02, True)]
    monkeypatch.setattr(evaluator.augmented, "grid", lambda most: mixings)
    monkeypatch.setattr(evaluator, "TUNED_ON", 15)

    def judge(**how):
        return evaluate.show(run, model, params, labels, dataset, search=search, **how)

    found = judge(split="test", mixing=None, tune=["P@1", "PSP@3"])
    tried = {neighbors.mixing(row): row["value"] for row in found["tuning"]}
    assert tried.keys() == set(mixings)
    best = neighbors.mixing(found["tuning"][0])
    assert found["mixing"] == best._asdict()
    assert found["with_memory"] == judge(split="test", mixing=best)["with_memory"]
    # The values are those of the validation queries that were drawn.
    monkeypatch.setattr(evaluator, "TUNED_ON", 5000)
    whole = {m: judge(split="valid", mixing=m)["with_memory"] for m in mixings}
    again = judge(split="test", mixing=None, tune=["P@1", "PSP@3"])["tuning"]
    for row in again:
        expected = whole[neighbors.mixing(row)]
        assert row["value"] == pytest.approx((expected["P@1"] + expected["PSP@3"]) / 2)
    assert [row["value"] for row in again] == sorted((r["value"] for r in again), reverse=True)


def test_the_door_keeps_what_it_tuned_and_refuses_what_it_cannot(run):
    dataset = workdir.open_dataset(run)
    with pytest.raises(InputError, match="--tune_memory=P@2: expected some of P@1, "):
        evaluate._check_tuning(["P@2"], dataset, run)
    bare = dataclasses.replace(dataset, valid=None)
    with pytest.raises(InputError, match="has no valid split; prepare it again with --valid"):
        evaluate._check_tuning(["P@1"], bare, run)
    tiny.door("evaluate", f"--workdir={run.workdir}", "--tune_memory=P@1")
    kept = json.loads(pathlib.Path(run.workdir, neighbors.TUNED).read_text())
    assert kept["by"] == ["P@1"] and kept["step"] == 6
    said = tiny.door("evaluate", f"--workdir={run.workdir}")
    assert f"memory as tuned: {neighbors.describe(Mixing(**kept['mixing']))}" in said
    assert "this run, text and pictures, memory" in said
    said = tiny.door("evaluate", f"--workdir={run.workdir}", "--memory_weight=0")
    assert "memory" not in said
