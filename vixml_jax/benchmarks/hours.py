"""Estimates the training time of a run from counted operations, without data, weights or devices.

    python -m vixml_jax.benchmarks.hours
        --flagfile=experiments/lf_wikipedia_500k_distilbert.flags --queries=1813391 --length=256
        [--accelerator="NVIDIA H200" --devices=8 --efficiency=0.4]

See `vixml_jax.training.flops.estimate` for what is counted. The tower must be a published one.
"""

from collections.abc import Sequence

from absl import flags

from vixml_jax import command_line
from vixml_jax import config as config_lib
from vixml_jax.errors import InputError
from vixml_jax.parallel import accelerators
from vixml_jax.training import flops


def main(argv: Sequence[str]) -> None:
    """Prints one line."""
    del argv
    values = flags.FLAGS
    config = config_lib.from_flags(values)
    if not config.model.pretrained:
        raise InputError("--model.pretrained: missing; expected a published tower")
    found = flops.estimate(config, values.queries, values.length)
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
    flags.DEFINE_enum("accelerator", flops.DEVICE, list(accelerators.KNOWN), "Kind of device.")
    flags.DEFINE_integer("devices", 1, "Number of devices.", lower_bound=1)
    flags.DEFINE_float(
        "efficiency",
        flops.EFFICIENCY,
        "Assumed fraction of the peak.",
        lower_bound=0.01,
        upper_bound=1.0,
    )


if __name__ == "__main__":
    command_line.launch(main, define_flags)
