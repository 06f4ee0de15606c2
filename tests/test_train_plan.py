"""`train --plan`: planned device memory, for the devices here and for TPU slices."""

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from tests.tiny import configuration, make_data
from vixml_jax import train
from vixml_jax import workdir as workdir_lib
from vixml_jax.config import LoraConfig
from vixml_jax.errors import InputError
from vixml_jax.flag_groups import HeadConfig
from vixml_jax.models import published_towers as towers
from vixml_jax.runtime import console, host_memory
from vixml_jax.training import build, memory_planner, trainer

ROOT = pathlib.Path(__file__).parents[1]
TINY = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 301,
}  # fmt: skip
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu cannot be imported"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("raw"))


def tower(path, name, **changes):
    """Makes a directory with only the configuration of a published tower; returns its path."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**towers.about(name), **changes}))
    return str(path)


def run_plan(*arguments):
    command = [sys.executable, "-m", "vixml_jax.train", "--plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def totals(output):
    """Reads GiB of each group, of the step, in total and of the device."""
    (line,) = re.findall(r"^memory per device \(GiB\): (.*)$", output, re.M)
    *groups, step, total = line.split(", ")
    step, total = step.removeprefix("training step ").split(" (or")[0], total.removeprefix("total ")
    sizes = {name: float(size) for name, size in (part.rsplit(" ", 1) for part in groups)}
    return sizes, float(step), *map(float, total.split(" of "))


@pytest.mark.eight_host_devices
def test_plan_is_that_of_train(data, tmp_path, capsys, monkeypatch):
    config = configuration(data, tmp_path / "run")
    planned = []
    plan_memory = memory_planner.plan_memory
    for module in (memory_planner, trainer):
        monkeypatch.setattr(
            module, "plan_memory", lambda *a: planned.append(plan_memory(*a)) or planned[-1]
        )
    train.plan(config)
    assert not os.path.exists(config.workdir)
    output = capsys.readouterr().out
    assert output.startswith(
        "plan: 8 x cpu, --mesh=replica:1,fsdp:8,tensor:1; 90 queries, 20 labels; a batch of 16 in "
    )
    assert "padded: label from 90 to 96, a multiple of replica:1 x fsdp:8, in bank" in output
    assert output.splitlines()[-1].endswith("the run fits")
    monkeypatch.setattr(console, "_level", console.Level.VERBOSE)
    train.train(dataclasses.replace(config, loop=dataclasses.replace(config.loop, epochs=0)))
    of_train = capsys.readouterr().out
    of_plan, of_train = (text[text.index("\narray ") :] for text in (output, of_train))
    table = of_plan[: of_plan.index("\nmemory per device")]
    assert of_train.startswith(table)  # The same arrays with the same shardings.
    by_plan, by_train = planned
    assert by_plan.held == by_train.held
    # What is available changes while others use the machine.
    assert by_plan.device == pytest.approx(by_train.device, rel=0.2)
    # One is for a batch of the expected size, the other for the first batch.
    assert 0.5 < by_plan.step / by_train.step < 2


def test_run_that_does_not_fit_is_rejected_after_the_table(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(host_memory, "device_memory", lambda device: 1000)
    config = configuration(data, tmp_path / "run")
    with pytest.raises(InputError, match=r"^memory per device \(GiB\): .* the run does not fit;"):
        train.plan(config)
    assert "optimizer: mu/" in capsys.readouterr().out


@pytest.mark.parametrize(
    "devices,sizes,message",
    [
        (
            "v5e",
            "",
            "--plan_devices=v5e: expected a TPU slice (v4, v5e, v5p, v6e) such as ",
        ),
        ("b9:2", "", "or up to 8 GPUs (a100, h100, h200, b200, l40s) such as h100:8"),
        ("", "labels:-3", "--plan_size=labels:-3: expected queries:NUMBER,labels:NUMBER"),
        ("", "tokens:3", "found 'tokens:3'"),
        ("", "queries:1", "found 1 training query; expected at least 2"),
    ],
)
def test_bad_devices_and_sizes_are_rejected(devices, sizes, message, data, tmp_path):
    with pytest.raises(InputError) as error:
        train.plan(configuration(data, tmp_path / "run"), devices=devices, sizes=sizes)
    assert message in str(error.value)


def test_plan_size_without_plan_is_rejected(tmp_path):
    command = [sys.executable, "-m", "vixml_jax.train", "--plan_size=labels:3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and "add --plan" in done.stderr


def test_missing_tpu_compiler_is_reported(data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(InputError, match="pip install libtpu"):
        train.plan(configuration(data, tmp_path / "run"), devices="v5e:2x2")


@needs_libtpu
@pytest.mark.slow
def test_plan_for_absent_tpus(data, tmp_path):
    """Eight TPUs, 100,001 labels and a decoder of which only the configuration exists."""
    checkpoint = tower(tmp_path / "qwen", "qwen2.5-0.5b", **TINY)
    workdir = tmp_path / "run"
    done = run_plan(
        f"--data={data}", f"--workdir={workdir}", f"--model.pretrained={checkpoint}",
        "--lora.rank=4", "--model.scan", "--model.remat", "--model.dtype=bfloat16",
        "--model.num_images=1", "--batch.size=16", "--loss.num_negatives=4",
        "--labels.num_free=100001", "--mesh=tensor:4", "--plan_devices=v5e:2x4",
        "--plan_size=queries:20000,labels:100001",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not workdir.exists()
    lines = done.stdout.splitlines()
    assert lines[0].startswith(
        "plan: 8 x TPU v5 lite (16 GiB, 197 TFLOP/s each), --mesh=replica:1,fsdp:2,tensor:4; "
        "20000 queries, 100001 labels; a batch of 16 in "
    )
    assert any(line.startswith("padded: vocab from 301 to 304, a multiple of") for line in lines)
    assert any(line.startswith("padded: kv_heads from 2 to 4") for line in lines)
    (row,) = (line.split() for line in lines if line.startswith("labels: centroids"))
    size = 100002 // 2 * 48 * 4 / 2**20
    assert row[2:] == ["100002x48", "float32", "replica+fsdp", ".", f"{size:.2f}"]
    groups, step, total, device = totals(done.stdout)
    assert groups["labels"] == pytest.approx((size + 100002 / 2 * 4 / 2**20) / 1024, abs=0.006)
    assert groups["optimizer"] >= groups["trained parameters"] and step > 0
    assert device == 16.0 and total == pytest.approx(sum(groups.values()) + step, abs=0.03)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["", "replica:4,fsdp:64"])
def test_plan_for_seven_billion_parameters_and_ten_million_labels(mesh, data, tmp_path):
    checkpoint = tower(tmp_path / "qwen", "qwen2.5-7b")
    done = run_plan(
        f"--data={data}", f"--workdir={tmp_path / 'run'}", f"--model.pretrained={checkpoint}",
        "--lora.rank=64", "--model.scan", "--model.remat", "--model.dtype=bfloat16",
        "--model.num_images=1", "--batch.size=16384", "--batch.row_width=128",
        "--batch.microbatch_rows=8", "--labels.num_free=10000000", f"--mesh={mesh}",
        "--plan_devices=v5e:16x16", "--plan_size=queries:2000000,labels:10000000",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    groups, _, total, device = totals(done.stdout)
    assert total < device == 16.0
    table = 10_000_128 * 3584 * 4 / 256 / 2**30
    assert groups["labels"] == pytest.approx(table, abs=0.01)
    assert groups["trained parameters"] > table and groups["optimizer"] > 2 * table
    shards = 64 if mesh else 256
    base = 7_070_619_136 * 2 / shards / 2**30
    assert groups["frozen parameters"] == pytest.approx(base, rel=0.05, abs=0.01)


def test_plan_needs_no_weights(data, tmp_path, capsys):
    checkpoint = tower(tmp_path / "qwen", "qwen2.5-0.5b", **TINY)
    config = configuration(data, tmp_path / "run")
    config = dataclasses.replace(
        config,
        mesh="tensor:4",
        model=dataclasses.replace(config.model, pretrained=checkpoint, scan=True),
        lora=LoraConfig(rank=2, alpha=4.0),
        batch=dataclasses.replace(config.batch, row_width=32),
    )
    train.plan(config, sizes="queries:5000")
    output = capsys.readouterr().out
    assert "; 5000 queries, 20 labels; " in output
    tower_and_layout = build.make_tower(config, workdir_lib.open_dataset(config))
    model = workdir_lib.build_model(config, *tower_and_layout, 20, workdir_lib.make_mesh(config))
    base = model.abstract_params["tower"]["encoder"]["blocks"]["gate"]["kernel"].value
    assert base.shape == (2, 48, 96)
    size = math.prod(base.shape) * 2 / len(jax.devices()) / 2**20
    (row,) = (line for line in output.splitlines() if "blocks/gate/kernel" in line)
    assert row.split()[3:] == ["2x48x96", "bfloat16", ".", "fsdp", "tensor", f"{size:.2f}"]


HEAD = {"epochs": 2, "batch_size": 64, "mlp_width": 8, "sample_above": 10_000, "num_sampled": 800}


@pytest.mark.parametrize(
    "labels",
    [pytest.param(5_000, id="all labels", marks=pytest.mark.slow),
     pytest.param(40_000, id="sampled labels", marks=pytest.mark.slow)],
)  # fmt: skip
def test_plan_knows_the_head(labels, data, tmp_path, capsys):
    """Its rows, moments and steps, whichever of its uses needs most."""
    planned = {}
    for kind in ("none", "only", "refit", "joint"):
        head = {
            "none": HeadConfig(),
            "only": HeadConfig(only=True, **HEAD),
            "refit": HeadConfig(refit=True, **HEAD),
            "joint": HeadConfig(weight=1.0, **HEAD),
        }[kind]
        config = dataclasses.replace(configuration(data, tmp_path / "run"), head=head)
        train.plan(config, sizes=f"queries:5000,labels:{labels}")
        output = capsys.readouterr().out
        planned[kind] = [line.split() for line in output.splitlines() if "head/vectors" in line]
    assert planned["none"] == []
    # Eight devices; the vectors and two moments, of the same shape.
    expected = [f"{labels}x16", "float32", "replica+fsdp", ".", f"{labels * 16 * 4 / 2**23:.2f}"]
    for kind in ("only", "refit", "joint"):
        names = sorted(row[-6] for row in planned[kind])
        assert len(names) == 3 and all(name.endswith("head/vectors") for name in names)
        assert all(row[-5:] == expected for row in planned[kind])


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "labels"), [("v5e:16x16", 10_000_000), ("v5p:2x2x1", 1_300_000)]
)
def test_plan_for_a_head_over_millions_of_labels(devices, labels, data, tmp_path):
    done = run_plan(
        f"--data={data}", f"--workdir={tmp_path / 'run'}", "--model.width=768",
        "--model.mlp_width=3072", "--model.num_layers=12", "--model.num_heads=12",
        "--batch.size=4096", "--batch.microbatch_rows=32", "--model.num_images=0",
        "--head.weight=1", "--head.refit", "--head.epochs=2", f"--plan_devices={devices}",
        f"--plan_size=queries:2000000,labels:{labels}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    groups, _, total, device = totals(done.stdout)
    assert total < device
    num = 4 if "v5p" in devices else 256
    assert groups["optimizer"] > 2 * labels * 768 * 4 / num / 2**30
