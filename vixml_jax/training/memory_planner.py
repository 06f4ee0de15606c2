"""Device memory of a run, computed before anything is allocated."""

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vixml_jax.data import sampling
from vixml_jax.errors import InputError
from vixml_jax.flag_groups import SearchConfig
from vixml_jax.modeling import Model
from vixml_jax.parallel import accelerators, sharding
from vixml_jax.runtime import host_memory
from vixml_jax.search import cost
from vixml_jax.structs import Batch, HeadBatch, PackedItems, Positives, TrainState

GIB, MIB = 2**30, 2**20
# Bytes of programs compiled after the first step, and of libraries that only they load.
LATER_PROGRAMS = GIB // 4
NUM_SHOWN = 20  # Arrays listed however small they are; those of 1 MiB per device always are.
HELP = (
    "to reduce the training step, lower --batch.microbatch_rows (0 means all rows at once) or "
    "--batch.size, or set --model.remat; to reduce stored arrays, shard over a larger fsdp axis "
    "(--mesh), set --lora.rank, or lower --labels.num_free; to reduce the label head, set "
    "--head.moments=bfloat16 or lower --head.label_block"
)
GPUS = ("gpu", "cuda", "rocm")  # `jax.Device.platform` of GPUs.
# Variables that say which part of a GPU's memory JAX takes; the second is the old name, which JAX
# still reads if the first is not set.
_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def _fraction_taken() -> tuple[float, str]:
    """The part of a GPU's memory that JAX takes, and what says so.

    Raises:
      InputError: If a variable that says so holds no number above 0.
    """
    for name in _FRACTIONS:
        if value := os.environ.get(name):
            try:
                fraction = float(value)
            except ValueError:
                fraction = float("nan")
            if not 0.0 < fraction < float("inf"):
                raise InputError(
                    f"{name}={value[:20]} in the environment: expected the part of a GPU's memory "
                    "that JAX may take, such as 0.95"
                )
            return fraction, f"{name}={value}"
    return 0.75, "75% by default"


def help_on(platform: str) -> str:
    """What reduces the memory of a run, or gives it more.

    Args:
      platform: `jax.Device.platform` of the devices.
    """
    if platform not in GPUS:
        return HELP
    return (
        f"{HELP}; on a GPU the limit is the part of its memory that JAX takes, "
        f"{_fraction_taken()[1]}: if no other program uses the GPU, set "
        "XLA_CLIENT_MEM_FRACTION=0.95 in the environment "
        "(XLA_PYTHON_CLIENT_PREALLOCATE=false takes memory step by step and leaves the limit as it "
        "is)"
    )


class MemoryPlan(NamedTuple):
    """Memory of one device, in bytes.

    Attributes:
      held: Bytes of the arrays that stay allocated, by group.
      step: Bytes that a training step needs in addition, from the compiled program: temporaries,
        the batch, the program itself, and padding by the device's memory layouts.
      device: Memory of the device; 0 if it is unknown.
      process: Share of the process itself on a CPU, whose memory is that of the machine: Python,
        libraries, compiled programs and data; 0 on other devices. So are the following.
      saving: Bytes of the copy of the state that is written while training goes on.
      evaluation: Bytes that encoding and search need, when no step runs.
      platform: `jax.Device.platform` of the device.
    """

    held: dict[str, int]
    step: int
    device: int
    process: int = 0
    saving: int = 0
    evaluation: int = 0
    platform: str = ""

    @property
    def total(self) -> int:
        """Bytes that the run needs."""
        working = max(self.step, self.evaluation) + self.saving
        return self.process + sum(self.held.values()) + working

    def __str__(self) -> str:
        capacity = f" of {self.device / GIB:.1f}" if self.device else ""
        held = {"process": self.process, **self.held}
        step = f"training step {self.step / GIB:.2f}"
        if self.evaluation:
            step += f" (or evaluation {self.evaluation / GIB:.2f})"
        if self.saving:
            step += f", checkpoint writing {self.saving / GIB:.2f}"
        return (
            f"memory per device (GiB): {_format_sizes(held)}, {step}, "
            f"total {self.total / GIB:.2f}{capacity}"
        )

    def check(self) -> None:
        """Raises an `InputError` if the run does not fit."""
        if self.device and self.total > self.device:
            raise InputError(f"{self}: the run does not fit; {help_on(self.platform)}")


