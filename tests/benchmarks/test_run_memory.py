"""Planned and peak memory of whole runs: the line that is read, and a run."""

import pytest

from tests.tiny import make_data
from vixml_jax.benchmarks.memory import runs
from vixml_jax.errors import InputError

GIB = 2**30


def test_plan_is_read_from_the_output():
    output = (
        "memory: 3.72 of 20.0 GiB per device planned\n"
        "memory per device (GiB): process 1.24, optimizer 0.20, training step 1.86 "
        "(or evaluation 0.70), checkpoint writing 0.31, total 3.72 of 20.0\n"
    )
    assert runs.planned_total(output) == pytest.approx(3.72 * GIB)
    with pytest.raises(ValueError, match="no line of planned memory"):
        runs.planned_total("step 1 of 2")


def test_failed_run_is_reported(tmp_path):
    with pytest.raises(InputError, match="train ended with status 2: error: --data="):
        runs.measure(str(tmp_path / "none"), [])


@pytest.mark.slow
def test_peak_of_a_run_is_near_its_plan(tmp_path):
    row = runs.measure(
        make_data(tmp_path),
        [
            "--batch.size=16", "--model.width=64",
            "--model.num_heads=2", "--model.num_layers=2", "--model.mlp_width=64",
            "--loss.num_negatives=4",
        ]
    )  # fmt: skip
    assert 0.85 < row.ratio < 1.15
    assert 0.2 * GIB < min(row.evaluate, row.predict)
    assert max(row.evaluate, row.predict) < 1.15 * row.planned
