"""Plot the learning curves of one or more runs as an image."""

import json
import os
from collections.abc import Sequence
from typing import Any

import msgspec
from absl import flags
from etils import epath

from vixml_jax import command_line
from vixml_jax.errors import InputError
from vixml_jax.runtime import console
from vixml_jax.storage import json_files

_MAX_LINES_BYTES = 1 << 30  # Of metrics.jsonl.
METRICS = ("P@1", "PSP@5", "R@100")
COMMON_FLAGS = ("runs", "x", "out")


def read_lines(workdir: str) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics.jsonl.

    Raises:
      InputError: If the directory has no readable metrics.jsonl.
    """
    path = os.path.join(workdir, "metrics.jsonl")
    remedy = "expected a run directory written by train"
    content = json_files.read_bytes(path, remedy, max_bytes=_MAX_LINES_BYTES)
    try:
        lines = [json.loads(line) for line in content.decode().splitlines()]
        return msgspec.convert(lines, list[dict[str, Any]])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}; {remedy}") from None


def read_curve(workdir: str, name: str) -> tuple[str, list[int], list[float]]:
    """Returns the steps at which a metric was evaluated during training, and its values.

    Args:
      workdir: Run directory.
      name: Name of the metric.

    Returns:
      The split ('valid' if the run was evaluated on it, else 'test'), the steps, and the values in
      percent.

    Raises:
      InputError: If the directory has no readable metrics.jsonl, or a results file is damaged.
    """
    lines = read_lines(workdir)
    for split, key in (("valid", f"valid/{name}"), ("test", name)):
        values = {line["step"]: line[key] for line in lines if key in line}
        last = epath.Path(workdir) / "evaluation" / f"{split}-exact.json"
        if lines and last.exists():
            # If the last step was evaluated during training, that value is kept: the JSON file may
            # be of an earlier epoch that was selected as the best.
            results = json_files.read(last, dict[str, Any], "evaluate the run again")
            if name in results:  # R@100 is missing if fewer labels were retrieved.
                values.setdefault(lines[-1]["step"], results[name])
        if values:
            break
    return split, list(values), list(values.values())


def minutes_at(workdir: str, steps: Sequence[int]) -> list[float]:
    """Returns the wall-clock minutes of training after which each of the steps was done.

    Args:
      workdir: Run directory.
      steps: Numbers of steps, each at least the first that was logged.

    Raises:
      InputError: If the directory has no readable metrics.jsonl, or its lines have no times.
    """
    lines = read_lines(workdir)
    if not all("seconds" in line for line in lines):
        raise InputError(
            f"{os.path.join(workdir, 'metrics.jsonl')}: has lines without seconds, as version 0.2 "
            "wrote them; use --x=step"
        )
    return [max(line["seconds"] for line in lines if line["step"] <= step) / 60.0 for step in steps]


def main(argv: Sequence[str]) -> None:
    """Draws the curves of the runs that the flags name."""
    del argv
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    values = flags.FLAGS
    if not values.runs:
        raise InputError("--runs: missing; expected run directories separated by commas")
    figure, panels = pyplot.subplots(1, len(METRICS), figsize=(9, 3), layout="constrained")
    for panel, name in zip(panels, METRICS, strict=True):
        for run, style in zip(values.runs, ("o-", "s--", "^:", "d-.") * 9, strict=False):
            split, steps, percent = read_curve(run, name)
            label = os.path.basename(run.rstrip("/")) + (", valid" if split == "valid" else "")
            x = minutes_at(run, steps) if values.x == "minutes" else steps
            panel.plot(x, percent, style, label=label)
        panel.set(title=f"{name}, percent", xlabel=values.x)
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(values.out, dpi=110)
    console.status(f"curves of {', '.join(values.runs)} written to {values.out}")


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_list("runs", [], "Run directories, separated by commas.")
    flags.DEFINE_enum(
        "x", "step", ["step", "minutes"], "Horizontal axis: steps, or minutes since the start."
    )
    flags.DEFINE_string("out", "curves.png", "Image file to write.")


if __name__ == "__main__":
    command_line.launch(main, define_flags, common=COMMON_FLAGS)
