"""The built-in jobs of README: what is trained beats the vote, with pictures and without."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("flags,vote", [("quickstart", "both"), ("quickstart_text", "text")])
def test_the_built_in_job_beats_the_vote(flags, vote, tmp_path):
    command = [sys.executable, "-m", "vixml_jax.train", f"--flagfile=experiments/{flags}.flags"]
    subprocess.run([*command, f"--workdir={tmp_path}"], cwd=ROOT, check=True)
    found = json.loads((tmp_path / "evaluation" / "test-exact.json").read_text())
    counted = found["vote"][f"vote, {vote}"]
    assert found["R@100"] > counted["R@100"]
    for name in ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "R@100"):
        assert found["with_memory"][name] > counted[name], name
