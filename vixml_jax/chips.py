"""TPUs as published: memory and peak of a chip, to plan for those that are not here."""

from typing import NamedTuple


class Chip(NamedTuple):
    """One chip.

    Attributes:
      kind: What JAX calls it, its `device_kind`.
      memory: GiB of HBM.
      peak: Operations a second in bfloat16.
      settings: What libtpu wants to know to give one device a chip.
    """

    kind: str
    memory: int
    peak: float
    settings: dict[str, str]


# "HBM capacity" and "peak compute per chip (bf16)" of https://cloud.google.com/tpu/docs/v4, and of
# v5e, v5p and v6e beside it.
CHIPS = {
    "v4": Chip("TPU v4", 32, 275e12, {"chip_config_name": "megacore"}),
    "v5e": Chip("TPU v5 lite", 16, 197e12, {}),
    "v5p": Chip("TPU v5", 95, 459e12, {}),
    "v6e": Chip("TPU v6 lite", 32, 918e12, {}),
}


def by_kind(kind: str) -> Chip | None:
    """The chip that JAX calls `kind`; None: not known."""
    return next((chip for chip in CHIPS.values() if chip.kind == kind), None)
