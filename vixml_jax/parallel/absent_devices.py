"""Devices that need not exist: programs can be compiled for them, but not run."""

import os
import re
from collections.abc import Sequence

import jax

from vixml_jax.errors import InputError
from vixml_jax.parallel import accelerators

# XLA times matrix products to choose how to compute them; without a GPU they are left to cuBLAS.
_WITHOUT_TUNING = "--xla_gpu_enable_triton_gemm=false"
_MOST_GPUS = 8  # Of a machine.


def find(name: str) -> Sequence[jax.Device]:
    """The devices of a TPU slice, such as "v5e:16x16", or the GPUs of a machine, such as "h100:8".

    JAX uses the CPU alone from now on.

    Raises:
      InputError: If there are no such devices, or the compiler for them is not installed.
    """
    kind, _, size = name.partition(":")
    if kind in accelerators.TPUS and re.fullmatch(r"\d+x\d+(x\d+)?", size):
        return _tpus(name)
    if kind in accelerators.GPUS and re.fullmatch(f"[1-{_MOST_GPUS}]", size):
        return _gpus(name)
    raise InputError(
        f"--plan_devices={name}: expected a TPU slice ({', '.join(accelerators.TPUS)}) such as "
        f"v5e:16x16 or v5p:4x4x8, or up to {_MOST_GPUS} GPUs "
        f"({', '.join(accelerators.GPUS)}) such as h100:8"
    )


def _tpus(name: str) -> Sequence[jax.Device]:
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise InputError(
            f"--plan_devices={name}: the TPU compiler is missing; pip install libtpu"
        ) from None
    from jax.experimental import topologies

    # Nothing is run, so no accelerator is needed. libtpu must neither query the metadata server for
    # the kind of this machine nor insist on being the only process that uses it. It ends the
    # process at flags of XLA that it does not know, such as new ones of the CPU, which has read
    # its own once it is there.
    jax.config.update("jax_platforms", "cpu")
    jax.devices()
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ |= {
        "XLA_FLAGS": " ".join(flag for flag in given if not flag.startswith("--xla_cpu_")),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    options = accelerators.TPUS[name.partition(":")[0]][1]
    try:
        return topologies.get_topology_desc(name, platform="tpu", **options).devices
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--plan_devices={name}: no such slice: {str(error).splitlines()[0]}"
        ) from None


def _gpus(name: str) -> Sequence[jax.Device]:
    try:
        import jax_cuda12_plugin  # noqa: F401
        import jax_plugins.xla_cuda12  # noqa: F401
    except ImportError:
        raise InputError(
            f"--plan_devices={name}: the GPU compiler is missing; pip install 'vixml_jax[gpu-plan]'"
        ) from None
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    given = os.environ.get("XLA_FLAGS", "")
    if _WITHOUT_TUNING not in given:
        os.environ["XLA_FLAGS"] = f"{given} {_WITHOUT_TUNING}".strip()
    kind, _, count = name.partition(":")
    return topologies.get_topology_desc(
        platform="cuda",
        target_config=gpu_target(accelerators.GPUS[kind]),
        topology=f"1x1x{count}",  # Slices, hosts of a slice, devices of a host.
    ).devices


def gpu_target(gpu: accelerators.Gpu) -> str:
    """A GPU as XLA describes it: a `GpuTargetConfigProto` in text form.

    The versions are those of the CUDA and cuDNN that jax[cuda12] installs at least.
    """
    published = accelerators.KNOWN[gpu.kind]
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.float32_units}
  threads_per_core_limit: {gpu.threads}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {gpu.shared_memory - 2**10}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  l2_cache_size: {gpu.cache}
  clock_rate_ghz: {gpu.clock}
  memory_bandwidth: {int(published.bandwidth)}
  device_memory_size: {published.memory}
  runtime_version: "12.8.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{gpu.kind}"
"""
