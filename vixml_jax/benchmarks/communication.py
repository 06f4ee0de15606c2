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
import numpy as np
from absl import flags

from vixml_jax import config as config_lib
from vixml_jax import errors, train, workdir
from vixml_jax.benchmarks import train_step
from vixml_jax.benchmarks.support import towers
from vixml_jax.config import BatchConfig, Config, LabelsConfig, LoraConfig, ModelConfig
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.parallel import accelerators as device_kinds
from vixml_jax.parallel import collectives
from vixml_jax.runtime import tree_utils
from vixml_jax.training import flops
from vixml_jax.training import memory_planner as plan_lib


class Setting(NamedTuple):
    """One step.

    Attributes:
      parts: Model, abstract state and step.
      size: Queries of a batch, and labels.
      length: Positions of a query and its label together.
      sparse: Whether free vectors are updated by rows.
      batch: Abstract.
      key: Abstract.
    """

    parts: train.Parts
    size: int
    length: float
    sparse: bool
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
    mesh = workdir.make_mesh(config, slice_of)
    sizes = plan_lib.DataSizes(values.queries, values.labels)
    parts = train.assemble(config, tower, train_step.layout_of(values.tower, 0), sizes, mesh)
    length = float(values.length)
    batch, key = plan_lib.abstract_batch(
        parts.model, values.batch, length, pictures=(False, False), width=1
    )
    return Setting(parts, values.batch, length, values.free_update == "sparse", batch, key)


def on_paper(setting: Setting, *, tpu: bool) -> dict[str, float]:
    """Bytes that each device sends in a step, by what they are of.

    N devices share the rows of a batch, F of them (fsdp) the weights. A ring sends (N - 1) / N of
    an array to gather or to scatter it, twice that to sum it for all (arXiv 1802.05799).

    Weights are gathered for each pass over them: forward, backward, and once more where chunks are
    read again; XLA for CPUs keeps them from the first pass where nothing is computed again. Their
    gradients are summed and scattered. Words are looked up by all who share the table, each in its
    part of the width, and dealt out; their gradients come back the same way. Vectors of queries,
    labels and prototypes go to every device, their gradients come back as sums, and the queries go
    into the bank. Of tables travels a row a candidate, summed over the devices (all but one of them
    give zeros), and the gradient of the free vectors; with sparse updates also two moments. Left
    out is what is small: ids, masks, norms, the change from rows to sides.

    Args:
      setting: Of the step.
      tpu: Whether the compiler is that of TPUs: products take bfloat16, and gradients are summed
        where they are kept; else for all.
    """
    model, like = setting.parts.model, setting.parts.like
    tower, shape = model.tower.config, dict(model.mesh.shape)
    fsdp, rows = shape["fsdp"], shape["replica"] * shape["fsdp"]
    vectors = 4.0 * setting.size * model.table.width

    def ring(devices: int) -> float:
        return (devices - 1) / devices

    def size(tree: Any) -> float:
        """Numbers of the dense weights of a tower, a tensor-parallel share of them."""
        dense, _ = tree_utils.partition(tree, lambda path: path[-1] != "word_embeddings")
        return sum(math.prod(x.shape) for x in jax.tree.leaves(dense)) / shape["tensor"]

    base = size(like.frozen.get("tower", {}))
    trained = size(like.params["tower"])
    combiner = sum(math.prod(x.shape) for x in jax.tree.leaves(like.params["combiner"]))
    passes = 3 if model.encode_chunk else 2 if tpu or tower.remat else 1
    width = 2 if tpu or tower.dtype == "bfloat16" else 4
    words = math.prod(setting.batch.items.tokens.shape) / rows * model.table.width
    looked_up = 2 if "word_embeddings" in like.params["tower"] else 1
    tables = 2 + 2 + 1 + (4 if setting.sparse else 0)
    replicas = 2 * 4 * trained / fsdp * ring(shape["replica"])
    return {
        "weights, gathered": passes * width * (base + trained) * ring(fsdp),
        "gradients, summed": (1 if tpu else 2) * 4 * trained * ring(fsdp) + replicas,
        "combiner's gradients": 2 * 4 * combiner * ring(rows),
        "words, dealt out": looked_up
        * (2 if tower.dtype == "bfloat16" else 4)
        * words
        * ring(fsdp),
        "vectors of the batch": 7 * vectors * ring(rows),
        "rows of tables": tables * vectors * ring(rows),
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
    counted = sum(one.sent for one in found)
    paper = on_paper(made, tpu=bool(values.devices))
    memory = plan_lib.plan_memory(made.parts.like, lambda: program)
    mesh = made.parts.model.mesh
    device = mesh.devices.flat[0]
    along = ",".join(f"{name}:{size}" for name, size in mesh.shape.items())
    num_rows = made.batch.items.tokens.shape[0]
    print(
        f"{mesh.size} x {device.device_kind}, {along}; {values.tower}, {values.dtype}, a batch of "
        f"{values.batch} in {num_rows} rows; {memory}"
    )
    print("MB that each device sends in a step")
    for name, size in {**paper, "all, on paper": sum(paper.values())}.items():
        print(f"  {name:24} {size / 1e6:12.2f}")
    print(
        f"  {'all, in the program':24} {counted / 1e6:12.2f}   {counted / sum(paper.values()):.3f}"
    )
    for kind in collectives.KINDS:
        size = sum(one.sent for one in found if one.kind == kind)
        if size:
            print(f"    {kind:22} {size / 1e6:12.2f}")
    chip = device_kinds.about(device.device_kind)
    if chip:
        work = operations(made) / mesh.size
        compute = work / (chip.peak_flops * values.efficiency)
        links = counted / (chip.links * chip.link_bandwidth)
        print(
            f"a step: {work / 1e12:.2f} TFLOP a device, {compute * 1e3:.0f} ms at "
            f"{100 * values.efficiency:.0f} % of {chip.peak_flops / 1e12:.0f} TFLOP/s; "
            f"{links * 1e3:.0f} ms over {chip.links} links of "
            f"{chip.link_bandwidth / 1e9:.0f} GB/s: "
            f"from {max(compute, links) * 1e3:.0f} ms, side by side, to "
            f"{(compute + links) * 1e3:.0f} ms, one after the other"
        )


def operations(setting: Setting) -> float:
    """Of a step of all devices: items of equal length."""
    model, size = setting.parts.model, setting.size
    tower = model.tower.config
    lengths = np.full(2 * size, setting.length / 2)
    total = flops.tower_flops(tower, lengths, 0)
    total += flops.similarity_flops(size, size, tower.width, 2)
    total += flops.combiner_flops(model.combiner, size, tower.width)
    return total.step


if __name__ == "__main__":
    define_flags()
    errors.launch(main)
