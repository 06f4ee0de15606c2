"""Tests of model selection in the training loop with given metrics, interrupted at any point."""

import dataclasses
import json
import os
import shutil
import signal
import types

import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.tiny import configuration, make_data
from vixml_jax import train
from vixml_jax import workdir as workdir_lib
from vixml_jax.config import LoopConfig
from vixml_jax.errors import InputError, NotFiniteError, Preempted
from vixml_jax.parallel import distributed, sharding
from vixml_jax.storage import digests
from vixml_jax.structs import LabelState, TrainState
from vixml_jax.training import build
from vixml_jax.training import trainer as trainer_lib
from vixml_jax.training.checkpoints import Checkpoints
from vixml_jax.training.metric_logger import CollapseGuard, MetricLogger
from vixml_jax.training.preemption import StopSignal

SCALARS = {"loss": 1.0, "loss_text": 1.0, "gradient_norm": 1.0, "violators": 0.0}
CURVE = [10.0, 30.0, 30.0, 20.0, 99.0]  # With patience 2 the last one is never reached.


class Interrupted(Exception):
    """Ends a run like a crash."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Configuration, data and model of a run without label prototypes; nothing is compiled."""
    config = configuration(make_data(tmp_path_factory.mktemp("raw")), "")
    labels = dataclasses.replace(config.labels, prototypes=False)
    batch = dataclasses.replace(config.batch, size=48, cluster_start=-1)
    config = dataclasses.replace(config, labels=labels, batch=batch)
    dataset = workdir_lib.open_dataset(config)
    tower, layout = build.make_tower(config, dataset)
    model = workdir_lib.build_model(
        config, tower, layout, dataset.num_labels, workdir_lib.make_mesh(config)
    )
    return config, dataset, model


def first_state():
    return TrainState(
        step=jnp.int32(0),
        params={"mean": jnp.float32(0), "steps": jnp.int32(0)},
        frozen={},
        opt_state={"sum": jnp.zeros(3)},
        labels=LabelState(jnp.zeros((8, 2)), jnp.zeros(8, jnp.int32)),
        bank=jnp.zeros((8, 2)),
    )


def train_step(state, batch, key):
    """A step whose result depends on all batches before it."""
    params = {
        "mean": 0.9 * state.params["mean"] + float(np.mean(batch.label_ids)),
        "steps": state.params["steps"] + 1,
    }
    return state._replace(step=state.step + 1, params=params), SCALARS


