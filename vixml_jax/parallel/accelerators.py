"""Published memory, speed and interconnects of accelerators, by `jax.Device.device_kind`."""

from typing import Any, NamedTuple

GIB = 2**30


class Accelerator(NamedTuple):
    """Specification of one device.

    Attributes:
      memory: Device memory in bytes; a process can use somewhat less.
      bandwidth: Bytes per second that are read from and written to this memory.
      peak_flops: Operations per second of dense bfloat16 products with float32 accumulation.
      float32_flops: Operations per second of float32 products at JAX's precisions "default", "high"
        and "highest". On a TPU these are one, three and six bfloat16 products, on a GPU TF32, TF32
        and float32 without tensor cores.
      links: Number of links to other devices of the same slice or machine.
      link_bandwidth: Bytes per second over one link in one direction.
      source: URL of the specification.
    """

    memory: int
    bandwidth: float
    peak_flops: float
    float32_flops: tuple[float, float, float]
    links: int
    link_bandwidth: float
    source: str


def _tpu(
    memory: int, bandwidth: float, peak: float, links: int, link_bandwidth: float, name: str
) -> Accelerator:
    source = f"https://docs.cloud.google.com/tpu/docs/{name}"
    float32 = (peak, peak / 3, peak / 6)
    return Accelerator(memory * GIB, bandwidth, peak, float32, links, link_bandwidth, source)


def _gpu(
    memory: int,
    bandwidth: float,
    peak: float,
    tf32: float,
    float32: float,
    links: int,
    link_bandwidth: float,
    name: str,
) -> Accelerator:
    source = f"https://www.nvidia.com/en-us/data-center/{name}/"
    speeds = (tf32, tf32, float32)
    return Accelerator(memory * 10**9, bandwidth, peak, speeds, links, link_bandwidth, source)


# Vendors publish the interconnect as the sum over all links, mostly over both directions; then half
# of it is used here. Products are those without sparsity, which is half of what NVIDIA lists.
# Without NVLink, the link is PCI Express 4.0.
KNOWN = {
    # 6 links of 50 GB/s: table 4 of https://arxiv.org/abs/2304.01433.
    "TPU v4": _tpu(32, 1200e9, 275e12, 6, 50e9, "v4"),
    "TPU v5 lite": _tpu(16, 800e9, 197e12, 4, 50e9, "v5e"),
    "TPU v5": _tpu(95, 2765e9, 459e12, 6, 100e9, "v5p"),
    "TPU v6 lite": _tpu(32, 1600e9, 918e12, 4, 100e9, "v6e"),
    "NVIDIA A100-SXM4-40GB": _gpu(40, 1555e9, 312e12, 156e12, 19.5e12, 12, 25e9, "a100"),
    "NVIDIA A100-SXM4-80GB": _gpu(80, 2039e9, 312e12, 156e12, 19.5e12, 12, 25e9, "a100"),
    "NVIDIA H100 80GB HBM3": _gpu(80, 3350e9, 989e12, 494e12, 67e12, 18, 25e9, "h100"),
    "NVIDIA H200": _gpu(141, 4800e9, 989e12, 494e12, 67e12, 18, 25e9, "h200"),
    "NVIDIA B200": _gpu(180, 8000e9, 2250e12, 1125e12, 75e12, 18, 50e9, "dgx-b200"),
    "NVIDIA L40S": _gpu(48, 864e9, 362e12, 183e12, 91.6e12, 1, 32e9, "l40s"),
    "NVIDIA L4": _gpu(24, 300e9, 121e12, 60e12, 30.3e12, 1, 32e9, "l4"),
}

# Name of a TPU generation in slice names -> the kind of its devices, and the options with which
# libtpu presents a chip as one device.
TPUS: dict[str, tuple[str, dict[str, str]]] = {
    "v4": ("TPU v4", {"chip_config_name": "megacore"}),
    "v5e": ("TPU v5 lite", {}),
    "v5p": ("TPU v5", {}),
    "v6e": ("TPU v6 lite", {}),
}


class Gpu(NamedTuple):
    """What the compiler knows of a GPU beside its memory.

    Attributes:
      kind: Its `device_kind`.
      capability: Compute capability.
      cores: Streaming multiprocessors.
      float32_units: Units of a multiprocessor, each with a multiplication and an addition a clock.
      threads: Most threads that a multiprocessor holds.
      shared_memory: Bytes of shared memory of a multiprocessor; a block can use 1 KiB less.
      cache: Bytes of its L2 cache.
      clock: Highest clock, in GHz.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    float32_units: int
    threads: int
    shared_memory: int
    cache: int
    clock: float


_KIB, _MIB = 2**10, 2**20
# Name of a GPU as in `--plan_devices`. Figures of the architecture: the CUDA C++ Programming Guide,
# "Compute Capabilities", and the white papers of Ampere, Hopper, Ada and Blackwell.
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 164 * _KIB, 40 * _MIB, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228 * _KIB, 50 * _MIB, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 2048, 228 * _KIB, 50 * _MIB, 1.98),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 128, 2048, 228 * _KIB, 126 * _MIB, 1.965),
    "l40s": Gpu("NVIDIA L40S", (8, 9), 142, 128, 1536, 100 * _KIB, 96 * _MIB, 2.52),
}


def find(kind: str) -> Accelerator | None:
    """Specification of a `device_kind`; None for unknown devices, such as CPUs."""
    return KNOWN.get(kind)


def peak_flops(devices: Any) -> float:
    """Total operations per second of JAX devices; 0 if any of them is unknown."""
    specs = [find(device.device_kind) for device in devices]
    return sum(spec.peak_flops for spec in specs) if all(specs) else 0.0
