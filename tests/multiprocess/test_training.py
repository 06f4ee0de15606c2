"""Runs of several processes on this machine against one process with as many devices."""

import dataclasses
import json
import os
import shutil

import pytest

from tests.multiprocess import spawn
from tests.tiny import assert_same_state, configuration, final_state, make_data
from vixml_jax import workdir as workdir_lib
from vixml_jax.flag_groups import HeadConfig
from vixml_jax.runtime import flag_fields
from vixml_jax.storage import digests


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("raw"))


def trained(data, workdir, *, num_processes, devices, **changes):
    config = configuration(data, workdir)
    loop = dataclasses.replace(config.loop, epochs=1)
    config = dataclasses.replace(config, **{"loop": loop, **changes})
    done = spawn.finish(
        spawn.start(
            "vixml_jax.train",
            flag_fields.lines(config),
            num_processes=num_processes,
            devices=devices,
        )
    )
    assert [status for status, *_ in done] == [0] * num_processes, done
    for _, stdout, _ in done[1:]:
        assert spawn.printed(stdout) == []
    return config, done


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    return trained(data, tmp_path_factory.mktemp("one") / "run", num_processes=1, devices=8)[0]


@pytest.mark.parametrize(
    ("num_processes", "devices"), [(2, 4), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_several_processes_train_the_same_run(data, one_process, tmp_path, num_processes, devices):
    config, done = trained(data, tmp_path / "run", num_processes=num_processes, devices=devices)
    assert f"output: {config.workdir}" in done[0][1]
    tolerance = {"rtol": 1e-3, "atol": 2e-4}
    assert_same_state(final_state(one_process), final_state(config), **tolerance)
    for name in ("config.json", "tower.json", "metrics.jsonl"):
        assert os.path.exists(os.path.join(config.workdir, name))
    found, expected = (
        json.load(open(os.path.join(run.workdir, "evaluation", "test-exact.json")))
        for run in (config, one_process)
    )
    assert found["counts"] == expected["counts"]
    assert found["R@10"] == pytest.approx(expected["R@10"], abs=4.0)
    lines = [
        [json.loads(line)["step"] for line in open(os.path.join(run.workdir, "metrics.jsonl"))]
        for run in (config, one_process)
    ]
    assert lines[0] == lines[1]
    # The newest checkpoint is removed, as if the run had been killed; a single process resumes it.
    newest = digests.steps(os.path.join(config.workdir, workdir_lib.CHECKPOINTS))[-1]
    shutil.rmtree(os.path.join(config.workdir, workdir_lib.CHECKPOINTS, str(newest)))
    _, done = trained(data, tmp_path / "run", num_processes=1, devices=8)
    assert "resumed at step" in done[0][1]
    assert_same_state(final_state(one_process), final_state(config), **tolerance)


@pytest.mark.slow
def test_several_processes_train_the_same_head(data, tmp_path):
    """Jointly with the tower, and then alone."""
    head = HeadConfig(weight=0.5, refit=True, epochs=2, batch_size=32, mlp_width=8, words=40)
    loop = dataclasses.replace(configuration(data, "").loop, epochs=1)
    runs = [
        trained(data, tmp_path / f"{n}", num_processes=n, devices=8 // n, head=head, loop=loop)[0]
        for n in (1, 2)
    ]
    expected, found = map(final_state, runs)
    assert any("['head']['vectors']" in name for name in expected)
    assert_same_state(expected, found, rtol=1e-3, atol=2e-4)
    results = [
        json.load(open(os.path.join(run.workdir, "evaluation", "test-exact.json"))) for run in runs
    ]
    assert results[0]["P@1"] == pytest.approx(results[1]["P@1"], abs=4.0)
