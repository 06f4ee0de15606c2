"""Signals, as they come to one process and to one of several."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from vixml_jax.errors import Preempted
from vixml_jax.training.preemption import Stop


def test_raised_where_it_comes_but_held_where_it_must_not():
    with Stop().caught() as stop:
        with stop.held():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked == "SIGTERM"
            with pytest.raises(Preempted, match="stopped by SIGTERM: nothing was under way"):
                with stop.at_once():
                    raise AssertionError("went on")
    with Stop().caught() as stop, pytest.raises(Preempted, match="SIGINT"):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.0)
        raise AssertionError("went on")
    with Stop().caught() as stop, stop.held():
        with pytest.raises(Preempted), stop.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)
            raise AssertionError("went on")
        assert stop._is_held


def test_once_all_is_over_signals_change_nothing():
    with Stop().caught():
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)


SECOND = """
import os, signal, sys, time
from vixml_jax.training.stopping import Stop
number = getattr(signal, sys.argv[1])
with Stop().caught() as stop, stop.held():
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), number)  # The same one, to the process's group.
    time.sleep(1.2)
    print("still here", flush=True)
    os.kill(os.getpid(), number)
    time.sleep(9)
    print("still here")
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_ends_the_process(name):
    done = subprocess.run([sys.executable, "-c", SECOND, name], capture_output=True, text=True)
    assert done.returncode == -getattr(signal, name) and done.stdout == "still here\n"


def test_two_processes_stop_and_save_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    here = pathlib.Path(__file__).parent
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
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
    told = [process.communicate(timeout=240) for process in started]
    assert [said.strip().endswith("fine") for said, _ in told] == [True, True], told
    assert "step 8 is damaged" in told[0][0] and "damaged" not in told[1][0]
