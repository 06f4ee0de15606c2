"""Step-time breakdown with a slow pipeline and a slow device; no transfers in steps; profiles."""

import concurrent.futures
import dataclasses
import glob
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import configuration, make_data
from vixml_jax import train
from vixml_jax import workdir as workdir_lib
from vixml_jax.config import LoopConfig
from vixml_jax.data import input_pipeline
from vixml_jax.errors import InputError
from vixml_jax.parallel import distributed, sharding
from vixml_jax.runtime import host_memory
from vixml_jax.structs import LabelState, TrainState
from vixml_jax.training import build, epoch_loop
from vixml_jax.training import trainer as trainer_lib
from vixml_jax.training.metric_logger import CollapseGuard, MetricLogger
from vixml_jax.training.preemption import StopSignal
from vixml_jax.training.step_timer import Profiler, StepTimer, parse_window
from vixml_jax.training.train_step import TrainStep

PHASES = ("data", "host", "compute")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("raw"))


def lines_of(workdir):
    with open(os.path.join(workdir, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


def test_phases_add_up_to_the_wall_time():
    """With a fake clock: two steps, then one; compiling is not part of a step."""
    moments = iter([0.0, 1.0, 1.5, 2.0, 9.0, 9.25, 10.0, 12.0, 20.0, 21.0, 22.0])
    timer = StepTimer(peak_flops=1e6, now=lambda: next(moments))
    assert timer.report() == {} and timer.summary() == ""
    timer.start()  # At 1.
    for phase in ("data", "host", "compiling", "host", "compute"):
        timer.lap(phase)
    timer.count(queries=3, labels=4, tokens=50, flops=2e6)
    timer.count(queries=1, labels=4, tokens=10, flops=1e6)
    means = timer.report()
    assert means.pop("peak_memory_gib") > 0
    assert means == pytest.approx({
        "step_s": 1.0, "data_s": 0.25, "host_s": 0.375, "compute_s": 0.375, "data_share": 0.25,
        "host_share": 0.375, "compute_share": 0.375, "queries_per_s": 2.0, "labels_per_s": 4.0,
        "tokens_per_s": 30.0, "flops_per_s": 1.5e6, "mfu": 1.5,
    })  # fmt: skip
    timer.lap("other")
    timer.report()
    timer.start()  # At 20.
    timer.lap("compute")
    timer.count(queries=8, labels=8, tokens=15, flops=0.0)
    timer.report()
    assert timer.summary().startswith(
        "training step 1,000 ms: compute 58.3 %, host 25.0 %, waiting for data 16.7 %; "
        "4 queries/s, 25 tokens/s; MFU 100.0 %; peak memory per process "
    )
    assert timer.summary().endswith("; outside of steps: compiling 7.0 s, other 2.0 s")


class Slow:
    """A pipeline that sleeps before each batch, and measures it: sleeps may last longer."""

    def __init__(self, batches, seconds):
        self._batches, self._seconds, self.spent = batches, seconds, 0.0

    def __iter__(self):
        return self

    def __next__(self):
        began = time.perf_counter()
        batch = next(self._batches)
        time.sleep(self._seconds)
        self.spent += time.perf_counter() - began
        return batch

    def __getattr__(self, name):
        return getattr(self._batches, name)


class Device:
    """Runs one step after another, asynchronously, and measures how long it is busy."""

    def __init__(self, seconds):
        self._work = concurrent.futures.ThreadPoolExecutor(1)
        self._seconds, self.spent = seconds, 0.0
        self._in_flight, self.most_in_flight = [], 0

    def _step(self):
        began = time.perf_counter()
        time.sleep(self._seconds)
        self.spent += time.perf_counter() - began

    def program(self, batch, key):
        return self

    def __call__(self, state, batch, key):
        self._in_flight = [step for step in self._in_flight if not step.done()]
        self._in_flight.append(self._work.submit(self._step))
        self.most_in_flight = max(self.most_in_flight, len(self._in_flight))
        names = ("loss", "loss_text", "gradient_norm", "violators")
        scalar = Scalar(self._in_flight[-1])
        return state._replace(step=state.step + 1), dict.fromkeys(names, scalar)


class Scalar:
    """A number that is available when its step is done."""

    def __init__(self, step):
        self._step = step

    def block_until_ready(self):
        self._step.result()

    def __array__(self, *args, **more):
        self._step.result()
        return np.float32(1.0)


@pytest.fixture(scope="module")
def parts(data):
    """Configuration, data and model of a run; the model is not compiled."""
    config = configuration(data, "")
    labels = dataclasses.replace(config.labels, prototypes=False)
    batch = dataclasses.replace(config.batch, size=8, cluster_start=-1)
    config = dataclasses.replace(config, labels=labels, batch=batch)
    dataset = workdir_lib.open_dataset(config)
    tower, layout = build.make_tower(config, dataset)
    return (
        config,
        dataset,
        workdir_lib.build_model(config, tower, layout, 20, workdir_lib.make_mesh(config)),
    )


class Unsaved:
    """Checkpoints that save nothing, but take time for it."""

    spent = 0.0

    def due(self, step):
        return step % 6 == 0

    def save(self, *args):
        began = time.perf_counter()
        time.sleep(0.05)
        self.spent += time.perf_counter() - began

    def wait(self):
        pass

    def drop_best_but(self, step):
        pass


@pytest.mark.parametrize("data_s, device_s", [(0.03, 0.0), (0.0, 0.03), (0.02, 0.05), (0.05, 0.02)])
def test_breakdown_shows_what_is_slow(parts, monkeypatch, tmp_path, data_s, device_s):
    config, dataset, model = parts
    epoch_batches = input_pipeline.epoch_batches
    slow = []

    def slow_batches(*args, **kwargs):
        slow.append(Slow(epoch_batches(*args, **kwargs), data_s))
        return slow[-1]

    monkeypatch.setattr(input_pipeline, "epoch_batches", slow_batches)
    device, unsaved = Device(device_s), Unsaved()
    trainer = trainer_lib.Trainer(
        model,
        dataset,
        device,
        batch=config.batch,
        labels=config.labels,
        loop=LoopConfig(epochs=1, log_every=5),
        block=32,
        seed=0,
        shards=sharding.num_shards(model.mesh),
        group=distributed.ALONE,
        stop=StopSignal(),
        checkpoints=unsaved,
        guard=CollapseGuard(margin=0.1, num_negatives=4),
        evaluate=None,
    )
    state = TrainState(
        step=0,
        params={},
        frozen={},
        opt_state={},
        labels=LabelState(jnp.zeros((8, 2)), jnp.zeros(8, jnp.int32)),
        bank=jnp.zeros((8, 2)),
    )
    logger = MetricLogger(str(tmp_path), step=0, total_steps=12, num_epochs=1)
    epoch_loop.all_finite(state)  # Compiled here, so that it does not count as saving.
    began = time.perf_counter()
    clusters, position = trainer.start()
    trainer._run_batches(state, clusters, position, logger)
    wall = time.perf_counter() - began
    logger.close()
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [5, 10, 12]
    steps = np.diff([0, *(line["step"] for line in lines)])

    def seconds(name):
        return float(np.sum(steps * [line[f"step_time/{name}_s"] for line in lines]))

    saving = logger.timer._all.seconds["saving"] + logger.timer._recent.seconds["saving"]
    assert 0.05 <= unsaved.spent <= saving < unsaved.spent + 0.1
    assert seconds("step") == pytest.approx(sum(seconds(phase) for phase in PHASES))
    # The time to write a line counts in the next line.
    assert 0.0 <= wall - seconds("step") - saving < 0.1
    waited = sum(batches.spent for batches in slow)
    assert waited - 0.06 <= seconds("data") <= waited + 0.2
    # "compute" is the time that the device is busy after the host stopped waiting for data or
    # working, which takes long if other processes use the processor.
    left = device.spent - waited
    assert left - seconds("host") - 0.06 <= seconds("compute") <= max(0.0, left) + 0.2
    assert seconds("host") < 2.0  # On a busy machine as well.
    for line in lines:
        shards = [line[f"step_time/{phase}_share"] for phase in PHASES]
        assert sum(shards) == pytest.approx(1.0)
        assert (
            line["step_time/flops_per_s"] > 0 and "step_time/mfu" not in line
        )  # A CPU has no known peak.
    assert device.most_in_flight == (epoch_loop.STEPS_IN_FLIGHT if device_s > data_s else 1)
    queries = np.sum(steps * [x["step_time/queries_per_s"] * x["step_time/step_s"] for x in lines])
    assert queries == pytest.approx(90)  # The last of 12 batches of 8 has two queries.


def test_steps_read_nothing_and_compile_nothing(data, tmp_path, monkeypatch):
    """While batches run, there are no implicit transfers to devices, values are read only at the
    start of an epoch and for a line of metrics, and only training steps are compiled."""
    config = configuration(data, tmp_path / "run")
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, save_every=100))
    kind = type(jnp.zeros(1))
    value, run_batches, program = kind._value, trainer_lib.Trainer._run_batches, TrainStep.program
    inside, steps, reads, compiled, programs = False, 0, [], [], set()

    def read(self):
        if inside:
            reads.append(steps)
        return value.fget(self)

    def counting(self, batch, key):
        nonlocal steps
        programs.add(program(self, batch, key))
        steps += inside
        return program(self, batch, key)

    def guarded(self, *args):
        nonlocal inside
        with jax.transfer_guard("disallow"):
            with pytest.raises(Exception, match="Disallowed host-to-device"):
                jnp.ones(3) + np.ones(3)  # The guard is active.
            inside = True
            state = run_batches(self, *args)
            inside = False
        return state

    def compiles(event, *args, **more):
        if inside and "backend_compile" in event:
            compiled.append(event)

    monkeypatch.setattr(kind, "_value", property(read))
    monkeypatch.setattr(TrainStep, "program", counting)
    monkeypatch.setattr(trainer_lib.Trainer, "_run_batches", guarded)
    jax.monitoring.register_event_duration_secs_listener(compiles)
    train.train(config)
    assert steps == 18
    assert set(reads) == {0, 3, 6, 9, 12, 15, 18}
    assert len(compiled) == len(programs) - 1  # The first is compiled for the memory plan.


