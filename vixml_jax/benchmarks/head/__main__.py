"""A step of the label head compared with the same in PyTorch: time and memory.

    python -m vixml_jax.benchmarks.head [--labels=7134,141816 --width=384 --batch=512]
    python -m vixml_jax.benchmarks.head --labels=1305265 --torch=false

A step is logits of all labels, a loss, its gradient and Adam. In PyTorch: `linear`, `log_softmax`
with the mean over the positives (or `binary_cross_entropy_with_logits`), `backward` and
`torch.optim.Adam`. Both have the same parameters and batches, and no network before the label
vectors. They take turns, each in a process of its own, on one thread (--threads).

Memory is what a step needs beside parameters and moments, which it updates in place: the growth of
the peak resident memory in its first step, in another process each, and what XLA allocates for the
compiled step. On an accelerator only time is measured.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from vixml_jax import command_line
from vixml_jax.benchmarks.head import steps
from vixml_jax.benchmarks.support import platforms, workers

_MODULE = "vixml_jax.benchmarks.head"
_PROGRAMS = ("ours", "torch")
_MIB = 2**20


def main(argv: Sequence[str]) -> None:
    """Prints speed, ratios and memory for each number of labels."""
    del argv
    values = flags.FLAGS
    device = platforms.describe().name
    baseline = "torch" if values.torch else "none"
    programs = platforms.measurable(_PROGRAMS, device, baseline, ("torch",))
    for labels in map(int, values.labels):
        settings = {
            "labels": labels, "width": values.width, "batch": values.batch, "loss": values.loss,
            "positives": values.positives, "block": values.block, "moments": values.moments,
            "threads": values.threads, "steps": max(1, values.work // labels), "device": device,
        }  # fmt: skip
        measured = programs if device == "cpu" else ()
        found = {name: _memory(name, settings) for name in measured}
        reports = workers.compare(
            _MODULE,
            programs,
            [],
            settings,
            rounds=values.rounds,
            texts=lambda about: about["queries"],
            unit="queries",
        )
        _print_quartiles(reports)
        for name, memory in found.items():
            print(f"{name:28s} {_described(memory)}")
        if "torch" in found:
            ratio = found["torch"]["step"] / found["ours"]["step"]
            print(f"memory of a step, torch : ours = {ratio:.1f}", flush=True)


def _print_quartiles(reports: dict[str, list[dict[str, Any]]]) -> None:
    """Milliseconds of a step, and ratios round by round."""
    times = {
        name: [1e3 * row["seconds"] / row["steps"] for row in rows]
        for name, rows in reports.items()
    }
    for name, row in times.items():
        print(f"{name:28s} {_quartiles(row)} ms a step")
    if "torch" in times:
        ratios = [b / a for a, b in zip(times["ours"], times["torch"], strict=True)]
        print(f"time of a step, torch : ours = {_quartiles(ratios)}")


def _quartiles(values: Sequence[float]) -> str:
    """Median, and quartiles in brackets."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def _described(memory: dict[str, int]) -> str:
    xla = f", {memory['xla'] / _MIB:.0f} by XLA" if "xla" in memory else ""
    return (
        f"{memory['stored'] / _MIB:.0f} MiB of parameters and moments; a step needs "
        f"{memory['step'] / _MIB:.0f} beside them{xla}; peak of the process "
        f"{memory['peak'] / _MIB:.0f}"
    )


def _memory(program: str, settings: dict[str, Any]) -> dict[str, int]:
    """Bytes that a step needs, measured in a process of its own."""
    command = [sys.executable, "-m", _MODULE, "--child", program, json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def define_flags() -> None:
    """The flags of this benchmark."""
    flags.DEFINE_list("labels", ["7134", "141816"], "Numbers of labels, separated by commas.")
    flags.DEFINE_integer("width", 384, "Width of the vectors.", lower_bound=1)
    flags.DEFINE_integer("batch", 512, "Queries per batch.", lower_bound=1)
    flags.DEFINE_integer("positives", 3, "Labels of each query.", lower_bound=1)
    losses = ["softmax", "decoupled_softmax", "bce"]
    flags.DEFINE_enum("loss", "softmax", losses, "As --head.loss in train.")
    flags.DEFINE_integer("block", 8192, "As --head.label_block in train.", lower_bound=1)
    flags.DEFINE_enum(
        "moments", "float32", ["float32", "bfloat16"], "As --head.moments in train; ours alone."
    )
    flags.DEFINE_integer("threads", 1, "Threads.", lower_bound=1)
    flags.DEFINE_integer("rounds", 7, "Rounds of each program.", lower_bound=1)
    flags.DEFINE_integer(
        "work", 150_000, "Labels times steps of a round, at least one step.", lower_bound=1
    )
    flags.DEFINE_boolean("torch", True, "Also measure PyTorch.")


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "--child":
        print(json.dumps(steps.memory(sys.argv[2], json.loads(sys.argv[3]))))
    elif not workers.serve(steps.prepare):
        command_line.launch(main, define_flags)
