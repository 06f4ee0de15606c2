"""Communication volume of a training step: counted in the compiled program, and by formula.

    python -m vixml_jax.benchmarks.communication [--devices=v5e:2x4] [--mesh=fsdp:-1]
        [--tower=all-minilm-l6] [--batch=1024] [--labels=131073] [--queries=294805]
    python -m vixml_jax.benchmarks.communication --what=head [--positives=5] [--loss=softmax]

--what=head counts that of the label head alone: its loss and gradient, as in a step of the tower,
and a step of the head epochs.

Without --devices the step is compiled for the devices that JAX finds; nothing is allocated or run.
For a TPU slice it is compiled by libtpu, without the TPUs, and a step time is estimated from its
operations, at an assumed fraction of the published peak, and from the bytes that each device sends
over links of the published bandwidth.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from vixml_jax import command_line, workdir
from vixml_jax import config as config_lib
from vixml_jax.benchmarks import train_step
from vixml_jax.config import BatchConfig, Config, LabelsConfig, LoraConfig, ModelConfig
from vixml_jax.flag_groups import HeadConfig
from vixml_jax.labels import head_update
from vixml_jax.labels.head import LabelHead
from vixml_jax.models import published_towers as towers
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.parallel import absent_devices, collectives, sharding
from vixml_jax.parallel import accelerators as device_kinds
from vixml_jax.runtime import tree_utils
from vixml_jax.structs import Positives
from vixml_jax.training import build, flops
from vixml_jax.training import memory_planner as plan_lib
from vixml_jax.training import optimizer as optimizer_lib


class Setting(NamedTuple):
    """A training step to analyse.

    Attributes:
      parts: Model, abstract state and step.
      size: Queries per batch, and labels per batch.
      length: Positions of a query and its label together.
      sparse: Whether only the free vectors of the batch are updated.
      batch, key: Abstract arguments of the step.
    """

    parts: build.Parts
    size: int
    length: float
    sparse: bool
    batch: Any
    key: Any


def setting(values: Any) -> Setting:
    """The step that the flags describe, on the mesh of `--mesh`."""
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
            size=values.batch, row_width=values.row_width, microbatch_rows=values.microbatch_rows
        ),
    )
    devices = absent_devices.find(values.devices) if values.devices else None
    mesh = workdir.make_mesh(config, devices)
    sizes = plan_lib.DataSizes(values.queries, values.labels)
    parts = build.assemble(config, tower, train_step.layout_of(values.tower, 0), sizes, mesh)
    length = float(values.length)
    batch, key = plan_lib.abstract_batch(
        parts.model, values.batch, length, has_images=(False, False), width=1
    )
    return Setting(parts, values.batch, length, values.free_update == "sparse", batch, key)


def on_paper(setting: Setting, *, tpu: bool) -> dict[str, float]:
    """Bytes that each device sends in a step, by kind, from a formula.

    The rows of a batch are sharded over N devices, the weights over F of them (fsdp). A ring sends
    (N - 1) / N of an array to gather or scatter it, and twice that for an all-reduce
    (arXiv 1802.05799).

    Weights are gathered for each pass over them: forward, backward, and once more where
    microbatches are recomputed; XLA for CPUs keeps them from the first pass where nothing is
    recomputed. Their gradients are reduce-scattered. Token embeddings are looked up by all devices
    that hold a part of the table's width, and exchanged; their gradients return the same way.
    Vectors of queries, labels and prototypes go to every device, their gradients are reduced, and
    the queries go into the bank.
    Of the label tables, one row per candidate is communicated, summed over the devices (all but one
    contribute zeros), and the gradient of the free vectors; with sparse updates also two moments.
    Small arrays (ids, masks, norms) are left out.

    Args:
      setting: The step.
      tpu: Whether the program is compiled for TPUs, where products take bfloat16 and gradients are
        reduce-scattered rather than all-reduced.
    """
    model, like = setting.parts.model, setting.parts.like
    tower, shape = model.tower.config, dict(model.mesh.shape)
    fsdp, rows = shape["fsdp"], shape["replica"] * shape["fsdp"]
    vectors = 4.0 * setting.size * model.table.width

    def ring(devices: int) -> float:
        return (devices - 1) / devices

    def size(tree: Any) -> float:
        """Dense weights of a tower per tensor-parallel shard."""
        dense, _ = tree_utils.partition(tree, lambda path: path[-1] != "word_embeddings")
        return sum(math.prod(x.shape) for x in jax.tree.leaves(dense)) / shape["tensor"]

    base = size(like.frozen.get("tower", {}))
    trained = size(like.params["tower"])
    combiner = sum(math.prod(x.shape) for x in jax.tree.leaves(like.params["combiner"]))
    passes = 3 if model.microbatch_rows else 2 if tpu or tower.remat else 1
    width = 2 if tpu or tower.dtype == "bfloat16" else 4
    words = math.prod(setting.batch.items.tokens.shape) / rows * model.table.width
    looked_up = 2 if "word_embeddings" in like.params["tower"] else 1
    tables = 2 + 2 + 1 + (4 if setting.sparse else 0)
    replicas = 2 * 4 * trained / fsdp * ring(shape["replica"])
    return {
        "weights, gathered": passes * width * (base + trained) * ring(fsdp),
        "gradients, reduced": (1 if tpu else 2) * 4 * trained * ring(fsdp) + replicas,
        "gradients of the combiner": 2 * 4 * combiner * ring(rows),
        "token embeddings, exchanged": looked_up
        * (2 if tower.dtype == "bfloat16" else 4)
        * words
        * ring(fsdp),
        "vectors of the batch": 7 * vectors * ring(rows),
        "rows of tables": tables * vectors * ring(rows),
    }


def head_programs(head: LabelHead, size: int, positives: int) -> dict[str, jax.stages.Compiled]:
    """The compiled programs of the label head: its gradient, and a step of the head epochs.

    Args:
      head: The label head.
      size: Queries per batch.
      positives: Labels of all queries together, with padding.
    """
    rows = sharding.rows_sharding(head.mesh)

    def abstract(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    boxed = jax.eval_shape(lambda: head.init_params(jax.random.key(0)))
    params = sharding.stored_tree({"head": boxed}, head.mesh)
    indices = abstract((positives,), jnp.int32)
    batch = (
        abstract((size, head.width), jnp.float32),
        Positives(indices, indices),
        abstract((size,), bool),
    )
    tx = optimizer_lib.head_optimizer(optax.constant_schedule(1e-3), "float32")
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(head.mesh))
    state = optax.ScaleByAdamState(count, params, params)
    selected = {"vectors", "bias"}

    def sampled(params: Any, state: Any, positives: Positives) -> tuple[Any, Any, Any]:
        """The rows of a step that scores some labels."""
        selection = head.select(positives, jax.random.key(0))
        if selection is None:
            return params, state, None

        def take(tree: Any) -> Any:
            rows = {name: head.take(tree["head"][name], selection) for name in selected}
            return {"head": tree["head"] | rows}

        return take(params), state._replace(mu=take(state.mu), nu=take(state.nu)), selection

    def gradient(params: Any, state: Any, *batch: Any) -> Any:
        params, _, selection = sampled(params, state, batch[1])
        of_both = jax.value_and_grad(head.loss_of, argnums=(0, 1))
        return of_both(params["head"], *batch, selection)

    def update(params: Any, state: Any, *batch: Any) -> Any:
        params, state, selection = sampled(params, state, batch[1])
        return head_update.update(head, params, state, *batch, tx, selection)

    return {
        name: jax.jit(run).lower(params, state, *batch).compile()
        for name, run in (("loss and gradient", gradient), ("step of the head epochs", update))
    }


def head_on_paper(head: LabelHead, size: int, positives: int) -> dict[str, float]:
    """Bytes that each device sends for the loss of the label head and its gradient, by kind.

    The vectors of the queries go to every device, and their gradients are reduce-scattered; so do
    the indices of positives and, with a softmax, two statistics of each query and the gradient of
    one. The network before the label vectors is replicated, so its gradient is all-reduced. Nothing
    depends on the number of labels. Masks and scalars are left out.

    Args:
      head, size, positives: See `head_programs`.
    """
    devices = sharding.num_row_shards(head.mesh)
    once = (devices - 1) / devices
    mlp = 2 * head.width * head.mlp_width + head.width + head.mlp_width if head.mlp_width else 0
    return {
        "vectors of queries, gathered": once * 4 * size * head.width,
        "gradients of queries, reduced": once * 4 * size * head.width,
        "indices of positives": once * 2 * 4 * positives,
        "statistics of queries": 0.0 if head.loss == "bce" else 3 * 2 * once * 4 * size,
        "gradients of the network": 2 * once * 4 * mlp,
    }


def analyse_head(values: Any) -> None:
    """Prints both counts for the label head."""
    mesh_config = Config(mesh=values.mesh)
    devices = absent_devices.find(values.devices) if values.devices else None
    mesh = workdir.make_mesh(mesh_config, devices)
    head = LabelHead(
        mesh, values.labels, towers.config_of(values.tower).width, HeadConfig().mlp_width,
        values.loss, num_sampled=values.num_sampled,
    )  # fmt: skip
    sizes = values.batch, values.batch * values.positives
    paper = head_on_paper(head, *sizes)
    along = ",".join(f"{name}:{size}" for name, size in mesh.shape.items())
    print(
        f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {along}; {values.labels:,} labels x "
        f"{head.width}, {values.loss}, a batch of {values.batch} with {sizes[1]} positives"
    )
    _print_on_paper(paper)
    for name, program in head_programs(head, *sizes).items():
        found = collectives.collectives(program)
        if values.list:
            _print_collectives(found)
        counted = sum(one.sent for one in found)
        print(
            f"  {name + ', found':24} {counted / 1e6:12.2f}   {counted / sum(paper.values()):.3f}"
        )


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_enum("what", "step", ["step", "head"], "Training step, or label head alone.")
    flags.DEFINE_integer("positives", 5, "Labels of a query, for --what=head.", lower_bound=1)
    flags.DEFINE_enum(
        "loss",
        "softmax",
        ["softmax", "decoupled_softmax", "bce"],
        "As --head.loss in train, for --what=head.",
    )
    flags.DEFINE_integer(
        "num_sampled", 0, "Labels drawn per step, for --what=head; 0: all.", lower_bound=0
    )
    flags.DEFINE_string(
        "devices", "", "TPUs to compile for, such as v5e:16x16; empty: the devices of this machine."
    )
    flags.DEFINE_string("mesh", config_lib.Config.mesh, "As in train.")
    flags.DEFINE_string("tower", "all-minilm-l6", "A published tower, by the start of its name.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of matrix products.")
    flags.DEFINE_integer("rank", 256, "Rank of a decoder's adapters.", lower_bound=1)
    flags.DEFINE_integer("batch", 1024, "Queries per batch, and labels per batch.", lower_bound=8)
    flags.DEFINE_integer("row_width", 64, "Positions of a packed row.", lower_bound=8)
    flags.DEFINE_float("length", 30.0, "Positions of a query and a label together.")
    flags.DEFINE_integer("microbatch_rows", 0, "As in train.", lower_bound=0)
    flags.DEFINE_integer("queries", 294805, "Training queries.", lower_bound=8)
    flags.DEFINE_integer("labels", 131073, "Labels.", lower_bound=2)
    flags.DEFINE_enum("free_update", "dense", ["dense", "sparse"], "As in train.")
    flags.DEFINE_float("efficiency", 0.4, "Share of the published peak that products reach.")
    flags.DEFINE_boolean("list", False, "Print each collective.")


def main(argv: Sequence[str]) -> None:
    """Prints both counts and the time that follows."""
    del argv
    values = flags.FLAGS
    if values.what == "head":
        analyse_head(values)
        return
    made = setting(values)
    program = made.parts.step.program(made.batch, made.key)
    found = collectives.collectives(program)
    if values.list:
        _print_collectives(found)
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
    _print_on_paper(paper)
    print(
        f"  {'total, in the program':24} {counted / 1e6:12.2f}   "
        f"{counted / sum(paper.values()):.3f}"
    )
    for kind in collectives.KINDS:
        size = sum(one.sent for one in found if one.kind == kind)
        if size:
            print(f"    {kind:22} {size / 1e6:12.2f}")
    chip = device_kinds.find(device.device_kind)
    if chip:
        work = operations(made) / mesh.size
        compute = work / (chip.peak_flops * values.efficiency)
        links = counted / (chip.links * chip.link_bandwidth)
        print(
            f"a step: {work / 1e12:.2f} TFLOP a device, {compute * 1e3:.0f} ms at "
            f"{100 * values.efficiency:.0f} % of {chip.peak_flops / 1e12:.0f} TFLOP/s; "
            f"{links * 1e3:.0f} ms over {chip.links} links of "
            f"{chip.link_bandwidth / 1e9:.0f} GB/s: "
            f"{max(compute, links) * 1e3:.0f} ms if they overlap, "
            f"{(compute + links) * 1e3:.0f} ms if not"
        )


def _print_on_paper(paper: dict[str, float]) -> None:
    print("MB sent by each device in a step")
    for name, size in {**paper, "total, by formula": sum(paper.values())}.items():
        print(f"  {name:24} {size / 1e6:12.2f}")


def _print_collectives(found: Sequence[collectives.Collective]) -> None:
    for one in sorted(found, key=lambda one: -one.sent):
        print(f"{one.sent / 1e6:10.3f} MB  {one.kind:18} {one.devices:4} x{one.times:<4} "
              f"{sorted(set(one.shapes))} {one.op_name[-60:]}")  # fmt: skip


def operations(setting: Setting) -> float:
    """FLOPs of a step over all devices, for items of equal length."""
    model, size = setting.parts.model, setting.size
    tower = model.tower.config
    lengths = np.full(2 * size, setting.length / 2)
    total = flops.tower_flops(tower, lengths, 0)
    total += flops.similarity_flops(size, size, tower.width, 2)
    total += flops.combiner_flops(model.combiner, size, tower.width)
    return total.step


if __name__ == "__main__":
    command_line.launch(main, define_flags)
