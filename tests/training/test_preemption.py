"""Tests of requests to stop: signals to a single process, and to one of two processes."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests import host_devices
from vixml_jax.errors import Preempted
from vixml_jax.runtime import progress
from vixml_jax.training.preemption import StopSignal


def test_signal_is_raised_at_once_unless_deferred():
    with StopSignal().installed() as stop:
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested_by == "SIGTERM"
            with pytest.raises(Preempted, match="stopped by SIGTERM: no unsaved training"):
                with stop.interruptible():
                    raise AssertionError("not interrupted")
    with StopSignal().installed() as stop, pytest.raises(Preempted, match="SIGINT"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.0)
        raise AssertionError("not interrupted")
    with StopSignal().installed() as stop, stop.deferred():
        with pytest.raises(Preempted), stop.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            with progress.track("items", 2) as done:  # Not in the handler, but between two items.
                done(1)
                raise AssertionError("not interrupted")
        os.kill(os.getpid(), signal.SIGTERM)


def test_signals_are_ignored_after_the_context():
    with StopSignal().installed():
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)


SECOND_SIGNAL = """
import os, signal, sys, time
from vixml_jax.training.preemption import StopSignal
number = getattr(signal, sys.argv[1])
with StopSignal().installed() as stop, stop.deferred():
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # The same signal, to the process group.
    time.sleep(1.2)
    print("running", flush=True)
    os.kill(os.getpid(), number)
    time.sleep(9)
    print("running")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_second_signal_ends_the_process(name):
    command = [sys.executable, "-c", SECOND_SIGNAL, name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 128 + getattr(signal, name) and done.stdout == "running\n"


def test_two_processes_stop_and_save_together(tmp_path):
    with socket.socket() as free_port:
        free_port.bind(("localhost", 0))
        address = f"localhost:{free_port.getsockname()[1]}"
    here = pathlib.Path(__file__).parent
    env = host_devices.environment(2) | {"JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = os.pathsep.join([str(here), *sys.path])
    script = str(here / "two_processes.py")
    started = [
        subprocess.Popen(
            [sys.executable, script, address, str(index), str(tmp_path)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in started]
    assert [stdout.strip().endswith("passed") for stdout, _ in outputs] == [True, True], outputs
    assert "step 8 is damaged" in outputs[0][0] and "damaged" not in outputs[1][0]
