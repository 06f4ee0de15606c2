"""Training of the label head in its three ways: reproducible, resumable, added later, evaluated."""

import collections
import dataclasses
import functools
import json
import os
import shutil

import jax
import numpy as np
import pytest

from tests import tiny
from tests.test_train import assert_close_rows, metric_lines, train_interrupted
from tests.tiny import assert_same_state, configuration, final_state, make_data
from vixml_jax import config as config_lib
from vixml_jax import saved_model, train
from vixml_jax import workdir as workdir_lib
from vixml_jax.errors import InputError
from vixml_jax.flag_groups import HeadConfig, LossConfig
from vixml_jax.modeling import Model
from vixml_jax.parallel import sharding
from vixml_jax.storage import digests
from vixml_jax.structs import LabelState
from vixml_jax.training import trainer

SMALL = {"epochs": 2, "batch_size": 32, "mlp_width": 8, "learning_rate": 0.02, "words": 50}
HEADS = {
    "none": HeadConfig(),
    "only": HeadConfig(only=True, **SMALL),
    "refit": HeadConfig(refit=True, **SMALL),
    "joint": HeadConfig(weight=0.5, refit=True, **SMALL),
}
# Steps: 2 epochs of 6 of the whole model, then 2 epochs of 3 of the head.
TOWER_STEPS, HEAD_STEPS = 12, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("raw"))


