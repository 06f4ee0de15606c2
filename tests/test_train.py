"""Training of a tiny model: reproducible, resumable, on one device and eight; what it writes."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import tiny
from tests.tiny import assert_same_state, configuration, final_state, make_data
from vixml_jax import config as config_lib
from vixml_jax import evaluate, evaluator, saved_model, train
from vixml_jax import workdir as workdir_lib
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.parallel import sharding
from vixml_jax.runtime import console, flag_fields
from vixml_jax.training import metric_logger, trainer


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("raw"))


@pytest.fixture(scope="module")
def finished_run(data, tmp_path_factory):
    """The configuration of a run that was not interrupted."""
    config = configuration(data, tmp_path_factory.mktemp("finished") / "run")
    train.train(config)
    return config


def metric_lines(config):
    with open(os.path.join(config.workdir, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


def test_run_learns_and_writes_metrics(finished_run):
    results = evaluated_at_the_end(finished_run, "test")
    counts = {"queries": 30, "queries_without_labels": 0, "labels": 20, "filter_pairs": 0}
    assert results["counts"] == counts
    assert results["R@10"] > 50.0 + 5.0  # A random order gives 50.
    lines = metric_lines(finished_run)
    assert [line["step"] for line in lines] == [3, 6, 9, 12, 15, 18]
    assert lines[-1]["loss"] < lines[0]["loss"]


class Stopped(Exception):
    """Ends a run in the middle, as any error would."""


def train_interrupted(config, num_steps):
    """Trains for some steps and then raises `Stopped` in the run."""
    advance, seen = metric_logger.MetricLogger.advance, []

    def stop(self, epoch):
        advance(self, epoch)
        seen.append(epoch)
        if len(seen) == num_steps:
            raise Stopped

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(metric_logger.MetricLogger, "advance", stop)
        with pytest.raises(Stopped):
            train.train(config)


@pytest.mark.parametrize(
    "num_steps", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 6, 11, 17))]
)
def test_interrupted_run_resumes_bit_for_bit(data, finished_run, tmp_path, num_steps):
    config = configuration(data, tmp_path / "run")
    train_interrupted(config, num_steps)
    train.train(config)
    assert_same_state(final_state(finished_run), final_state(config))
    steps = [line["step"] for line in metric_lines(config)]
    assert steps == sorted(set(steps))


@pytest.mark.eight_host_devices
def test_log_opens_with_five_lines(data, tmp_path, capsys):
    config = configuration(data, tmp_path / "run")
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=1))
    train_interrupted(config, 3)
    output = capsys.readouterr().out.splitlines()
    name = os.path.basename(os.path.dirname(data))
    sizes = "90 train and 30 test queries, 20 labels, images of width 12"
    assert output[0] == f"data: {name}, {sizes}"
    assert re.fullmatch(
        r"model: encoder from scratch, 1 layers x 16, [\d,]+ trained and 0 frozen parameters, "
        "float32, label prototypes",
        output[1],
    )
    assert re.fullmatch(
        "devices: 8 x cpu, mesh replica:1,fsdp:8,tensor:1, batches of 16 queries in "
        r"about \d+ rows of 16",
        output[2],
    )
    assert re.fullmatch(r"memory: 0\.\d\d( of [\d.]+)? GiB per device planned", output[3])
    assert output[4] == f"output: {config.workdir}, new run"
    assert output[5:] == []
    train.train(config)
    output = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in output[:4]] == ["data", "model", "devices", "memory"]
    assert output[4] == f"output: {config.workdir}, resumed at step 2 of 6"
    assert re.fullmatch(
        r"epoch 1/1, step 6 of 6: loss \d\.\d{4}, violators \d\.\d\d, [\d,]+ queries/s.*", output[5]
    )
    assert output[-1] == (
        f"written to {config.workdir}: config.json (flags), checkpoints/ (model and training "
        "state), metrics.jsonl and tensorboard/ (training curves), evaluation/ (results), serving/ "
        "(label vectors for predict)"
    )


def test_log_is_quiet_or_verbose_on_request(data, tmp_path, monkeypatch, capfd):
    config = configuration(data, tmp_path / "run")
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=1))
    monkeypatch.setattr(console, "_level", console.Level.QUIET)
    train.train(config)
    quiet = capfd.readouterr()
    assert quiet.err == ""
    assert "P@1" in quiet.out  # The results.
    for start in ("data:", "memory", "epoch", "written to", "training step", "final model", "\r"):
        assert start not in quiet.out
    monkeypatch.setattr(console, "_level", console.Level.VERBOSE)
    train.train(dataclasses.replace(config, workdir=str(tmp_path / "verbose")))
    verbose = capfd.readouterr().out
    assert "padded: label from 90 to 96" in verbose and "\noptimizer: mu/" in verbose
    assert "memory per device (GiB): " in verbose and "checkpoints: " in verbose


def tensorboard_events(config):
    """All events of a run's TensorBoard files, in order."""
    from tensorboardX.proto import event_pb2

    directory = os.path.join(config.workdir, "tensorboard")
    events = []
    for name in sorted(os.listdir(directory)):
        with open(os.path.join(directory, name), "rb") as file:
            while header := file.read(12):
                size = int.from_bytes(header[:8], "little")
                events.append(event_pb2.Event.FromString(file.read(size)))
                file.read(4)  # The checksum.
    return events


