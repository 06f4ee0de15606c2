"""The memory of a run, known before anything of it is allocated."""

import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.modeling import Model
from vixml_jax.parallel import accelerators, sharding
from vixml_jax.runtime import host_memory
from vixml_jax.structs import Batch, PackedItems, TrainState

GIB, MIB = 2**30, 2**20
NUM_SHOWN = 20  # Arrays of a table, however small; all of a MiB a device are shown.
HELP = (
    "the step's part falls with a smaller --batch.encode_chunk (0 is all rows at once) or "
    "--batch.size and with --model.remat, what is held with more devices along fsdp (--mesh), with "
    "--lora.rank and with fewer --labels.num_free"
)


class MemoryPlan(NamedTuple):
    """Bytes of one device.

    Attributes:
      held: What stays there all the time, by what it is.
      step: What a training step takes beside it, as its compiled program says: temporaries, the
        batch, the program itself, and what the device's layouts add to arrays.
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
        of = f" of {self.device / GIB:.1f}" if self.device else ""
        return (
            f"memory a device, GiB: {_spell_sizes(self.held)}, a step {self.step / GIB:.2f}: "
            f"{self.total / GIB:.2f}{of}"
        )

    def check(self) -> None:
        """Raises an `InputError` if the run does not fit."""
        if self.device and self.total > self.device:
            raise InputError(f"{self}: it does not fit; {HELP}")


def _spell_sizes(held: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f}" for name, size in held.items() if size)


def bytes_a_device(tree: Any) -> int:
    """Of the leaves' shards on one device; leaves have shape, dtype and sharding."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def plan_memory(like: TrainState, compiled: Callable[[], jax.stages.Compiled]) -> MemoryPlan:
    """What a run takes.

    Args:
      like: The state's shapes, dtypes and shardings.
      compiled: Gives the compiled step.

    Raises:
      InputError: If the compiler itself finds that the step does not fit.
    """
    held = {name: sum(size for *_, size in rows) for name, rows in _arrays(like).items()}
    try:
        found = compiled().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = re.search(
            r"Used \S+ of \S+ hbm|memory required[^.]*\([^)]*\) exceeds available HBM \S+\)",
            str(error),
        )
        raise InputError(
            f"memory a device, GiB: {_spell_sizes(held)}, and of the step its compiler says "
            f"'{said[0] if said else str(error)[:200]}': it does not fit; {HELP}"
        ) from error
    beside = (
        found.argument_size_in_bytes - sum(held.values()),
        found.output_size_in_bytes - found.alias_size_in_bytes,  # The donated state is in place.
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )
    return MemoryPlan(held, sum(max(0, size) for size in beside), _of_a_device(like))


def _of_a_device(like: TrainState) -> int:
    """Bytes of a device that the state lies on: its own count, or the published one."""
    found = like.step.sharding.device_set
    here = [device for device in found if device in set(jax.local_devices())]
    if here:
        return host_memory.of_a_device(here[0])
    chip = accelerators.about(next(iter(found)).device_kind)
    return chip.memory if chip else 0


