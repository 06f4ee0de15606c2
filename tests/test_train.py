"""The whole line on a tiny data set: one seed one run, stopped and resumed, on one device and
eight."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.tiny import assert_same_state, configuration, final_state, make_data
from vixml_jax import config as config_lib
from vixml_jax import evaluate, evaluator, train
from vixml_jax import workdir as workdir_lib
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.parallel import sharding
from vixml_jax.training import metric_logger, trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def whole_run(data, tmp_path_factory):
    config = configuration(data, tmp_path_factory.mktemp("whole") / "run")
    train.train(config)
    return config


def test_the_run_learns_and_writes_what_it_says(whole_run):
    with open(os.path.join(whole_run.workdir, "evaluation", "test-exact.json")) as file:
        found = json.load(file)
    assert found["counts"] == {"queries": 30, "labels": 20, "filter_pairs": 0}
    assert found["R@10"] > 50.0 + 5.0  # Chance is 50.
    lines = [json.loads(line) for line in open(os.path.join(whole_run.workdir, "metrics.jsonl"))]
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18]
    assert lines[-1]["loss"] < lines[0]["loss"]


class Stopped(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize("at", [1, 5, 6, 11, 17])
def test_a_stopped_run_resumes_bit_for_bit(data, whole_run, tmp_path, monkeypatch, at):
    config = configuration(data, tmp_path / "run")
    advance = metric_logger.Telemetry.advance
    seen = []

    def stop(self, epoch):
        advance(self, epoch)
        seen.append(epoch)
        if len(seen) == at:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(metric_logger.Telemetry, "advance", stop)
        with pytest.raises(Stopped):
            train.train(config)
    train.train(config)
    assert_same_state(final_state(whole_run), final_state(config))
    steps = [
        json.loads(line)["step"] for line in open(os.path.join(config.workdir, "metrics.jsonl"))
    ]
    assert steps == sorted(set(steps))


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """Data with a validation split, and as many training queries: the programs are the same."""
    return make_data(tmp_path_factory.mktemp("divided"), train=112, valid=0.2)


class Sealed(PreparedDataset):
    """Data whose test split cannot be read."""

    def __getattribute__(self, name):
        assert not name.startswith("test"), f"{name} was read"
        return super().__getattribute__(name)


def choosing(config, **changes):
    changes = {"eval_every": 1, "choose_by": "nDCG@3", **changes}
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, **changes))


def open_sealed(config, *_):
    dataset = PreparedDataset.open(config.data)
    return Sealed(**{f.name: getattr(dataset, f.name) for f in dataclasses.fields(dataset)})


@pytest.fixture(scope="module")
def chosen_run(divided, tmp_path_factory):
    """A run that is judged after every epoch, but never sees the test split."""
    config = choosing(configuration(divided, tmp_path_factory.mktemp("chosen") / "run"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(workdir_lib, "open_dataset", open_sealed)
        train.train(config)
    return config


def judged_on_the_way(config, name="nDCG@3"):
    """Epochs and what they reached on the validation split."""
    lines = [json.loads(line) for line in open(os.path.join(config.workdir, "metrics.jsonl"))]
    assert not any(name in line for line in lines)
    return {line["epoch"]: line[f"valid/{name}"] for line in lines if f"valid/{name}" in line}


def judged_at_the_end(config, split="valid"):
    path = os.path.join(config.workdir, "evaluation", f"{split}-exact.json")
    with open(path) as file:
        return json.load(file)


def run_evaluate(config, split):
    """What the door prints and writes."""
    flags = [f"--workdir={config.workdir}", f"--split={split}"]
    done = subprocess.run(
        [sys.executable, "-m", "vixml_jax.evaluate", *flags],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, judged_at_the_end(config, split)


def test_the_test_split_rests_until_it_is_judged(chosen_run):
    assert open_sealed(chosen_run).split("valid")
    with pytest.raises(AssertionError, match="test was read"):
        open_sealed(chosen_run).split("test")
    written = os.listdir(os.path.join(chosen_run.workdir, "evaluation"))
    assert "valid-exact.json" in written and all(name.startswith("valid-") for name in written)
    found = judged_on_the_way(chosen_run)
    assert list(found) == [0, 1, 2]
    assert judged_at_the_end(chosen_run)["nDCG@3"] == max(found.values())
    assert judged_at_the_end(chosen_run)["counts"]["queries"] == 22
    said, on_test = run_evaluate(chosen_run, "test")
    assert on_test["counts"]["queries"] == 30
    best = max(found, key=found.get)
    assert f"checkpoint of step {6 * (best + 1)}, the best in nDCG@3 on valid" in said


def test_training_is_the_same_whether_it_is_judged_or_not(chosen_run, divided, tmp_path, capsys):
    config = configuration(divided, tmp_path / "run")
    train.train(config)
    assert_same_state(final_state(chosen_run), final_state(config))
    assert not judged_on_the_way(config)
    assert not os.path.exists(os.path.join(config.workdir, workdir_lib.BEST))
    said = capsys.readouterr().out
    assert "model: of the last epoch, 2\n" in said
    assert f"python -m vixml_jax.evaluate --workdir={config.workdir}\n" in said
    # The last epoch is judged on the way and at the end by the same arrays.
    assert judged_at_the_end(config)["nDCG@3"] == judged_on_the_way(chosen_run)[2]


def test_a_run_that_is_ruined_keeps_what_it_was(divided, tmp_path, monkeypatch, capsys):
    """Zero parameters after the second epoch: all labels look alike, and patience is over."""
    config = choosing(configuration(divided, tmp_path / "run"), patience=1)
    run_batches = trainer.Trainer._run_batches

    def ruin(self, state, clusters, position, telemetry):
        state, done = run_batches(self, state, clusters, position, telemetry)
        if position.epoch == 1:
            state = state._replace(params=jax.tree.map(jax.numpy.zeros_like, state.params))
        return state, done

    monkeypatch.setattr(trainer.Trainer, "_run_batches", ruin)
    train.train(config)
    found = judged_on_the_way(config)
    assert list(found) == [0, 1]
    assert found[0] > found[1]
    assert (
        f"model: of epoch 0, the best in nDCG@3 on valid, {found[0]:.2f}; training ended with "
        "epoch 1, as --loop.patience says\n"
    ) in capsys.readouterr().out
    at_the_end = judged_at_the_end(config)
    said, again = run_evaluate(config, "valid")
    assert "checkpoint of step 6, the best in nDCG@3 on valid" in said
    assert at_the_end["nDCG@3"] == again["nDCG@3"] == found[0]
    # Started again, it is judged again and trains no more.
    before = final_state(config)
    train.train(config)
    assert_same_state(before, final_state(config))
    assert judged_on_the_way(config) == found


def test_stopped_after_an_evaluation_it_chooses_the_same(
    chosen_run, divided, tmp_path, monkeypatch
):
    config = choosing(configuration(divided, tmp_path / "run"))
    advance = metric_logger.Telemetry.advance
    seen = []

    def stop(self, epoch):
        advance(self, epoch)
        seen.append(epoch)
        if len(seen) == 7:
            raise Stopped

    monkeypatch.setattr(metric_logger.Telemetry, "advance", stop)
    with pytest.raises(Stopped):
        train.train(config)
    monkeypatch.undo()
    train.train(config)
    assert_same_state(final_state(chosen_run), final_state(config))
    assert judged_on_the_way(config) == judged_on_the_way(chosen_run)
    assert judged_at_the_end(config)["nDCG@3"] == judged_at_the_end(chosen_run)["nDCG@3"]
    assert (
        workdir_lib.find_model(config.workdir)[1] == workdir_lib.find_model(chosen_run.workdir)[1]
    )


def test_what_cannot_be_chosen_by_is_refused(data, divided, tmp_path):
    config = choosing(configuration(data, tmp_path / "run"))
    with pytest.raises(InputError, match=r"choose_by=nDCG@3: .* no validation .* --valid=0.02"):
        train.train(config)
    config = choosing(configuration(divided, tmp_path / "run"), choose_by="R@100")
    with pytest.raises(InputError, match=r"choose_by=R@100: expected one of P@1, .* R@10, MRR"):
        train.train(config)
    assert not os.path.exists(config.workdir)


def test_one_device_equals_eight(data, whole_run, tmp_path, monkeypatch):
    config = configuration(data, tmp_path / "run")
    one = jax.devices()[:1]
    create = functools.partial(sharding.create_mesh, devices=one)
    monkeypatch.setattr(sharding, "create_mesh", create)
    # Dropout draws by position in the packed rows, which differ; without it all is equal.
    plain = {
        "model": dataclasses.replace(config.model, dropout=0.0),
        "labels": dataclasses.replace(config.labels, dropout=0.0),
        "loop": dataclasses.replace(config.loop, epochs=1),
    }
    config = dataclasses.replace(config, **plain)
    train.train(config)
    alone = final_state(config)
    monkeypatch.undo()
    spread = dataclasses.replace(config, workdir=str(tmp_path / "spread"))
    train.train(spread)
    together = final_state(spread)
    for name, value in alone.items():
        rows = min(len(value), len(together[name])) if value.ndim else None
        np.testing.assert_allclose(
            together[name][:rows] if value.ndim else together[name],
            value[:rows] if value.ndim else value,
            atol=2e-4,
            err_msg=name,
        )


@pytest.mark.parametrize("before,after", [(8, 2), pytest.param(1, 4, marks=pytest.mark.slow)])
def test_a_run_goes_on_upon_other_devices(data, tmp_path, monkeypatch, before, after):
    """Without dropout, to rounding."""
    create = sharding.create_mesh

    def upon(count):
        def made(*sizes, **_):
            return create(*sizes, devices=jax.devices()[:count])

        monkeypatch.setattr(sharding, "create_mesh", made)

    config = configuration(data, tmp_path / "run")
    plain = {
        "model": dataclasses.replace(config.model, dropout=0.0),
        "labels": dataclasses.replace(config.labels, dropout=0.0),
        "loop": dataclasses.replace(config.loop, epochs=2),
        "batch": dataclasses.replace(config.batch, cluster_start=-1),
    }
    config = dataclasses.replace(config, **plain)
    whole = dataclasses.replace(config, workdir=str(tmp_path / "whole"))
    upon(before)
    train.train(whole)
    advance, seen = metric_logger.Telemetry.advance, []

    def stop(self, epoch):
        advance(self, epoch)
        seen.append(epoch)
        if len(seen) == 9:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(metric_logger.Telemetry, "advance", stop)
        with pytest.raises(Stopped):
            train.train(config)
    left = final_state(config)
    upon(after)
    train.train(config)
    expected, found = final_state(whole), final_state(config)
    assert found["['training']['step']"] == 12 > left["['training']['step']"]
    moved = 0.0
    for name, value in expected.items():
        rows = min(len(value), len(found[name])) if value.ndim else None
        np.testing.assert_allclose(
            found[name][:rows] if value.ndim else found[name],
            value[:rows] if value.ndim else value,
            atol=2e-4,
            err_msg=name,
        )
        moved = max(moved, float(np.max(np.abs(left[name] - value), initial=0.0)))
    assert moved > 1e-2  # There was something to be trained after it.


def test_another_configuration_is_refused(whole_run):
    with pytest.raises(InputError, match="--seed: 0 there, 1 here"):
        train.train(dataclasses.replace(whole_run, seed=1))


def test_how_often_to_save_is_no_part_of_what_a_run_is(whole_run, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in (workdir_lib.CONFIG, workdir_lib.TOWER):
        shutil.copy(os.path.join(whole_run.workdir, name), workdir / name)
    loop_flags = dataclasses.replace(whole_run.loop, keep=5, save_every=7, save_minutes=1.5)
    changed = dataclasses.replace(whole_run, workdir=str(workdir), loop=loop_flags)
    tower, layout = workdir_lib.read_tower(workdir)
    content = workdir_lib.open_dataset(changed).content_hash
    workdir_lib.open_run(changed, tower, layout, content, sharding.create_mesh())
    assert config_lib.load(str(workdir / workdir_lib.CONFIG)) == changed
    more = dataclasses.replace(changed, loop=dataclasses.replace(loop_flags, keep=1, epochs=9))
    with pytest.raises(InputError, match=r"configuration \(--loop.epochs: 3 there, 9 here\)"):
        workdir_lib.open_run(more, tower, layout, content, sharding.create_mesh())
    assert config_lib.load(str(workdir / workdir_lib.CONFIG)) == changed


def test_evaluate_from_the_run_directory_alone(whole_run, capsys):
    with open(os.path.join(whole_run.workdir, "evaluation", "test-exact.json")) as file:
        trained = json.load(file)
    config = config_lib.load(os.path.join(whole_run.workdir, workdir_lib.CONFIG))
    dataset = workdir_lib.open_dataset(config)
    model = workdir_lib.build_model(
        config,
        *workdir_lib.read_tower(config.workdir),
        dataset.num_labels,
        workdir_lib.make_mesh(config),
    )
    params, labels, step = workdir_lib.restore_model(config.workdir, model)
    assert step == 18
    evaluate.show(config, model, params, labels, dataset, split="test", search="exact")
    with open(os.path.join(whole_run.workdir, "evaluation", "test-exact.json")) as file:
        again = json.load(file)
    assert {k: v for k, v in again.items() if "@" in k} == {
        k: v for k, v in trained.items() if "@" in k
    }
    assert "P@1" in capsys.readouterr().out
    for _ in range(2):  # Builds the index, then loads it.
        evaluate.show(config, model, params, labels, dataset, split="test", search="scann")
    with open(os.path.join(whole_run.workdir, "evaluation", "test-scann.json")) as file:
        approximate = json.load(file)
    assert approximate["search"]["recall@10"] == 1.0  # So few labels are searched exactly.
    np.testing.assert_allclose(approximate["P@5"], trained["P@5"])


def test_evaluate_without_pictures(whole_run, capsys):
    config = config_lib.load(os.path.join(whole_run.workdir, workdir_lib.CONFIG))
    dataset = workdir_lib.open_dataset(config)
    model = workdir_lib.build_model(
        config,
        *workdir_lib.read_tower(config.workdir),
        dataset.num_labels,
        workdir_lib.make_mesh(config),
    )
    params, labels, _ = workdir_lib.restore_model(config.workdir, model)
    hidden = evaluator.without_images(dataset, "test")
    shown, bare = (
        model.encode_queries(params, data.test, block=32).values for data in (dataset, hidden)
    )
    moved = np.abs(shown - bare).max(axis=1)
    assert moved[::2].min() > 1e-3  # Every other query has a picture.
    np.testing.assert_allclose(moved[1::2], 0.0, atol=1e-6)
    evaluate.show(
        config, model, params, labels, dataset, split="test", search="exact", hide_images=True
    )
    assert "this run, text " in capsys.readouterr().out
    path = os.path.join(whole_run.workdir, "evaluation", "test-exact-without_images.json")
    with open(path) as file:
        assert "vote" not in json.load(file)


def test_the_votes_that_stand_beside_a_run(whole_run):
    dataset = workdir_lib.open_dataset(whole_run)
    rows = {
        name: evaluator.measure(vote, dataset, "test")
        for name, vote in evaluator.baselines(dataset, 10).items()
    }
    assert list(rows) == ["vote, text", "vote, picture", "vote, both"]
    assert all(0.0 <= value <= 100.0 for row in rows.values() for value in row.values())


def test_collapse_is_told_once():
    guard = metric_logger.CollapseGuard(margin=0.1, num_negatives=10, patience=5)
    fine = {"loss_text": 0.05, "violators": 3.0}
    collapsed = {"loss_text": 0.1001, "violators": 9.99}
    said = [guard.warning(x) for x in [fine] * 3 + [collapsed] * 5]
    assert said[:-1] == [None] * 7
    assert "collapsed?" in said[-1]


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch):
    config = configuration(data, tmp_path / "run")
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e30)
    )
    with pytest.raises(FloatingPointError, match=r"at step \d+ \(epoch \d+\)"):
        train.train(config)


def test_more_negatives_than_queries_is_refused(data, tmp_path):
    config = configuration(data, tmp_path / "run")
    config = dataclasses.replace(config, batch=dataclasses.replace(config.batch, size=200))
    with pytest.raises(InputError, match=r"--batch\.size=200 is more than the 90"):
        train.train(config)
    assert not os.path.exists(config.workdir)
