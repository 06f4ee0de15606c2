"""Texts a second of one training step, beside the same tower and loss in PyTorch.

    python -m vixml_jax.benchmarks.train_step --peer=torch [--data=DIR] [--threads=1]

MiniLM-L6 sizes, random weights, float32, real texts; programs take turns in one run, each alone on
the same processors: ours packed; torch padded to 32 as the paper's program does; torch padded to
the longest text of the batch; and both where every text is 32 tokens long.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from vixml_jax import errors
from vixml_jax.benchmarks import inputs, workers
from vixml_jax.data.store import Items, PreparedDataset, Ragged

MINILM = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}
PROGRAMS = (
    "ours",
    "torch, padded to 32",
    "torch, padded to longest",
    "ours, all of 32",
    "torch, all of 32",
)


def tower_of_minilm() -> Any:
    """Our configuration of the same sizes."""
    from vixml_jax.models.bert import BertConfig

    return BertConfig(
        vocab_size=MINILM["vocab_size"],
        num_layers=MINILM["num_hidden_layers"],
        width=MINILM["hidden_size"],
        num_heads=MINILM["num_attention_heads"],
        mlp_width=MINILM["intermediate_size"],
        max_positions=MINILM["max_position_embeddings"],
    )


def data_of(settings: dict[str, Any], *, full: bool) -> PreparedDataset:
    """The data to read; with `full`, every text repeated or cut to 32 tokens."""
    dataset = inputs.open_data(settings["data"])
    sides = {
        name: dataclasses.replace(getattr(dataset, name), images=None)
        for name in ("train", "test", "labels")
    }
    if full:
        sides = {name: _filled(items) for name, items in sides.items()}
    return dataclasses.replace(dataset, **sides)


def _filled(items: Items, length: int = 32) -> Items:
    rows = [
        np.resize(items.tokens.values[a:b], length)
        for a, b in zip(items.tokens.offsets[:-1], items.tokens.offsets[1:], strict=True)
    ]
    return dataclasses.replace(
        items, tokens=Ragged(np.concatenate(rows), np.arange(len(rows) + 1) * length)
    )


def batches_of(dataset: PreparedDataset, settings: dict[str, Any], *, width: int) -> list[Any]:
    """The same batches for every program, in rows of `width` positions."""
    from vixml_jax.data import packing, pipeline

    rng = np.random.default_rng(0)
    lengths = [np.diff(items.tokens.offsets) for items in (dataset.train, dataset.labels)]
    rows = packing.RowSizes.expected(
        sum(float(np.mean(one)) for one in lengths), batch_size=settings["batch"], width=width
    )
    iterator = pipeline.epoch_batches(
        dataset,
        rng.permutation(len(dataset.train)),
        epoch=0,
        seed=0,
        batch_size=settings["batch"],
        width=width,
        layout=packing.Layout(),
        weights=None,
        rows=rows,
    )
    return [next(iterator) for _ in range(settings["steps"])]


def prepare(program: str, settings: dict[str, Any]) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """Builds a program and runs its batches once, so that nothing is compiled in a timed round."""
    full = "all of" in program
    dataset = data_of(settings, full=full)
    batches = batches_of(dataset, settings, width=32 if full else 64)
    build = _ours if program.startswith("ours") else _torch
    run = build(program, dataset, batches, settings)
    run()
    return {"program": program}, run


def _torch(
    program: str, dataset: PreparedDataset, batches: list[Any], settings: dict[str, Any]
) -> Callable[[], dict[str, Any]]:
    import torch

    from vixml_jax.benchmarks import torch_peer

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    peer = torch_peer.Program(MINILM, dataset.num_labels)
    length = None if "longest" in program else 32

    def texts(items: Items, ids: np.ndarray) -> list[np.ndarray]:
        offsets = items.tokens.offsets
        return [np.asarray(items.tokens.values[offsets[i] : offsets[i + 1]]) for i in ids]

    def run() -> dict[str, Any]:
        for batch in batches:
            loss = peer.step(
                texts(dataset.train, batch.query_ids),
                texts(dataset.labels, batch.label_ids),
                batch.label_ids,
                batch.relevance,
                length,
            )
        return {"loss": loss}

    return run


def _ours(
    program: str, dataset: PreparedDataset, batches: list[Any], settings: dict[str, Any]
) -> Callable[[], dict[str, Any]]:
    import functools

    import jax
    from flax import linen as nn

    from vixml_jax import runs, sharding
    from vixml_jax.config import Config, LabelsConfig, LossConfig
    from vixml_jax.data.packing import Layout
    from vixml_jax.training import loop, losses, optimizer, step

    config = Config(labels=LabelsConfig(num_free=dataset.num_labels))
    mesh = sharding.create_mesh()
    tower = tower_of_minilm()
    model = runs.build_model(config, tower, Layout(), dataset.num_labels, mesh)
    tx = optimizer.make_optimizer(total_steps=10**6, **dataclasses.asdict(config.optimizer))
    boxed = jax.eval_shape(lambda: runs.init_params(model, jax.random.key(0)))
    params = nn.unbox(jax.jit(functools.partial(runs.init_params, model))(jax.random.key(0)))
    state, shardings = loop.place_state(
        model,
        boxed,
        params,
        {},
        tx,
        model.table.init_state(np.arange(dataset.num_labels, dtype=np.int32)),
        loop.empty_bank(model, len(dataset.train)),
    )
    loss_fn = functools.partial(losses.total_loss, **dataclasses.asdict(LossConfig()))
    train_step = step.make_train_step(model, loss_fn, tx, shardings)
    key = jax.random.key(0)

    def run() -> dict[str, Any]:
        nonlocal state
        for batch in batches:
            state, scalars = train_step(state, sharding.to_devices(batch, mesh), key)
        return {"loss": float(scalars["loss"])}

    return run


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    settings = {name: values[name].value for name in ("data", "batch", "steps", "threads")}
    names = PROGRAMS if values.peer == "torch" else [n for n in PROGRAMS if n.startswith("ours")]
    workers.compare(
        "vixml_jax.benchmarks.train_step",
        names,
        [
            ("ours", "torch, padded to 32"),
            ("ours", "torch, padded to longest"),
            ("ours, all of 32", "torch, all of 32"),
        ],
        settings,
        rounds=values.rounds,
        texts=lambda about: 2 * values.batch * values.steps,
    )


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_enum("peer", "torch", ["torch", "none"], "What to run beside ours.")
    flags.DEFINE_string("data", "glyphs", "Prepared data whose texts are read, or 'glyphs'.")
    flags.DEFINE_integer("batch", 128, "Queries of a batch, and as many labels.")
    flags.DEFINE_integer("steps", 4, "Steps of a round.")
    flags.DEFINE_integer("rounds", 5, "Rounds of each program.")
    flags.DEFINE_integer("threads", 1, "Processors that each program has.")


if __name__ == "__main__":
    if not workers.serve(prepare):
        define_flags()
        errors.launch(main)
