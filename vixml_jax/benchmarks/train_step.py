"""Texts a second of one training step, beside the same tower and loss in PyTorch.

    python -m vixml_jax.benchmarks.train_step --peer=torch [--tower=qwen2.5-0.5b] [--data=DIR]

A published tower with random weights on real texts; programs take turns in one run, each alone on
the same processors: ours packed; torch padded to 32 as the paper's program does; torch padded to
the longest text of the batch; and both where every text is 32 tokens long. Decoders have adapters
on all maps beside a frozen base, and a prompt around each text.

On a GPU all is bfloat16, in batches of 2,048 whose every text is 32 tokens long and has three
pictures, torch with SDPA and gradient checkpointing; the share of the GPU's peak and the peak
memory stand beside the speeds. Without a GPU the command measures float32 on the CPU, and says so.
"""

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from vixml_jax import errors
from vixml_jax.benchmarks.support import inputs, towers, workers
from vixml_jax.data.packing import Layout
from vixml_jax.data.store import Items, PreparedDataset, Ragged
from vixml_jax.parallel import accelerators

PROGRAMS = (
    "ours",
    "torch, padded to 32",
    "torch, padded to longest",
    "ours, all of 32",
    "torch, all of 32",
)
IMAGE_WIDTH = 1152  # SigLIP 2 so400m's.


def layout_of(tower: str, num_images: int) -> Layout:
    """How an item is written: for a decoder between prompt pieces as long as the paper's."""
    if towers.about(tower)["model_type"] in ("bert", "distilbert"):
        return Layout(num_images)
    say, show, end = (1, 2, 3), (4, 5, 6), (7,)
    return Layout(num_images, (say, "text", show, "images", end), (say, "text", end), False)


def data_of(settings: dict[str, Any], *, full: bool) -> PreparedDataset:
    """The data to read, each item with as many pictures as the settings say; with `full`, every
    text repeated or cut to 32 tokens."""
    dataset = inputs.open_data(settings["data"])
    sides = {name: getattr(dataset, name) for name in ("train", "test", "labels")}
    if full:
        sides = {name: _filled(items) for name, items in sides.items()}
    num_images = settings["images"]
    for name, items in sides.items():
        pictures = None
        if num_images:  # One and the same: what a picture shows costs nothing.
            row = np.random.default_rng(0).normal(size=(1, IMAGE_WIDTH)).astype(np.float16)
            values = np.broadcast_to(row, (len(items) * num_images, IMAGE_WIDTH))
            pictures = Ragged(values, np.arange(len(items) + 1) * num_images)
        sides[name] = dataclasses.replace(items, images=pictures)
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
    """Positions of a row: one item exactly where all are alike, or three on a GPU, whose products
    want larger rows of a multiple of 8."""
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
    """Builds programs that share a tower, and runs the batches of each once, so that nothing is
    compiled in a timed round."""
    layout = layout_of(settings["tower"], settings["images"])
    build = _ours if programs[0].startswith("ours") else _torch
    step = build(inputs.open_data(settings["data"]), layout, settings)
    prepared: dict[str, workers.Prepared] = {}
    for program in programs:
        full = "all of" in program
        dataset = data_of(settings, full=full)
        width = row_width(layout, full=full, wide=settings["device"] == "gpu")
        batches = batches_of(dataset, settings, layout=layout, width=width)
        run = step(dataset, batches, None if "longest" in program else 32)
        run()
        about = {"flops": operations(settings, batches), "device": _device(settings)}
        prepared[program] = about, run
    return prepared


def operations(settings: dict[str, Any], batches: list[Any]) -> float:
    """What a round of these batches needs, of every program the same."""
    from vixml_jax.config import LabelsConfig
    from vixml_jax.labels.prototypes import Combiner
    from vixml_jax.models.decoder import DecoderConfig
    from vixml_jax.training import flops

    tower = towers.config_of(settings["tower"])
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


# Data, its batches, and what texts are padded to (None: the longest of a batch) -> a round.
Rounds = Callable[[PreparedDataset, list[Any], int | None], Callable[[], dict[str, Any]]]


def _torch(dataset: PreparedDataset, layout: Layout, settings: dict[str, Any]) -> Rounds:
    import torch

    from vixml_jax.benchmarks.baselines import torch_models

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    peer = torch_models.Program(
        towers.about(settings["tower"]),
        dataset.num_labels,
        lora_rank=settings["rank"],
        layout=layout,
        image_width=IMAGE_WIDTH,
        device="cuda" if settings["device"] == "gpu" else "cpu",
    )

    def side(items: Items, ids: np.ndarray) -> torch_models.Side:
        starts = items.tokens.offsets
        texts = [np.asarray(items.tokens.values[starts[i] : starts[i + 1]]) for i in ids]
        if items.images is None:
            return texts, None
        rows = items.images.offsets[ids][:, None] + np.arange(layout.num_images)
        return texts, items.images.values[rows]

    def prepared(dataset: PreparedDataset, batches: list[Any], length: int | None) -> Any:
        def run() -> dict[str, Any]:
            for batch in batches:
                queries = side(dataset.train, batch.query_ids)
                labels = side(dataset.labels, batch.label_ids)
                loss = peer.step(queries, labels, batch.label_ids, batch.relevance, length)
            return {"loss": loss, "bytes": peer.peak_bytes()}

        return run

    return prepared


