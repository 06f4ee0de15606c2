"""Memory of a training step by batch size and microbatch, with adapters or full training.

    python -m vixml_jax.benchmarks.memory [--tower=qwen2.5-0.5b] [--batches=512,2048] [--measure]

Memory is that of the compiled program, as `train` prints it before it starts; nothing is allocated.
With --measure each step is also run, on random tokens in a process of its own, and the growth of
the process's peak resident memory is printed beside the plan.
"""

import dataclasses
import json
import math
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from vixml_jax import command_line
from vixml_jax.benchmarks import train_step
from vixml_jax.benchmarks.support import steps
from vixml_jax.config import BatchConfig, Config, LabelsConfig
from vixml_jax.models import published_towers as towers
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.parallel import sharding
from vixml_jax.structs import Batch, PackedItems, Positives
from vixml_jax.training.memory_planner import GIB, MemoryPlan, plan_memory

WIDTH = 128  # Positions of a row.
NUM_LABELS = 65536


def build(settings: dict[str, Any]) -> steps.Parts:
    """What one line of the table is about."""
    config = Config(
        labels=LabelsConfig(num_free=NUM_LABELS),
        batch=BatchConfig(microbatch_rows=settings["chunk"], row_width=WIDTH),
    )
    tower = towers.config_of(settings["tower"])
    changes: dict[str, Any] = {"dtype": settings["dtype"], "scan": True, "remat": True}
    if isinstance(tower, DecoderConfig):
        changes["lora_rank"] = settings["rank"]
    return steps.build(
        config,
        dataclasses.replace(tower, **changes),
        train_step.layout_of(settings["tower"], 0),
        num_queries=settings["batch"],
        num_labels=NUM_LABELS,
        mesh=sharding.create_mesh(),
    )


def random_batch(settings: dict[str, Any], shards: int) -> Batch:
    """Items of equal length, `WIDTH // length` per row, in full microbatches on each device."""
    rng = np.random.default_rng(0)
    size, length = settings["batch"], settings["length"]
    a_row = WIDTH // length
    own = size // shards  # Queries of a device, and labels of a device.
    rows = math.ceil(2 * own / a_row)
    rows = math.ceil(rows / max(1, settings["chunk"])) * max(1, settings["chunk"])
    items = np.full((shards, rows * a_row), -1, np.int32)
    for side in range(2):
        mine = side * size + np.arange(size, dtype=np.int32).reshape(shards, own)
        items[:, side * own : (side + 1) * own] = mine
    rows *= shards
    items = items.reshape(rows, a_row)
    segments = np.full((rows, WIDTH), -1, np.int32)
    segments[:, : a_row * length] = np.repeat(items, length, axis=1)
    tokens = rng.integers(0, 1000, (rows, WIDTH), np.int32)
    positions = np.broadcast_to(np.arange(WIDTH, dtype=np.int32) % length, (rows, WIDTH)).copy()
    packed = PackedItems(
        tokens, segments, positions, np.full_like(tokens, -1), np.zeros((0, 1), np.float16)
    )
    ids = np.arange(size, dtype=np.int32)
    return Batch(packed, ids, ids % NUM_LABELS, Positives(ids, ids % NUM_LABELS))


def plan(settings: dict[str, Any]) -> MemoryPlan:
    """The memory plan of the compiled step."""
    parts = build(settings)
    mesh = parts.model.mesh
    batch = sharding.to_devices(random_batch(settings, sharding.num_row_shards(mesh)), mesh)
    return plan_memory(parts.like, lambda: parts.step.program(batch, jax.random.key(0)))


def measure(settings: dict[str, Any]) -> int:
    """Growth of this process's peak resident memory when a step runs, in bytes."""
    parts = build(settings)
    mesh = parts.model.mesh
    state = steps.fresh_state(parts, jax.random.key(0))
    batch = sharding.to_devices(random_batch(settings, sharding.num_row_shards(mesh)), mesh)
    program = parts.step.program(batch, jax.random.key(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state, scalars = program(state, batch, jax.random.key(0))
    if not np.isfinite(scalars["loss"]):
        raise RuntimeError(f"the loss is {scalars['loss']}")
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def main(argv: Sequence[str]) -> None:
    """Prints one line for each batch size, microbatch and rank."""
    del argv
    values = flags.FLAGS
    decoder = isinstance(towers.config_of(values.tower), DecoderConfig)
    print(f"{values.tower}, {values.dtype}, items of {values.length} positions; GiB per device")
    names = ("batch", "chunk", "rank", "trained", "frozen", "optimizer", "step", "total")
    print("".join(f"{name:>10}" for name in names) + ("  measured" if values.measure else ""))
    for rank in map(int, values.ranks if decoder else ["0"]):
        for chunk in map(int, values.chunks):
            for batch in map(int, values.batches):
                settings = {
                    "tower": values.tower, "dtype": values.dtype, "length": values.length,
                    "batch": batch, "chunk": chunk, "rank": rank,
                }  # fmt: skip
                found = plan(settings)
                held = ("trained parameters", "frozen parameters", "optimizer")
                sizes = [*(found.held[name] for name in held), found.step, found.total]
                line = f"{batch:10d}{chunk:10d}{rank:10d}"
                line += "".join(f"{size / GIB:10.2f}" for size in sizes)
                if values.measure:
                    command = [sys.executable, "-m", "vixml_jax.benchmarks.memory", "--child"]
                    done = subprocess.run(
                        [*command, json.dumps(settings)], check=True, capture_output=True, text=True
                    )
                    line += f"{int(done.stdout) / GIB:10.2f}"
                print(line, flush=True)


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_string("tower", "all-minilm-l6", "A published tower, by the start of its name.")
    flags.DEFINE_enum(
        "dtype",
        "float32",
        ["float32", "bfloat16"],
        "Dtype of matrix products and of the frozen base.",
    )
    flags.DEFINE_list(
        "batches", ["512", "1024", "2048"], "Queries per batch, and labels per batch."
    )
    flags.DEFINE_list("chunks", ["0", "32", "128"], "Rows of a microbatch; 0: the whole batch.")
    flags.DEFINE_list("ranks", ["64"], "Ranks of a decoder's adapters; 0: train all weights.")
    flags.DEFINE_integer("length", 32, "Positions per item.", lower_bound=1, upper_bound=WIDTH)
    flags.DEFINE_boolean("measure", False, "Also run each step and measure its memory.")


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--child":
        print(measure(json.loads(sys.argv[2])))
    else:
        command_line.launch(main, define_flags)
