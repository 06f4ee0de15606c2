"""What devices send each other in a training step: counted in the compiled program, beside what
the arithmetic on paper says, and how long it takes over the links of a slice that is not here.

    python -m vixml_jax.benchmarks.communication [--devices=v5e:2x4] [--mesh=fsdp:-1]
        [--tower=all-minilm-l6] [--batch=1024] [--labels=131073] [--queries=294805]

Without --devices the program is compiled for the devices that JAX finds here; nothing is allocated
or run. For a slice of TPUs it is their own compiler's program (needs libtpu), and the time that a
step should take follows from its operations, at an assumed share of the published peak, and from
the bytes that each device sends, over the published links.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import flags

from vixml_jax import config as config_lib
from vixml_jax import devices, errors, runs, train, trees
from vixml_jax.benchmarks import towers, train_step
from vixml_jax.config import BatchConfig, Config, LabelsConfig, LoraConfig, ModelConfig
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.training import collectives, flops
from vixml_jax.training import plan as plan_lib


class Setting(NamedTuple):
    """One step.

    Attributes:
      parts: Model, abstract state and step.
      size: Queries of a batch, and labels.
      length: Positions of a query and its label together.
      batch: Abstract.
      key: Abstract.
    """

    parts: train.Parts
    size: int
    length: float
    batch: Any
    key: Any


def setting(values: Any) -> Setting:
    """The step that the flags describe, on the mesh that they name."""
    tower = towers.config_of(values.tower)
    decoder = isinstance(tower, DecoderConfig)
    changes: dict[str, Any] = {"dtype": values.dtype, "scan": decoder, "remat": decoder}
    if decoder:
        changes["lora_rank"] = values.rank
    tower = dataclasses.replace(tower, **changes)
    config = Config(
        mesh=values.mesh,
        model=ModelConfig(pretrained=values.tower, num_images=0, dtype=values.dtype),
        lora=LoraConfig(rank=values.rank if decoder else 0),
        labels=LabelsConfig(free_update=values.free_update),
        batch=BatchConfig(
            size=values.batch, row_width=values.row_width, encode_chunk=values.encode_chunk
        ),
    )
    slice_of = plan_lib.slice_of(values.devices) if values.devices else None
    mesh = runs.make_mesh(config, slice_of)
    sizes = plan_lib.DataSizes(values.queries, values.labels)
    parts = train.assemble(config, tower, train_step.layout_of(values.tower, 0), sizes, mesh)
    length = float(values.length)
    batch, key = plan_lib.abstract_batch(
        parts.model, values.batch, length, pictures=(False, False), width=1
    )
    return Setting(parts, values.batch, length, batch, key)


def on_paper(setting: Setting, *, scatters: bool) -> dict[str, float]:
    """Bytes that each device sends in a step, by what they are of.

    N devices share the rows of a batch, F of them (fsdp) the weights. A ring sends (N - 1) / N of
    an array to gather or to scatter it, twice that to sum it for all (arXiv 1802.05799).

    Weights are gathered for the forward and for the backward pass, and their gradients summed and
    scattered. Words are looked up by all who share the table, each in its part of the width, and
    dealt out; their gradients come back the same way. Vectors of queries, labels and prototypes go
    to every device, their gradients come back as sums, and the queries go into the bank. Of tables
    travels a row a candidate, summed over the devices (all but one of them give zeros), and the
    gradient of the free vectors.

    Args:
      setting: Of the step.
      scatters: Whether the compiler sums gradients to where they are kept (TPUs, GPUs); else for
        all, as XLA for CPUs does.
    """
    model, like = setting.parts.model, setting.parts.like
    shape = dict(model.mesh.shape)
    fsdp, rows = shape["fsdp"], shape["replica"] * shape["fsdp"]
    b, d = setting.size, model.table.width

    def ring(devices: int) -> float:
        return (devices - 1) / devices

    def weights(tree: Any) -> float:
        """Bytes of what is spread over fsdp, in what it is computed in."""
        width = 4 if model.tower.config.dtype == "float32" else 2
        leaves = jax.tree.leaves(tree)
        return sum(width * math.prod(x.shape) / shape["tensor"] for x in leaves)

    params = trees.merge(like.params, like.frozen)["tower"]
    tables = ("word_embeddings",)
    dense, _ = trees.partition(params, lambda path: path[-1] not in tables)
    trained, _ = trees.partition(like.params, lambda path: path[-1] not in tables)
    trained.pop("free", None)
    summed = sum(4 * math.prod(x.shape) / shape["tensor"] for x in jax.tree.leaves(trained))
    spread = "word_embeddings" in like.params.get("tower", {})
    positions = math.prod(setting.batch.items.tokens.shape) / rows  # Of a device.
    states = positions * d * 4
    vectors = 4 * b * d
    passes = 3 if model.tower.config.remat and not model.tower.config.scan else 2
    return {
        "weights, gathered": passes * weights(dense) * ring(fsdp),
        "gradients, summed": (1 if scatters else 2) * summed * ring(rows),
        "words, dealt out": (2 if spread else 1) * states * ring(fsdp),
        "vectors of the batch": (3 + 3 + 1) * vectors * ring(rows),
        "rows of tables": (2 * 2 + 1) * vectors * ring(rows),
    }


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_string("devices", "", "TPUs to compile for, v5e:16x16 say; empty: those here.")
    flags.DEFINE_string("mesh", config_lib.Config.mesh, "As train has it.")
    flags.DEFINE_string("tower", "all-minilm-l6", "A published tower, by (the start of) its name.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of products.")
    flags.DEFINE_integer("rank", 256, "Of a decoder's adapters.", lower_bound=1)
    flags.DEFINE_integer("batch", 1024, "Queries of a batch, and labels.", lower_bound=8)
    flags.DEFINE_integer("row_width", 64, "Positions of a row.", lower_bound=8)
    flags.DEFINE_float("length", 30.0, "Positions of a query and a label together.")
    flags.DEFINE_integer("encode_chunk", 0, "As train has it.", lower_bound=0)
    flags.DEFINE_integer("queries", 294805, "Training queries.", lower_bound=8)
    flags.DEFINE_integer("labels", 131073, "Labels.", lower_bound=2)
    flags.DEFINE_enum("free_update", "dense", ["dense", "sparse"], "As train has it.")
    flags.DEFINE_float("efficiency", 0.4, "Share of the published peak that products reach.")
    flags.DEFINE_boolean("list", False, "Print each collective.")


def main(argv: Sequence[str]) -> None:
    """Prints both counts and the time that follows."""
    del argv
    values = flags.FLAGS
    made = setting(values)
    program = made.parts.step.program(made.batch, made.key)
    found = collectives.collectives(program)
    if values.list:
        for one in sorted(found, key=lambda one: -one.sent):
            print(f"{one.sent / 1e6:10.3f} MB  {one.kind:18} {one.devices:4} x{one.times:<4} "
                  f"{sorted(set(one.shapes))} {one.of[-60:]}")  # fmt: skip
    print(found and sum(one.sent for one in found) / 1e6)
    for name, size in on_paper(made, scatters=bool(values.devices)).items():
        print(f"{name:24} {size / 1e6:10.3f}")


if __name__ == "__main__":
    define_flags()
    errors.launch(main)
