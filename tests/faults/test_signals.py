"""SIGTERM and SIGINT at any time: one line, the right status, no crash, nothing left."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

PROGRAM = """
import os, sys, time
from vixml_jax import command_line, errors
from vixml_jax.runtime import signals
from vixml_jax.training.preemption import StopSignal

signals.GRACE_S = 1.0

def block():
    print("ready", flush=True)
    while True:  # As a library that swallows what a signal handler raises.
        try:
            time.sleep(60)
        except BaseException:
            print("swallowed", flush=True)

def main(argv):
    "Waits."
    {what}

command_line.launch(main, lambda: None)
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
IN_RUN = "with StopSignal().installed() as stop, stop.{context}(): block()"


def end(what, number):
    """The status, output and errors of a program that gets a signal once it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(what=what)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = process.stdout.readline()
    if number:
        process.send_signal(number)
        process.send_signal(number)  # To the process group, too.
    output, errors = process.communicate(timeout=60)
    return process.returncode, first + output, errors


@pytest.mark.parametrize(
    "what, number, status, cleaned, line",
    [
        (UNWIND.strip(), signal.SIGTERM, 143, "cleaned", "stopped by SIGTERM"),
        (UNWIND.strip(), signal.SIGINT, 130, "cleaned", "interrupted"),
        ("block()", signal.SIGTERM, 143, "swallowed", "stopped by SIGTERM"),
        (
            IN_RUN.format(context="leaving"),
            signal.SIGTERM,
            75,
            "",
            "stopped by SIGTERM: no unsaved",
        ),
        (IN_RUN.format(context="leaving"), signal.SIGINT, 75, "", "stopped by SIGINT: no unsaved"),
        (IN_RUN.format(context="unwinding"), signal.SIGTERM, 75, "swallowed", "stopped by SIGTERM"),
    ],
)
def test_a_signal_ends_a_command_whatever_its_main_thread_does(what, number, status, cleaned, line):
    found, output, errors = end(what, number)
    assert found == status, errors
    assert cleaned in output and errors.startswith(line) and errors.count("\n") == 1


def test_a_signal_to_a_forked_child_does_not_reach_its_parent():
    assert end(FORKED.strip(), None) == (0, f"{signal.SIGTERM.value}\n", "")


@pytest.mark.slow
def test_signals_from_the_start_of_a_run_to_its_first_steps(tmp_path):
    from vixml_jax.benchmarks import fault_injection as faults

    data = faults.make_data(str(tmp_path / "source"))
    reference = faults.Run(data, str(tmp_path / "reference"))
    start = time.monotonic()
    assert reference.finish()[0] == 0
    seconds, expected = time.monotonic() - start, reference.state()
    rng = np.random.default_rng(5)
    for trial in range(40):
        run = faults.Run(data, str(tmp_path / f"run{trial}"))
        process = run.start()
        alive = faults.wait_for(process, faults.moment(rng, 0.6 * seconds))
        process.send_signal(signal.SIGINT if trial % 4 == 3 else signal.SIGTERM)
        then = time.monotonic()
        output, _ = process.communicate()
        early = -signal.SIGTERM, -signal.SIGINT, 130, 143  # While Python imports the command.
        assert process.returncode in (0, 75, *early), (trial, output)
        assert time.monotonic() - then < 10, (trial, output)
        assert "Fatal" not in output and (not alive or process.returncode != 139)
        if process.returncode in early:
            assert not os.path.exists(run.checkpoints), output
        if trial % 5 == 0:
            assert run.finish()[0] == 0
            assert faults.same(run.state(), expected), trial
