"""Flags of a run: help texts, bounds and choices, JSON files, errors in one line."""

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
from vixml_jax.runtime import flag_fields

ROOT = pathlib.Path(__file__).parents[1]


def test_every_flag_has_help_and_is_used():
    leaves = list(flag_fields.leaves(config.Config()))
    code = "".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "vixml_jax").rglob("*.py")
        if path.name not in ("config.py", "flag_groups.py")
    )
    assert len(leaves) <= 91
    for name, field, _ in leaves:
        assert field.metadata["help"].endswith("."), name
        # Some groups are passed as keyword arguments, so the field's name is enough.
        assert re.search(rf"\b{field.name}\b", code), f"--{name} is never used"


def test_first_sentence_of_help_fits_the_short_help():
    leaves = [
        *flag_fields.leaves(config.Config()),
        *flag_fields.leaves(config.SearchConfig(), "search."),
    ]
    for name, field, _ in leaves:
        assert len(field.metadata["help"].split(". ")[0]) <= 60, name


def test_json_round_trip():
    original = config.Config(seed=3, batch=config.BatchConfig(size=64, curriculum=[1, 2]))
    assert config.from_dict(json.loads(original.to_json())) == original
    assert config.differences(original, dataclasses.replace(original, seed=4)) == [
        "--seed: was 3, now 4"
    ]


def test_flag_lines_give_the_same_configuration():
    original = config.Config(
        seed=3,
        batch=config.BatchConfig(curriculum=[1, 2]),
        model=config.ModelConfig(scan=True, dropout=0.25),
    )
    values = flags.FlagValues()
    config.define_flags(values)
    lines = flag_fields.lines(original)
    values(["train", *lines])
    assert config.from_flags(values) == original
    assert {"--seed=3", "--batch.curriculum=1,2", "--model.scan=True"} < set(lines)


@pytest.mark.parametrize(
    "tree,message",
    [
        ({"seed": -1}, "--seed=-1: expected at least 0"),
        ({"model": {"dtype": "int8"}}, "--model.dtype=int8: expected one of float32, bfloat16"),
        ({"loss": {"num_negatives": 1024}}, "--loss.num_negatives=1024: a batch of"),
        ({"loss": {"margin_min": 0.5}}, "--loss.margin_min=0.5 is above"),
        ({"model": {"num_images": 64}}, "--model.num_images=64 leaves no positions"),
        (
            {"loop": {"patience": 2, "eval_every": 1}},
            "--loop.patience=2 needs a metric to wait for: set",
        ),
        ({"loop": {"monitor": "P@1"}}, "--loop.monitor=P@1 needs evaluations in training: set"),
        ({"loop": {"patience": -1}}, "--loop.patience=-1: expected at least 0"),
        ({"mesh": "fsdp:-1,tensor:-1"}, "--mesh=fsdp:-1,tensor:-1: expected sizes such as"),
        ({"mesh": "fsdp:2,tensor:-1,replica:-1"}, "replica and tensor cannot both take the rest"),
        ({"mesh": "tensor:-1"}, "fsdp and tensor cannot both take the rest"),
        ({"mesh": "data:2"}, "'data' is none of replica, fsdp, tensor"),
        ({"mesh": "fsdp:2,fsdp:4"}, "fsdp is given twice"),
        ({"mesh": "fsdp:0"}, "'0' is not a number of devices for fsdp"),
        ({"mesh": "fsdp:2.5"}, "'2.5' is not a number of devices for fsdp"),
        ({"mesh": "fsdp"}, "'' is not a number of devices for fsdp"),
        ({"mesh": "1,-1,1"}, "'1' is none of replica, fsdp, tensor"),
        ({"mesh": [1, -1, 1]}, "--mesh: expected str, got array"),
    ],
)
def test_bad_values_are_rejected_in_one_line(tree, message):
    with pytest.raises(InputError) as error:
        config.from_dict(tree)
    assert message in str(error.value)
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
def test_mesh_axes_are_given_by_name(mesh, sizes):
    expected = dict(zip(("replica", "fsdp", "tensor"), sizes, strict=True))
    assert config.mesh_sizes(mesh) == expected


@pytest.mark.eight_host_devices
def test_mesh_for_another_number_of_devices_is_rejected():
    with pytest.raises(InputError) as error:
        workdir.make_mesh(config.Config(mesh="replica:3,tensor:2"))
    assert str(error.value) == (
        "--mesh=replica:3,tensor:2: replica:3,fsdp:1,tensor:2 is for 6 devices, found 8 (cpu): "
        "choose sizes whose product is 8, or -1 for one of them"
    )


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--no_such_flag"], "no_such_flag"),
        (["--batch.size=many"], "batch.size"),
        (["--model.dtype=int8"], "--model.dtype=int8"),
        (["--data=/nowhere"], "/nowhere"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_bad_flags_give_exit_status_2_and_one_line(arguments, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "vixml_jax.train", f"--workdir={tmp_path}/run", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def parsed(*argv):
    values = flags.FlagValues()
    flags.DEFINE_enum("search", "exact", ["exact", "scann"], "Of a command.", flag_values=values)
    config.define_group("search", config.SearchConfig, values)
    values(["evaluate", *argv])
    return values


def test_separate_group_of_flags():
    values = parsed("--search=scann", "--search.recall=0.95", "--search.query_block=64")
    assert values.search == "scann"
    group = config.group_from_flags("search", config.SearchConfig, values)
    assert group == config.SearchConfig(recall=0.95, query_block=64)
    for _, field, _ in flag_fields.leaves(group):
        assert field.metadata["help"].endswith(".")


@pytest.mark.parametrize("flag", ["recall=0", "recall=1.5", "query_block=0", "memory_gb=-1"])
def test_separate_group_of_flags_has_bounds(flag):
    with pytest.raises(InputError, match=rf"--search.{flag}(\.0)?: expected "):
        config.group_from_flags("search", config.SearchConfig, parsed(f"--search.{flag}"))


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", "Expecting value"),
        (b'{"data": "\xff"}', "decode"),
        (b"[]", "Expected `object`, got `array`"),
        (b"null", "Expected `object`, got `null`"),
        (b'{"a":' * 99999 + b"1" + b"}" * 99999, "recursion"),
        (b'{"loop": null}', "unknown settings loop"),
        (b'{"eval": 3}', "unknown settings eval"),
        (b'{"seed": "3"}', "--seed: expected int, got str"),
        (b'{"seed": 3.5}', "--seed: expected int, got float"),
        (b'{"lora": {"maps": "query"}}', "--lora.maps: expected array, got str"),
        (b'{"loop": {"keep": 1, "max_to_keep": 2}}', "unknown settings loop.keep"),
        (b'{"a":' * 99 + b'{"b": 1}' + b"}" * 99, "unknown settings a.a." + "a." * 36 + "a..."),
        (json.dumps({f"x{n}": 1 for n in range(20)}).encode(), "x0, x1, x10, x11, x12, x13, x14, "),
        (json.dumps({f"x{n}": 1 for n in range(20)}).encode(), "x15 and 12 more"),
    ],
)
def test_damaged_files_are_input_errors(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        config.load(path)
    assert str(error.value).startswith(f"{path}: not a valid configuration: ")
    assert message in str(error.value)


def test_infinite_values_are_saved_and_read(tmp_path):
    original = config.Config(optimizer=config.OptimizerConfig(clip_norm=float("inf")))
    (tmp_path / "config.json").write_text(original.to_json())
    assert config.load(tmp_path / "config.json") == original
