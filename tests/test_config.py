"""Flags: all documented and typed, bounds said in one line, files and flags held to the same."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import pytest

from vixml_jax import config
from vixml_jax.errors import InputError

ROOT = pathlib.Path(__file__).parent.parent


def leaves():
    return config._leaves(config.Config())


def test_every_flag_has_help_and_is_used():
    code = "".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "vixml_jax").rglob("*.py")
        if path.name != "config.py"
    )
    assert len(leaves()) < 80
    for prefix, field, _ in leaves():
        assert field.metadata["help"].endswith("."), field.name
        # Groups that are passed on whole are used field by field as keyword arguments.
        assert re.search(rf"\b{field.name}\b", code), f"--{prefix}{field.name} is never used"


def test_json_round_trip():
    made = config.Config(seed=3, batch=config.BatchConfig(size=64, curriculum=[1, 2]))
    assert config.from_dict(json.loads(made.to_json())) == made
    assert config.differences(made, dataclasses.replace(made, seed=4)) == [
        "--seed: 3 there, 4 here"
    ]


@pytest.mark.parametrize(
    "tree,found",
    [
        ({"seed": -1}, "--seed=-1: expected at least 0"),
        ({"model": {"dtype": "int8"}}, "--model.dtype=int8: expected one of float32, bfloat16"),
        ({"loss": {"num_negatives": 1024}}, "--loss.num_negatives=1024: a batch of"),
        ({"loss": {"margin_min": 0.5}}, "--loss.margin_min=0.5 is above"),
        ({"model": {"num_images": 64}}, "--model.num_images=64 leaves no place"),
        ({"loop": {"patience": 2, "eval_every": 1}}, "--loop.patience=2: nothing to wait for; set"),
        ({"loop": {"choose_by": "P@1"}}, "--loop.choose_by=P@1: no epoch is evaluated; set"),
        ({"loop": {"patience": -1}}, "--loop.patience=-1: expected at least 0"),
        ({"mesh": [2, -1, -1]}, "--mesh=2,-1,-1: expected three sizes"),
    ],
)
def test_bad_values_are_refused_in_one_line(tree, found):
    with pytest.raises(InputError) as error:
        config.from_dict(tree)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments,found",
    [
        (["--no_such_flag"], "no_such_flag"),
        (["--batch.size=many"], "batch.size"),
        (["--model.dtype=int8"], "--model.dtype=int8"),
        (["--data=/nowhere"], "/nowhere"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_doors_leave_with_status_2_and_one_line(arguments, found, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vixml_jax.train", f"--workdir={tmp_path}/run", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert found in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
