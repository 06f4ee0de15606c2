"""Signals at any time: one line, the right status, no crash, nothing left."""

import os
import pty
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from vixml_jax.benchmarks.support import killed_commands
from vixml_jax.runtime import progress
from vixml_jax.structs import Shard
from vixml_jax.training.clustering import balanced, bisecting

PROGRAM = """
import os, sys, time
from vixml_jax import command_line, errors
from vixml_jax.runtime import progress, signals

signals.GRACE_S = 1.0

def block():
    while True:  # As a library that swallows what a signal handler raises.
        try:
            print("ready", flush=True)
            time.sleep(60)
        except BaseException:
            print("swallowed", flush=True)

def main(argv):
    "Waits."
    {what}

command_line.launch(main, lambda: None)
"""
# As compiled code that calls Python and makes an error of its own of whatever that raises.
TURNED = """
    try:
        print("ready", flush=True); time.sleep(60)
    except BaseException:
        raise {error} from None
"""
UNWIND = """
    try:
        print("ready", flush=True); time.sleep(60)
    finally:
        print("cleaned", flush=True)
"""
FORKED = """
    if os.fork() == 0:
        os.kill(os.getpid(), 15); time.sleep(60)
    print(os.wait()[1], flush=True); time.sleep(1.5)
"""
IN_RUN = """
    from vixml_jax.training.preemption import StopSignal
    with StopSignal().installed() as stop, stop.{context}(): block()
"""
# Prints to its terminal, of which it is the leader, before and after the terminal is closed.
ON_TERMINAL = """
    from vixml_jax.training.preemption import StopSignal
    os.open(os.ttyname(0), os.O_RDWR)
    with StopSignal().installed() as stop, stop.deferred(), progress.track("items", None) as done:
        start = time.monotonic()
        while stop.requested_by is None or time.monotonic() < start + 2:
            print("ready", flush=True)
            done(1)
        raise stop.preempted("saved")
"""


def start(*command, **options):
    """Starts a command in a process; `options` are those of `Popen`."""
    pipes = {name: subprocess.PIPE for name in ("stdout", "stderr")}
    return subprocess.Popen(command, text=True, **({"stdin": subprocess.DEVNULL} | pipes | options))


def end(what, *numbers, before=()):
    """The status, output and errors of a program that gets signals once it is ready.

    Args:
      what: What it does.
      numbers: Of the signals.
      before: Words before the command.
    """
    process = start(*before, sys.executable, "-c", PROGRAM.format(what=what.strip()))
    first = process.stdout.readline()
    for number in numbers:
        process.send_signal(number)
        process.send_signal(number)  # To the process group, too.
    output, errors = process.communicate(timeout=60)
    return process.returncode, first + output, errors


@pytest.mark.parametrize(
    "what, number, status, cleaned, line",
    [
        (UNWIND, signal.SIGTERM, 143, "cleaned", "stopped by SIGTERM"),
        (UNWIND, signal.SIGINT, 130, "cleaned", "interrupted"),
        (UNWIND, signal.SIGHUP, 129, "cleaned", "stopped by SIGHUP"),
        (TURNED.format(error="ValueError(5)"), signal.SIGINT, 130, "", "interrupted"),
        (TURNED.format(error="OSError(28, 'x')"), signal.SIGTERM, 143, "", "stopped by SIGTERM"),
        (TURNED.format(error="errors.InputError('x')"), signal.SIGHUP, 129, "", "stopped by"),
        ("block()", signal.SIGTERM, 143, "swallowed", "stopped by SIGTERM"),
        (
            IN_RUN.format(context="leaving"),
            signal.SIGTERM,
            75,
            "",
            "stopped by SIGTERM: no unsaved",
        ),
        (IN_RUN.format(context="leaving"), signal.SIGINT, 75, "", "stopped by SIGINT: no unsaved"),
        (IN_RUN.format(context="leaving"), signal.SIGHUP, 75, "", "stopped by SIGHUP: no unsaved"),
        (IN_RUN.format(context="unwinding"), signal.SIGTERM, 75, "swallowed", "stopped by SIGTERM"),
    ],
)
def test_a_signal_ends_a_command_whatever_its_main_thread_does(what, number, status, cleaned, line):
    found, output, errors = end(what, number)
    assert found == status, errors
    assert cleaned in output and errors.startswith(line) and errors.count("\n") == 1


@pytest.mark.parametrize("seconds", [0, 0.3])
@pytest.mark.parametrize(
    "number, command, status, line",
    [
        (signal.SIGTERM, ("vixml_jax.train", "--data=x"), 75, "stopped by SIGTERM: no unsaved"),
        (signal.SIGINT, ("vixml_jax", "train"), 75, "stopped by SIGINT: no unsaved"),
        (signal.SIGHUP, ("vixml_jax.train",), 75, "stopped by SIGHUP: no unsaved"),
        (signal.SIGTERM, ("vixml_jax.predict", "train"), 143, "stopped by SIGTERM"),
        (signal.SIGINT, ("vixml_jax.evaluate",), 130, "interrupted"),
        (signal.SIGHUP, ("vixml_jax", "export"), 129, "stopped by SIGHUP"),
    ],
)
def test_a_signal_ends_a_command_that_is_being_imported(number, command, status, line, seconds):
    process = start(sys.executable, "-m", *command)
    killed_commands.wait_for_start(process)
    time.sleep(seconds)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (status, "")
    assert errors.startswith(line) and errors.count("\n") == 1
    if status == 75:
        assert errors.endswith(f"; to resume: {sys.executable} -m {' '.join(command)}\n")


