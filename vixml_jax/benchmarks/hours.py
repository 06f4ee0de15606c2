"""Estimates the training time of a run from counted operations, without data, weights or devices.

    python -m vixml_jax.benchmarks.hours --flagfile=experiments/lf_wiki.flags --queries=1813391
        --length=256 [--accelerator="NVIDIA H200" --devices=8 --efficiency=0.4]

All texts are counted at their maximum length and all items with all their images, so the operations
are an upper bound; the fraction of the peak that a run reaches is an assumption (--efficiency).
Communication, evaluation and clustering are not counted. The tower must be a published one.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import flags

from vixml_jax import command_line
from vixml_jax import config as config_lib
from vixml_jax.benchmarks.support import towers
from vixml_jax.config import Config
from vixml_jax.errors import InputError
from vixml_jax.labels.prototypes import Combiner
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.parallel import accelerators
from vixml_jax.training import flops

PROMPT = 8  # Positions of a decoder's prompt, about.


class Estimate(NamedTuple):
    """Operations of a run.

    Attributes:
      steps: Training steps.
      step: Floating-point operations of a step over all devices.
    """

    steps: int
    step: float

    def hours(self, flops_per_s: float) -> float:
        """Hours at a given number of operations per second."""
        return self.steps * self.step / flops_per_s / 3600


def estimate(config: Config, num_queries: int, length: int) -> Estimate:
    """Operations of a run on a published tower.

    Args:
      config: Of the run.
      num_queries: Training queries.
      length: Maximum number of tokens of a text.
    """
    tower = towers.config_of(config.model.pretrained.rsplit("/", 1)[-1])
    num_images, size = config.model.num_images, config.batch.size
    changes = {"image_width": 1152 if num_images else 0}
    if isinstance(tower, DecoderConfig):
        changes["lora_rank"] = config.lora.rank
        length += PROMPT
    tower = dataclasses.replace(tower, **changes)
    lengths = np.full(2 * size, length + num_images)
    total = flops.tower_flops(tower, lengths, 2 * size * num_images)
    total += flops.similarity_flops(size, size, tower.width, 2 if config.labels.prototypes else 1)
    if config.labels.prototypes:
        labels = config.labels
        combiner = Combiner(labels.num_heads, labels.mlp_width, labels.dropout)
        total += flops.combiner_flops(combiner, size, tower.width)
    return Estimate(config.loop.epochs * -(-num_queries // size), total.step)


def main(argv: Sequence[str]) -> None:
    """Prints one line."""
    del argv
    values = flags.FLAGS
    config = config_lib.from_flags(values)
    if not config.model.pretrained:
        raise InputError("--model.pretrained: missing; expected a published tower")
    found = estimate(config, values.queries, values.length)
    chip = accelerators.KNOWN[values.accelerator]
    hours = found.hours(values.devices * values.efficiency * chip.peak_flops)
    print(
        f"{config.model.pretrained}: {found.steps:,} steps of {found.step / 1e12:,.1f} TFLOP; "
        f"{hours:,.1f} h on {values.devices} x {values.accelerator} at "
        f"{100 * values.efficiency:.0f} % of {chip.peak_flops / 1e12:,.0f} TFLOP/s"
    )


def define_flags() -> None:
    """The flags of a run, and those of this benchmark."""
    config_lib.define_flags()
    flags.DEFINE_integer("queries", 294_805, "Training queries.", lower_bound=1)
    flags.DEFINE_integer("length", 32, "Maximum number of tokens of a text.", lower_bound=1)
    flags.DEFINE_enum(
        "accelerator", "NVIDIA H100 80GB HBM3", list(accelerators.KNOWN), "Kind of device."
    )
    flags.DEFINE_integer("devices", 1, "Number of devices.", lower_bound=1)
    flags.DEFINE_float(
        "efficiency", 0.4, "Assumed fraction of the peak.", lower_bound=0.01, upper_bound=1.0
    )


if __name__ == "__main__":
    command_line.launch(main, define_flags)
