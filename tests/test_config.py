"""Flags: all documented and typed, bounds said in one line, files and flags held to the same."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags

from vixml_jax import config, workdir
from vixml_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[1]


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
        ({"mesh": "fsdp:-1,tensor:-1"}, "--mesh=fsdp:-1,tensor:-1: expected sizes as in"),
        ({"mesh": "fsdp:2,tensor:-1,replica:-1"}, "replica and tensor cannot both be the rest"),
        ({"mesh": "tensor:-1"}, "fsdp and tensor cannot both be the rest"),
        ({"mesh": "data:2"}, "'data' is none of replica, fsdp, tensor"),
        ({"mesh": "fsdp:2,fsdp:4"}, "fsdp is named twice"),
        ({"mesh": "fsdp:0"}, "'0' is no number of devices for fsdp"),
        ({"mesh": "fsdp:2.5"}, "'2.5' is no number of devices for fsdp"),
        ({"mesh": "fsdp"}, "'' is no number of devices for fsdp"),
        ({"mesh": "1,-1,1"}, "'1' is none of replica, fsdp, tensor"),
        ({"mesh": [1, -1, 1]}, "--mesh=[1, -1, 1]: expected sizes as in"),
    ],
)
def test_bad_values_are_refused_in_one_line(tree, found):
    with pytest.raises(InputError) as error:
        config.from_dict(tree)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "mesh,sizes",
    [
        ("", (1, -1, 1)),
        ("tensor:4", (1, -1, 4)),
        ("fsdp:2,replica:-1", (-1, 2, 1)),
        ("tensor:3,fsdp:2,replica:5", (5, 2, 3)),
    ],
)
def test_axes_of_the_mesh_by_name(mesh, sizes):
    expected = dict(zip(("replica", "fsdp", "tensor"), sizes, strict=True))
    assert config.mesh_sizes(mesh) == expected


def test_a_mesh_of_other_devices_says_what_is_there():
    with pytest.raises(InputError) as error:
        workdir.make_mesh(config.Config(mesh="replica:3,tensor:2"))
    assert str(error.value) == (
        "--mesh=replica:3,tensor:2: replica:3,fsdp:1,tensor:2 is for 6 devices, found 8 (cpu): "
        "choose sizes whose product is 8, or -1 for one of them"
    )


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


def parsed(*argv):
    values = flags.FlagValues()
    flags.DEFINE_enum("search", "exact", ["exact", "scann"], "A door's.", flag_values=values)
    config.define_group("search", config.SearchConfig, values)
    values(["door", *argv])
    return values


def test_a_group_of_its_own():
    values = parsed("--search=scann", "--search.recall=0.95", "--search.query_block=64")
    assert values.search == "scann"
    made = config.group_from_flags("search", config.SearchConfig, values)
    assert made == config.SearchConfig(recall=0.95, query_block=64)
    for _, field, _ in config._leaves(made):
        assert field.metadata["help"].endswith(".")


@pytest.mark.parametrize("flag", ["recall=0", "recall=1.5", "query_block=0", "memory_gb=-1"])
def test_a_group_of_its_own_keeps_its_bounds(flag):
    with pytest.raises(InputError, match=rf"--search.{flag}(\.0)?: expected "):
        config.group_from_flags("search", config.SearchConfig, parsed(f"--search.{flag}"))
