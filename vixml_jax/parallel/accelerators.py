"""What accelerators have and can do, as their vendors publish it, by `jax.Device.device_kind`."""

from typing import Any, NamedTuple

GIB = 2**30


class Accelerator(NamedTuple):
    """One device.

    Attributes:
      memory: Bytes on it. A process gets somewhat less.
      peak_flops: Dense products in bfloat16, float32 sums: operations a second.
      links: To other devices of the same pod, slice or NVLink domain.
      link_bandwidth: Bytes a second over one link, one way; 0 without links.
      source: Where this is written.
    """

    memory: int
    peak_flops: float
    links: int
    link_bandwidth: float
    source: str


_TPU = "https://docs.cloud.google.com/tpu/docs"
_NVIDIA = "https://www.nvidia.com/en-us/data-center"

# Interconnects are published as the sum over links; of the bidirectional sums this is the half.
KNOWN = {
    # 6 links of 50 GB/s: table 4 of https://arxiv.org/abs/2304.01433.
    "TPU v4": Accelerator(32 * GIB, 275e12, 6, 50e9, f"{_TPU}/v4"),
    "TPU v5 lite": Accelerator(16 * GIB, 197e12, 4, 50e9, f"{_TPU}/v5e"),
    "TPU v5": Accelerator(95 * GIB, 459e12, 6, 100e9, f"{_TPU}/v5p"),
    "TPU v6 lite": Accelerator(32 * GIB, 918e12, 4, 100e9, f"{_TPU}/v6e"),
    "NVIDIA A100-SXM4-40GB": Accelerator(40 * 10**9, 312e12, 12, 25e9, f"{_NVIDIA}/a100/"),
    "NVIDIA A100-SXM4-80GB": Accelerator(80 * 10**9, 312e12, 12, 25e9, f"{_NVIDIA}/a100/"),
    "NVIDIA H100 80GB HBM3": Accelerator(80 * 10**9, 989e12, 18, 25e9, f"{_NVIDIA}/h100/"),
    "NVIDIA H200": Accelerator(141 * 10**9, 989e12, 18, 25e9, f"{_NVIDIA}/h200/"),
    "NVIDIA L4": Accelerator(24 * 10**9, 121e12, 0, 0.0, f"{_NVIDIA}/l4/"),
}

# What a slice of TPUs is named by: the kind of its devices, and what libtpu wants to know to make a
# chip one device.
TPUS: dict[str, tuple[str, dict[str, str]]] = {
    "v4": ("TPU v4", {"chip_config_name": "megacore"}),
    "v5e": ("TPU v5 lite", {}),
    "v5p": ("TPU v5", {}),
    "v6e": ("TPU v6 lite", {}),
}


def about(kind: str) -> Accelerator | None:
    """The device that JAX calls so; None where it is not known, as a CPU is not."""
    return KNOWN.get(kind)


def peak_flops(devices: Any) -> float:
    """Operations a second of all these devices together; 0 where one is not known.

    Args:
      devices: Of JAX.
    """
    found = [about(device.device_kind) for device in devices]
    return sum(one.peak_flops for one in found) if all(found) else 0.0
