"""Time and peak memory of loading a checkpoint, compared with `transformers`.

    python -m vixml_jax.benchmarks.load [--gigabytes=2] [--dtype=bfloat16] [--devices=1,8]

A checkpoint of random bfloat16 weights with the sizes of Qwen2.5-1.5B, with as many layers as fill
the given size, is written in files of half a gigabyte. In each round each program loads it in a new
process on the same cores, with the files in the page cache. Memory is the growth of RssAnon (read
every 2 ms) during loading, weights included; mapped pages of the files, which the system can drop,
are counted separately (RssFile). In bfloat16 `transformers` only maps the files.
"""

import json
import math
import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from vixml_jax import command_line
from vixml_jax.benchmarks.support import workers

QWEN = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
}
PART = 5 * 10**8  # Bytes.
BASELINE = "transformers"


def write_checkpoint(directory: str, gigabytes: float) -> list[int]:
    """Writes config.json, weight files and their index; returns the size of each tensor."""
    import ml_dtypes
    import safetensors.numpy

    from vixml_jax.models import hf_checkpoints, hf_configs, hf_files, hf_names

    def shapes(num_layers: int) -> dict[str, tuple[int, ...]]:
        about = {**QWEN, "num_hidden_layers": num_layers}
        _, config = hf_configs.read_config(hf_files.CONFIG, about, hf_names.TOWERS)
        sizes, expected = (
            hf_checkpoints.sizes_of(config),
            hf_names.TENSORS["qwen2"].expected(config),
        )
        return {name: place.shape(sizes) for name, (place, _) in expected.items()}

    one, two = (2 * sum(math.prod(shape) for shape in shapes(n).values()) for n in (1, 2))
    num_layers = max(1, 1 + round((gigabytes * 10**9 - one) / (two - one)))
    drawn = np.random.default_rng(0).normal(scale=0.02, size=10**6).astype(ml_dtypes.bfloat16)
    parts: list[dict[str, np.ndarray]] = [{}]
    for name, shape in shapes(num_layers).items():
        value = np.resize(drawn, shape)
        if parts[-1] and sum(x.nbytes for x in parts[-1].values()) + value.nbytes > PART:
            parts.append({})
        parts[-1][name] = value
    files = {}
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        safetensors.numpy.save_file(part, os.path.join(directory, file), metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    for name, content in (
        (hf_files.CONFIG, {**QWEN, "num_hidden_layers": num_layers}),
        (hf_files.INDEX, {"metadata": {}, "weight_map": files}),
    ):
        with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
            json.dump(content, file)
    return [x.size for part in parts for x in part.values()]


def prepare(programs: list[str], settings: dict[str, Any]) -> dict[str, workers.Prepared]:
    """Imports what each program needs; a round loads the checkpoint and keeps it."""
    return {
        name: ({}, (_torch if name == BASELINE else _ours)(name, settings)) for name in programs
    }


def _ours(program: str, settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    before, count = os.environ.get("XLA_FLAGS", ""), program.split()[1]
    os.environ["XLA_FLAGS"] = f"{before} --xla_force_host_platform_device_count={count}"
    import jax
    import safetensors  # noqa: F401  (imported before the clock starts)

    from vixml_jax.models import hf_checkpoints
    from vixml_jax.parallel import sharding

    mesh, kept = sharding.create_mesh(), []
    jax.block_until_ready(jax.device_put(np.zeros(8), sharding.replicated(mesh)))

    def run() -> dict[str, Any]:
        kept.append(
            hf_checkpoints.load_hf_tower(settings["path"], dtype=settings["dtype"], mesh=mesh)
        )
        return {}

    return run


def _torch(program: str, settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    import torch
    import transformers

    torch.set_num_threads(settings["threads"])
    model, kept = transformers.Qwen2Model, []

    def run() -> dict[str, Any]:
        kept.append(model.from_pretrained(settings["path"], dtype=settings["dtype"]))
        return {}

    return run


class PeakMemory:
    """Peak memory of another process while the context is open, in bytes.

    Attributes:
      own: Growth of its anonymous memory.
      files: Growth of its mapped file pages.
    """

    def __init__(self, process: int, every: float = 0.002):
        self.own = self.files = 0
        self._path, self._every = f"/proc/{process}/status", every
        self._first = self._read()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(self._every):
            own, files = (x - y for x, y in zip(self._read(), self._first, strict=True))
            self.own, self.files = max(self.own, own), max(self.files, files)

    def _read(self) -> tuple[int, int]:
        with open(self._path, encoding="utf-8") as file:
            fields = dict(line.split(":", 1) for line in file)
        return tuple(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


def main(argv: Sequence[str]) -> None:
    del argv
    values = flags.FLAGS
    programs = [f"ours, {count} device{'s' * (count != '1')}" for count in values.devices]
    programs += [BASELINE] if values.baseline == BASELINE else []
    with tempfile.TemporaryDirectory(prefix="vixml-") as path:
        sizes = write_checkpoint(path, values.gigabytes)
        settings = {"path": path, "dtype": values.dtype, "threads": values.threads}
        itemsize = {"float32": 4, "bfloat16": 2}[values.dtype]
        weights, largest = (itemsize * f(sizes) for f in (sum, max))
        print(
            f"weights of {weights / 1e9:.2f} GB in {values.dtype}, the largest tensor of "
            f"{largest / 1e9:.2f} GB; {values.threads} processors"
        )
        print(
            "program           seconds   GB/s  peak GB  over the weights  in tensors  files, GB"
            f"  (median and highest of {values.rounds})"
        )
        found: dict[str, list[tuple[float, PeakMemory]]] = {name: [] for name in programs}
        for _ in range(values.rounds):
            for name in programs:
                worker = workers.Worker(
                    "vixml_jax.benchmarks.load", [name], settings, values.threads
                )
                with PeakMemory(worker.pid) as memory:
                    seconds = worker.time(name)["seconds"]
                worker.close()
                found[name].append((seconds, memory))
        for name, rounds in found.items():
            seconds = statistics.median(seconds for seconds, _ in rounds)
            own, files = (max(getattr(m, kind) for _, m in rounds) for kind in ("own", "files"))
            print(
                f"{name:16s} {seconds:8.2f} {weights / 1e9 / seconds:6.2f} {own / 1e9:8.2f} "
                f"{(own - weights) / 1e9:17.2f} {(own - weights) / largest:11.2f} "
                f"{files / 1e9:10.2f}"
            )


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_float("gigabytes", 2.0, "Approximate size of the checkpoint.")
    flags.DEFINE_enum(
        "dtype", "bfloat16", ["float32", "bfloat16"], "Dtype of the weights in memory."
    )
    flags.DEFINE_list("devices", ["1", "8"], "Numbers of host devices to shard the weights over.")
    flags.DEFINE_enum("baseline", BASELINE, [BASELINE, "none"], "Baseline to compare with.")
    flags.DEFINE_integer("rounds", 3, "Rounds of each program.", lower_bound=1)
    flags.DEFINE_integer("threads", 2, "Cores of each program.")


if __name__ == "__main__":
    if not workers.serve(prepare):
        command_line.launch(main, define_flags)
