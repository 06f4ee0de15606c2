"""Planned and peak memory of whole runs on a CPU, process included.

    python -m vixml_jax.benchmarks.memory.runs --data=prepared [--pretrained=DIRECTORY]
        [--batches=64,256] [--train_flag=--lora.rank=4 ...]

Each run is a process of its own that trains one epoch and evaluates. The plan is the total that it
prints before it starts; the peak is that of its resident memory, as the kernel counts it. The last
two columns are the peaks of `evaluate` and `predict` with the trained run; `predict` reads the
texts of the labels as queries.
"""

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from vixml_jax import command_line
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError

GIB = 2**30
HEADER = ("batch", "plan", "peak", "peak/plan", "evaluate", "predict")


class Row(NamedTuple):
    """Planned and peak memory of a run, in bytes, and the peaks of other commands that read it."""

    planned: float
    peak: float
    evaluate: float
    predict: float

    @property
    def ratio(self) -> float:
        """Peak by plan."""
        return self.peak / self.planned


def planned_total(output: str) -> float:
    """Bytes planned in total, from what a run of `train --verbose` printed.

    Raises:
      ValueError: If it printed no plan.
    """
    found = re.search(r"^memory per device \(GiB\): .*total ([0-9.]+)", output, re.M)
    if not found:
        raise ValueError("the output has no line of planned memory")
    return float(found[1]) * GIB


def measure(data: str, arguments: Sequence[str]) -> Row:
    """Trains a new run, and evaluates and predicts with it.

    Args:
      data: Prepared data.
      arguments: Further flags of `train`.

    Raises:
      InputError: If a command fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        run = f"--workdir={scratch}/run"
        flags_of_train = ["--verbose", "--loop.epochs=1", f"--data={data}", *arguments]
        output, peak = _peak("train", run, *flags_of_train)
        _, evaluate = _peak("evaluate", run)
        queries = os.path.join(scratch, "queries.csv")
        with open(queries, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("id", "text"))
            texts = PreparedDataset.open(data).labels.texts
            writer.writerows(enumerate(text for chunk in texts.chunks() for text in chunk))
        out = f"--out={scratch}/out.jsonl"
        columns = ("--id_column=id", "--text=text")
        _, predict = _peak("predict", run, f"--queries={queries}", out, *columns)
    return Row(planned_total(output), peak, evaluate, predict)


def _peak(command: str, *arguments: str) -> tuple[str, int]:
    """Runs a command; returns what it printed and its peak resident memory in bytes."""
    # One device, so that memory per device is that of the process.
    settings = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", f"vixml_jax.{command}", *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=settings,
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read()
    if child.returncode:
        last = output.strip().splitlines()[-1:] or ["it printed nothing"]
        raise InputError(f"{command} ended with status {child.returncode}: {last[0]}")
    return output, usage.ru_maxrss * 1024


def main(argv: Sequence[str]) -> None:
    """Prints one line for each batch size."""
    del argv
    values = flags.FLAGS
    shared = [*values.train_flag]
    if values.pretrained:
        shared.append(f"--model.pretrained={values.pretrained}")
    print("GiB " + "".join(f"{name:>10}" for name in HEADER))
    for batch in map(int, values.batches):
        row = measure(values.data, [*shared, f"--batch.size={batch}"])
        sizes = (
            row.planned / GIB, row.peak / GIB, row.ratio, row.evaluate / GIB, row.predict / GIB
        )  # fmt: skip
        print(f"    {batch:10d}" + "".join(f"{size:10.2f}" for size in sizes), flush=True)


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_string("data", None, "Prepared data.", required=True)
    flags.DEFINE_string("pretrained", "", "Pretrained tower; empty: one from scratch.")
    flags.DEFINE_list("batches", ["64", "256", "1024"], "Queries per batch.")
    flags.DEFINE_multi_string("train_flag", [], "A further flag of train, such as --lora.rank=4.")


if __name__ == "__main__":
    command_line.launch(main, define_flags)
