"""The memory of a run, known before anything of it is allocated."""

import math
from typing import Any, NamedTuple

import jax

from vixml_jax import memory
from vixml_jax.errors import InputError
from vixml_jax.structs import TrainState

GIB = 2**30


class MemoryPlan(NamedTuple):
    """Bytes of one device.

    Attributes:
      held: What stays there all the time, by what it is.
      step: What a training step takes beside it, as its compiled program says.
      device: What the device has; 0: it does not say.
    """

    held: dict[str, int]
    step: int
    device: int

    @property
    def total(self) -> int:
        """What the run needs."""
        return sum(self.held.values()) + self.step

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.held.items() if size)
        of = f" of {self.device / GIB:.1f}" if self.device else ""
        return (
            f"memory a device, GiB: {parts}, a step {self.step / GIB:.2f}: "
            f"{self.total / GIB:.2f}{of}"
        )

    def check(self) -> None:
        """Raises an `InputError` if the run does not fit."""
        if self.device and self.total > self.device:
            raise InputError(
                f"{self}: it does not fit; the step's part falls with a smaller "
                "--batch.encode_chunk (0 is all rows at once) or --batch.size and with "
                "--model.remat, what is held with more devices along fsdp (--mesh), with "
                "--lora.rank and with fewer --labels.num_free"
            )


def bytes_a_device(tree: Any) -> int:
    """Of the leaves' shards on one device; leaves have shape, dtype and sharding."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def plan_memory(like: TrainState, program: jax.stages.Compiled) -> MemoryPlan:
    """What a run takes.

    Args:
      like: The state's shapes, dtypes and shardings.
      program: The compiled step.
    """
    found = program.memory_analysis()
    kept = found.output_size_in_bytes - found.alias_size_in_bytes  # Beside the donated state.
    held = {
        "trained parameters": bytes_a_device(like.params),
        "frozen parameters": bytes_a_device(like.frozen),
        "optimizer": bytes_a_device(like.opt_state),
        "labels": bytes_a_device(like.labels),
        "embeddings of the queries": bytes_a_device(like.bank),
    }
    return MemoryPlan(held, found.temp_size_in_bytes + max(0, kept), memory.of_a_device())