class _Array(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str
    spec: str
    size: int  # Bytes a device.


def _arrays(like: TrainState) -> dict[str, list[_Array]]:
    """The arrays of a state by what they are of."""
    groups = {
        "trained parameters": like.params,
        "frozen parameters": like.frozen,
        "optimizer": like.opt_state,
        "labels": like.labels,
        "embeddings of the queries": {"bank": like.bank},
    }
    return {
        group: [
            _Array(
                sharding.path_name(path), x.shape, str(x.dtype), _spell(x.sharding.spec),
                bytes_a_device(x),
            )
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        ]
        for group, tree in groups.items()
    }  # fmt: skip


def _spell(spec: Sequence[Any]) -> str:
    """A partition spec as `--mesh` spells axes: "fsdp . tensor"; "whole" on every device."""
    axes = ["+".join((axis,) if isinstance(axis, str) else axis or ".") for axis in spec]
    return " ".join(axes) if any(axis != "." for axis in axes) else "whole"


def array_table(like: TrainState) -> str:
    """Every large array of a state, a line each, by group; what is small in a line a group.

    Large is what takes a MiB of a device, and the largest `NUM_SHOWN` whatever they take. The
    partition spec has a word a dimension: the axes of the mesh it is spread over, or "." for none.
    """
    groups = _arrays(like)
    sizes = sorted((x.size for rows in groups.values() for x in rows), reverse=True)
    least = min(MIB, sizes[min(NUM_SHOWN, len(sizes)) - 1])
    lines = [("array", "shape", "dtype", "spread over", "MiB a device")]
    for group, rows in groups.items():
        shown = sorted((x for x in rows if x.size >= least), key=lambda x: -x.size)
        for x in shown:
            shape = "x".join(map(str, x.shape)) or "one"
            lines.append((f"{group}: {x.name}", shape, x.dtype, x.spec, f"{x.size / MIB:.2f}"))
        rest = sum(x.size for x in rows if x.size < least)
        if rest:
            count = len(rows) - len(shown)
            lines.append((f"{group}: {count} smaller", "", "", "", f"{rest / MIB:.2f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([*map(str.ljust, line[:-1], widths), line[-1].rjust(widths[-1])])
        for line in lines
    )


class DataSizes(NamedTuple):
    """How large data are."""

    queries: int
    labels: int

    @staticmethod
    def parse(text: str, found: "DataSizes") -> "DataSizes":
        """Sizes as `--plan_size` names them; what it does not name is as found.

        Raises:
          InputError: If it names none.
        """
        sizes = found._asdict()
        for part in text.split(",") if text else ():
            name, _, size = part.partition(":")
            if name not in sizes or not re.fullmatch("[1-9][0-9]{0,11}", size):
                raise InputError(
                    f"--plan_size={text}: expected queries:NUMBER,labels:NUMBER, found {part!r}"
                )
            sizes[name] = int(size)
        return DataSizes(**sizes)


def slice_of(name: str) -> Sequence[jax.Device]:
    """The devices of a slice of TPUs, to compile for alone: "v5e:16x16" has 256.

    Raises:
      InputError: If there is no such slice, or no compiler for it.
    """
    kind, _, topology = name.partition(":")
    flag = f"--plan_devices={name}"
    if kind not in accelerators.TPUS or not re.fullmatch(r"\d+x\d+(x\d+)?", topology):
        raise InputError(
            f"{flag}: expected {' or '.join(accelerators.TPUS)} and a topology, as v5e:16x16 or "
            "v5p:4x4x8"
        )
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise InputError(f"{flag}: the compiler of TPUs is missing: pip install libtpu") from None
    from jax.experimental import topologies

    # Nothing is run, so no accelerator is taken; libtpu need not ask what machine this is, nor be
    # the only one at work here.
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    try:
        found = topologies.get_topology_desc(
            name, platform="tpu", **accelerators.TPUS[kind][1]
        ).devices
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError) as error:
        raise InputError(f"{flag}: no such slice: {str(error).splitlines()[0]}") from None
    return found


def abstract_batch(
    model: Model, size: int, length: float, *, pictures: Sequence[bool], width: int
) -> tuple[Batch, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a batch and of the key that goes with it into a step.

    Args:
      model: Packs it.
      size: Queries, and labels.
      length: Positions of a query and a label together, on average.
      pictures: Whether queries, and whether labels, have pictures.
      width: Of a picture's embedding.
    """
    shares = sharding.num_shares(model.mesh)
    rows = model.row_sizes(length, size, shares)
    size = -(-size // shares) * shares
    num_images = size * model.layout.num_images * sum(pictures)
    packed = jax.ShapeDtypeStruct((shares * rows.least, model.row_width), np.int32)
    ids = jax.ShapeDtypeStruct((size,), np.int32)
    batch = Batch(
        PackedItems(
            tokens=packed,
            segments=packed,
            positions=packed,
            image_at=packed,
            images=jax.ShapeDtypeStruct((num_images, width if num_images else 1), np.float16),
        ),
        query_ids=ids,
        label_ids=ids,
        relevance=jax.ShapeDtypeStruct((size, size), bool),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(model.mesh))
    return sharding.abstract_on_devices(batch, model.mesh), key
