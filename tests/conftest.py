"""Eight host devices for every test, set before JAX starts; one cache of compiled programs."""

import os
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    # On a busy machine eight devices may take longer than 40 s to synchronise.
    " --xla_cpu_collective_call_terminate_timeout_seconds=300"
    # Most of the time goes into compiling small programs, which these nearly halve.
    " --xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
).strip()
# Runs that are stopped, resumed and repeated compile their step once. Workers of pytest-xdist
# inherit the directory from the process that starts them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vixml_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Under nohup, processes that tests start would ignore it as well.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Directories and files whose tests take longest. Workers get them first, so that they end together.
SLOWEST = ("benchmarks", "multiprocess", "test_train", "training", "parallel", "serving", "storage")


def pytest_collection_modifyitems(items):
    """Puts the slowest files first; within a file the order stays."""

    def is_fast(item):
        return not item.nodeid.removeprefix("tests/").startswith(SLOWEST)

    items.sort(key=is_fast)
