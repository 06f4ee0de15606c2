"""Where time goes: the real loop around a slow pipeline and a slow device; what it never does."""

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
from vixml_jax.training import trainer as trainer_lib
from vixml_jax.training.metric_logger import CollapseGuard, Telemetry
from vixml_jax.training.preemption import Stop
from vixml_jax.training.step_timer import Profiler, Watch, parse_window
from vixml_jax.training.train_step import TrainStep

PHASES = ("data", "host", "compute")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("raw"))


def lines_of(workdir):
    with open(os.path.join(workdir, "metrics.jsonl")) as file:
        return [json.loads(line) for line in file]


def test_phases_sum_to_the_wall_and_rates_follow():
    """A clock of our own: two steps, then one; compiling stands beside."""
    moments = iter([0.0, 1.0, 1.5, 2.0, 9.0, 9.25, 10.0, 12.0, 20.0, 21.0, 22.0])
    watch = Watch(peak_flops=1e6, now=lambda: next(moments))
    assert watch.report() == {} and watch.closing() == ""
    watch.start()  # At 1.
    for phase in ("data", "host", "compiling", "host", "compute"):
        watch.lap(phase)
    watch.count(queries=3, labels=4, tokens=50, flops=2e6)
    watch.count(queries=1, labels=4, tokens=10, flops=1e6)
    found = watch.report()
    assert found.pop("peak_memory_gib") > 0
    assert found == pytest.approx({
        "step_s": 1.0, "data_s": 0.25, "host_s": 0.375, "compute_s": 0.375, "data_share": 0.25,
        "host_share": 0.375, "compute_share": 0.375, "queries_per_s": 2.0, "labels_per_s": 4.0,
        "tokens_per_s": 30.0, "flops_per_s": 1.5e6, "mfu": 1.5,
    })  # fmt: skip
    watch.lap("nothing of ours")
    watch.report()
    watch.start()  # At 20.
    watch.lap("compute")
    watch.count(queries=8, labels=8, tokens=15, flops=0.0)
    watch.report()
    assert watch.closing().startswith(
        "step 1,000 ms: compute 58.3 %, host 25.0 %, waiting for data 16.7 %; "
        "4 queries/s, 25 tokens/s; MFU 100.0 %; peak memory of the process "
    )
    assert watch.closing().endswith("; beside the steps: compiling 7.0 s, nothing of ours 2.0 s")


class Slow:
    """A pipeline that takes its time over every batch, and knows how much: no sleep is shorter than
    told, on a busy machine many are longer."""

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
    """Works on one step after another, for some time each, and knows how much, while the host goes
    on."""

    def __init__(self, seconds):
        self._work = concurrent.futures.ThreadPoolExecutor(1)
        self._seconds, self.spent = seconds, 0.0
        self._under_way, self.most_under_way = [], 0

    def _step(self):
        began = time.perf_counter()
        time.sleep(self._seconds)
        self.spent += time.perf_counter() - began

    def program(self, batch, key):
        return self

    def __call__(self, state, batch, key):
        self._under_way = [one for one in self._under_way if not one.done()]
        self._under_way.append(self._work.submit(self._step))
        self.most_under_way = max(self.most_under_way, len(self._under_way))
        one = Scalar(self._under_way[-1])
        names = ("loss", "loss_text", "gradient_norm", "violators")
        return state._replace(step=state.step + 1), dict.fromkeys(names, one)


class Scalar:
    """A number that is there when its step is done."""

    def __init__(self, step):
        self._step = step

    def block_until_ready(self):
        self._step.result()

    def __array__(self, *args, **more):
        self._step.result()
        return np.float32(1.0)


@pytest.fixture(scope="module")
def parts(data):
    """Model and data of a run whose step is another; nothing of the model is compiled."""
    config = configuration(data, "")
    labels = dataclasses.replace(config.labels, prototypes=False)
    batch = dataclasses.replace(config.batch, size=8, cluster_start=-1)
    config = dataclasses.replace(config, labels=labels, batch=batch)
    dataset = workdir_lib.open_dataset(config)
    tower, layout = train.make_tower(config, dataset)
    return (
        config,
        dataset,
        workdir_lib.build_model(config, tower, layout, 20, workdir_lib.make_mesh(config)),
    )