def largest(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """The plan of the part of a run that needs most."""
    return max(plans, key=lambda plan: plan.total)


def _format_sizes(held: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in held.items() if size)


def bytes_per_device(tree: Any) -> int:
    """Bytes of one device's shards of all leaves; leaves have a shape, dtype and sharding."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def plan_memory(
    like: TrainState,
    compiled: Callable[[], jax.stages.Compiled],
    of_step: TrainState | None = None,
) -> MemoryPlan:
    """The memory that a run needs on each device.

    Args:
      like: The state's shapes, dtypes and shardings.
      compiled: Returns the compiled step.
      of_step: The part of the state that the step takes; None: all.

    Raises:
      InputError: If the compiler finds that the step does not fit.
    """
    held = {name: sum(size for *_, size in rows) for name, rows in _arrays(like).items()}
    try:
        program = compiled()
        analysis = program.memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sizes = re.search(
            r"Used \S+ of \S+ hbm|memory required[^.]*\([^)]*\) exceeds available HBM \S+\)",
            str(error),
        )
        raise InputError(
            f"memory per device (GiB): {_format_sizes(held)}; training step: the compiler reports "
            f"'{sizes[0] if sizes else str(error)[:200]}': the run does not fit; "
            f"{help_on(_platform(like))}"
        ) from error
    batch = analysis.argument_size_in_bytes - bytes_per_device(like if of_step is None else of_step)
    step = max(0, batch) + beside_arguments(program)
    return MemoryPlan(held, step, _device_memory(like), platform=_platform(like))


def beside_arguments(program: jax.stages.Compiled) -> int:
    """Bytes per device that a program needs beside its arguments: temporaries, outputs, itself."""
    analysis = program.memory_analysis()
    sizes = (
        # Donated arrays are updated in place.
        analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.generated_code_size_in_bytes,
    )
    return sum(max(0, size) for size in sizes)


def with_process(plan: MemoryPlan, like: TrainState, evaluation: int) -> MemoryPlan:
    """The plan with what else a process on a CPU holds; the same plan for other devices.

    To be called once the step is compiled and before the state is allocated: what the process holds
    then, it holds throughout.

    Args:
      plan: The plan of the arrays and of the step.
      like: The state's shapes, dtypes and shardings.
      evaluation: See `evaluation_bytes`.
    """
    if _platform(like) != "cpu":
        return plan
    process = (host_memory.resident() + LATER_PROGRAMS) // jax.local_device_count()
    saved = bytes_per_device(like._replace(frozen=()))
    return plan._replace(process=process, saving=saved, evaluation=evaluation)


def evaluation_bytes(
    model: Model, items: Sequence[tuple[float, int]], *, block: int, labels: int
) -> int:
    """Approximate bytes per device of encoding a block, or of an exact search if that needs more.

    Blocks of the search are those that evaluations in training use.

    Args:
      model: The model that encodes.
      items: Of each kind of items, queries and labels, the mean number of positions and how many
        there are.
      block: Items encoded at a time, over all devices.
      labels: Number of labels.
    """
    tower, shards = model.tower.config, sharding.num_row_shards(model.mesh)
    positions = model.row_width * max(
        model.row_sizes(length, min(block, count), shards).least for length, count in items
    )
    # The widest layers and the attention of all heads, of which three copies exist at the peak:
    # measured on encoders of 384 with texts of 16 and of 64 tokens.
    values = 3 * (tower.mlp_width + 3 * tower.width + tower.num_heads * model.row_width)
    blocks = SearchConfig()
    search = cost.exact_bytes(
        labels,
        model.table.width,
        query_block=blocks.query_block,
        label_block=blocks.label_block,
        devices=shards,
    )
    return max(4 * positions * values, search // shards)


def _platform(like: TrainState) -> str:
    return next(iter(like.step.sharding.device_set)).platform


def _device_memory(like: TrainState) -> int:
    """Memory of a device of the state in bytes: as it reports, or else as published.

    Of an absent GPU it is the part that JAX takes.
    """
    devices = like.step.sharding.device_set
    local = [device for device in devices if device in jax.local_devices()]
    if local:
        return host_memory.device_memory(local[0])
    chip = accelerators.find(next(iter(devices)).device_kind)
    if chip is None:
        return 0
    if _platform(like) not in GPUS:
        return chip.memory
    return int(_fraction_taken()[0] * chip.memory)


class _Array(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    size: int  # Bytes per device.


def _arrays(like: TrainState) -> dict[str, list[_Array]]:
    """The arrays of a state, by group."""
    groups = {
        "trained parameters": like.params,
        "frozen parameters": like.frozen,
        "optimizer": like.opt_state,
        "labels": like.labels,
        "query embeddings": {"bank": like.bank},
    }
    return {
        group: [
            _Array(
                sharding.path_name(path), x.shape, str(x.dtype), _format_spec(x.sharding.spec),
                bytes_per_device(x),
            )
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        ]
        for group, tree in groups.items()
    }  # fmt: skip


def _format_spec(spec: Sequence[Any]) -> str:
    """A partition spec with the mesh axes of each dimension, "fsdp . tensor", or "replicated"."""
    axes = ["+".join((axis,) if isinstance(axis, str) else axis or ".") for axis in spec]
    return " ".join(axes) if any(axis != "." for axis in axes) else "replicated"


def array_table(like: TrainState) -> str:
    """A table of the large arrays of a state by group, with one line for the others of a group.

    Arrays of at least 1 MiB per device are large, and so are the `NUM_SHOWN` largest. The column
    "sharded over" has one entry for each dimension: mesh axes joined by "+", or "." for none.
    """
    groups = _arrays(like)
    sizes = sorted((x.size for rows in groups.values() for x in rows), reverse=True)
    smallest = min(MIB, sizes[min(NUM_SHOWN, len(sizes)) - 1])
    lines = [("array", "shape", "dtype", "sharded over", "MiB per device")]
    for group, rows in groups.items():
        shown = sorted((x for x in rows if x.size >= smallest), key=lambda x: -x.size)
        for x in shown:
            shape = "x".join(map(str, x.shape)) or "scalar"
            lines.append((f"{group}: {x.name}", shape, x.dtype, x.spec, f"{x.size / MIB:.2f}"))
        rest = sum(x.size for x in rows if x.size < smallest)
        if rest:
            count = len(rows) - len(shown)
            lines.append((f"{group}: {count} smaller", "", "", "", f"{rest / MIB:.2f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([*map(str.ljust, line[:-1], widths), line[-1].rjust(widths[-1])])
        for line in lines
    )


class DataSizes(NamedTuple):
    """Sizes of a data set.

    Attributes:
      queries: Number of training queries.
      labels: Number of labels.
      labels_per_query: Mean number of labels of a training query.
    """

    queries: int
    labels: int
    labels_per_query: float = 1.0

    @property
    def density(self) -> tuple[float, float]:
        """Mean number of labels of a training query, and of training queries of a label."""
        return self.labels_per_query, self.queries * self.labels_per_query / self.labels

    @staticmethod
    def parse(text: str, default: "DataSizes") -> "DataSizes":
        """The sizes given by the flag `--plan_size`.

        Args:
          text: "queries:NUMBER,labels:NUMBER", either one alone, or "".
          default: Sizes that the text does not give.

        Raises:
          InputError: If the text is anything else.
        """
        sizes = default._asdict()
        for part in text.split(",") if text else ():
            name, _, size = part.partition(":")
            if name not in ("queries", "labels") or not re.fullmatch("[1-9][0-9]{0,11}", size):
                raise InputError(
                    f"--plan_size={text}: expected queries:NUMBER,labels:NUMBER, found {part!r}"
                )
            sizes[name] = int(size)
        return DataSizes(**sizes)


def abstract_batch(
    model: Model,
    size: int,
    length: float,
    *,
    has_images: Sequence[bool],
    width: int,
    labels_per_query: float = 1.0,
) -> tuple[Batch, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch and of the random key of a step.

    Args:
      model: The model that the batch is packed for.
      size: Number of queries, and of labels.
      length: Mean number of positions of a query and a label together.
      has_images: Whether queries, and whether labels, have images.
      width: Width of an image embedding.
      labels_per_query: Mean number of labels of a query.
    """
    shards = sharding.num_shards(model.mesh)
    rows = model.row_sizes(length, size, shards)
    size = -(-size // shards) * shards
    num_images = size * model.layout.num_images * sum(has_images)
    ids = jax.ShapeDtypeStruct((size,), np.int32)
    batch = Batch(
        _abstract_items(model, shards * rows.least, num_images, width),
        query_ids=ids,
        label_ids=ids,
        positives=_abstract_positives(size, shards, labels_per_query),
        tokens=_abstract_words(model, size),
    )
    return sharding.abstract_on_devices(batch, model.mesh), _abstract_key(model)


def abstract_block(
    model: Model, size: int, length: float, *, images: bool, width: int
) -> tuple[PackedItems, int]:
    """Shapes, dtypes and shardings of a block of items to encode, and the number of items.

    Args:
      model: The model that the items are packed for.
      size: Number of items, over all devices.
      length: Mean number of positions of an item.
      images: Whether the items have images.
      width: Width of an image embedding.
    """
    shards = sharding.num_row_shards(model.mesh)
    rows = model.row_sizes(length, size, shards).least
    size = -(-size // shards) * shards
    num_images = size * model.layout.num_images * images
    items = _abstract_items(model, shards * rows, num_images, width)
    return sharding.abstract_on_devices(items, model.mesh), size


def _abstract_items(model: Model, rows: int, num_images: int, width: int) -> PackedItems:
    packed = jax.ShapeDtypeStruct((rows, model.row_width), np.int32)
    images = jax.ShapeDtypeStruct((num_images, width if num_images else 1), np.float16)
    return PackedItems(packed, packed, packed, packed, images)


def abstract_head_batch(
    model: Model, size: int, labels_per_query: float
) -> tuple[HeadBatch, jax.ShapeDtypeStruct]:
    """The same as `abstract_batch` for a batch of a head epoch.

    Args:
      model: The model that the batch is for.
      size: Number of queries.
      labels_per_query: Mean number of labels of a query.
    """
    shards = sharding.num_shards(model.mesh)
    size = -(-size // shards) * shards
    batch = HeadBatch(
        jax.ShapeDtypeStruct((size,), np.int32),
        _abstract_positives(size, shards, labels_per_query),
        _abstract_words(model, size),
    )
    return sharding.abstract_on_devices(batch, model.mesh), _abstract_key(model)


def _abstract_words(model: Model, size: int) -> jax.ShapeDtypeStruct | None:
    return jax.ShapeDtypeStruct((size, model.word_tokens), np.int32) if model.word_tokens else None


def _abstract_positives(size: int, shards: int, labels_per_query: float) -> Positives:
    usual = sampling.usual_positives(np.array([labels_per_query]), size, shards)
    return Positives(*(jax.ShapeDtypeStruct((shards * usual,), np.int32) for _ in range(2)))


def _abstract_key(model: Model) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(model.mesh))
