"""Which epoch becomes the model: rigged curves through the real loop, stopped at any point."""

import dataclasses
import json
import os
import shutil
import signal
import types

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import configuration, make_data
from vixml_jax import train
from vixml_jax import workdir as workdir_lib
from vixml_jax.config import LoopConfig
from vixml_jax.errors import InputError, NotFiniteError, Preempted
from vixml_jax.parallel import distributed, sharding
from vixml_jax.storage import digests
from vixml_jax.structs import LabelState, TrainState
from vixml_jax.training import trainer as trainer_lib
from vixml_jax.training.checkpoints import Checkpoints
from vixml_jax.training.metric_logger import CollapseGuard, Telemetry
from vixml_jax.training.preemption import Stop

SCALARS = {"loss": 1.0, "loss_text": 1.0, "gradient_norm": 1.0, "violators": 0.0}
CURVE = [10.0, 30.0, 30.0, 20.0, 99.0]  # At patience 2 the last is never reached.


class Stopped(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Model and data of a run without label prototypes: of it nothing is compiled."""
    config = configuration(make_data(tmp_path_factory.mktemp("raw")), "")
    labels = dataclasses.replace(config.labels, prototypes=False)
    batch = dataclasses.replace(config.batch, size=48, cluster_start=-1)
    config = dataclasses.replace(config, labels=labels, batch=batch)
    dataset = workdir_lib.open_dataset(config)
    tower, layout = train.make_tower(config, dataset)
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
    """What is left of a batch depends on all those before it."""
    params = {
        "mean": 0.9 * state.params["mean"] + float(np.mean(batch.label_ids)),
        "steps": state.params["steps"] + 1,
    }
    return state._replace(step=state.step + 1, params=params), SCALARS


def run(parts, checkpoints, workdir, curve, tick=lambda name: None, stop=None, **loop_flags):
    """Runs the loop from where the checkpoints stand; evaluations are read from the curve."""
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
        shares=sharding.num_shares(model.mesh),
        group=distributed.ALONE,
        checkpoints=checkpoints,
        guard=CollapseGuard(margin=0.1, num_negatives=4),
        evaluate=evaluate,
        split="valid",
        stop=stop or Stop(),
    )
    state, (clusters, position) = first_state(), trainer.start()
    if checkpoints.latest_step() is not None:
        state, clusters, position = checkpoints.restore(state, clusters)
        position = trainer_lib.Position(**position)
    telemetry = Telemetry(workdir, step=int(state.step), total_steps=20)
    try:
        state, position = trainer.run(state, clusters, position, telemetry)
    finally:
        telemetry.close()
    return state, position


class Nowhere:
    """Checkpoints of a run that is not stopped."""

    def __init__(self):
        self.best = None

    def __getattr__(self, name):
        return lambda *_: None

    def save_best(self, state, labels):
        self.best = int(state.step)


@pytest.mark.parametrize("seed", range(12))
def test_the_first_of_the_best_is_chosen_and_patience_counts(parts, tmp_path, seed):
    rng = np.random.default_rng(seed)
    epochs, every, patience = (int(rng.integers(*span)) for span in ((1, 9), (1, 4), (0, 4)))
    curve = rng.integers(0, 4, epochs).astype(float)  # So few values that there are ties.
    judged = [e for e in range(epochs) if (e + 1) % every == 0 or e == epochs - 1]
    firsts = [int(np.argmax(curve[judged[: n + 1]])) for n in range(len(judged))]
    ends = [n for n, first in enumerate(firsts) if patience and n - first >= patience]
    end = ends[0] if ends else len(judged) - 1

    checkpoints = Nowhere()
    flags = {"epochs": epochs, "eval_every": every, "patience": patience, "choose_by": "P@1"}
    state, position = run(parts, checkpoints, str(tmp_path), curve, **flags)
    assert int(state.step) == 2 * (judged[end] + 1)
    best = judged[firsts[end]]
    assert checkpoints.best == position.best_step == 2 * (best + 1)
    assert (position.best, position.waited) == (curve[best], end - firsts[end])
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    found = {line["epoch"]: line["valid/P@1"] for line in lines if "valid/P@1" in line}
    assert found == {epoch: curve[epoch] for epoch in judged[: end + 1]}
    config = types.SimpleNamespace(loop=LoopConfig(**flags))
    said = train.describe_choice(config, position, 2)
    assert said.startswith(f"model: of epoch {best}, the best in P@1 on valid, {curve[best]:.2f}; ")
    assert ("--loop.patience" in said) == (judged[end] < epochs - 1)


def chosen_run(parts, workdir, tick=lambda name: None, stop=None):
    """A run that keeps all of its checkpoints on disk, and how it ends."""
    checkpoints = Checkpoints(
        os.path.join(workdir, workdir_lib.CHECKPOINTS),
        keep=2,
        every=1,
        best=os.path.join(workdir, workdir_lib.BEST),
    )

    def around(name, call):
        def both(*args):
            tick(f"before {name}")
            call(*args)
            if name == "save":
                checkpoints.wait()  # The next is due, and taken, however slow the disk is.
            tick(f"after {name}")

        return both

    for name in ("save", "save_best", "drop_best_but"):
        setattr(checkpoints, name, around(name, getattr(checkpoints, name)))
    try:
        state, position = run(
            parts, checkpoints, workdir, CURVE, tick, stop,
            epochs=5, eval_every=1, choose_by="P@1", patience=2, save_every=1, log_every=1,
        )  # fmt: skip
    finally:
        checkpoints.close()
    lines = [json.loads(line) for line in open(os.path.join(workdir, "metrics.jsonl"))]
    lines = [{k: v for k, v in line.items() if not k.startswith("watch/")} for line in lines]
    return (float(state.params["mean"]), position, lines, kept_model(workdir))


def kept_model(workdir):
    """Step and parameters of what evaluation would read."""
    import orbax.checkpoint as ocp

    directory, step = workdir_lib.find_model(workdir)
    with ocp.CheckpointManager(directory, item_names=("model", "training", "position")) as manager:
        args = ocp.args.Composite(model=ocp.args.StandardRestore())
        params = manager.restore(step, args=args)["model"]["params"]
    return os.path.basename(directory), step, float(params["mean"]), int(params["steps"])


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    """An uninterrupted run, and all that happened in it."""
    events = []
    workdir = str(tmp_path_factory.mktemp("whole"))
    return chosen_run(parts, workdir, events.append), events, workdir


def test_a_run_out_of_patience_keeps_its_best_and_trains_no_more(parts, whole):
    (mean, position, lines, kept), events, workdir = whole
    assert (position.epoch, position.best, position.best_step, position.waited) == (4, 30.0, 4, 2)
    assert kept[:2] == ("best", 4) and kept[3] == 4 and kept[2] != mean
    assert os.listdir(os.path.join(workdir, workdir_lib.BEST)) == ["4"]
    assert events.count("step") == 8 and events.count("before save_best") == 2
    again = []
    assert chosen_run(parts, workdir, again.append) == (mean, position, lines, kept)
    assert not {"step", "evaluate", "before save", "before save_best"} & set(again)


# Of the 38 events: around the first best model, the second, and where patience ends.
@pytest.mark.parametrize("at", [8, 9, 11, 19, 20, 22, 27, 35])
def test_stopped_anywhere_it_chooses_the_same(parts, whole, tmp_path, at):
    expected, events, _ = whole
    seen = []

    def tick(name):
        seen.append(name)
        if len(seen) == at:
            raise Stopped

    with pytest.raises(Stopped):
        chosen_run(parts, str(tmp_path), tick)
    assert seen == events[:at]
    if "after save" in seen:  # What a run says that it chose is there at any time.
        assert kept_model(str(tmp_path))[3] > 0
    assert chosen_run(parts, str(tmp_path)) == expected
    assert os.listdir(tmp_path / workdir_lib.BEST) == ["4"]


# A signal in a step, in each part of an epoch's end, in saving, and where the run is over.
@pytest.mark.parametrize("at", [1, 4, 5, 7, 9, 10, 13, 20, 24, 33, 37])
def test_a_signal_leaves_all_that_was_done(parts, whole, tmp_path, at):
    """It saves, however often the signal comes within a second, and goes on bit for bit."""
    expected, events, _ = whole
    seen, stop = [], Stop()
    signals = [signal.SIGINT, signal.SIGINT] if at % 2 else [signal.SIGTERM]

    def tick(name):
        seen.append(name)
        if len(seen) == at:
            for number in signals:
                os.kill(os.getpid(), number)

    steps = events[:at].count("step")
    if at >= events.index("after save", len(events) - 3):
        with stop.caught():
            assert chosen_run(parts, str(tmp_path), tick, stop) == expected
        return
    with stop.caught(), pytest.raises(Preempted, match=r"stopped by SIG.*: saved at step") as told:
        chosen_run(parts, str(tmp_path), tick, stop)
    saved = int(str(told.value).rsplit(" ", 1)[1])
    # The step under way is finished; one more only if it came after all that looks for it.
    assert steps <= saved <= steps + 1
    assert digests.newest_whole(str(tmp_path / workdir_lib.CHECKPOINTS)) == (saved, {})
    again = []
    assert chosen_run(parts, str(tmp_path), again.append) == expected
    assert again.count("step") == 8 - saved
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(whole[2]))


def test_a_state_that_is_not_finite_is_never_saved(parts, tmp_path, monkeypatch):
    """Not by steps, and not by a signal: a loss is that of the state before its step."""
    as_before = train_step

    def ruin(at, what):
        def step(state, batch, key):
            state, scalars = as_before(state, batch, key)
            if int(state.step) == at and what == "state":
                mean = state.params["mean"] * jnp.nan
                state = state._replace(params={**state.params, "mean": mean})
            if int(state.step) == at and what == "loss":
                scalars = {**scalars, "loss": float("nan")}
            return state, scalars

        monkeypatch.setitem(globals(), "train_step", step)

    cases = [(3, "loss", False), (3, "state", False), (3, "loss", True), (1, "state", True)]
    for number, (at, what, signalled) in enumerate(cases):
        stop, seen = Stop(), []

        def tick(name, seen=seen, at=at, signalled=signalled):
            seen.append(name)
            if signalled and name == "step" and seen.count("step") == at:
                os.kill(os.getpid(), signal.SIGTERM)

        ruin(at, what)
        root = tmp_path / str(number)
        kept = rf"that of step {at - 1} is kept" if at > 1 else "no checkpoint is saved yet"
        where = f"at step {at}" if what == "loss" else f"after step {at}"
        with stop.caught(), pytest.raises(NotFiniteError, match=rf"{where} .*; {kept}; .*rate"):
            chosen_run(parts, str(root), tick, stop)
        step, damaged = digests.newest_whole(str(root / workdir_lib.CHECKPOINTS))
        assert (step, damaged) == ((at - 1) or None, {})
        if step:
            assert np.isfinite(kept_model(str(root))[2])
        monkeypatch.undo()


def test_what_is_run_again_replaces_what_was_kept(parts, tmp_path, monkeypatch):
    """Not every device gives the same sums twice: what counts is the run that goes on."""
    seen, again, as_before = [], {}, train_step

    def tick(name):
        seen.append(name)
        if seen.count("after save_best") == 2:
            raise Stopped

    def otherwise(state, batch, key):
        state, scalars = as_before(state, batch, key)
        state = state._replace(params={**state.params, "mean": state.params["mean"] + 1})
        again[int(state.step)] = float(state.params["mean"])
        return state, scalars

    with pytest.raises(Stopped):
        chosen_run(parts, str(tmp_path), tick)
    assert sorted(os.listdir(tmp_path / workdir_lib.BEST)) == ["2", "4"]
    assert kept_model(str(tmp_path))[:2] == ("best", 2)
    monkeypatch.setitem(globals(), "train_step", otherwise)
    chosen_run(parts, str(tmp_path))
    assert kept_model(str(tmp_path)) == ("best", 4, again[4], 4)


def test_a_chosen_model_that_is_gone_is_told(parts, tmp_path):
    chosen_run(parts, str(tmp_path))
    shutil.rmtree(tmp_path / workdir_lib.BEST / "4")
    with pytest.raises(InputError, match="best: lacks step 4, which training chose"):
        workdir_lib.find_model(str(tmp_path))
