"""Training runs that are killed, stopped, damaged, or run out of disk space."""

import os
import time

import numpy as np
import pytest

from vixml_jax.benchmarks import fault_injection
from vixml_jax.benchmarks.support import killed_commands


class Runs:
    """Makes runs on one data set; holds the final state of an undisturbed run."""

    def __init__(self, root):
        self.root, self.count = root, 0
        self.data = fault_injection.make_data(str(root))
        then = time.monotonic()
        run = self()
        status, output = run.finish()
        assert status == 0, output
        self.expected, self.seconds = run.state(), time.monotonic() - then

    def __call__(self, **changes):
        self.count += 1
        changes = {"loop.epochs": 3} | changes
        return fault_injection.Run(self.data, str(self.root / f"run{self.count}"), **changes)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("faults"))


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bits(make):
    seed = int(np.random.default_rng().integers(2**31))
    rows = fault_injection.kills(make, make.expected, make.seconds, 2, seed)
    assert [(row.count, row.recovered) for row in rows] == [(1, 1), (1, 1)], (seed, rows)


def test_sigterm_saves_and_prints_the_command_to_resume(make):
    """In its steps: the status says so, and its last line the command that goes on."""
    run = make(**{"loop.epochs": 200})
    process = run.start()
    assert fault_injection.wait_for(process, lambda: len(run.saved()) > 0)
    process.terminate()
    said, _ = process.communicate()
    line = said.strip().split("\n")[-1]
    step = run.saved()[-1]
    assert process.returncode == 75 and "Traceback" not in said
    assert line.startswith(f"stopped by SIGTERM: saved at step {step}; to resume: "), line
    assert "-m vixml_jax.train --model.num_layers=1 " in line
    assert f" --workdir={run.workdir}" in line


def test_a_full_disk_loses_nothing(make, tmp_path):
    row = fault_injection.full_disk(
        lambda workdir: fault_injection.Run(make.data, workdir, **{"loop.epochs": 3}),
        make.expected,
        str(tmp_path / "disk"),
    )
    if not row.count:
        pytest.skip(row.note)
    assert row.recovered == 1, row


def test_a_loss_that_is_not_finite_ends_in_one_line(make):
    row = fault_injection.not_finite(make(**{"optimizer.learning_rate": 1e30}))
    assert row.recovered == 1, row
    assert "; the checkpoint of step " in row.note or "no checkpoint is saved yet" in row.note


@pytest.mark.slow
def test_no_fault_loses_a_run(tmp_path):
    rows = fault_injection.inject_all(str(tmp_path), num_kills=100, num_stops=10, seed=0)
    killed = [row for row in rows if "kill" in row.fault or "by a signal" in row.fault]
    assert sum(row.count for row in killed) == 100
    assert [row for row in rows if row.recovered < row.count] == []


def test_states_are_compared_bit_for_bit():
    one = {"a": np.array([0.0, np.nan]), "b": np.array([1])}
    assert fault_injection.same(one, {"a": np.array([0.0, np.nan]), "b": np.array([1])})
    assert not fault_injection.same(one, {"a": np.array([-0.0, np.nan]), "b": np.array([1])})
    assert not fault_injection.same(one, {"a": one["a"]})
    assert not fault_injection.same(one, {"a": one["a"], "b": np.array([1], np.int32)})


def test_a_command_that_is_killed_is_repeated_and_leaves_nothing(tmp_path):
    """By each of the signals, at any time or while it writes."""
    seed = int(np.random.default_rng().integers(2**31))
    raw = f"{os.path.dirname(fault_injection.make_data(str(tmp_path)))}/raw"
    flags = (f"--source={raw}", "--out={}/prepared", "--overwrite")
    earlier, prepare = (
        killed_commands.Job("prepare", (*flags, f"--max_tokens={n}"), "prepared") for n in (3, 8)
    )
    os.mkdir(tmp_path / "jobs")
    killed_commands.undisturbed(earlier, str(tmp_path / "jobs"))
    count = len(killed_commands.SIGNALS)
    row = killed_commands.kills(prepare, str(tmp_path / "jobs"), count, seed)
    assert (row.count, row.recovered) == (count, count), (seed, row.note)
