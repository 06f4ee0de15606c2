"""Inference speed in texts per second, compared with the same tower in PyTorch.

    python -m vixml_jax.benchmarks.encode --baseline=torch [--data=DIR] [--threads=1]

MiniLM-L6 sizes, random weights, texts in the order of the data. Programs take turns in one run on
the same cores: ours packed; torch padded to 32 as the paper's program does; torch in batches of
texts sorted by length, padded to the longest. The clock includes packing and padding. float32 on a
CPU, bfloat16 on one accelerator.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from vixml_jax import command_line
from vixml_jax.benchmarks import train_step
from vixml_jax.benchmarks.support import platforms, workers
from vixml_jax.data.packing import Layout
from vixml_jax.data.store import Items, Ragged

TOWER = "all-minilm-l6"
PROGRAMS = ("ours", "torch, padded to 32", "torch, sorted by length")


def prepare(programs: list[str], settings: dict[str, Any]) -> dict[str, workers.Prepared]:
    """Builds the programs and runs each once, so that nothing is compiled in a timed round."""
    items = _first(train_step.data_of(settings, full=False).train, settings["texts"])
    prepared: dict[str, workers.Prepared] = {}
    for program in programs:
        run = (_ours if program == "ours" else _torch)(program, items, settings)
        run()
        prepared[program] = {"texts": len(items)}, run
    return prepared


def _first(items: Items, count: int) -> Items:
    offsets = np.asarray(items.tokens.offsets[: count + 1])
    return dataclasses.replace(
        items,
        texts=[""] * (len(offsets) - 1),
        tokens=Ragged(np.asarray(items.tokens.values[: offsets[-1]]), offsets),
    )


def _ours(program: str, items: Items, settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    import jax
    from flax import linen as nn

    from vixml_jax import workdir
    from vixml_jax.config import Config, LabelsConfig
    from vixml_jax.parallel import sharding

    dtype = "float32" if settings["device"] == "cpu" else "bfloat16"
    model = workdir.build_model(
        Config(labels=LabelsConfig(num_free=2)),
        dataclasses.replace(train_step.config_of(settings), dtype=dtype),
        Layout(),
        2,
        sharding.create_mesh(devices=jax.devices()[:1]),
    )
    params = nn.unbox(jax.jit(model.init_params)(jax.random.key(0)))

    def run() -> dict[str, Any]:
        found = model.encode_queries(params, items, block=settings["batch"])
        return {"sum": float(found.values.sum())}

    return run


def _torch(program: str, items: Items, settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    import torch

    from vixml_jax.benchmarks.baselines import torch_models

    torch.set_num_threads(settings["threads"])
    device = "cuda" if settings["device"] == "gpu" else "cpu"
    tower = torch_models.Tower(train_step.tower_config(settings), device=device).eval()
    offsets = items.tokens.offsets
    texts = [np.asarray(items.tokens.values[a:b]) for a, b in itertools.pairwise(offsets)]

    def run() -> dict[str, Any]:
        order, length = range(len(texts)), 32
        if "sorted" in program:
            order, length = np.argsort([len(text) for text in texts], kind="stable"), None
        found = np.empty((len(texts), tower.words.weight.shape[1]), np.float32)
        half = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
        with torch.no_grad(), half:
            for start in range(0, len(texts), settings["batch"]):
                ids = order[start : start + settings["batch"]]
                vectors = tower(*torch_models.pad([texts[i] for i in ids], length))
                unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
                found[ids] = unit.cpu().numpy()
        return {"sum": float(found.sum())}

    return run


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    settings = {name: values[name].value for name in ("data", "batch", "texts", "threads")}
    settings |= {"tower": TOWER, "images": 0, "device": platforms.describe().name}
    names = platforms.measurable(PROGRAMS, settings["device"], values.baseline)
    workers.compare(
        "vixml_jax.benchmarks.encode",
        names,
        [("ours", name) for name in PROGRAMS[1:]],
        settings,
        rounds=values.rounds,
        texts=lambda about: about["texts"],
    )


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_enum("baseline", "torch", ["torch", "none"], "Baseline to compare with.")
    flags.DEFINE_string("data", "glyphs", "Prepared data whose texts are encoded, or 'glyphs'.")
    flags.DEFINE_integer("batch", 512, "Texts encoded at a time.")
    flags.DEFINE_integer("texts", 4096, "Texts per round.")
    flags.DEFINE_integer("rounds", 5, "Rounds of each program.")
    flags.DEFINE_integer("threads", 1, "Cores of each program.")


if __name__ == "__main__":
    if not workers.serve(prepare):
        command_line.launch(main, define_flags)