class Unsaved:
    """Checkpoints that keep nothing, and take their time for it."""

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
def test_who_is_slow_is_told(parts, monkeypatch, tmp_path, data_s, device_s):
    config, dataset, model = parts
    made = input_pipeline.epoch_batches
    slow = []

    def slowly(*args, **more):
        slow.append(Slow(made(*args, **more), data_s))
        return slow[-1]

    monkeypatch.setattr(input_pipeline, "epoch_batches", slowly)
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
        shares=sharding.num_shares(model.mesh),
        group=distributed.ALONE,
        stop=Stop(),
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
    telemetry = Telemetry(str(tmp_path), step=0, total_steps=12)
    trainer_lib._all_finite(
        state
    )  # Compiled before, or saving would be as slow as the machine is busy.
    began = time.perf_counter()
    clusters, position = trainer.start()
    trainer._run_batches(state, clusters, position, telemetry)
    wall = time.perf_counter() - began
    telemetry.close()
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [5, 10, 12]
    steps = np.diff([0, *(line["step"] for line in lines)])

    def seconds(name):
        return float(np.sum(steps * [line[f"watch/{name}_s"] for line in lines]))

    saving = telemetry.watch._all.seconds["saving"] + telemetry.watch._recent.seconds["saving"]
    assert 0.05 <= unsaved.spent <= saving < unsaved.spent + 0.1
    assert seconds("step") == pytest.approx(sum(seconds(phase) for phase in PHASES))
    # Each line's own writing is in the next one's.
    assert 0.0 <= wall - seconds("step") - saving < 0.1
    waited = sum(one.spent for one in slow)
    assert waited - 0.06 <= seconds("data") <= waited + 0.2
    # A device that is busy while the host waits for data keeps what is left for "compute"; so does
    # one that is busy while the host works, as it does long where others want the processor.
    left = device.spent - waited
    assert left - seconds("host") - 0.06 <= seconds("compute") <= max(0.0, left) + 0.2
    assert seconds("host") < 2.0  # Whatever else this machine does.
    for line in lines:
        shares = [line[f"watch/{phase}_share"] for phase in PHASES]
        assert sum(shares) == pytest.approx(1.0)
        assert line["watch/flops_per_s"] > 0 and "watch/mfu" not in line  # Of a CPU.
    assert device.most_under_way == (trainer_lib.STEPS_UNDER_WAY if device_s > data_s else 1)
    queries = np.sum(steps * [x["watch/queries_per_s"] * x["watch/step_s"] for x in lines])
    assert queries == pytest.approx(90)  # The last of 12 batches of 8 has two.


def test_a_step_reads_nothing_and_compiles_nothing(data, tmp_path, monkeypatch):
    """While batches run, nothing implicit goes to the devices, nothing is read from them but where
    an epoch begins and a line is written, and nothing is compiled but programs of the step."""
    config = configuration(data, tmp_path / "run")
    config = dataclasses.replace(config, loop=dataclasses.replace(config.loop, save_every=100))
    kind = type(jnp.zeros(1))
    value, run_batches, program = kind._value, trainer_lib.Trainer._run_batches, TrainStep.program
    inside, steps, reads, compiled, programs = False, 0, [], [], set()

    def read(self):
        if inside:
            reads.append(steps)
        return value.fget(self)

    def counted(self, batch, key):
        nonlocal steps
        programs.add(program(self, batch, key))
        steps += inside
        return program(self, batch, key)

    def guarded(self, *args):
        nonlocal inside
        with jax.transfer_guard("disallow"):
            with pytest.raises(Exception, match="Disallowed host-to-device"):
                jnp.ones(3) + np.ones(3)  # The guard is there.
            inside = True
            state = run_batches(self, *args)
            inside = False
        return state

    def compiles(event, *args, **more):
        if inside and "backend_compile" in event:
            compiled.append(event)

    monkeypatch.setattr(kind, "_value", property(read))
    monkeypatch.setattr(TrainStep, "program", counted)
    monkeypatch.setattr(trainer_lib.Trainer, "_run_batches", guarded)
    jax.monitoring.register_event_duration_secs_listener(compiles)
    train.train(config)
    assert steps == 18
    assert set(reads) == {0, 3, 6, 9, 12, 15, 18}
    assert len(compiled) == len(programs) - 1  # The first is compiled for the memory plan.


