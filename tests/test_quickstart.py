"""The quickstart flag files: a trained model beats the kNN baseline, with and without images."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("flags,baseline", [("quickstart", "both"), ("quickstart_text", "text")])
def test_quickstart_beats_the_knn_baseline(flags, baseline, tmp_path):
    command = [sys.executable, "-m", "vixml_jax.train", f"--flagfile=experiments/{flags}.flags"]
    subprocess.run([*command, f"--workdir={tmp_path}"], cwd=ROOT, check=True)
    results = json.loads((tmp_path / "evaluation" / "test-exact.json").read_text())
    knn = results["knn_baseline"][f"kNN baseline, {baseline}"]
    assert results["R@100"] > knn["R@100"]
    for name in ("P@1", "P@3", "P@5", "PSP@1", "PSP@3", "PSP@5", "R@100"):
        assert results["with_neighbours"][name] > knn[name], name
