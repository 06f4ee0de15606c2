"""Where the time of preparing a table goes: reading, splitting, tokenizing, or writing.

    python -m vixml_jax.benchmarks.prepare_stages [--like=NAME] [--rows=300000]

A table of synthetic texts (see `support/synthetic_data.py`) is written as csv and as parquet, each
row with an id, a text and five labels on average. Each file is read and prepared by the functions
that `prepare` calls, on one processor. Seconds are those that the processor works for this process,
so that other work on the machine changes little.
"""

import contextlib
import csv
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pyarrow
from absl import flags
from pyarrow import parquet

from vixml_jax import command_line
from vixml_jax.benchmarks import prepare as prepare_benchmark
from vixml_jax.benchmarks.support import synthetic_data
from vixml_jax.data import preprocessing
from vixml_jax.data.text import batch_tokenizer

FORMATS = ("csv", "parquet")
STAGES = ("read", "split", "tokenize", "write")
_LABELS_PER_ROW = 5
_MAX_LABELS = 50_000


def _rows(
    like: synthetic_data.Like, count: int, tokenizer: str
) -> Iterator[tuple[str, str, list[str]]]:
    """Yields id, text and labels of each row."""
    rng = np.random.default_rng(0)
    size = like.scaled(count / like.train)
    num_words = min(10**6, 1000 + round(size.text_bytes / 7 / 8))
    words = synthetic_data.Words.make(num_words, tokenizer, rng)
    num_labels = min(_MAX_LABELS, 1 + count // 4)
    row = 0
    for texts in words.texts(count, like.words, rng):
        for text in texts:
            number = rng.geometric(1 / _LABELS_PER_ROW)
            labels = np.unique(synthetic_data.zipf(num_labels, rng.random(number), shift=1000.0))
            yield f"q{row}", text, [f"label {label}" for label in labels.tolist()]
            row += 1


def write_tables(directory: str, like: synthetic_data.Like, count: int, tokenizer: str) -> None:
    """Writes the same table as `table.csv` and as `table.parquet`.

    Args:
      directory: An existing directory.
      like: Has the numbers of words of a text.
      count: Number of rows.
      tokenizer: Its single-token words are the frequent ones; see `synthetic_data.write`.
    """
    ids, texts, labels = zip(*_rows(like, count, tokenizer), strict=True)
    table = os.path.join(directory, "table")
    with open(f"{table}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "labels"])
        writer.writerows(zip(ids, texts, map("|".join, labels), strict=True))
    columns = {"id": ids, "text": texts, "labels": labels}
    parquet.write_table(pyarrow.table(columns), f"{table}.parquet")


class Clock:
    """Seconds of the processor in each stage; within one, another may begin and end.

    Attributes:
      spent: Seconds by stage.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._stage, self._since = "", time.process_time()

    def switch(self, stage: str) -> str:
        """Begins a stage; returns the one that ends."""
        now, before = time.process_time(), self._stage
        self.spent[before] = self.spent.get(before, 0.0) + now - self._since
        self._stage, self._since = stage, now
        return before


def measure(source: str, spool: str, settings: preprocessing.Settings) -> dict[str, float]:
    """Seconds of each stage: `read`, `split`, `tokenize` and `write`.

    Args:
      source: A table.
      spool: An existing directory for temporary files.
      settings: Of the preparation.
    """
    clock = Clock()
    split_and_filter, encode = preprocessing.split_and_filter, batch_tokenizer.Encoders.encode

    def timed_split(*arguments: Any) -> Any:
        before = clock.switch("split")
        found = split_and_filter(*arguments)
        clock.switch(before)
        return found

    def timed_encode(self: batch_tokenizer.Encoders, chunks: Iterator[list[str]]) -> Iterator[Any]:
        before = clock.switch("tokenize")
        for found in encode(self, chunks):
            clock.switch(before)
            yield found
            before = clock.switch("tokenize")
        clock.switch(before)

    with (
        mock.patch.object(preprocessing, "split_and_filter", timed_split),
        mock.patch.object(batch_tokenizer.Encoders, "encode", timed_encode),
    ):
        clock.switch("read")
        raw = preprocessing.read_source(source, spool)
        clock.switch("write")
        preprocessing.prepare(raw, os.path.join(spool, "out"), settings)
        clock.switch("")
    return {stage: clock.spent[stage] for stage in STAGES}


@contextlib.contextmanager
def one_processor() -> Iterator[None]:
    """Lets this process use one processor within the context."""
    usable = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(usable)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, usable)


def main(argv: Sequence[str]) -> None:
    """Prints the seconds of each stage, and their part of all."""
    del argv
    values = flags.FLAGS
    like = synthetic_data.LIKE[values.like]
    settings = preprocessing.Settings(tokenizer=values.tokenizer, max_tokens=like.max_tokens)
    with tempfile.TemporaryDirectory(dir=values.dir) as directory:
        write_tables(directory, like, values.rows, values.tokenizer)
        for name in FORMATS:
            with tempfile.TemporaryDirectory(dir=directory) as spool, one_processor():
                seconds = measure(os.path.join(directory, f"table.{name}"), spool, settings)
            total = sum(seconds.values())
            stages = ", ".join(
                f"{stage} {taken:.1f} s ({taken / total:.0%})" for stage, taken in seconds.items()
            )
            print(
                f"{values.like}, {values.rows:,} rows as {name}: {stages}; "
                f"{total:.1f} s of one processor in all",
                flush=True,
            )


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_enum(
        "like", "lf_amazontitles_1.3m", [*synthetic_data.LIKE], "Whose lengths the texts have."
    )
    flags.DEFINE_integer("rows", 300_000, "Number of rows.", lower_bound=64)
    flags.DEFINE_string(
        "tokenizer", prepare_benchmark.find_tokenizer(), "Directory or name of the tokenizer."
    )
    flags.DEFINE_string("dir", None, "Where files are written and removed; default: as tempfile.")


if __name__ == "__main__":
    command_line.launch(main, define_flags)
