"""Learning curves read from run directories with and without a validation split."""

import importlib
import json
from unittest import mock

import pytest
from absl import flags

from vixml_jax.errors import InputError
from vixml_jax.report import curves


def write_run(path, lines, **last):
    (path / "evaluation").mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for split, value in last.items():
        (path / "evaluation" / f"{split}-exact.json").write_text(json.dumps({"P@1": value}))
    return str(path)


def test_run_without_validation_split_gives_the_test_curve(tmp_path):
    lines = [{"step": 3, "loss": 1.0}, {"step": 4, "P@1": 20.0}, {"step": 8, "loss": 0.5}]
    run = write_run(tmp_path / "run", lines, test=30.0)
    assert curves.read_curve(run, "P@1") == ("test", [4, 8], [20.0, 30.0])


def test_validation_and_test_values_are_never_mixed(tmp_path):
    lines = [{"step": 4, "valid/P@1": 20.0}, {"step": 8, "valid/P@1": 15.0}]
    # The JSON file is of the selected epoch, not of the last one.
    run = write_run(tmp_path / "selected", lines, valid=20.0, test=99.0)
    assert curves.read_curve(run, "P@1") == ("valid", [4, 8], [20.0, 15.0])
    run = write_run(tmp_path / "last", [*lines, {"step": 9, "loss": 1.0}], valid=16.0, test=99.0)
    assert curves.read_curve(run, "P@1") == ("valid", [4, 8, 9], [20.0, 15.0, 16.0])


def test_minutes_of_steps(tmp_path):
    lines = [
        {"step": 3, "seconds": 60.0, "loss": 1.0},
        {"step": 4, "seconds": 90.0, "P@1": 20.0},
        {"step": 8, "seconds": 150.0, "loss": 0.5},
    ]
    run = write_run(tmp_path / "run", lines, test=30.0)
    _, steps, _ = curves.read_curve(run, "P@1")
    assert curves.minutes_at(lines, steps) == curves._minutes(run, steps) == [1.5, 2.5]
    old = write_run(tmp_path / "old", [{"step": 3, "P@1": 1.0}])
    with pytest.raises(
        InputError, match=r"without seconds, as version 0\.2 wrote them; use --x=step"
    ):
        curves._minutes(old, [3])


def test_other_directory_is_rejected(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl: .* expected a run directory"):
        curves.read_curve(str(tmp_path), "P@1")


def test_metric_that_was_not_computed_has_no_curve(tmp_path):
    """A run that retrieved few labels has no R@100."""
    run = write_run(tmp_path / "run", [{"step": 4, "loss": 1.0}], test=30.0)
    assert curves.read_curve(run, "R@100")[1:] == ([], [])


def test_all_runs_are_drawn(tmp_path):
    lines = [{"step": 4, "P@1": 1.0, "PSP@5": 1.0, "R@100": 1.0}]
    runs = [write_run(tmp_path / f"run{i}", lines) for i in range(40)]
    curves.define_flags()
    out = tmp_path / "curves.svg"
    flags.FLAGS(["curves", f"--runs={','.join(runs)}", f"--out={out}"])
    axes = importlib.import_module("matplotlib.pyplot").Axes
    with mock.patch.object(axes, "plot", autospec=True, side_effect=axes.plot) as plot:
        curves.main([])
    labels = [call.kwargs["label"] for call in plot.call_args_list]
    assert labels == [f"run{i}" for _ in curves.METRICS for i in range(40)]