def train_profiled(config, path, window):
    """What a run says, in a process of its own: where the compiler of TPUs has been loaded, as by
    other tests, JAX's profiler ends the process."""
    path.write_text(config.to_json())
    program = (
        "import sys; from vixml_jax import config, train; "
        f"train.train(config.load(sys.argv[1]), profile={window})"
    )
    command = [sys.executable, "-c", program, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def test_a_window_of_steps_is_profiled(data, tmp_path):
    """It is no part of what a run is resumed by; a trace that the end of an epoch cuts is kept."""
    config = configuration(data, tmp_path / "run")
    where = os.path.join(config.workdir, "profile")
    said = train_profiled(config, tmp_path / "config.json", (4, 9))
    assert f"profile of steps 5 to 6: {where}; to look at it: pip install xprof" in said
    for kind in ("*.xplane.pb", "perfetto_trace.json.gz"):
        (path,) = glob.glob(os.path.join(where, "plugins", "profile", "*", kind))
        assert os.path.getsize(path) > 1000
    said = train_profiled(config, tmp_path / "config.json", (2, 3))  # Over: no step is left.
    assert "--profile_steps=2:3: none of these steps was run" in said


def test_a_trace_begins_and_ends_where_it_should(tmp_path, monkeypatch):
    """Steps under way are awaited at either end, so that the window holds its steps whole."""
    seen, step = [], 0

    class Running:
        def __init__(self, number):
            self.number = number

        def block_until_ready(self):
            seen.append(("await", self.number))

    monkeypatch.setattr(jax, "block_until_ready", lambda x: [one.block_until_ready() for one in x])
    profiler = jax.profiler
    monkeypatch.setattr(profiler, "start_trace", lambda *args, **more: seen.append(("start", step)))
    monkeypatch.setattr(profiler, "stop_trace", lambda: seen.append(("stop", step)))
    for first in (0, 4):  # A run from its start, and one resumed inside of the window.
        said = []
        watched = Profiler((3, 5), str(tmp_path), said.append)
        for step in range(first, 8):
            watched.at(step, [Running(step)])
        watched.close()
        assert said[0].startswith(f"profile of steps {max(first, 3) + 1} to 5: {tmp_path};")
        assert len(said) == 1
    assert seen == [
        ("await", 3), ("start", 3), ("await", 5), ("stop", 5),
        ("await", 4), ("start", 4), ("await", 5), ("stop", 5),
    ]  # fmt: skip


def test_the_window_is_told_as_two_numbers():
    assert parse_window("") is None
    assert parse_window("100:110") == (100, 110)
    for bad in ("100", "100:", ":5", "5:5", "7:5", "-1:3", "a:b", "1:2:3"):
        with pytest.raises(InputError, match=f"--profile_steps={bad}: expected START:END"):
            parse_window(bad)


def test_the_bar_tells_of_a_wait_that_matters(tmp_path, monkeypatch):
    telemetry = Telemetry(str(tmp_path), step=0, total_steps=2)
    shown = []
    monkeypatch.setattr(telemetry._bar, "set_postfix_str", lambda text, **more: shown.append(text))
    for share in (0.02, 0.021):
        found = {"queries_per_s": 600.0, "data_share": share}
        monkeypatch.setattr(telemetry.watch, "report", lambda found=found: found)
        telemetry.scalars(1, {"loss": 1.0, "violators": 2.0})
    telemetry.close()
    assert shown == [
        "loss 1.0000, violators 2.00, 600 queries/s",
        "loss 1.0000, violators 2.00, 600 queries/s, 2 % waiting for data",
    ]


class Told:
    """A device that says what it holds."""

    def __init__(self, peak):
        self._peak = peak

    def memory_stats(self):
        return {"peak_bytes_in_use": self._peak}


def test_the_fullest_device_counts(monkeypatch):
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    assert host_memory.peak_of_a_device() == pytest.approx(peak * 1024, rel=0.02)
    monkeypatch.setattr(jax, "local_devices", lambda: [Told(3), Told(7), Told(5)])
    assert host_memory.peak_of_a_device() == 7
