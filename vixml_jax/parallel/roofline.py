"""The least time of a compiled program on its devices, from published speeds (arXiv 1007.1726)."""

from collections import Counter
from typing import NamedTuple

import jax

from vixml_jax.errors import InputError
from vixml_jax.parallel import accelerators, collectives, memory_traffic, products
from vixml_jax.parallel.accelerators import Accelerator


class Times(NamedTuple):
    """Seconds that a program takes at least, each at the published speed.

    Attributes:
      compute: For its matrix products.
      memory: For its reads from and writes to device memory.
      links: For its collectives.
    """

    compute: float
    memory: float
    links: float

    @property
    def bound(self) -> str:
        """Name of the largest, which binds if all three overlap."""
        return max(self._fields, key=lambda name: getattr(self, name))


class Work(NamedTuple):
    """What a run of a program does on each device.

    Attributes:
      products: Operations of matrix products, by kind (`products.KINDS`).
      moved: Bytes read from and written to device memory.
      sent: Bytes that collectives send, by kind (`collectives.KINDS`); kinds that occur.
    """

    products: dict[str, float]
    moved: float
    sent: dict[str, float]

    @property
    def flops(self) -> float:
        """Operations of all matrix products."""
        return sum(self.products.values())

    def times(self, chip: Accelerator) -> Times:
        """The least times on a kind of device."""
        speeds = (chip.peak_flops, *chip.float32_flops)
        return Times(
            sum(
                self.products[kind] / speed
                for kind, speed in zip(products.KINDS, speeds, strict=True)
            ),
            self.moved / chip.bandwidth,
            sum(self.sent.values()) / (chip.links * chip.link_bandwidth),
        )

    def describe(self, kind: str) -> str:
        """A sentence on the work, and where the speed of the device is known, on its times.

        Args:
          kind: `jax.Device.device_kind`.
        """
        sent = ", ".join(f"{name} {_bytes(size)}" for name, size in self.sent.items())
        text = (
            f"{self.flops / 1e12:.3f} TFLOP of matrix products, {_bytes(self.moved)} of memory "
            f"traffic, {sent or 'nothing'} over links"
        )
        chip = accelerators.find(kind)
        if chip is None:
            return text
        times = self.times(chip)
        each = ", ".join(f"{name} {1e3 * getattr(times, name):.2f}" for name in times._fields)
        return f"{text}; at least (ms): {each}; bound: {times.bound}"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def work(traced: jax.stages.Traced, program: jax.stages.Compiled, num_devices: int) -> Work:
    """What a run of a program does on each device.

    Args:
      traced: The program before it was compiled.
      program: The same, compiled.
      num_devices: Number of devices that share the work.

    Raises:
      InputError: If this version of JAX cannot read what the compiler of the devices has made.
    """
    try:
        text = program.as_text()
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise InputError(
            f"the compiled program cannot be read by JAX {jax.__version__} "
            f"({str(error).splitlines()[0]}); plan for other devices, or install the version of "
            "JAX that the compiler belongs to"
        ) from None
    sent: Counter[str] = Counter()
    for one in collectives.read_collectives(text):
        sent[one.kind] += one.sent
    return Work(
        products.of_program(traced, num_devices),
        memory_traffic.read_traffic(text),
        {kind: sent[kind] for kind in collectives.KINDS if sent[kind]},
    )
