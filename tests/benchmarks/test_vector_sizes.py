"""The benchmark of vector sizes on a tiny run: its rows are those of the evaluation."""

import argparse
import dataclasses

import numpy as np
import pytest

from tests import tiny
from vixml_jax import train
from vixml_jax.benchmarks.serving import vector_sizes
from vixml_jax.errors import InputError
from vixml_jax.search import factory


@pytest.mark.slow
def test_sizes_of_a_run(tmp_path):
    config = tiny.configuration(tiny.make_data(tmp_path, train=60, valid=0.2), tmp_path / "run")
    config = dataclasses.replace(
        config, head=dataclasses.replace(config.head, only=True, epochs=2, batch_size=16)
    )
    train.train(config)
    settings = {"data": "", "split": "valid", "widths": ["8"], "queries": 5, "rounds": 2}
    rows = vector_sizes.measure(config.workdir, argparse.Namespace(**settings))
    sizes = [(16, "float32"), (16, "int8"), (8, "float32"), (8, "int8")]
    assert [(row.width, row.dtype) for row in rows] == sizes
    # Two parts and a bias, padded to a multiple of 8; integers, two scales and the bias.
    assert [row.bytes for row in rows] == [4 * 40, 2 * 16 + 12, 4 * 24, 2 * 8 + 12]
    # With 20 labels, all are scored again.
    assert rows[0].metrics == rows[1].metrics and rows[2].metrics == rows[3].metrics
    assert rows[0].slower == (1.0, 1.0, 1.0) and max(row.log_sum for row in rows) < 1e-5
    lines = vector_sizes.table(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 6
    with pytest.raises(InputError, match=r"--widths=17: expected 1 to 16"):
        settings["widths"] = ["17"]
        vector_sizes.measure(config.workdir, argparse.Namespace(**settings))


def test_times_are_relative_to_the_first():
    vectors = np.eye(20, 8, dtype=np.float32)
    indexes = [factory.open_index(vectors, kind="exact", k=3) for _ in range(2)]
    first, second = vector_sizes.time_in_turns(indexes, vectors, rounds=3)
    assert first == (1.0, 1.0, 1.0)
    assert 0 < second[1] <= second[0] <= second[2]
