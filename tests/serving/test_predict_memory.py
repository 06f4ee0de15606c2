"""Memory of `predict` does not grow with the number of queries, nor with what is resumed."""

import os
import sys

import numpy as np
import pytest

from tests.service.conftest import unpack

ROWS, FEWER = 200_000, 20_000
MOST_MIB = 48  # By which the peak may be higher; 280 bytes for each further query.


def peak_mib(arguments):
    """Peak resident memory of the command `predict`."""
    command = [sys.executable, "-m", "vixml_jax", "predict", "--quiet", *arguments]
    _, status, usage = os.wait4(os.spawnv(os.P_NOWAIT, sys.executable, command), 0)
    assert status == 0
    return usage.ru_maxrss / 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_queries(tmp_path):
    workdir, peaks = unpack(tmp_path), {}
    words = np.random.default_rng().integers(10, size=(ROWS, 2)).tolist()
    lines = [f"a{a} b{b} word{i}\n" for i, (a, b) in enumerate(words)]
    for turn, count in enumerate((ROWS, FEWER, ROWS)):  # First to compile for all shapes.
        (tmp_path / "queries.csv").write_text("text\n" + "".join(lines[:count]))
        out = tmp_path / f"out{turn}"
        arguments = [
            f"--workdir={workdir}", f"--queries={tmp_path}/queries.csv", f"--out={out}",
            "--resume", f"--compile_cache={tmp_path}/programs",
        ]  # fmt: skip
        peaks[count] = peak_mib(arguments)
    content = out.read_bytes()
    assert content.count(b"\n") == ROWS
    assert peaks[ROWS] < peaks[FEWER] + MOST_MIB
    # As a process leaves it that is killed when all but the last line is written.
    unfinished = out.rename(tmp_path / f"{out.name}.unfinished")
    os.truncate(unfinished, len(content) - 5)
    assert peak_mib(arguments) < peaks[FEWER] + MOST_MIB
    resumed = out.read_bytes()
    end = content[:-5].rindex(b"\n") + 1
    assert resumed[:end] == content[:end] and resumed.count(b"\n") == ROWS
