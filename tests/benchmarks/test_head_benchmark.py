"""The benchmark of the label head at tiny sizes: both programs do the same, and are measured."""

import re

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from vixml_jax.benchmarks.head import __main__ as head
from vixml_jax.benchmarks.head import steps

SETTINGS = {
    "labels": 70, "width": 8, "batch": 16, "positives": 3, "block": 20, "moments": "float32",
    "threads": 1, "steps": 2, "device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("loss", ["softmax", "decoupled_softmax", "bce"])
def test_both_programs_take_the_same_steps(loss):
    settings = SETTINGS | {"loss": loss}
    ours, theirs = steps.ours(settings), steps.pytorch(settings)
    assert ours.stored == theirs.stored + 4  # The number of steps, which PyTorch has on the host.
    assert ours.xla > 0 and theirs.xla is None
    losses = np.array([[program.step() for program in (ours, theirs)] for _ in range(5)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-4)
    assert np.all(np.diff(losses, axis=0) < 0)


def test_each_query_has_distinct_labels():
    made = steps.data(SETTINGS | {"labels": 7})
    assert made.labels.shape == (16, 3) and made.labels.max() < 7
    assert all(len(set(row)) == 3 for row in made.labels)
    np.testing.assert_allclose(np.linalg.norm(made.queries, axis=1), 1.0, rtol=1e-6)


def test_time_and_memory_are_measured_in_turns(capfd):
    head.define_flags()
    flags.FLAGS.mark_as_parsed()
    small = {"labels": ["20000"], "width": 16, "batch": 128, "block": 1000, "rounds": 2}
    with flagsaver.flagsaver(**small):
        head.main([])
    printed = capfd.readouterr().out
    number = r"([\d.]+) \(([\d.]+) to ([\d.]+)\)"
    ratio = re.search(f"time of a step, torch : ours = {number}", printed)
    low, median, high = (float(ratio[i]) for i in (2, 1, 3))
    assert 0 < low <= median <= high
    assert len(re.findall(rf"(?m)^(?:ours|torch) +{number} ms a step", printed)) == 2
    # 128 x 20,000 logits are 10 MiB, of which PyTorch has several; a block of ours is 0.5 MiB.
    needs = [int(x) for x in re.findall(r"a step needs (\d+) beside", printed)]
    assert needs[1] >= 20 and needs[0] < 10
    assert float(re.search(r"memory of a step, torch : ours = ([\d.]+)", printed)[1]) > 2
