"""Starts the processes of one run by hand, each with host devices of its own."""

import os
import re
import socket
import subprocess
import sys

from vixml_jax import config as config_lib


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
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    program = [module] if module.endswith(".py") else ["-m", module]
    children = []
    for index in range(num_processes):
        together = [
            f"--coordinator=localhost:{port}",
            f"--num_processes={num_processes}",
            f"--process_index={index}",
        ]
        children.append(
            subprocess.Popen(
                [sys.executable, *program, *arguments, *(together if num_processes > 1 else [])],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
                },
            )
        )
    return children


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
