"""What is installed and which devices there are, and whether a product on a device is right."""

import importlib.metadata
import os
import shutil
import subprocess
import time
from typing import Any

from vixml_jax.benchmarks.accelerator.results import Row, at_most

# Distributions whose versions decide what runs on an accelerator, and how fast.
_LIBRARIES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "libtpu", "flax", "torch",
    "transformers", "peft",
)  # fmt: skip
_VARIABLES = ("XLA_", "JAX_", "LIBTPU_", "CUDA_", "NCCL_", "TF_GPU_")
_SIDES = {"full": 8192, "tiny": 256}


def examine(settings: dict[str, Any]) -> list[Row]:
    """Versions, devices and memory; the error and speed of a matrix product."""
    import jax

    from vixml_jax.parallel import accelerators
    from vixml_jax.runtime import host_memory

    device = jax.devices()[0]
    known = accelerators.find(device.device_kind)
    memory = host_memory.device_memory(device) / 2**30
    rows = [
        Row("versions", ", ".join(_versions())),
        Row("platform", " ".join(device.client.platform_version.split())),
        Row("devices", f"{jax.device_count()} x {device.device_kind}"),
        Row("compute capability", str(getattr(device, "compute_capability", "none"))),
        Row(
            "memory of a device that JAX may use, GiB",
            memory,
            f"{known.memory / 2**30:.1f} published" if known else "unknown device",
        ),
        Row("host memory, GiB", (host_memory.available() or 0) / 2**30),
        Row("host cores", settings["threads"]),
        Row("environment", ", ".join(_environment()) or "nothing set"),
    ]
    if shutil.which("nvidia-smi"):
        ask = [
            "nvidia-smi",
            "--query-gpu=name,driver_version,memory.total",
            "--format=csv,noheader",
        ]
        done = subprocess.run(ask, capture_output=True, text=True, check=False)
        rows.append(
            Row("nvidia-smi", "; ".join((done.stdout or done.stderr).split("\n")).strip("; "))
        )
    return rows + _product(settings, known.peak_flops if known else 0.0)


def _versions() -> list[str]:
    found = []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _environment() -> list[str]:
    names = sorted(name for name in os.environ if name.startswith(_VARIABLES))
    return [f"{name}={os.environ[name]}" for name in names]


def _product(settings: dict[str, Any], peak: float) -> list[Row]:
    """The largest error of a float32 product, and the speed of a bfloat16 one."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 128, 1024), np.float32)
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    found = np.asarray(jnp.matmul(a, b.T, precision="highest"), np.float64)
    error = np.abs(found - exact).max() / np.abs(exact).max()

    side = _SIDES[settings["size"]]
    x = jnp.asarray(rng.standard_normal((side, side), np.float32), jnp.bfloat16)
    product = jax.jit(lambda x, y: x @ y)
    y = product(x, x).block_until_ready()
    start, times = time.perf_counter(), 10
    for _ in range(times):
        y = product(x, y)
    y.block_until_ready()
    speed = 2 * side**3 * times / (time.perf_counter() - start)
    wanted = f"{peak / 1e12:.0f} published" if peak else ""
    return [
        at_most("relative error of a float32 product at the highest precision", error, 5e-6),
        Row(f"bfloat16 product of {side} x {side}, TFLOP/s", speed / 1e12, wanted),
    ]
