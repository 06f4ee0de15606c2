"""`--deterministic` reaches XLA before its devices start."""

import os
import subprocess
import sys

SCRIPT = """
import os, sys
from vixml_jax import command_line, train

def start(*_):
    import jax
    print(jax.devices()[0].platform, os.environ.get("XLA_FLAGS"))
    sys.stdout.flush()
    os._exit(0)

train.distributed.start = start
command_line.launch(train.main, train.define_flags)
"""


def test_deterministic_sets_the_flag_of_xla_before_devices_start():
    """XLA ends a process that gives it a flag that it does not know."""
    given = "--xla_force_host_platform_device_count=2"
    for arguments in ([], ["--deterministic"]):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *arguments],
            env={**os.environ, "XLA_FLAGS": given, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        expected = [given] + ["--xla_gpu_deterministic_ops=true"] * bool(arguments)
        assert done.stdout.split() == ["cpu", *expected]
