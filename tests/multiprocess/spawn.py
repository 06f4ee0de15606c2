"""Starts the processes of one run by hand, each with host devices of its own."""

import os
import re
import subprocess
import sys

from vixml_jax import config as config_lib
from vixml_jax.benchmarks.support import workers


def flags_of(config):
    """What to write on a command line for a configuration."""
    return [
        f"--{prefix}{field.name}="
        + (
            ",".join(map(str, value))
            if isinstance(value, list)
            else str(value).lower()
            if isinstance(value, bool)
            else str(value)
        )
        for prefix, field, value in config_lib._leaves(config)
    ]


def start(module, arguments, *, num_processes, devices):
    """Processes of `python -m module`, or of a file, that have `devices` each; one does without a
    coordinator."""
    program = [module] if module.endswith(".py") else ["-m", module]
    return [
        subprocess.Popen(
            [sys.executable, *program, *arguments, *together],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            },
        )
        for together in workers.together(num_processes)
    ]


def finish(children, timeout=240):
    """Statuses, and what each printed: [(status, stdout, stderr)]."""
    try:
        said = [child.communicate(timeout=timeout) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *words) for child, words in zip(children, said, strict=True)]


def printed(words):
    """The lines of standard output that are Python's: Gloo prints some of its own, several threads
    at once."""
    return [line for line in words.splitlines() if not re.search(r"\[Gloo\]|peer ranks|^$", line)]
