"""Plot the learning curves of one or more runs as an image."""

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np
from absl import flags
from etils import epath

from vixml_jax import command_line
from vixml_jax.errors import InputError
from vixml_jax.runtime import console
from vixml_jax.storage import json_files

_MAX_LINES_BYTES = 1 << 30  # Of metrics.jsonl.
METRICS = ("P@1", "PSP@5", "R@100")
COMMON_FLAGS = ("runs", "x", "out")
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class _Place(TypedDict, total=False):
    """Where a line belongs."""

    step: _Count
    epoch: _Count
    seconds: Annotated[float, msgspec.Meta(ge=0.0, le=1e12)]


def read_lines(workdir: str) -> list[dict[str, int | float]]:
    """Returns the lines of a run's metrics.jsonl, but for one that is being written.

    Raises:
      InputError: If the directory has no readable metrics.jsonl.
    """
    path = os.path.join(workdir, "metrics.jsonl")
    remedy = "expected a run directory written by train"
    content = json_files.read_bytes(path, remedy, max_bytes=_MAX_LINES_BYTES)
    try:
        whole = content[: content.rfind(b"\n") + 1]  # The last line may be half written.
        lines = [json.loads(line, parse_int=_integer) for line in whole.decode().splitlines()]
        msgspec.convert(lines, list[_Place])
        return msgspec.convert(lines, list[dict[str, int | float]])
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}; {remedy}") from None


def _integer(text: str) -> int | float:
    """An integer of JSON; one that no file of a run has is as large as any number."""
    return int(text) if len(text) < 20 else float(text)


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
                value = results[name]
                if not isinstance(value, int | float):
                    raise InputError(
                        f"{last}: {name} is {value!r:.60}, expected a number; evaluate again"
                    )
                values.setdefault(lines[-1]["step"], value)
        if values:
            break
    return split, list(values), list(values.values())


def minutes_at(lines: Sequence[Mapping[str, float]], steps: Sequence[int]) -> list[float]:
    """Returns the minutes of training after which each of the steps was done.

    The time between two starts of a run is no time of training, and neither is that of steps which
    were lost with a start and done again by the next.

    Args:
      lines: Of metrics.jsonl, each with its `seconds`.
      steps: Numbers of steps, each at least the first that was logged.
    """
    logged = [line["step"] for line in lines]
    last = np.maximum.accumulate([line["seconds"] for line in lines])
    at = np.searchsorted(logged, steps, side="right") - 1
    return (last[at] / 60.0).tolist()


def _minutes(workdir: str, steps: Sequence[int]) -> list[float]:
    lines = read_lines(workdir)
    if not all("seconds" in line for line in lines):
        raise InputError(
            f"{os.path.join(workdir, 'metrics.jsonl')}: has lines without seconds, as version 0.2 "
            "wrote them; use --x=step"
        )
    return minutes_at(lines, steps)


def epochs_at(lines: Sequence[Mapping[str, float]], steps: Iterable[float]) -> list[float]:
    """Returns the epochs that were done after steps: 1.5 in the middle of the second epoch.

    The last step of each epoch is logged, so epochs that ended have their true sizes. The newest
    epoch may go on; it is taken to be as long as the one before it, if both train the same, and
    else to end with the newest line.

    Args:
      lines: Of metrics.jsonl.
      steps: Numbers of steps.
    """
    ends, of_head = {0: 0}, {}  # Last step, and kind, by number of epochs done.
    for line in lines:
        ends[line["epoch"] + 1] = line["step"]
        of_head[line["epoch"] + 1] = of_head.get(line["epoch"] + 1, False) or is_of_head(line)
    done, last = list(ends), list(ends.values())
    if len(last) > 2 and of_head[done[-1]] == of_head[done[-2]]:
        last[-1] = max(last[-1], 2 * last[-2] - last[-3])
    return np.interp(list(steps), last, done).tolist()


def is_of_head(line: Mapping[str, float]) -> bool:
    """Returns whether a line is of an epoch in which only the label head is trained."""
    rates = {name for name in line if name.startswith("learning_rate/")}
    return rates == {"learning_rate/head"}


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
        for run, style in zip(values.runs, itertools.cycle(("o-", "s--", "^:", "d-."))):
            split, steps, percent = read_curve(run, name)
            label = os.path.basename(run.rstrip("/")) + (", valid" if split == "valid" else "")
            x = steps if values.x == "step" else _minutes(run, steps)
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
