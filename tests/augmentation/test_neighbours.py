"""Training neighbours of a run: the search for neighbours, and tuning by the command."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from tests import tiny
from vixml_jax import evaluate, evaluator, saved_model, train, workdir
from vixml_jax.augmentation import neighbours, settings
from vixml_jax.augmentation.mixing import Mixing
from vixml_jax.augmentation.settings import Scoring
from vixml_jax.errors import InputError
from vixml_jax.search import index
from vixml_jax.search.exact import ExactIndex


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
    params, labels, step = saved_model.restore(run.workdir, model)
    mixings = [Mixing(0.1, 24, 0.05), Mixing(0.5, 4, 0.1), Mixing(0.9, 24, 0.02, True)]
    monkeypatch.setattr(evaluator.mixing_lib, "grid", lambda most, joint: mixings)
    monkeypatch.setattr(evaluator, "MAX_TUNING_QUERIES", 15)

    def results_of(**how):
        return evaluate.show(run, model, params, labels, dataset, search=search, step=step, **how)

    found = results_of(split="test", tune=["P@1", "PSP@3"])
    scorings = [Scoring(mixing=mixing) for mixing in (None, *mixings)]
    tried = {settings.from_row(row): row["value"] for row in found["tuning"]}
    assert tried.keys() == set(scorings)
    best = settings.from_row(found["tuning"][0])
    again = results_of(split="test", scoring=best)
    if best.mixing is None:
        assert "mixing" not in found and "with_neighbours" not in found
    else:
        assert found["mixing"] == best.mixing._asdict()
        assert found["with_neighbours"] == again["with_neighbours"]
    # On all validation queries, the values are those of evaluations on the validation split.
    monkeypatch.setattr(evaluator, "MAX_TUNING_QUERIES", 5000)
    expected_metrics = {}
    for scoring in scorings:
        results = results_of(split="valid", scoring=scoring)
        row = "metrics" if scoring.mixing is None else "with_neighbours"
        expected_metrics[scoring] = results[row]
    again = results_of(split="test", tune=["P@1", "PSP@3"])["tuning"]
    for row in again:
        expected = expected_metrics[settings.from_row(row)]
        assert row["value"] == pytest.approx((expected["P@1"] + expected["PSP@3"]) / 2)
    # What is used comes first, then that without neighbours, then all others, best first.
    assert [row["weight"] for row in again[: 1 + (again[0]["weight"] > 0)]][-1] == 0
    rest = [row["value"] for row in again[1 + (again[0]["weight"] > 0) :]]
    assert rest == sorted(rest, reverse=True)


def test_the_command_saves_tuned_settings_and_refuses_invalid_flags(run):
    dataset = workdir.open_dataset(run)
    with pytest.raises(InputError, match="--tune=P@2: expected metrics among P@1, "):
        evaluate._check_tuning(["P@2"], dataset, run)
    bare = dataclasses.replace(dataset, valid=None)
    with pytest.raises(InputError, match="has no validation split; prepare it again with --valid"):
        evaluate._check_tuning(["P@1"], bare, run)
    tiny.run_command("evaluate", f"--workdir={run.workdir}", "--tune=P@1")
    saved = json.loads(pathlib.Path(run.workdir, settings.TUNED).read_text())
    assert saved["by"] == ["P@1"] and saved["step"] == 6
    # Neighbours need not help on these data: the best setting that uses them is made the best.
    row = next(row for row in saved["tried"] if row["weight"])
    settings.save_tuned(run.workdir, 6, ["P@1"], [row])
    printed = tiny.run_command("evaluate", f"--workdir={run.workdir}")
    described = settings.describe(settings.from_row(row))
    assert f"training neighbours as tuned: {described}" in printed
    assert "this run, text and images, with neighbours" in printed
    printed = tiny.run_command("evaluate", f"--workdir={run.workdir}", "--knn.weight=0")
    assert "neighbours" not in printed
