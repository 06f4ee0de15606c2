"""Published memory, speed and interconnects of accelerators, by `jax.Device.device_kind`."""

from typing import Any, NamedTuple

GIB = 2**30


class Accelerator(NamedTuple):
    """Specification of one device.

    Attributes:
      memory: Device memory in bytes; a process can use somewhat less.
      peak_flops: Operations per second of dense bfloat16 products with float32 accumulation.
      links: Number of links to other devices of the same pod, slice or NVLink domain.
      link_bandwidth: Bytes per second over one link in one direction; 0 without links.
      source: URL of the specification.
    """

    memory: int
    peak_flops: float
    links: int
    link_bandwidth: float
    source: str


_TPU = "https://docs.cloud.google.com/tpu/docs"
_NVIDIA = "https://www.nvidia.com/en-us/data-center"

# Vendors publish the interconnect as the sum over all links, mostly over both directions; then half
# of it is used here.
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

# Name of a TPU generation in slice names -> the kind of its devices, and the options with which
# libtpu presents a chip as one device.
TPUS: dict[str, tuple[str, dict[str, str]]] = {
    "v4": ("TPU v4", {"chip_config_name": "megacore"}),
    "v5e": ("TPU v5 lite", {}),
    "v5p": ("TPU v5", {}),
    "v6e": ("TPU v6 lite", {}),
}


def find(kind: str) -> Accelerator | None:
    """Specification of a `device_kind`; None for unknown devices, such as CPUs."""
    return KNOWN.get(kind)


def peak_flops(devices: Any) -> float:
    """Total operations per second of JAX devices; 0 if any of them is unknown."""
    specs = [find(device.device_kind) for device in devices]
    return sum(spec.peak_flops for spec in specs) if all(specs) else 0.0
