"""Training neighbours of a run: settings given, tuned and saved; the search for neighbours."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from absl import flags

from tests import tiny
from vixml_jax import evaluate, evaluator, train, workdir
from vixml_jax.augmentation import neighbours
from vixml_jax.augmentation.mixing import PUBLISHED, Mixing
from vixml_jax.config import KnnConfig
from vixml_jax.errors import InputError
from vixml_jax.search import index
from vixml_jax.search.exact import ExactIndex


def given(**values):
    """Parsed `--knn.*` flags, of which only these are given."""
    parsed = flags.FlagValues()
    for name in Mixing._fields:
        flags.DEFINE_string(f"knn.{name}", None, "", flag_values=parsed)
    parsed(["command"])
    for name, value in values.items():
        parsed[f"knn.{name}"].value = value
    return parsed


def test_flags_override_tuned_settings_which_override_trained_ones(tmp_path, capsys):
    trained = KnnConfig(weight=0.3, k=7, temperature=0.2, joint=True)
    where = str(tmp_path)
    assert neighbours.from_flags(trained, given(), where, 5) == Mixing(0.3, 7, 0.2, True)
    assert neighbours.from_flags(KnnConfig(), given(), where, 5) is None
    assert neighbours.from_flags(KnnConfig(), given(weight=0.4), where, 5) == Mixing(
        0.4, *PUBLISHED[1:]
    )
    assert neighbours.from_flags(trained, given(weight=0.0), where, 5) is None
    with pytest.raises(InputError, match=r"--knn\.k: training neighbours are off; add --knn"):
        neighbours.from_flags(KnnConfig(), given(k=3), where, 5)
    tried = [{**Mixing(0.5, 20, 0.1)._asdict(), "value": 3.0}]
    neighbours.save_tuned(where, 5, ["P@1"], tried)
    assert neighbours.from_flags(KnnConfig(), given(), where, 5) == Mixing(0.5, 20, 0.1)
    assert "training neighbours as tuned: --knn.weight=0.5 --knn.k=20" in capsys.readouterr().out
    assert neighbours.from_flags(trained, given(k=3), where, 5) == Mixing(0.5, 3, 0.1)
    another_step = neighbours.from_flags(trained, given(), where, 6)
    assert another_step == Mixing(0.3, 7, 0.2, True)
    path = pathlib.Path(where, neighbours.TUNED)
    path.write_text('{"step": 5}')
    with pytest.raises(InputError, match=r"mixing.json: .*remove it, or run evaluate --tune again"):
        neighbours.from_flags(trained, given(), where, 5)


def test_a_training_query_is_not_its_own_neighbour():
    vectors = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    train_index = ExactIndex(vectors)
    itself = np.array([4, 9, 9])
    found = neighbours.nearest(train_index, vectors[itself], 6, itself)
    order = np.argsort(-(vectors[itself] @ vectors.T), axis=1)
    for row, own, ids in zip(order, itself, found.ids, strict=True):
        np.testing.assert_array_equal(ids, row[row != own][:6])
    assert neighbours.nearest(train_index, vectors[:2], 40).ids.shape == (2, 40)


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
def test_tuning_on_valid_then_evaluating(run, search, monkeypatch):
    dataset = workdir.open_dataset(run)
    model = workdir.build_model(
        run, *workdir.read_tower(run.workdir), dataset.num_labels, workdir.make_mesh(run)
    )
    params, labels, _ = workdir.restore_model(run.workdir, model)
    mixings = [Mixing(0.1, 24, 0.05), Mixing(0.5, 4, 0.1), Mixing(0.9, 24, 0.02, True)]
    monkeypatch.setattr(evaluator.mixing_lib, "grid", lambda most: mixings)
    monkeypatch.setattr(evaluator, "MAX_TUNING_QUERIES", 15)

    def results_of(**how):
        return evaluate.show(run, model, params, labels, dataset, search=search, **how)

    found = results_of(split="test", mixing=None, tune=["P@1", "PSP@3"])
    tried = {neighbours.mixing(row): row["value"] for row in found["tuning"]}
    assert tried.keys() == set(mixings)
    best = neighbours.mixing(found["tuning"][0])
    assert found["mixing"] == best._asdict()
    assert found["with_neighbours"] == results_of(split="test", mixing=best)["with_neighbours"]
    # On all validation queries, the values are those of evaluations on the validation split.
    monkeypatch.setattr(evaluator, "MAX_TUNING_QUERIES", 5000)
    expected_metrics = {m: results_of(split="valid", mixing=m)["with_neighbours"] for m in mixings}
    again = results_of(split="test", mixing=None, tune=["P@1", "PSP@3"])["tuning"]
    for row in again:
        expected = expected_metrics[neighbours.mixing(row)]
        assert row["value"] == pytest.approx((expected["P@1"] + expected["PSP@3"]) / 2)
    assert [row["value"] for row in again] == sorted((r["value"] for r in again), reverse=True)


def test_the_command_saves_tuned_settings_and_refuses_invalid_flags(run):
    dataset = workdir.open_dataset(run)
    with pytest.raises(InputError, match="--tune=P@2: expected metrics among P@1, "):
        evaluate._check_tuning(["P@2"], dataset, run)
    bare = dataclasses.replace(dataset, valid=None)
    with pytest.raises(InputError, match="has no validation split; prepare it again with --valid"):
        evaluate._check_tuning(["P@1"], bare, run)
    tiny.run_command("evaluate", f"--workdir={run.workdir}", "--tune=P@1")
    saved = json.loads(pathlib.Path(run.workdir, neighbours.TUNED).read_text())
    assert saved["by"] == ["P@1"] and saved["step"] == 6
    printed = tiny.run_command("evaluate", f"--workdir={run.workdir}")
    settings = neighbours.describe(Mixing(**saved["mixing"]))
    assert f"training neighbours as tuned: {settings}" in printed
    assert "this run, text and images, with neighbours" in printed
    printed = tiny.run_command("evaluate", f"--workdir={run.workdir}", "--knn.weight=0")
    assert "neighbours" not in printed
