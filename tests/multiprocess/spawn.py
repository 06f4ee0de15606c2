"""Starts the processes of a run on this machine, each with its own host devices."""

import re
import subprocess
import sys

from tests import host_devices
from vixml_jax.benchmarks.support import workers


def start(module, arguments, *, num_processes, devices):
    """Starts processes of `python -m module`, or of a Python file, with `devices` devices each.

    A single process is started without a coordinator.
    """
    program = [module] if module.endswith(".py") else ["-m", module]
    return [
        subprocess.Popen(
            [sys.executable, *program, *arguments, *process_flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=host_devices.environment(devices) | {"JAX_PLATFORMS": "cpu"},
        )
        for process_flags in workers.cluster_flags(num_processes)
    ]


def finish(children, timeout=240):
    """(exit status, stdout, stderr) of each process."""
    try:
        outputs = [child.communicate(timeout=timeout) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *texts) for child, texts in zip(children, outputs, strict=True)]


def printed(text):
    """Lines of standard output without those of Gloo, which several threads may interleave."""
    return [line for line in text.splitlines() if not re.search(r"\[Gloo\]|peer ranks|^$", line)]