def _ours(dataset: PreparedDataset, layout: Layout, settings: dict[str, Any]) -> Rounds:
    import functools

    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from vixml_jax import workdir
    from vixml_jax.config import BatchConfig, Config, LabelsConfig, LossConfig
    from vixml_jax.models.decoder import DecoderConfig
    from vixml_jax.parallel import sharding
    from vixml_jax.training import losses, optimizer
    from vixml_jax.training import train_state as state_lib
    from vixml_jax.training import train_step as train_step_lib

    gpu = settings["device"] == "gpu"
    config = Config(
        labels=LabelsConfig(num_free=dataset.num_labels),
        batch=BatchConfig(encode_chunk=settings["chunk"]),
    )
    changes: dict[str, Any] = {
        "dtype": "bfloat16" if gpu else "float32",
        "scan": gpu,
        "remat": gpu,
        "image_width": IMAGE_WIDTH if layout.num_images else 0,
    }
    tower = towers.config_of(settings["tower"])
    if isinstance(tower, DecoderConfig):
        changes["lora_rank"] = settings["rank"]
    tower = dataclasses.replace(tower, **changes)
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    model = workdir.build_model(config, tower, layout, dataset.num_labels, mesh)
    tx = optimizer.make_optimizer(total_steps=10**6, **dataclasses.asdict(config.optimizer))

    def fresh(key: jax.Array) -> Any:
        params, frozen = workdir.split_params(nn.unbox(model.init_params(key)), tower)
        frozen = jax.tree.map(lambda x: x.astype(jnp.dtype(tower.dtype)), frozen)
        return sharding.pad((params, frozen), (like.params, like.frozen))

    trained, frozen = workdir.split_params(model.abstract_params, tower)
    frozen = workdir.as_frozen(frozen, tower.dtype)
    like = state_lib.abstract_state(model, trained, frozen, tx, len(dataset.train))
    state = state_lib.place_state(
        like,
        *jax.jit(fresh)(jax.random.key(0)),
        tx,
        model.table.init_state(np.arange(dataset.num_labels, dtype=np.int32)),
        state_lib.empty_bank(model, len(dataset.train)),
    )
    loss_fn = functools.partial(losses.total_loss, **dataclasses.asdict(LossConfig()))
    train_step = train_step_lib.make_train_step(model, loss_fn, tx, like)
    key = jax.random.key(0)

    def prepared(dataset: PreparedDataset, batches: list[Any], length: int | None) -> Any:
        def run() -> dict[str, Any]:
            nonlocal state
            for batch in batches:
                state, scalars = train_step(state, sharding.to_devices(batch, mesh), key)
            said = {"loss": float(scalars["loss"])}
            stats = jax.devices()[0].memory_stats() or {}
            return {**said, "bytes": stats.get("peak_bytes_in_use", 0)}

        return run

    return prepared


def on_gpu() -> bool:
    """Whether JAX finds a GPU; asked in a child, so that this process holds none of its memory."""
    ask = "import jax; print(jax.default_backend())"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    return found.stdout.strip() == "gpu"


def main(argv: Sequence[str]) -> None:
    """Prints texts a second, ratios, and on a GPU the share of its peak and the peak memory."""
    del argv
    values = flags.FLAGS
    decoder = towers.about(values.tower)["model_type"] not in ("bert", "distilbert")
    gpu = on_gpu()
    settings = {
        "tower": values.tower,
        "data": values.data,
        "batch": values.batch or (2048 if gpu else 8 if decoder else 128),
        "steps": values.steps or (1 if decoder else 4),
        "threads": values.threads,
        "rank": values.rank if decoder else 0,
        "images": 3 if gpu else 0,
        "chunk": values.chunk,
        "device": "gpu" if gpu else "cpu",
    }
    names = [name for name in PROGRAMS if not gpu or "all of" in name]
    if values.peer == "none":
        names = [name for name in names if name.startswith("ours")]
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
        texts=lambda about: 2 * settings["batch"] * settings["steps"],
    )
    if not gpu:
        print(
            "no GPU here: measured on the CPU in float32; not measured: bfloat16, batches of "
            "2,048 with pictures, share of a GPU's peak, memory on it"
        )
        return
    for name, found in rounds.items():
        kind = found[0]["device"]
        known = accelerators.about(kind)
        seconds = sorted(one["seconds"] for one in found)[len(found) // 2]
        done = found[0]["flops"] / seconds
        share = f"{done / known.peak_flops:.1%} of its peak" if known else "peak unknown"
        print(f"{name}: {done / 1e12:.0f} TFLOP/s on {kind} ({share}), "
              f"{max(one['bytes'] for one in found) / 2**30:.1f} GiB at most")  # fmt: skip


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_enum("peer", "torch", ["torch", "none"], "What to run beside ours.")
    flags.DEFINE_string("tower", "all-minilm-l6", "A published tower, by (the start of) its name.")
    flags.DEFINE_string("data", "glyphs", "Prepared data whose texts are read, or 'glyphs'.")
    flags.DEFINE_integer("batch", 0, "Queries of a batch, and as many labels; 0: as suits.")
    flags.DEFINE_integer("steps", 0, "Steps of a round; 0: as suits.")
    flags.DEFINE_integer("rounds", 5, "Rounds of each program.")
    flags.DEFINE_integer("rank", 64, "Rank of a decoder's adapters.", lower_bound=1)
    flags.DEFINE_integer("chunk", 0, "Rows that ours reads at a time; 0: all.", lower_bound=0)
    flags.DEFINE_integer("threads", 1, "Processors that each program has.")


if __name__ == "__main__":
    if not workers.serve(prepare):
        define_flags()
        errors.launch(main)