def train_profiled(config, path, window):
    """Trains in a process of its own and returns its output.

    Where libtpu has been loaded, as by other tests, JAX's profiler aborts the process.
    """
    path.write_text(config.to_json())
    program = (
        "import sys; from vixml_jax import config, train; "
        f"train.train(config.load(sys.argv[1]), profile={window})"
    )
    command = [sys.executable, "-c", program, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_window_of_steps_is_profiled(data, tmp_path):
    """The window may differ when a run is resumed; the end of an epoch ends the trace."""
    config = configuration(data, tmp_path / "run")
    where = os.path.join(config.workdir, "profile")
    output = train_profiled(config, tmp_path / "config.json", (4, 9))
    assert f"profile of steps 5 to 6 written to {where}; to view it, run `pip install" in output
    for kind in ("*.xplane.pb", "perfetto_trace.json.gz"):
        (path,) = glob.glob(os.path.join(where, "plugins", "profile", "*", kind))
        assert os.path.getsize(path) > 1000
    output = train_profiled(config, tmp_path / "config.json", (2, 3))  # No step is left.
    assert "--profile_steps=2:3: none of these steps was run" in output


def test_trace_contains_complete_steps(tmp_path, monkeypatch):
    """Running steps are awaited at either end of the window."""
    seen, step = [], 0

    class Running:
        def __init__(self, number):
            self.number = number

        def block_until_ready(self):
            seen.append(("await", self.number))

    monkeypatch.setattr(
        jax, "block_until_ready", lambda steps: [step.block_until_ready() for step in steps]
    )
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: seen.append(("start", step)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(("stop", step)))
    for first in (0, 4):  # A new run, and one resumed inside the window.
        lines = []
        profiler = Profiler((3, 5), str(tmp_path), lines.append)
        for step in range(first, 8):
            profiler.at(step, [Running(step)])
        profiler.close()
        start = f"profile of steps {max(first, 3) + 1} to 5 written to {tmp_path};"
        assert lines[0].startswith(start)
        assert len(lines) == 1
    assert seen == [
        ("await", 3), ("start", 3), ("await", 5), ("stop", 5),
        ("await", 4), ("start", 4), ("await", 5), ("stop", 5),
    ]  # fmt: skip


def test_window_is_two_numbers():
    assert parse_window("") is None
    assert parse_window("100:110") == (100, 110)
    for bad in ("100", "100:", ":5", "5:5", "7:5", "-1:3", "a:b", "1:2:3"):
        with pytest.raises(InputError, match=f"--profile_steps={bad}: expected START:END"):
            parse_window(bad)


class FakeDevice:
    """A device with a known peak of memory in use."""

    def __init__(self, peak):
        self._peak = peak

    def memory_stats(self):
        return {"peak_bytes_in_use": self._peak}


def test_peak_memory_is_that_of_the_fullest_device(monkeypatch):
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    assert host_memory.peak_device_memory() == pytest.approx(peak * 1024, rel=0.02)
    monkeypatch.setattr(jax, "local_devices", lambda: [FakeDevice(3), FakeDevice(7), FakeDevice(5)])
    assert host_memory.peak_device_memory() == 7
