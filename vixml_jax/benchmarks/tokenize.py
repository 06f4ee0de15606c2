"""Tokenizing speed in texts per second, compared with one call per text and with batch calls.

    python -m vixml_jax.benchmarks.tokenize [--file=TEXTS] [--tokenizer=DIR] [--rounds=5]

Synthetic titles and long texts (see `support/synthetic_data.py`), or the lines of a file. Each
program has a process of its own on the same cores, and they take turns; in every round all get the
same new texts, and must give the same tokens. Ours fills its cache of words in the first round,
which is also shown separately: a data set has many such rounds.
"""

import hashlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from vixml_jax import command_line
from vixml_jax.benchmarks import prepare as prepare_benchmark
from vixml_jax.benchmarks.support import synthetic_data, workers
from vixml_jax.data.sources import xml_repository
from vixml_jax.data.text import batch_tokenizer
from vixml_jax.data.text import tokenizer as tokenizer_lib
from vixml_jax.data.text.batch_tokenizer import Encoded
from vixml_jax.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MODULE = "vixml_jax.benchmarks.tokenize"
OURS, BATCH, ONE = "ours", "many texts per call", "one call per text"
_CHUNK = 4096


def _ours(tokenizer: "Tokenizer", threads: int) -> Callable[[list[str]], Encoded]:
    """As in prepare: the chunks of a round go to one process per core."""
    encoders = batch_tokenizer.Encoders(tokenizer, threads if threads > 1 else 0)
    encoders.__enter__()  # Closed when the process ends.

    def run(texts: list[str]) -> Encoded:
        found = [encoded for _, encoded in encoders.encode(_chunks(texts))]
        return Encoded(*(np.concatenate(part) for part in zip(*found, strict=True)))

    run(["a"] * _CHUNK * 2 * threads)  # So that all processes have started.
    return run


def _batch(tokenizer: "Tokenizer", threads: int) -> Callable[[list[str]], Encoded]:
    """The batch call of the tokenizers library, on all cores."""

    def run(texts: list[str]) -> Encoded:
        found = (tokenizer.encode_batch_fast(chunk) for chunk in _chunks(texts))
        return _gather(tokenizer, itertools.chain.from_iterable(found))

    return run


def _one(tokenizer: "Tokenizer", threads: int) -> Callable[[list[str]], Encoded]:
    return lambda texts: _gather(tokenizer, map(tokenizer.encode, texts))


PROGRAMS = {OURS: _ours, BATCH: _batch, ONE: _one}


def _chunks(texts: list[str]) -> Iterator[list[str]]:
    return (texts[start : start + _CHUNK] for start in range(0, len(texts), _CHUNK))


def _gather(tokenizer: "Tokenizer", found: Iterator[Any]) -> Encoded:
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    rows, full = [], []
    for one in found:
        rows.append(one.ids)
        full.append(len(one.ids) + sum(len(rest) - special for rest in one.overflowing))
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    values = np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum()))
    return Encoded(values, lengths, np.array(full, np.int32))


def _texts(settings: dict[str, Any]) -> Iterator[str]:
    """New texts: those of the file, or synthetic ones without end."""
    if settings["file"]:
        return itertools.chain.from_iterable(xml_repository.read_texts(settings["file"]))
    rng = np.random.default_rng(0)
    words = synthetic_data.Words.make(settings["words"], settings["tokenizer"], rng)
    lengths = synthetic_data.LIKE[settings["like"]].words
    return itertools.chain.from_iterable(words.texts(10**9, lengths, rng))


def prepare(programs: list[str], settings: dict[str, Any]) -> dict[str, workers.Prepared]:
    """A program with its own copy of the texts."""
    (program,) = programs
    tokenizer = tokenizer_lib.load(settings["tokenizer"], settings["max_tokens"])
    encode = PROGRAMS[program](tokenizer, settings["threads"])
    texts = _texts(settings)

    def run() -> dict[str, Any]:
        now = list(itertools.islice(texts, settings["texts"]))
        start = time.perf_counter()
        found = encode(now)
        seconds = time.perf_counter() - start
        digest = hashlib.sha256(b"".join(part.tobytes() for part in found)).hexdigest()
        tokens = int(found.lengths.sum())
        return {"seconds": seconds, "texts": len(now), "tokens": tokens, "digest": digest}

    return {program: ({}, run)}


