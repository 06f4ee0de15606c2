"""Eight host devices for every test, set before JAX starts; one cache of compiled programs.

With the variable VIXML_JAX_TEST_PLATFORM tests run on the devices of that platform instead.
"""

import os
import re
import signal
import tempfile

import pytest
from absl import flags

PLATFORM = os.environ.get("VIXML_JAX_TEST_PLATFORM", "")
os.environ["HF_HUB_OFFLINE"] = "1"
# Processes that tests start inherit all of this.
if not PLATFORM:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
        # On a busy machine eight devices may take longer than 40 s to synchronise.
        " --xla_cpu_collective_call_terminate_timeout_seconds=300"
        # Most of the time goes into compiling small programs, which these make more than twice as
        # fast.
        " --xla_llvm_disable_expensive_passes=true --xla_backend_optimization_level=0"
        " --xla_cpu_use_fusion_emitters=false"
    ).strip()
else:
    # The CPU is there, too, for what tests compute on the host.
    os.environ["JAX_PLATFORMS"] = PLATFORM if PLATFORM == "cpu" else f"{PLATFORM},cpu"
    # Accelerators multiply in TF32 or bfloat16 by default, too coarse for the tests' tolerances.
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
    # Several processes share a GPU.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
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
    """Puts the slowest files first; within a file the order stays. Skips what needs eight CPUs."""
    if PLATFORM:
        skip = pytest.mark.skip(reason="its expectations are those of eight host devices")
        for item in items:
            if item.get_closest_marker("eight_host_devices"):
                item.add_marker(skip)

    def is_fast(item):
        return not item.nodeid.removeprefix("tests/").startswith(SLOWEST)

    items.sort(key=is_fast)


@pytest.fixture(autouse=True)
def own_flags():
    """Flags that a test defines are gone after it: commands share names of flags."""
    before = set(flags.FLAGS)
    yield
    for name in set(flags.FLAGS) - before:  # Libraries define some as they are imported.
        if flags.FLAGS.find_module_defining_flag(name).startswith("vixml_jax"):
            delattr(flags.FLAGS, name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    """Skips what needs more devices than there are, where a fixture makes its mesh."""
    return (yield from _skipping_without_devices())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """The same for tests."""
    return (yield from _skipping_without_devices())


def _skipping_without_devices():
    try:
        return (yield)
    except ValueError as error:
        found = PLATFORM and re.search(r"is for (\d+) devices, found (\d+) \(", str(error))
        if not found or int(found[1]) <= int(found[2]):
            raise
        pytest.skip(f"needs {found[1]} devices, found {found[2]}")
