"""Planned and peak memory of whole runs of `train` on a CPU, process included.

    python -m vixml_jax.benchmarks.memory.runs --data=prepared [--pretrained=DIRECTORY]
        [--batches=64,256] [--train_flag=--lora.rank=4 ...]

Each run is a process of its own that trains one epoch and evaluates. The plan is the total that it
prints before it starts; the peak is that of its resident memory, as the kernel counts it.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from vixml_jax import command_line
from vixml_jax.errors import InputError

GIB = 2**30
HEADER = ("batch", "plan", "peak", "peak/plan")


class Row(NamedTuple):
    """Planned and peak memory of a run, in bytes."""

    planned: float
    peak: float

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


def measure(arguments: Sequence[str]) -> Row:
    """Runs `train` with these arguments in a new run directory.

    Raises:
      InputError: If the run fails.
    """
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as log:
        command = [
            sys.executable, "-m", "vixml_jax.train", "--verbose", "--loop.epochs=1",
            f"--workdir={scratch}/run", *arguments,
        ]  # fmt: skip
        # One device, so that memory per device is that of the process.
        settings = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=settings)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read()
    if child.returncode:
        last = output.strip().splitlines()[-1:] or ["it printed nothing"]
        raise InputError(f"a run ended with status {child.returncode}: {last[0]}")
    return Row(planned_total(output), usage.ru_maxrss * 1024)


def main(argv: Sequence[str]) -> None:
    """Prints one line for each batch size."""
    del argv
    values = flags.FLAGS
    shared = [f"--data={values.data}", *values.train_flag]
    if values.pretrained:
        shared.append(f"--model.pretrained={values.pretrained}")
    print("GiB " + "".join(f"{name:>10}" for name in HEADER))
    for batch in map(int, values.batches):
        row = measure([*shared, f"--batch.size={batch}"])
        sizes = (row.planned / GIB, row.peak / GIB, row.ratio)
        print(f"    {batch:10d}" + "".join(f"{size:10.2f}" for size in sizes), flush=True)


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_string("data", None, "Prepared data.", required=True)
    flags.DEFINE_string("pretrained", "", "Pretrained tower; empty: one from scratch.")
    flags.DEFINE_list("batches", ["64", "256", "1024"], "Queries per batch.")
    flags.DEFINE_multi_string("train_flag", [], "A further flag of train, such as --lora.rank=4.")


if __name__ == "__main__":
    command_line.launch(main, define_flags)