def measure(settings: dict[str, Any], *, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """The reports of each program and round, run in turns.

    Raises:
      RuntimeError: If two programs disagree.
      InputError: If the file has too few texts.
    """
    started = {
        name: workers.Worker(MODULE, [name], settings, settings["threads"]) for name in PROGRAMS
    }
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in PROGRAMS}
    try:
        for _ in range(rounds):
            for name, worker in started.items():
                reports[name].append(worker.time(name))
            last = {name: rows[-1] for name, rows in reports.items()}
            if any(report["texts"] < settings["texts"] for report in last.values()):
                raise InputError(
                    f"--file={settings['file']}: expected {settings['texts'] * rounds} texts; "
                    "use fewer --texts or --rounds"
                )
            if len({report["digest"] for report in last.values()}) > 1:
                raise RuntimeError(f"{', '.join(last)} give different tokens")
    finally:
        for worker in started.values():
            worker.close()
    return reports


def table(reports: dict[str, list[dict[str, Any]]]) -> str:
    """One line per program: texts per second, and ratio to one call per text."""
    lines = [f"{'':18} {'texts/s':>10} {'x one call':>10} {'min':>6} {'max':>6} {'first':>6}"]
    for name, rows in reports.items():
        speed = statistics.median(row["texts"] / row["seconds"] for row in rows)
        times = [
            one["seconds"] / row["seconds"] for one, row in zip(reports[ONE], rows, strict=True)
        ]
        lines.append(
            f"{name:18} {speed:10,.0f} {statistics.median(times):10.2f} {min(times):6.2f} "
            f"{max(times):6.2f} {times[0]:6.2f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Prints a table for titles and one for long texts, or one for a file."""
    del argv
    values = flags.FLAGS
    kinds = [("", values.max_tokens or 32, values.texts or 8192)]
    if not values.file:
        kinds = [
            (like, synthetic_data.LIKE[like].max_tokens, values.texts or count)
            for like, count in (("lf_amazontitles_1.3m", 65536), ("lf_wikipedia_500k", 8192))
        ]
    for like, max_tokens, texts in kinds:
        settings = {
            "file": values.file, "like": like, "tokenizer": values.tokenizer, "texts": texts,
            "max_tokens": max_tokens, "threads": values.threads, "words": values.words,
        }  # fmt: skip
        reports = measure(settings, rounds=values.rounds)
        tokens = statistics.median(one["tokens"] / one["texts"] for one in reports[ONE])
        print(
            f"{like or values.file}: {texts} texts per round of {tokens:.1f} tokens, cut at "
            f"{max_tokens}; {values.threads} cores; median, min, max and first of "
            f"{values.rounds} rounds"
        )
        print(table(reports), flush=True)


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_string("file", "", "File of texts, one per line; default: synthetic texts.")
    flags.DEFINE_string(
        "tokenizer", prepare_benchmark.find_tokenizer(), "Directory or name of the tokenizer."
    )
    flags.DEFINE_integer("max_tokens", 0, "Tokens per text of the file; 0: 32.", lower_bound=0)
    flags.DEFINE_integer(
        "texts", 0, "Texts per round; 0: 65,536 titles, 8,192 other texts.", lower_bound=0
    )
    flags.DEFINE_integer(
        "words", 10**6, "Number of words that synthetic texts are drawn from.", lower_bound=1000
    )
    flags.DEFINE_integer("rounds", 5, "Rounds of each program.", lower_bound=1)
    flags.DEFINE_integer("threads", 2, "Cores of each program.", lower_bound=1)


if __name__ == "__main__":
    if not workers.serve(prepare):
        command_line.launch(main, define_flags)