def head_run(data, workdir, kind, **changes):
    """The configuration of a run of a kind, without dropout."""
    config = configuration(data, workdir)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dropout=0.0),
        labels=dataclasses.replace(config.labels, dropout=0.0),
        loop=dataclasses.replace(config.loop, epochs=2),
        **{"head": HEADS[kind], **changes},
    )


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Configurations of finished runs, by kind; each is trained when it is first asked for."""

    @functools.cache
    def run(kind):
        config = head_run(data, tmp_path_factory.mktemp(kind) / "run", kind)
        train.train(config)
        return config

    return run


def head_of(state):
    return {name: value for name, value in state.items() if "['params']['head']" in name}


def others_of(state):
    """The arrays of a model without its head."""
    return {
        name: value
        for name, value in state.items()
        if name.startswith("['model']") and "['head']" not in name
    }


@pytest.mark.slow
def test_run_with_widths_resumes_bit_for_bit(data, tmp_path):
    """Interrupted in an epoch of the whole model, and in one of the head."""
    widths = LossConfig(widths=[4, 8])
    configs = [head_run(data, tmp_path / name, "joint", loss=widths) for name in "ab"]
    train.train(configs[0])
    for num_steps in (5, 13):
        train_interrupted(configs[1], num_steps)
    train.train(configs[1])
    assert_same_state(*map(final_state, configs))
    with pytest.raises(InputError, match=r"--loss.widths=4,17: expected at most 16, the width"):
        train.train(head_run(data, tmp_path / "c", "joint", loss=LossConfig(widths=[4, 17])))


@pytest.mark.parametrize(
    ("kind", "num_steps"),
    [("only", 5), ("joint", 5),
     *(pytest.param(*each, marks=pytest.mark.slow)
       for each in (("only", 1), ("refit", 12), ("refit", 13), ("refit", 16), ("joint", 15)))],
)  # fmt: skip
def test_interrupted_run_resumes_bit_for_bit(finished, data, tmp_path, kind, num_steps):
    config = head_run(data, tmp_path / "run", kind)
    train_interrupted(config, num_steps)
    train.train(config)
    assert_same_state(final_state(finished(kind)), final_state(config))
    steps = [line["step"] for line in metric_lines(config)]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_refit_added_to_a_finished_run_gives_the_same(finished, tmp_path):
    """The run without a head trains its tower in the same way, bit for bit."""
    plain, expected = finished("none"), final_state(finished("refit"))
    shutil.copytree(plain.workdir, tmp_path / "run")
    before = final_state(plain)
    config = dataclasses.replace(plain, workdir=str(tmp_path / "run"), head=HEADS["refit"])
    train.train(config)
    assert_same_state(expected, final_state(config))
    assert others_of(before) and head_of(expected)
    assert_same_state(others_of(before), others_of(expected))
    assert config_lib.load(os.path.join(config.workdir, "config.json")).head.refit
    # Once it has begun, its flags are those of the run.
    more = dataclasses.replace(config, head=dataclasses.replace(config.head, epochs=3))
    with pytest.raises(InputError, match=r"--head\.epochs: was 2, now 3"):
        train.train(more)


def test_flags_that_change_training_steps_cannot_be_added(finished):
    for kind in ("joint", "only"):
        config = dataclasses.replace(finished("none"), head=HEADS[kind])
        with pytest.raises(InputError, match=r"another configuration .*--head"):
            train.train(config)
    weight = dataclasses.replace(HEADS["joint"], weight=0.25)
    with pytest.raises(InputError, match=r"--head\.weight: was 0\.5, now 0\.25"):
        train.train(dataclasses.replace(finished("joint"), head=weight))


@pytest.mark.parametrize("kind", ["only", "joint"])
def test_one_device_gives_the_result_of_eight(finished, data, tmp_path, monkeypatch, kind):
    create = functools.partial(sharding.create_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "create_mesh", create)
    config = head_run(data, tmp_path / "run", kind)
    train.train(config)
    expected = final_state(finished(kind))
    for name, value in final_state(config).items():
        assert_close_rows(expected[name], value, name)
    largest = max(float(np.abs(value).max()) for value in head_of(expected).values())
    assert largest > 0.05


def test_head_learns_and_only_it_is_trained(finished):
    config = finished("only")
    lines = metric_lines(config)
    assert [line["step"] for line in lines] == [3, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["learning_rate/head"] == pytest.approx(0.02 * (1 - 2 / HEAD_STEPS))
    assert not any("violators" in line or "learning_rate/tower" in line for line in lines)
    state = final_state(config)
    assert {name.split("']")[1] for name in others_of(state)} == {"['labels"}
    assert not any("tower" in name or "combiner" in name for name in state)
    with open(os.path.join(config.workdir, "evaluation", "test-exact.json")) as file:
        assert json.load(file)["R@10"] > 60.0  # A random order gives 50.


def test_steps_of_a_refit_follow_those_of_the_tower(finished):
    lines = metric_lines(finished("joint"))
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18]
    tower, head = lines[:4], lines[4:]
    assert all("loss_head" in line and "violators" in line for line in tower)
    assert all(line["loss"] > 0.5 * line["loss_head"] for line in tower)
    assert [line["epoch"] for line in lines] == [0, 0, 1, 1, 2, 3]
    # The head has a schedule in each part of the run.
    assert tower[0]["learning_rate/head"] == pytest.approx(0.02 * (1 - 2 / TOWER_STEPS))
    assert head[0]["learning_rate/head"] == pytest.approx(0.02 * (1 - 2 / HEAD_STEPS))
    assert all("violators" not in line for line in head)


def test_restored_model_has_the_head(finished):
    """Its logits, computed from the restored arrays, rank the labels of training queries high."""
    for kind in ("only", "refit", "joint", "none"):
        config = workdir_lib.read_config(finished(kind).workdir)
        assert config.head.loss == ("auto" if kind == "none" else "decoupled_softmax")
        dataset = workdir_lib.open_dataset(config)
        mesh = workdir_lib.make_mesh(config)
        model = workdir_lib.build_model(
            config, *workdir_lib.read_tower(config.workdir), dataset.num_labels, mesh
        )
        params, _, step = saved_model.restore(config.workdir, model)
        assert ("head" in params) == (kind != "none") == (model.head is not None)
        if kind == "none":
            continue
        steps = {"only": HEAD_STEPS}.get(kind, TOWER_STEPS + HEAD_STEPS)
        assert (step, tiny.saved(config.workdir).vectors_step) == (steps, steps - HEAD_STEPS)
        queries = model.encode_queries(params, dataset.train, block=32).values
        vectors, bias = model.head_rows(params)
        g = model.head_queries(params, queries, dataset.train.tokens)
        scores = g @ vectors.values.T * 20 + bias.values
        best = np.argsort(-scores)[:, :2]
        found = np.take_along_axis(dataset.train_relevance.toarray(), best, axis=1).mean()
        assert found > 0.25  # A random pair of labels gives 0.1.


def test_nothing_is_encoded_twice(data, tmp_path, monkeypatch):
    encoded, stream = collections.Counter(), Model._stream

    def counting(self, encode, items, *args, **more):
        encoded[len(items)] += 1
        return stream(self, encode, items, *args, **more)

    monkeypatch.setattr(Model, "_stream", counting)
    train.train(head_run(data, tmp_path / "only", "only"))
    assert encoded == {90: 1, 20: 1, 30: 1}  # Training queries, labels, test queries.
    encoded.clear()
    config = head_run(data, tmp_path / "refit", "refit")
    train.train(config)
    # Before training and after the last epoch.
    assert encoded == {90: 2, 20: 2, 30: 1}
    encoded.clear()
    train.train(config)
    assert encoded == {}


def test_refit_starts_from_the_best_epoch(tmp_path, monkeypatch, capsys):
    """The tower is set to zero after the second epoch, which ends patience."""
    data = make_data(tmp_path, train=112, valid=0.2)
    config = head_run(data, tmp_path / "run", "refit")
    loop = dataclasses.replace(config.loop, epochs=4, eval_every=1, monitor="nDCG@3", patience=1)
    config = dataclasses.replace(config, loop=loop)
    run_batches = trainer.Trainer._run_batches
    encoded, stream = collections.Counter(), Model._stream

    def counting(self, encode, items, *args, **more):
        encoded[len(items)] += 1
        return stream(self, encode, items, *args, **more)

    def set_to_zero(self, state, clusters, position, logger):
        state, done = run_batches(self, state, clusters, position, logger)
        if position.epoch == 1:
            state = state._replace(params=jax.tree.map(jax.numpy.zeros_like, state.params))
        return state, done

    monkeypatch.setattr(trainer.Trainer, "_run_batches", set_to_zero)
    monkeypatch.setattr(Model, "_stream", counting)
    train.train(config)
    # Before training, and for the centroids of two evaluations; the best one's vectors are kept.
    assert encoded[90] == 3
    output = capsys.readouterr().out
    assert "final model: from epoch 1/4, the best in nDCG@3 on valid" in output
    assert "after epoch 2/4 (--loop.patience=1); its head refitted in 2 epochs" in output
    found = tiny.saved(config.workdir)
    assert not found.is_best and found.step == 12 + HEAD_STEPS
    best = os.path.join(config.workdir, "best", "6")
    model = workdir_lib.build_model(
        workdir_lib.read_config(config.workdir),
        *workdir_lib.read_tower(config.workdir),
        20,
        workdir_lib.make_mesh(config),
    )
    params, labels, _ = saved_model.restore(config.workdir, model)
    like = {
        "params": sharding.stored_tree(model.abstract_params, model.mesh),
        "labels": sharding.stored_tree(model.table.abstract_state, model.mesh),
    }
    kept = digests.read(best, model=like)["model"]
    assert params.pop("head")
    jax.tree.map(np.testing.assert_array_equal, params, kept["params"])
    np.testing.assert_array_equal(labels.centroids, LabelState(*kept["labels"]).centroids)
    assert np.abs(np.asarray(params["free"])).max() > 0
    before = final_state(config)
    train.train(config)
    assert_same_state(before, final_state(config))


def test_opening_lines_and_progress_tell_of_the_head(data, tmp_path, capsys):
    config = head_run(data, tmp_path / "run", "refit")
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=1))
    train.train(config)
    output = capsys.readouterr().out.splitlines()
    assert output[2] == (
        "head: decoupled_softmax over 20 labels (2.0 labels per query), MLP of 8, 50 words, "
        "trained 2 epochs after the last"
    )
    lines = [line for line in output if "epoch " in line and ", step " in line]
    assert lines[0].startswith("epoch 1/1, step 6 of 12: loss ") and "violators" in lines[0]
    assert lines[-1].startswith("head epoch 2/2, step 12 of 12: loss ")
    assert "violators" not in lines[-1]
    assert "final model: from the last epoch, 1/1; its head refitted in 2 epochs" in output


def test_loss_is_chosen_by_labels_per_query_and_queries_per_label(data, tmp_path):
    config = head_run(data, tmp_path / "run", "only")
    for *density, loss in (
        (5.4, 99.0, "decoupled_softmax"),
        (5.5, 24.9, "decoupled_softmax"),
        (5.5, 25.0, "bce"),
        (41.0, 117.0, "bce"),
    ):
        assert workdir_lib.with_head_loss(config, *density).head.loss == loss
    given = dataclasses.replace(config.head, loss="softmax")
    config = dataclasses.replace(config, head=given)
    assert workdir_lib.with_head_loss(config, 99.0, 99.0).head.loss == "softmax"
    with pytest.raises(ValueError, match="with_head_loss"):
        workdir_lib.build_model(
            head_run(data, tmp_path, "only"), None, None, 20, sharding.create_mesh()
        )


@pytest.mark.parametrize(
    ("num_free", "centroids", "tokens"),
    [(0, "none", 1), *(pytest.param(*each, marks=pytest.mark.slow)
                       for each in ((0, "stale", 2), (7, "none", 2)))],
)  # fmt: skip
def test_prototypes_without_free_vectors_or_centroids(data, tmp_path, num_free, centroids, tokens):
    config = head_run(data, tmp_path / "run", "none")
    labels = dataclasses.replace(config.labels, num_free=num_free, centroids=centroids)
    loop = dataclasses.replace(config.loop, epochs=1)
    config = dataclasses.replace(config, labels=labels, loop=loop)
    train.train(config)
    state = final_state(config)
    assert any("['free']" in name for name in state) == (num_free > 0)
    used = bool(np.abs(state["['model']['labels']['centroids']"]).max() > 0)
    assert used == (centroids != "none")
    with open(os.path.join(config.workdir, "evaluation", "test-exact.json")) as file:
        assert json.load(file)["counts"]["labels"] == 20


def test_flags_that_contradict_each_other_are_rejected(data, tmp_path):
    only = head_run(data, tmp_path, "only")
    loop = dataclasses.replace(only.loop, monitor="P@1", eval_every=1)
    with pytest.raises(InputError, match="monitor=P@1 selects an epoch of the tower"):
        dataclasses.replace(only, loop=loop)
    with pytest.raises(InputError, match=r"--head\.only trains no adapters"):
        dataclasses.replace(
            only,
            lora=dataclasses.replace(only.lora, rank=2),
            model=dataclasses.replace(only.model, pretrained="x"),
        )
    with pytest.raises(InputError, match=r"without --head\.weight and --head\.refit"):
        dataclasses.replace(only, head=dataclasses.replace(only.head, refit=True))
