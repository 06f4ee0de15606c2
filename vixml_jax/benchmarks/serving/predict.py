"""Prediction throughput and latency, compared with the same model in PyTorch.

    python -m vixml_jax.benchmarks.serving.predict [--towers=all-minilm-l6 --labels=131072]

From texts to the best ten labels: tokenizer, tower, search. Random weights and labels, float32,
texts in the order of the data. Ours is a `Predictor`; PyTorch pads texts to the longest of a batch
and searches by `matmul` and `topk`. "ours, tower" are the vectors of a query alone, without search.
With --search=scann, ours searches by ScaNN as it is built, without tuning. Programs take turns on
the same cores.
"""

import functools
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from vixml_jax import command_line
from vixml_jax.benchmarks.support import inputs, workers
from vixml_jax.models import published_towers as towers

K = 10
PROGRAMS = ("ours, alone", "ours, tower", "ours, many", "torch, alone", "torch, many")
_OURS = 3  # The first of them.
_QUERIES = 2048  # Each round draws some of them.


def prepare(programs: list[str], settings: dict[str, Any]) -> dict[str, workers.Prepared]:
    """In a child process: the programs, each of which has been run once."""
    dataset = inputs.open_data(settings["data"])
    texts = list(itertools.islice(dataset.train.texts, _QUERIES))
    rng, labels = np.random.default_rng(0), random_labels(settings)
    if programs[0].startswith("ours"):
        predictor = our_predictor(dataset, labels, settings)
        answer, encode = functools.partial(predictor, k=K), predictor.encode
    else:
        answer = encode = torch_answers(dataset, labels, settings)

    def alone(run: Callable[[list[str]], object]) -> dict[str, Any]:
        seconds = []
        for i in rng.integers(len(texts), size=settings["singles"]):
            start = time.perf_counter()
            run([texts[i]])
            seconds.append(time.perf_counter() - start)
        return {"each": seconds}

    def many() -> dict[str, Any]:
        start = rng.integers(max(1, len(texts) - settings["batch"]))
        answer(texts[start : start + settings["batch"]])
        return {}

    known = {
        "alone": (settings["singles"], functools.partial(alone, answer)),
        "tower": (settings["singles"], functools.partial(alone, encode)),
        "many": (settings["batch"], many),
    }
    prepared: dict[str, workers.Prepared] = {}
    for program in programs:
        count, run = known[program.split(", ")[1]]
        run()
        prepared[program] = {"queries": min(count, len(texts))}, run
    return prepared


def random_labels(settings: dict[str, Any]) -> np.ndarray:
    """Random unit vectors [labels, e], the same for every program."""
    width = towers.config_of(settings["tower"]).width
    shape = settings["labels"], width
    labels = np.random.default_rng(1).standard_normal(shape, np.float32)
    return labels / np.linalg.norm(labels, axis=1, keepdims=True)


def our_predictor(dataset: Any, labels: np.ndarray, settings: dict[str, Any]) -> Any:
    """A `Predictor` of a tower with random weights; all its programs are compiled."""
    import dataclasses

    import jax
    from flax import linen as nn

    from vixml_jax import workdir
    from vixml_jax.augmentation.settings import COSINES
    from vixml_jax.config import Config, LabelsConfig
    from vixml_jax.data.packing import Layout
    from vixml_jax.parallel import sharding
    from vixml_jax.search.factory import open_index
    from vixml_jax.serving import artifacts
    from vixml_jax.serving.predictor import Predictor

    model = workdir.build_model(
        Config(labels=LabelsConfig(num_free=2)),
        towers.config_of(settings["tower"]),
        Layout(),
        2,
        sharding.create_mesh(),
    )
    params = nn.unbox(jax.jit(model.init_params)(jax.random.key(0)))
    stored = sharding.stored_tree(model.abstract_params, model.mesh)
    params = jax.device_put(
        sharding.pad(params, stored), jax.tree.map(lambda x: x.sharding, stored)
    )
    names = [f"label {row}" for row in range(len(labels))]
    with tempfile.TemporaryDirectory() as directory:
        place = os.path.join(directory, artifacts.DIRECTORY)
        artifacts.save(place, dataset, 0, labels[: dataset.num_labels], None)
        kept = dataclasses.replace(
            artifacts.ServingArtifacts.open(place), ids=names, texts=names, vectors=labels
        )
        predictor = Predictor(
            directory,
            model,
            params,
            None,
            kept,
            index=open_index(labels, kind=settings["search"], k=K),
            train_index=None,
            scoring=COSINES,
        )
    predictor.warm_up()
    return predictor


def torch_answers(
    dataset: Any, labels: np.ndarray, settings: dict[str, Any]
) -> Callable[[list[str]], list[Any]]:
    """A function from texts to the names and scores of their best labels, by PyTorch."""
    import torch

    from vixml_jax.benchmarks.baselines import torch_models
    from vixml_jax.data.text import tokenizer as tokenizer_lib

    torch.set_num_threads(settings["threads"])
    tower = torch_models.Tower(towers.about(settings["tower"])).eval()
    tokenizer = tokenizer_lib.load(dataset.path, dataset.max_tokens)
    transposed = torch.from_numpy(labels).T
    names = [f"label {row}" for row in range(len(labels))]

    def answer(texts: list[str]) -> list[list[tuple[str, float]]]:
        tokens = [np.array(one.ids) for one in tokenizer.encode_batch(texts)]
        with torch.no_grad():
            vectors = torch.nn.functional.normalize(tower(*torch_models.pad(tokens, None)), dim=-1)
            scores, ids = torch.topk(vectors @ transposed, K)
        return [
            [(names[i], s) for i, s in zip(*row, strict=True)]
            for row in zip(ids.tolist(), scores.tolist(), strict=True)
        ]

    return answer


def main(argv: Sequence[str]) -> None:
    """Prints a table for each tower."""
    del argv
    values = flags.FLAGS
    names = ("data", "labels", "search", "batch", "singles", "threads")
    for tower in values.towers:
        settings = {"tower": tower} | {name: values[name].value for name in names}
        reports = workers.compare(
            "vixml_jax.benchmarks.serving.predict",
            PROGRAMS if values.baseline == "torch" else PROGRAMS[:_OURS],
            [
                ("ours, tower", "ours, alone"),
                ("ours, alone", "torch, alone"),
                ("ours, many", "torch, many"),
            ],
            settings,
            rounds=values.rounds,
            texts=lambda about: about["queries"],
            unit="queries",
        )
        for program, rounds in reports.items():
            if waits := [1000 * second for one in rounds for second in one.get("each", [])]:
                p50, p99 = np.percentile(waits, [50, 99])
                print(f"{program}: p50 {p50:.2f} ms, p99 {p99:.2f} ms")


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_list("towers", ["all-minilm-l6", "qwen2.5-0.5b"], "Towers to measure.")
    flags.DEFINE_enum("baseline", "torch", ["torch", "none"], "Baseline to compare with.")
    flags.DEFINE_string("data", "glyphs", "Prepared data whose texts are the queries, or 'glyphs'.")
    flags.DEFINE_integer("labels", 131072, "Number of labels.", lower_bound=K)
    flags.DEFINE_enum("search", "exact", ["exact", "scann"], "How ours searches.")
    flags.DEFINE_integer("batch", 256, "Queries per batch.", lower_bound=1)
    flags.DEFINE_integer("singles", 100, "Single queries per round.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Rounds of each program.", lower_bound=1)
    flags.DEFINE_integer("threads", os.cpu_count() or 1, "Cores of each program.")


if __name__ == "__main__":
    if not workers.serve(prepare):
        command_line.launch(main, define_flags)