def test_tensorboard_has_the_scalars_and_flags(chosen_run):
    """Loss, step times, learning rates and evaluations with their steps; all flags as text."""
    events = tensorboard_events(chosen_run)
    points, texts = {}, {}
    for event in events:
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "text":
                texts[value.tag] = value.tensor.string_val[0].decode()
            else:
                points.setdefault(value.tag, {})[event.step] = value.simple_value
    steps = [3, 6, 9, 12, 15, 18]
    for name in ("loss", "violators", "step_time/step_s", "step_time/queries_per_s"):
        assert list(points[name]) == steps, name
    assert not any(name.startswith("watch/") for name in points)
    for name in ("valid/P@1", "valid/nDCG@3", "valid/R@10"):
        assert list(points[name]) == [6, 12, 18], name
    # The optimizer's own schedule: 3 warm-up steps to 3e-3, then linear to 0 at step 18.
    for group in ("tower", "labels", "images"):
        rates = points[f"learning_rate/{group}"]
        expected = {step: 3e-3 * min((step - 1) / 3, (18 - (step - 1)) / 15) for step in steps}
        assert rates == pytest.approx(expected, rel=1e-5)
    (text,) = texts.values()
    assert text.splitlines() == [f"    {line}" for line in flag_fields.lines(chosen_run)]
    assert "    --optimizer.learning_rate=0.003\n" in text and "    --loop.epochs=3\n" in text
    on_disk = {(line["step"], line["epoch"]) for line in metric_lines(chosen_run)}
    assert on_disk == {(3, 0), (6, 0), (9, 1), (12, 1), (15, 2), (18, 2)}
    logged = next(line for line in metric_lines(chosen_run) if line["step"] == 9)
    assert logged["learning_rate/tower"] == pytest.approx(3e-3 * 10 / 15, rel=1e-5)


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """Data with a validation split and 90 training queries too, so compiled programs are shared."""
    return make_data(tmp_path_factory.mktemp("divided"), train=112, valid=0.2)


class WithoutTest(PreparedDataset):
    """Data whose test split must not be read."""

    def __getattribute__(self, name):
        assert not name.startswith("test"), f"{name} was read"
        return super().__getattribute__(name)


def with_monitor(config, **changes):
    changes = {"eval_every": 1, "monitor": "nDCG@3", **changes}
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, **changes))


def open_without_test(config, *_):
    dataset = PreparedDataset.open(config.data)
    return WithoutTest(**{f.name: getattr(dataset, f.name) for f in dataclasses.fields(dataset)})