def test_a_command_that_ignores_hangups_goes_on():
    """As `nohup` starts it."""
    found, output, errors = end(UNWIND, signal.SIGHUP, signal.SIGTERM, before=["nohup"])
    assert (found, output, errors) == (143, "ready\ncleaned\n", "stopped by SIGTERM\n")


def test_a_closed_terminal_stops_a_run_that_prints():
    leader, terminal = pty.openpty()
    program = PROGRAM.format(what=ON_TERMINAL.strip())
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    process = start(sys.executable, "-c", program, start_new_session=True, **streams)
    os.close(terminal)
    assert os.read(leader, 5) == b"ready"
    os.close(leader)
    assert process.wait(60) == 75


class Stopped(Exception):
    """Ends a clustering."""


def test_a_clustering_ends_soon_after_a_request(monkeypatch):
    """Wherever the request arrives, few groups are split after it."""
    monkeypatch.setattr(balanced, "MAX_LOCAL_ROWS", 4000)
    x = np.random.default_rng(0).normal(size=(16000, 4)).astype(np.float32)
    splits, checks, limit = [], [], np.inf

    def cluster():
        splits.clear()
        checks.clear()
        return balanced.balanced_clusters(Shard(np.arange(len(x)), x), len(x), 4000, seed=0)

    def check(together):
        checks.append(len(splits))
        if len(checks) > limit:
            raise Stopped

    def counted(function):
        return lambda *arguments: (splits.append(function), function(*arguments))[1]

    for name in ("bisect", "_improve_small"):
        monkeypatch.setattr(bisecting, name, counted(getattr(bisecting, name)))
    with progress.checking(check):
        expected = cluster()
        total, num_checks = len(splits), len(checks)
        for limit in range(0, num_checks, 15):  # noqa: B007
            with pytest.raises(Stopped):
                cluster()
            assert len(splits) - checks[-1] <= total / 3
        limit = np.inf
        np.testing.assert_array_equal(cluster(), expected)


def test_a_signal_to_a_forked_child_does_not_reach_its_parent():
    assert end(FORKED) == (0, f"{signal.SIGTERM.value}\n", "")


@pytest.mark.slow
def test_signals_from_the_start_of_a_run_to_its_end(tmp_path):
    from vixml_jax.benchmarks import fault_injection as faults

    data = faults.make_data(str(tmp_path / "source"))
    reference = faults.Run(data, str(tmp_path / "reference"))
    start = time.monotonic()
    assert reference.finish()[0] == 0
    seconds, expected = time.monotonic() - start, reference.state()
    rng, statuses = np.random.default_rng(5), []
    for trial in range(40):
        run = faults.Run(data, str(tmp_path / f"run{trial}"))
        process = run.start()
        killed_commands.wait_for_start(process)
        faults.wait_for(process, faults.moment(rng, seconds))
        process.send_signal((signal.SIGTERM, signal.SIGINT, signal.SIGHUP)[trial % 3])
        then = time.monotonic()
        output, _ = process.communicate()
        statuses.append(process.returncode)
        assert process.returncode in (0, 75), (trial, process.returncode, output)
        seconds *= 0.9 if process.returncode == 0 else 1.0  # It had ended: runs are faster now.
        assert time.monotonic() - then < 20, (trial, output)
        assert "Traceback" not in output and "Fatal" not in output, (trial, output)
        if run.saved() or trial % 4 == 0:
            status, output = run.finish()
            assert status == 0 and faults.same(run.state(), expected), (trial, output)
    assert statuses.count(75) > 20


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_resumes_to_the_same_bits(tmp_path):
    from vixml_jax.benchmarks import fault_injection as faults

    data = faults.make_data(str(tmp_path / "source"))
    changes = {"loop.epochs": 60, "loop.eval_every": 100}
    reference, run = (faults.Run(data, str(tmp_path / name), **changes) for name in ("one", "two"))
    assert reference.finish()[0] == 0
    leader, terminal = pty.openpty()
    program = (
        "import os, sys; os.open(os.ttyname(0), os.O_RDWR); os.execv(sys.argv[1], sys.argv[1:])"
    )
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    command = (sys.executable, "-c", program, *run.command)
    process = start(*command, start_new_session=True, **streams)
    os.close(terminal)
    while not run.saved():
        if select.select([leader], [], [], 0.01)[0]:
            os.read(leader, 1 << 16)
    os.close(leader)
    assert process.wait(60) == 75
    assert 0 < run.saved()[-1] < reference.saved()[-1]
    status, output = run.finish()
    assert status == 0 and faults.same(run.state(), reference.state()), output
