"""Learning curves of runs as a picture: `python -m vixml_jax.report.curves --runs=A,B`."""

import json
import os
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath

from vixml_jax import errors
from vixml_jax.errors import InputError

METRICS = ("P@1", "PSP@5", "R@100")


def read_lines(workdir: str) -> list[dict[str, Any]]:
    """What training wrote on its way.

    Raises:
      InputError: If the directory holds no metrics of a run.
    """
    path = os.path.join(workdir, "metrics.jsonl")
    try:
        text = epath.Path(path).read_text()
        return [json.loads(line) for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}; expected a run directory that train wrote") from None


def read_curve(workdir: str, name: str) -> tuple[str, list[int], list[float]]:
    """Steps at which a metric was measured in training, and its values in percent.

    Returns:
      The split, steps and values: of 'valid' where the run had one, else of 'test'.

    Raises:
      InputError: If the directory holds no metrics of a run.
    """
    lines = read_lines(workdir)
    for split, key in (("valid", f"valid/{name}"), ("test", name)):
        found = {line["step"]: line[key] for line in lines if key in line}
        last = epath.Path(workdir) / "evaluation" / f"{split}-exact.json"
        if lines and last.exists():
            # Where the last epoch was evaluated on the way, the file may be of a better one.
            found.setdefault(lines[-1]["step"], json.loads(last.read_text())[name])
        if found:
            break
    return split, list(found), list(found.values())


def main(argv: Sequence[str]) -> None:
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
            split, steps, values_there = read_curve(run, name)
            label = os.path.basename(run.rstrip("/")) + (", valid" if split == "valid" else "")
            panel.plot(steps, values_there, style, label=label)
        panel.set(title=f"{name}, percent", xlabel="step")
        panel.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(values.out, dpi=110)
    print(f"curves of {', '.join(values.runs)} written to {values.out}")


def define_flags() -> None:
    """The flags of this picture."""
    flags.DEFINE_list("runs", [], "Run directories, separated by commas.")
    flags.DEFINE_string("out", "curves.png", "Picture to write.")


if __name__ == "__main__":
    define_flags()
    errors.launch(main)
