"""Training speed in texts per second, compared with the same tower and loss in PyTorch.

    python -m vixml_jax.benchmarks.train_step --baseline=torch [--tower=qwen2.5-0.5b] [--data=DIR]

A published tower with random weights on the texts of a data set. Programs take turns in one run on
the same cores: ours packed; torch padded to 32 as the paper's program does; torch padded to the
longest text of the batch; and both with every text 32 tokens long. Decoders have adapters on all
linear maps beside a frozen base, and a prompt around each text. Texts are packed or padded before
the clock starts; the clock includes their way to the device.

On an accelerator everything is bfloat16, in batches of 2,048 texts of 32 tokens with three images
each, torch (on a GPU) with SDPA and gradient checkpointing; the fraction of the device's peak and
the peak memory are printed too. Without one the command measures float32 on the CPU, and says so.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from vixml_jax import command_line
from vixml_jax.benchmarks.support import inputs, platforms, workers
from vixml_jax.data.packing import Layout
from vixml_jax.data.store import Items, PreparedDataset, Ragged
from vixml_jax.models import hf_configs, hf_names
from vixml_jax.models import published_towers as towers
from vixml_jax.models.tower import TowerConfig
from vixml_jax.parallel import accelerators

PROGRAMS = (
    "ours",
    "torch, padded to 32",
    "torch, padded to longest",
    "ours, all of 32",
    "torch, all of 32",
)
IMAGE_WIDTH = 1152  # SigLIP 2 so400m's.


def tower_config(settings: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the tower of `settings`, with what `settings["sizes"]` changes of it."""
    return {**towers.about(settings["tower"]), **settings.get("sizes", {})}


def config_of(settings: dict[str, Any]) -> TowerConfig:
    """The sizes of the tower of `settings`."""
    return hf_configs.read_config("config.json", tower_config(settings), hf_names.TOWERS)[1]


def layout_of(tower: str, num_images: int) -> Layout:
    """The layout of items: for a decoder with prompt pieces as long as the paper's."""
    if towers.about(tower)["model_type"] in ("bert", "distilbert"):
        return Layout(num_images)
    text, images, end = (1, 2, 3), (4, 5, 6), (7,)
    return Layout(num_images, (text, "text", images, "images", end), (text, "text", end), False)


def data_of(settings: dict[str, Any], *, full: bool) -> PreparedDataset:
    """The data set with `settings["images"]` images per item.

    With `full`, every text is repeated or truncated to 32 tokens.
    """
    dataset = inputs.open_data(settings["data"])
    sides = {name: getattr(dataset, name) for name in ("train", "test", "labels")}
    if full:
        sides = {name: _filled(items) for name, items in sides.items()}
    num_images = settings["images"]
    for name, items in sides.items():
        item_images = None
        if num_images:  # All the same: their values do not affect speed.
            row = np.random.default_rng(0).normal(size=(1, IMAGE_WIDTH)).astype(np.float16)
            values = np.broadcast_to(row, (len(items) * num_images, IMAGE_WIDTH))
            item_images = Ragged(values, np.arange(len(items) + 1) * num_images)
        sides[name] = dataclasses.replace(items, images=item_images)
    return dataclasses.replace(dataset, **sides)


def _filled(items: Items, length: int = 32) -> Items:
    rows = [
        np.resize(items.tokens.values[a:b], length)
        for a, b in zip(items.tokens.offsets[:-1], items.tokens.offsets[1:], strict=True)
    ]
    return dataclasses.replace(
        items, tokens=Ragged(np.concatenate(rows), np.arange(len(rows) + 1) * length)
    )


