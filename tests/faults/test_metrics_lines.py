"""The lines of metrics.jsonl of a run that was stopped anywhere are those of one that was not."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest

from tests.tiny import configuration, make_data
from vixml_jax import train
from vixml_jax import workdir as workdir_lib
from vixml_jax.storage import digests


def lines_of(workdir):
    """The lines without times."""
    with open(os.path.join(workdir, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    for line in lines:
        for name in [name for name in line if name == "seconds" or name.startswith("step_time/")]:
            del line[name]
    return lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that logs every 3 steps and saves every 2, with all of its checkpoints."""
    root = tmp_path_factory.mktemp("run")
    config = configuration(make_data(root), root / "run")
    config = dataclasses.replace(
        config, loop=dataclasses.replace(config.loop, max_to_keep=100, epochs=2)
    )
    train.train(config)
    return config


def test_lines_after_a_kill_are_those_of_an_uninterrupted_run(finished, tmp_path):
    rng = np.random.default_rng(4)
    steps = digests.steps(os.path.join(finished.workdir, workdir_lib.CHECKPOINTS))
    unaligned = [step for step in steps if step % 3]
    killed_at = int(rng.choice(unaligned))
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    for step in steps:  # As if the process had been killed after this checkpoint.
        if step > killed_at:
            shutil.rmtree(workdir / workdir_lib.CHECKPOINTS / str(step))
    train.train(dataclasses.replace(finished, workdir=str(workdir)))
    assert lines_of(workdir) == lines_of(finished.workdir)