@pytest.fixture(scope="module")
def chosen_run(divided, tmp_path_factory):
    """A run that is evaluated after every epoch and never reads the test split."""
    config = with_monitor(configuration(divided, tmp_path_factory.mktemp("chosen") / "run"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(workdir_lib, "open_dataset", open_without_test)
        train.train(config)
    return config


def evaluated_in_training(config, name="nDCG@3"):
    """The metric on the validation split, by epoch."""
    lines = metric_lines(config)
    assert not any(name in line for line in lines)
    return {line["epoch"]: line[f"valid/{name}"] for line in lines if f"valid/{name}" in line}


def evaluated_at_the_end(config, split="valid"):
    path = os.path.join(config.workdir, "evaluation", f"{split}-exact.json")
    with open(path) as file:
        return json.load(file)


def run_evaluate(config, split):
    """Runs the command; returns what it prints and the results that it writes."""
    flags = [f"--workdir={config.workdir}", f"--split={split}"]
    done = subprocess.run(
        [sys.executable, "-m", "vixml_jax.evaluate", *flags],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, evaluated_at_the_end(config, split)


def test_test_split_is_not_read_in_training(chosen_run):
    assert open_without_test(chosen_run).split("valid")
    with pytest.raises(AssertionError, match="test was read"):
        open_without_test(chosen_run).split("test")
    written = os.listdir(os.path.join(chosen_run.workdir, "evaluation"))
    assert "valid-exact.json" in written and all(name.startswith("valid-") for name in written)
    by_epoch = evaluated_in_training(chosen_run)
    assert list(by_epoch) == [0, 1, 2]
    assert evaluated_at_the_end(chosen_run)["nDCG@3"] == max(by_epoch.values())
    assert evaluated_at_the_end(chosen_run)["counts"]["queries"] == 22
    output, on_test = run_evaluate(chosen_run, "test")
    assert on_test["counts"]["queries"] == 30
    best = max(by_epoch, key=by_epoch.get)
    assert f"checkpoint of step {6 * (best + 1)}, the best in nDCG@3 on valid" in output


def test_evaluations_do_not_change_training(chosen_run, divided, tmp_path, capsys):
    config = configuration(divided, tmp_path / "run")
    train.train(config)
    assert_same_state(final_state(chosen_run), final_state(config))
    assert not evaluated_in_training(config)
    assert not os.path.exists(os.path.join(config.workdir, workdir_lib.BEST))
    output = capsys.readouterr().out
    assert "final model: from the last epoch, 3/3\n" in output
    assert f"python -m vixml_jax.evaluate --workdir={config.workdir}\n" in output
    # Evaluations after the last epoch, in training and at the end, use the same arrays.
    assert evaluated_at_the_end(config)["nDCG@3"] == evaluated_in_training(chosen_run)[2]


def test_best_epoch_is_kept_when_later_ones_are_worse(divided, tmp_path, monkeypatch, capsys):
    """All parameters are set to zero after the second epoch, which ends patience."""
    config = with_monitor(configuration(divided, tmp_path / "run"), patience=1)
    run_batches = trainer.Trainer._run_batches

    def set_to_zero(self, state, clusters, position, logger):
        state, done = run_batches(self, state, clusters, position, logger)
        if position.epoch == 1:
            state = state._replace(params=jax.tree.map(jax.numpy.zeros_like, state.params))
        return state, done

    monkeypatch.setattr(trainer.Trainer, "_run_batches", set_to_zero)
    train.train(config)
    by_epoch = evaluated_in_training(config)
    assert list(by_epoch) == [0, 1]
    assert by_epoch[0] > by_epoch[1]
    output = capsys.readouterr().out
    assert f"\nepoch 1/3, valid: nDCG@3 {by_epoch[0]:.2f}, P@1 " in output
    assert (
        f"final model: from epoch 1/3, the best in nDCG@3 on valid ({by_epoch[0]:.2f}); training "
        "stopped after epoch 2/3 (--loop.patience=1)\n"
    ) in output
    at_the_end = evaluated_at_the_end(config)
    output, again = run_evaluate(config, "valid")
    assert "checkpoint of step 6, the best in nDCG@3 on valid" in output
    assert at_the_end["nDCG@3"] == again["nDCG@3"] == by_epoch[0]
    # Started again, the run is evaluated again without further training.
    before = final_state(config)
    train.train(config)
    assert_same_state(before, final_state(config))
    assert evaluated_in_training(config) == by_epoch


def test_run_interrupted_after_an_evaluation_selects_the_same(chosen_run, divided, tmp_path):
    config = with_monitor(configuration(divided, tmp_path / "run"))
    train_interrupted(config, 7)
    train.train(config)
    assert_same_state(final_state(chosen_run), final_state(config))
    assert evaluated_in_training(config) == evaluated_in_training(chosen_run)
    assert evaluated_at_the_end(config)["nDCG@3"] == evaluated_at_the_end(chosen_run)["nDCG@3"]
    assert tiny.saved(config.workdir).step == tiny.saved(chosen_run.workdir).step


def test_monitor_that_cannot_be_computed_is_rejected(data, divided, tmp_path):
    config = with_monitor(configuration(data, tmp_path / "run"))
    with pytest.raises(InputError, match=r"monitor=nDCG@3: .* no validation .* --valid=0\.1 "):
        train.train(config)
    config = with_monitor(configuration(divided, tmp_path / "run"), monitor="R@100")
    with pytest.raises(InputError, match=r"monitor=R@100: expected metrics among P@1, .*MRR"):
        train.train(config)
    assert not os.path.exists(config.workdir)


def test_one_device_gives_the_result_of_eight(data, tmp_path, monkeypatch):
    config = configuration(data, tmp_path / "run")
    create = functools.partial(sharding.create_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "create_mesh", create)
    # Dropout depends on positions in packed rows, which differ; without it all values are equal.
    changes = {
        "model": dataclasses.replace(config.model, dropout=0.0),
        "labels": dataclasses.replace(config.labels, dropout=0.0),
        "loop": dataclasses.replace(config.loop, epochs=1),
    }
    config = dataclasses.replace(config, **changes)
    train.train(config)
    one_device = final_state(config)
    monkeypatch.undo()
    config = dataclasses.replace(config, workdir=str(tmp_path / "eight"))
    train.train(config)
    eight_devices = final_state(config)
    for name, value in one_device.items():
        assert_close_rows(eight_devices[name], value, name)


def assert_close_rows(actual, expected, name):
    """Checks that arrays agree in the rows that both have; numbers of padding rows may differ."""
    if expected.ndim:
        rows = min(len(expected), len(actual))
        actual, expected = actual[:rows], expected[:rows]
    np.testing.assert_allclose(actual, expected, atol=2e-4, err_msg=name)


@pytest.mark.parametrize("before,after", [(8, 2), (1, 4)])
@pytest.mark.slow
def test_run_resumes_on_another_number_of_devices(data, tmp_path, monkeypatch, before, after):
    """Without dropout, the results are equal up to rounding."""
    create = sharding.create_mesh

    def use_devices(count):
        def create_mesh(*args, **sizes):
            return create(*args, **(sizes | {"devices": jax.devices()[:count]}))

        monkeypatch.setattr(sharding, "create_mesh", create_mesh)

    config = configuration(data, tmp_path / "run")
    changes = {
        "model": dataclasses.replace(config.model, dropout=0.0),
        "labels": dataclasses.replace(config.labels, dropout=0.0),
        "loop": dataclasses.replace(config.loop, epochs=2),
        "batch": dataclasses.replace(config.batch, cluster_start=-1),
    }
    config = dataclasses.replace(config, **changes)
    uninterrupted = dataclasses.replace(config, workdir=str(tmp_path / "uninterrupted"))
    use_devices(before)
    train.train(uninterrupted)
    train_interrupted(config, 9)
    at_interruption = final_state(config)
    use_devices(after)
    train.train(config)
    expected, actual = final_state(uninterrupted), final_state(config)
    step = "['training']['step']"
    assert actual[step] == 12 > at_interruption[step]
    largest_change = 0.0
    for name, value in expected.items():
        assert_close_rows(actual[name], value, name)
        change = np.max(np.abs(at_interruption[name] - value), initial=0.0)
        largest_change = max(largest_change, float(change))
    assert largest_change > 1e-2  # The resumed run did train.


def test_resuming_with_other_flags_is_rejected(finished_run):
    with pytest.raises(InputError, match="--seed: was 0, now 1"):
        train.train(dataclasses.replace(finished_run, seed=1))


def test_checkpoint_flags_may_change_when_resuming(finished_run, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for name in (workdir_lib.CONFIG, workdir_lib.TOWER):
        shutil.copy(os.path.join(finished_run.workdir, name), workdir / name)
    loop_flags = dataclasses.replace(
        finished_run.loop, max_to_keep=5, save_every=7, save_minutes=1.5
    )
    changed = dataclasses.replace(finished_run, workdir=str(workdir), loop=loop_flags)
    tower, layout = workdir_lib.read_tower(workdir)
    content = workdir_lib.open_dataset(changed).content_hash
    workdir_lib.open_run(changed, tower, layout, content, sharding.create_mesh())
    assert config_lib.load(str(workdir / workdir_lib.CONFIG)) == changed
    more = dataclasses.replace(
        changed, loop=dataclasses.replace(loop_flags, max_to_keep=1, epochs=9)
    )
    with pytest.raises(InputError, match=r"configuration \(--loop.epochs: was 3, now 9\)"):
        workdir_lib.open_run(more, tower, layout, content, sharding.create_mesh())
    assert config_lib.load(str(workdir / workdir_lib.CONFIG)) == changed


def test_evaluate_needs_only_the_run_directory(finished_run, capsys):
    trained = evaluated_at_the_end(finished_run, "test")
    config = config_lib.load(os.path.join(finished_run.workdir, workdir_lib.CONFIG))
    dataset = workdir_lib.open_dataset(config)
    model = workdir_lib.build_model(
        config,
        *workdir_lib.read_tower(config.workdir),
        dataset.num_labels,
        workdir_lib.make_mesh(config),
    )
    params, labels, step = saved_model.restore(config.workdir, model)
    assert step == 18
    how = {"split": "test", "step": step}
    evaluate.show(config, model, params, labels, dataset, search="exact", **how)
    again = evaluated_at_the_end(finished_run, "test")
    assert {k: v for k, v in again.items() if "@" in k} == {
        k: v for k, v in trained.items() if "@" in k
    }
    assert "P@1" in capsys.readouterr().out
    for _ in range(2):  # Builds the index, then reads it.
        evaluate.show(config, model, params, labels, dataset, search="scann", **how)
    with open(os.path.join(finished_run.workdir, "evaluation", "test-scann.json")) as file:
        approximate = json.load(file)
    assert approximate["search"]["recall@10"] == 1.0  # Few labels are searched exactly.
    np.testing.assert_allclose(approximate["P@5"], trained["P@5"])


def test_evaluate_without_images(finished_run, capsys):
    config = config_lib.load(os.path.join(finished_run.workdir, workdir_lib.CONFIG))
    dataset = workdir_lib.open_dataset(config)
    model = workdir_lib.build_model(
        config,
        *workdir_lib.read_tower(config.workdir),
        dataset.num_labels,
        workdir_lib.make_mesh(config),
    )
    params, labels, step = saved_model.restore(config.workdir, model)
    hidden = evaluator.without_images(dataset, "test")
    shown, bare = (
        model.encode_queries(params, data.test, block=32).values for data in (dataset, hidden)
    )
    change = np.abs(shown - bare).max(axis=1)
    assert change[::2].min() > 1e-3  # Every other query has an image.
    np.testing.assert_allclose(change[1::2], 0.0, atol=1e-6)
    how = {"split": "test", "search": "exact", "step": step}
    evaluate.show(config, model, params, labels, dataset, drop_images=True, **how)
    assert "this run, text " in capsys.readouterr().out
    path = os.path.join(finished_run.workdir, "evaluation", "test-exact-without_images.json")
    with open(path) as file:
        assert "knn_baseline" not in json.load(file)


def test_knn_baselines_of_a_run(finished_run):
    dataset = workdir_lib.open_dataset(finished_run)
    rows = {
        name: evaluator.measure(result, dataset, "test")
        for name, result in evaluator.baselines(dataset, 10).items()
    }
    assert list(rows) == [f"kNN baseline, {kind}" for kind in ("text", "image", "both")]
    assert all(0.0 <= value <= 100.0 for row in rows.values() for value in row.values())


def test_collapse_is_reported_once():
    guard = metric_logger.CollapseGuard(margin=0.1, num_negatives=10, patience=5)
    fine = {"loss_text": 0.05, "violators": 3.0}
    collapsed = {"loss_text": 0.1001, "violators": 9.99}
    warnings = [guard.warning(x) for x in [fine] * 3 + [collapsed] * 5]
    assert warnings[:-1] == [None] * 7
    assert warnings[-1].startswith("warning: training seems to have collapsed: for 5 steps")


def test_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch):
    config = configuration(data, tmp_path / "run")
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e30)
    )
    with pytest.raises(FloatingPointError, match=r"at step \d+ \(epoch \d/3\)"):
        train.train(config)


def test_batch_larger_than_the_data_becomes_smaller(data, tmp_path, capsys):
    config = configuration(data, tmp_path / "run")
    config = dataclasses.replace(config, batch=dataclasses.replace(config.batch, size=200))
    train_interrupted(config, 1)
    printed = capsys.readouterr().out
    assert "note: --batch.size=200 is more than the 90 training queries: using " in printed
    assert "batches of 22 queries in about " in printed