def row_width(layout: Layout, *, full: bool, wide: bool) -> int:
    """Positions per row.

    With `full`, exactly one item of equal length; on a GPU (`wide`) three, rounded up to a multiple
    of 8, since matrix products are faster on larger rows.
    """
    longest = 32 + layout.overhead
    if not full:
        return 64
    return -(-3 * longest // 8) * 8 if wide else longest


def batches_of(
    dataset: PreparedDataset, settings: dict[str, Any], *, layout: Layout, width: int
) -> list[Any]:
    """The same batches for every program, in rows of `width` positions."""
    from vixml_jax.data import input_pipeline, packing

    rng = np.random.default_rng(0)
    lengths = [
        packing.item_lengths(items, width=width, layout=layout)
        for items in (dataset.train, dataset.labels)
    ]
    rows = packing.RowSizes.expected(
        sum(float(np.mean(one)) for one in lengths),
        batch_size=settings["batch"],
        width=width,
        chunk=settings["chunk"],
    )
    iterator = input_pipeline.epoch_batches(
        dataset,
        rng.permutation(len(dataset.train)),
        epoch=0,
        seed=0,
        batch_size=settings["batch"],
        width=width,
        layout=layout,
        weights=None,
        rows=rows,
    )
    return [next(iterator) for _ in range(settings["steps"])]


def prepare(programs: list[str], settings: dict[str, Any]) -> dict[str, workers.Prepared]:
    """Builds programs that share a tower and runs each once, so that timing compiles nothing."""
    layout = layout_of(settings["tower"], settings["images"])
    build = _ours if programs[0].startswith("ours") else _torch
    step = build(inputs.open_data(settings["data"]), layout, settings)
    prepared: dict[str, workers.Prepared] = {}
    for program in programs:
        full = "all of" in program
        dataset = data_of(settings, full=full)
        width = row_width(layout, full=full, wide=settings["device"] != "cpu")
        batches = batches_of(dataset, settings, layout=layout, width=width)
        run = step(dataset, batches, None if "longest" in program else 32)
        start = time.perf_counter()
        run()
        first_s = time.perf_counter() - start
        about = {
            "texts": 2 * settings["batch"] * settings["steps"],
            "flops": operations(settings, batches),
            "device": _device(settings),
            "first_s": first_s,
        }
        prepared[program] = about, run
    return prepared


def operations(settings: dict[str, Any], batches: list[Any]) -> float:
    """FLOPs of a round of these batches, the same for every program."""
    from vixml_jax.config import LabelsConfig
    from vixml_jax.labels.prototypes import Combiner
    from vixml_jax.models.decoder import DecoderConfig
    from vixml_jax.training import flops

    tower = config_of(settings)
    sizes = {"image_width": IMAGE_WIDTH if settings["images"] else 0}
    if isinstance(tower, DecoderConfig):
        sizes["lora_rank"] = settings["rank"]
    tower, labels = dataclasses.replace(tower, **sizes), LabelsConfig()
    combiner = Combiner(labels.num_heads, labels.mlp_width, labels.dropout)
    return sum(flops.step_flops(tower, combiner, one) for one in batches)


def _device(settings: dict[str, Any]) -> str:
    if settings["device"] == "cpu":
        return "cpu"
    import jax

    return jax.devices()[0].device_kind


# (data, batches, padded length or None for the longest of a batch) -> function that runs a round.
Rounds = Callable[[PreparedDataset, list[Any], int | None], Callable[[], dict[str, Any]]]


def _torch(dataset: PreparedDataset, layout: Layout, settings: dict[str, Any]) -> Rounds:
    import torch

    from vixml_jax.benchmarks.baselines import torch_models

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    baseline = torch_models.Program(
        tower_config(settings),
        dataset.num_labels,
        lora_rank=settings["rank"],
        layout=layout,
        image_width=IMAGE_WIDTH,
        device="cuda" if settings["device"] == "gpu" else "cpu",
    )

    def side(items: Items, ids: np.ndarray, length: int | None) -> torch_models.Side:
        starts = items.tokens.offsets
        texts = [np.asarray(items.tokens.values[starts[i] : starts[i + 1]]) for i in ids]
        images = None
        if items.images is not None:
            rows = items.images.offsets[ids][:, None] + np.arange(layout.num_images)
            images = items.images.values[rows]
        return torch_models.side(texts, images, length)

    def prepared(dataset: PreparedDataset, batches: list[Any], length: int | None) -> Any:
        padded = [
            (
                side(dataset.train, batch.query_ids, length),
                side(dataset.labels, batch.label_ids, length),
                dataset.train_relevance[batch.query_ids][:, batch.label_ids].toarray() > 0,
            )
            for batch in batches
        ]

        def run() -> dict[str, Any]:
            for (queries, labels, relevance), batch in zip(padded, batches, strict=True):
                loss = baseline.step(queries, labels, batch.label_ids, relevance)
            return {"loss": loss, "bytes": baseline.peak_bytes()}

        return run

    return prepared


def _ours(dataset: PreparedDataset, layout: Layout, settings: dict[str, Any]) -> Rounds:
    import jax

    from vixml_jax.benchmarks.support import steps
    from vixml_jax.config import BatchConfig, Config, LabelsConfig
    from vixml_jax.models.decoder import DecoderConfig
    from vixml_jax.parallel import sharding
    from vixml_jax.training import memory_planner

    on_cpu = settings["device"] == "cpu"
    config = Config(
        labels=LabelsConfig(num_free=dataset.num_labels),
        batch=BatchConfig(microbatch_rows=settings["chunk"]),
    )
    changes: dict[str, Any] = {
        "dtype": "float32" if on_cpu else "bfloat16",
        "scan": not on_cpu,
        "remat": not on_cpu,
        "image_width": IMAGE_WIDTH if layout.num_images else 0,
    }
    tower = config_of(settings)
    if isinstance(tower, DecoderConfig):
        changes["lora_rank"] = settings["rank"]
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    parts = steps.build(
        config,
        dataclasses.replace(tower, **changes),
        layout,
        num_queries=len(dataset.train),
        num_labels=dataset.num_labels,
        mesh=mesh,
    )
    key = jax.random.key(0)
    state = steps.fresh_state(parts, key)

    def prepared(dataset: PreparedDataset, batches: list[Any], length: int | None) -> Any:
        programs = [parts.step.program(sharding.to_devices(one, mesh), key) for one in batches]
        plans = [memory_planner.plan_memory(parts.like, lambda one=one: one) for one in programs]
        planned = memory_planner.largest(plans).total

        def run() -> dict[str, Any]:
            nonlocal state
            for batch in batches:
                state, scalars = parts.step(state, sharding.to_devices(batch, mesh), key)
            loss = float(scalars["loss"])
            stats = jax.devices()[0].memory_stats() or {}
            return {
                "loss": loss, "bytes": stats.get("peak_bytes_in_use", 0), "planned": planned,
            }  # fmt: skip

        return run

    return prepared


def main(argv: Sequence[str]) -> None:
    """Prints texts per second and ratios, and of an accelerator fraction of peak and memory."""
    del argv
    values = flags.FLAGS
    decoder = towers.about(values.tower)["model_type"] not in ("bert", "distilbert")
    device = platforms.describe().name
    on_cpu = device == "cpu"
    settings = {
        "tower": values.tower,
        "data": values.data,
        "batch": values.batch or (8 if on_cpu and decoder else 128 if on_cpu else 2048),
        "steps": values.steps or (1 if decoder else 4),
        "threads": values.threads,
        "rank": values.rank if decoder else 0,
        "images": 0 if on_cpu else 3,
        "chunk": values.chunk,
        "device": device,
    }
    names = [name for name in PROGRAMS if on_cpu or "all of" in name]
    modules = ("torch", "transformers", *(("peft",) if decoder else ()))
    names = platforms.measurable(names, device, values.baseline, modules)
    rounds = workers.compare(
        "vixml_jax.benchmarks.train_step",
        names,
        [
            ("ours", "torch, padded to 32"),
            ("ours", "torch, padded to longest"),
            ("ours, all of 32", "torch, all of 32"),
        ],
        settings,
        rounds=values.rounds,
        texts=lambda about: about["texts"],
    )
    if on_cpu:
        print(
            "no accelerator here: measured on the CPU in float32; not measured: bfloat16, batches "
            "of 2,048 with images, fraction of a device's peak, device memory"
        )
        return
    for name, found in rounds.items():
        kind = found[0]["device"]
        known = accelerators.find(kind)
        seconds = sorted(one["seconds"] for one in found)[len(found) // 2]
        done = found[0]["flops"] / seconds
        fraction = f"{done / known.peak_flops:.1%} of its peak" if known else "peak unknown"
        print(f"{name}: {done / 1e12:.0f} TFLOP/s on {kind} ({fraction}), "
              f"{max(one['bytes'] for one in found) / 2**30:.1f} GiB peak")  # fmt: skip


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_enum("baseline", "torch", ["torch", "none"], "Baseline to compare with.")
    flags.DEFINE_string("tower", "all-minilm-l6", "A published tower, by the start of its name.")
    flags.DEFINE_string("data", "glyphs", "Prepared data whose texts are used, or 'glyphs'.")
    flags.DEFINE_integer(
        "batch", 0, "Queries per batch, and labels per batch; 0: by tower and device."
    )
    flags.DEFINE_integer("steps", 0, "Steps per round; 0: by tower.")
    flags.DEFINE_integer("rounds", 5, "Rounds of each program.")
    flags.DEFINE_integer("rank", 64, "Rank of a decoder's adapters.", lower_bound=1)
    flags.DEFINE_integer(
        "chunk", 0, "Rows of a microbatch of ours; 0: the whole batch.", lower_bound=0
    )
    flags.DEFINE_integer("threads", 1, "Cores of each program.")


if __name__ == "__main__":
    if not workers.serve(prepare):
        command_line.launch(main, define_flags)