def run(parts, checkpoints, workdir, curve, tick=lambda name: None, stop=None, **loop_flags):
    """Runs the loop from the newest checkpoint, with metrics taken from the curve."""
    config, dataset, model = parts

    class Step:
        def program(self, batch, key):
            def step(state, batch, key):
                tick("step")
                return train_step(state, batch, key)

            return step

    def evaluate(params, labels):
        tick("evaluate")
        return {"P@1": curve[int(params["steps"]) // 2 - 1], "MRR": 1.0}

    trainer = trainer_lib.Trainer(
        model,
        dataset,
        Step(),
        batch=config.batch,
        labels=config.labels,
        loop=LoopConfig(**loop_flags),
        block=32,
        seed=0,
        shards=sharding.num_shards(model.mesh),
        group=distributed.ALONE,
        checkpoints=checkpoints,
        guard=CollapseGuard(margin=0.1, num_negatives=4),
        evaluate=evaluate,
        split="valid",
        stop=stop or StopSignal(),
    )
    state, (clusters, position) = first_state(), trainer.start()
    if checkpoints.latest_step() is not None:
        state, clusters, position = checkpoints.restore(state, clusters)
        position = trainer_lib.Position(**position)
    logger = MetricLogger(workdir, step=int(state.step), total_steps=20, num_epochs=10)
    try:
        state, position = trainer.run(state, clusters, position, logger)
    finally:
        logger.close()
    return state, position


class NoCheckpoints:
    """Takes the place of `Checkpoints` in a run that is not interrupted."""

    def __init__(self):
        self.best = None

    def __getattr__(self, name):
        return lambda *_: None

    def save_best(self, state, labels):
        self.best = int(state.step)


@pytest.mark.parametrize("seed", range(12))
def test_first_best_epoch_is_selected_and_patience_ends_the_run(parts, tmp_path, seed):
    rng = np.random.default_rng(seed)
    epochs, every, patience = (int(rng.integers(*span)) for span in ((1, 9), (1, 4), (0, 4)))
    curve = rng.integers(0, 4, epochs).astype(float)  # Few values, so that there are ties.
    evaluated = [e for e in range(epochs) if (e + 1) % every == 0 or e == epochs - 1]
    firsts = [int(np.argmax(curve[evaluated[: n + 1]])) for n in range(len(evaluated))]
    ends = [n for n, first in enumerate(firsts) if patience and n - first >= patience]
    end = ends[0] if ends else len(evaluated) - 1

    checkpoints = NoCheckpoints()
    flags = {"epochs": epochs, "eval_every": every, "patience": patience, "monitor": "P@1"}
    state, position = run(parts, checkpoints, str(tmp_path), curve, **flags)
    assert int(state.step) == 2 * (evaluated[end] + 1)
    best = evaluated[firsts[end]]
    assert checkpoints.best == position.best_step == 2 * (best + 1)
    assert (position.best, position.waited) == (curve[best], end - firsts[end])
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    logged = {line["epoch"]: line["valid/P@1"] for line in lines if "valid/P@1" in line}
    assert logged == {epoch: curve[epoch] for epoch in evaluated[: end + 1]}
    config = types.SimpleNamespace(loop=LoopConfig(**flags))
    line = train.describe_final_model(config, position, 2)
    assert line.startswith(
        f"final model: from epoch {best + 1}/{epochs}, the best in P@1 on valid ({curve[best]:.2f})"
    )
    assert ("--loop.patience" in line) == (evaluated[end] < epochs - 1)


def run_with_checkpoints(parts, workdir, tick=lambda name: None, stop=None):
    """A run with checkpoints on disk: its last mean, position, metrics, and the model it keeps."""
    checkpoints = Checkpoints(
        os.path.join(workdir, workdir_lib.CHECKPOINTS),
        max_to_keep=2,
        every=1,
        best=os.path.join(workdir, workdir_lib.BEST),
    )

    def with_ticks(name, call):
        def ticking(*args):
            tick(f"before {name}")
            call(*args)
            if name == "save":
                checkpoints.wait()  # So that the next one is saved when due, however slow the disk.
            tick(f"after {name}")

        return ticking

    for name in ("save", "save_best", "drop_best_but"):
        setattr(checkpoints, name, with_ticks(name, getattr(checkpoints, name)))
    try:
        state, position = run(
            parts, checkpoints, workdir, CURVE, tick, stop,
            epochs=5, eval_every=1, monitor="P@1", patience=2, save_every=1, log_every=1,
        )  # fmt: skip
    finally:
        checkpoints.close()
    lines = [json.loads(line) for line in open(os.path.join(workdir, "metrics.jsonl"))]
    lines = [
        {k: v for k, v in line.items() if not k.startswith(("step_time/", "seconds"))}
        for line in lines
    ]
    return (float(state.params["mean"]), position, lines, kept_model(workdir))


def kept_model(workdir):
    """Directory, step and parameters of the model that evaluation would read."""
    import orbax.checkpoint as ocp

    found = tiny.saved(workdir)
    directory, step = os.path.dirname(found.path), found.step
    with ocp.CheckpointManager(directory, item_names=("model", "training", "position")) as manager:
        args = ocp.args.Composite(model=ocp.args.StandardRestore())
        params = manager.restore(step, args=args)["model"]["params"]
    return os.path.basename(directory), step, float(params["mean"]), int(params["steps"])


@pytest.fixture(scope="module")
def uninterrupted(parts, tmp_path_factory):
    """The result of an uninterrupted run, its events and its directory."""
    events = []
    workdir = str(tmp_path_factory.mktemp("uninterrupted"))
    return run_with_checkpoints(parts, workdir, events.append), events, workdir


def test_run_out_of_patience_keeps_its_best_model_and_trains_no_more(parts, uninterrupted):
    (mean, position, lines, kept), events, workdir = uninterrupted
    assert (position.epoch, position.best, position.best_step, position.waited) == (4, 30.0, 4, 2)
    assert kept[:2] == ("best", 4) and kept[3] == 4 and kept[2] != mean
    assert os.listdir(os.path.join(workdir, workdir_lib.BEST)) == ["4"]
    assert events.count("step") == 8 and events.count("before save_best") == 2
    resumed = []
    assert run_with_checkpoints(parts, workdir, resumed.append) == (mean, position, lines, kept)
    assert not {"step", "evaluate", "before save", "before save_best"} & set(resumed)


# Events, of 38, around the first and second best model, and where patience ends the run.
@pytest.mark.parametrize("at", [8, 9, 11, 19, 20, 22, 27, 35])
def test_interrupted_run_selects_the_same_model(parts, uninterrupted, tmp_path, at):
    expected, events, _ = uninterrupted
    seen = []

    def tick(name):
        seen.append(name)
        if len(seen) == at:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_with_checkpoints(parts, str(tmp_path), tick)
    assert seen == events[:at]
    if "after save" in seen:  # The selected model can be read at any time.
        assert kept_model(str(tmp_path))[3] > 0
    assert run_with_checkpoints(parts, str(tmp_path)) == expected
    assert os.listdir(tmp_path / workdir_lib.BEST) == ["4"]


# Signals in a step, in each part of an epoch's end, while saving, and after the last step.
@pytest.mark.parametrize("at", [1, 4, 5, 7, 9, 10, 13, 20, 24, 33, 37])
def test_signal_saves_all_progress(parts, uninterrupted, tmp_path, at):
    """The run saves, even if the signal is repeated within a second, and resumes bit for bit."""
    expected, events, _ = uninterrupted
    seen, stop = [], StopSignal()
    signals = [signal.SIGINT, signal.SIGINT] if at % 2 else [signal.SIGTERM]

    def tick(name):
        seen.append(name)
        if len(seen) == at:
            for number in signals:
                os.kill(os.getpid(), number)

    steps = events[:at].count("step")
    if at >= events.index("after save", len(events) - 3):
        with stop.installed():
            assert run_with_checkpoints(parts, str(tmp_path), tick, stop) == expected
        return
    message = r"stopped by SIG.*: saved at step"
    with stop.installed(), pytest.raises(Preempted, match=message) as error:
        run_with_checkpoints(parts, str(tmp_path), tick, stop)
    saved = int(str(error.value).rsplit(" ", 1)[1])
    # The current step is finished, and one more if the signal came after the check of that step.
    assert steps <= saved <= steps + 1
    assert digests.newest_intact(str(tmp_path / workdir_lib.CHECKPOINTS)) == (saved, {})
    resumed = []
    assert run_with_checkpoints(parts, str(tmp_path), resumed.append) == expected
    assert resumed.count("step") == 8 - saved
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(uninterrupted[2]))


def test_non_finite_state_is_never_saved(parts, tmp_path, monkeypatch):
    """Neither when a checkpoint is due nor on a signal; a loss is that of the state before it."""
    original_step = train_step

    def make_non_finite(at, what):
        def step(state, batch, key):
            state, scalars = original_step(state, batch, key)
            if int(state.step) == at and what == "state":
                mean = state.params["mean"] * jnp.nan
                state = state._replace(params={**state.params, "mean": mean})
            if int(state.step) == at and what == "loss":
                scalars = {**scalars, "loss": float("nan")}
            return state, scalars

        monkeypatch.setitem(globals(), "train_step", step)

    cases = [(3, "loss", False), (3, "state", False), (3, "loss", True), (1, "state", True)]
    for number, (at, what, signalled) in enumerate(cases):
        stop, seen = StopSignal(), []

        def tick(name, seen=seen, at=at, signalled=signalled):
            seen.append(name)
            if signalled and name == "step" and seen.count("step") == at:
                os.kill(os.getpid(), signal.SIGTERM)

        make_non_finite(at, what)
        root = tmp_path / str(number)
        kept = "no checkpoint is saved yet"
        if at > 1:
            kept = rf"the checkpoint of step {at - 1} is kept"
        where = f"at step {at}" if what == "loss" else f"after step {at}"
        with stop.installed(), pytest.raises(NotFiniteError, match=rf"{where} .*; {kept}; .*rate"):
            run_with_checkpoints(parts, str(root), tick, stop)
        step, damaged = digests.newest_intact(str(root / workdir_lib.CHECKPOINTS))
        assert (step, damaged) == ((at - 1) or None, {})
        if step:
            assert np.isfinite(kept_model(str(root))[2])
        monkeypatch.undo()


def test_repeated_steps_replace_the_best_model_saved_before(parts, tmp_path, monkeypatch):
    """Repeated steps may round differently on some devices: the resumed run's model is kept."""
    seen, means, original_step = [], {}, train_step

    def tick(name):
        seen.append(name)
        if seen.count("after save_best") == 2:
            raise Interrupted

    def changed_step(state, batch, key):
        state, scalars = original_step(state, batch, key)
        state = state._replace(params={**state.params, "mean": state.params["mean"] + 1})
        means[int(state.step)] = float(state.params["mean"])
        return state, scalars

    with pytest.raises(Interrupted):
        run_with_checkpoints(parts, str(tmp_path), tick)
    assert sorted(os.listdir(tmp_path / workdir_lib.BEST)) == ["2", "4"]
    assert kept_model(str(tmp_path))[:2] == ("best", 2)
    monkeypatch.setitem(globals(), "train_step", changed_step)
    run_with_checkpoints(parts, str(tmp_path))
    assert kept_model(str(tmp_path)) == ("best", 4, means[4], 4)


def test_missing_best_model_is_an_error(parts, tmp_path):
    run_with_checkpoints(parts, str(tmp_path))
    shutil.rmtree(tmp_path / workdir_lib.BEST / "4")
    with pytest.raises(InputError, match="best: step 4, the best model, is missing"):
        tiny.saved(tmp_path)
