"""Environment of processes that tests start."""

import os


def environment(devices):
    """That of this process, with as many host devices; programs compile as fast as in tests."""
    flags = os.environ.get("XLA_FLAGS", "")  # Of a flag that is given twice the last one counts.
    flags += f" --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags}
