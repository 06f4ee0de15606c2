"""Eight host devices for every test, set before jax wakes up; one cache of compiled programs."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    # On a busy machine eight devices may take longer than 40 s to meet: no reason to abort.
    " --xla_cpu_collective_call_terminate_timeout_seconds=300"
).strip()
# Runs that are stopped, resumed and repeated compile their step once.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vixml_jax_tests_")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
