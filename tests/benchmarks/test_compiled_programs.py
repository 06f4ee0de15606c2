"""Programs lowered and compiled for GPUs and TPUs that need not exist, of tiny models."""

import dataclasses
import importlib.util
import math
import re

import jax
import pytest

from vixml_jax.benchmarks import compiled as benchmark
from vixml_jax.config import BatchConfig, LabelsConfig, LossConfig
from vixml_jax.errors import InputError
from vixml_jax.flag_groups import HeadConfig
from vixml_jax.models.siglip import SiglipConfig
from vixml_jax.parallel import absent_devices, accelerators, collectives, hlo_text, sharding
from vixml_jax.training import head_trainer
from vixml_jax.training.memory_planner import DataSizes, bytes_per_device
from vixml_jax.training.planning import programs

QUERIES, LABELS = 30_000, 20_000  # Larger than every other dimension.
ENCODER = {
    "num_layers": 2, "width": 64, "num_heads": 2, "mlp_width": 128, "vocab_size": 512,
    "max_positions": 64,
}  # fmt: skip
DECODER = {
    "num_layers": 2, "width": 64, "num_heads": 4, "num_kv_heads": 2, "head_width": 32,
    "mlp_width": 128, "vocab_size": 512,
}  # fmt: skip
SHARD = LABELS // 8 * 64  # Elements of a table on one of eight devices.
HOST = ("send(", "recv(", "infeed", "outfeed", "callback", "MoveToHost", "MoveToDevice", "S(5)")


def tiny(name):
    """A run of the benchmark with small sizes, and sizes of its tower."""
    run, kind = benchmark.RUNS[name]
    lora = dataclasses.replace(run.config.lora, rank=4 if run.config.lora.rank else 0)
    config = dataclasses.replace(
        run.config,
        batch=BatchConfig(
            size=64, row_width=32, microbatch_rows=4 if run.config.batch.microbatch_rows else 0
        ),
        labels=LabelsConfig(num_free=LABELS, num_heads=2, mlp_width=64),
        loss=LossConfig(num_negatives=4),
        lora=lora,
        head=dataclasses.replace(run.config.head, batch_size=64, mlp_width=64, label_block=512)
        if run.config.head.only
        else HeadConfig(),
        # Hidden states of a block of items are smaller than the tables, too.
        eval=dataclasses.replace(run.config.eval, block=256),
    )
    sizes = DataSizes(QUERIES, LABELS, 2.0)
    lengths = run.lengths._replace(query=12.0, label=10.0, image_width=48)
    small = run._replace(config=config, sizes=sizes, lengths=lengths)
    return small, kind, DECODER if run.config.lora.rank else ENCODER


def assert_sound(name, found, parts):
    """No host transfer, no gather of tables, donated state in place, no sort of whole blocks."""
    text = found.compiled.as_text()
    assert not [mark for mark in HOST if mark in text]
    for one in collectives.read_collectives(text):
        # XLA joins small arrays to a long one, so the number of elements counts.
        largest = max(map(math.prod, one.shapes), default=1)
        assert largest < SHARD, f"{one.kind} of {one.shapes}: {one.op_name}"
    like = {
        programs.STEP: lambda: parts.like,
        programs.HEAD: lambda: head_trainer.own_state(parts.head.like),
    }.get(found.name)
    if like:
        donated = bytes_per_device(like())
        # Layouts of a device may pad what is in place.
        assert found.compiled.memory_analysis().alias_size_in_bytes >= 0.99 * donated, name
    bodies, _ = hlo_text.computations(text)
    for line in (line for lines in bodies.values() for line in lines):
        if re.search(r" sort\(|DeviceRadixSort|TopK", line):
            widest = max(max(x.shape, default=1) for x in hlo_text.instruction(line).outputs)
            assert widest < LABELS // 8, line.strip()[:200]
    assert found.work.moved > 0 and found.work.flops > 0


def small_search(monkeypatch):
    """Searches 64 queries at a time, which compiles faster."""
    monkeypatch.setattr(programs, "QUERY_BLOCK", 64)


SIGLIP = SiglipConfig(
    image_size=32, patch_size=8, num_layers=2, width=64, num_heads=2, mlp_width=128,
    dtype="bfloat16",
)  # fmt: skip


@pytest.mark.parametrize("name", ["minilm", "qwen-microbatches-images", "head", "search"])
def test_programs_lower_for_gpus_and_tpus(name, monkeypatch):
    """On a mesh of this machine's devices; the CPU has no part in what is lowered."""
    small_search(monkeypatch)
    run, kind, tower = tiny(name)
    parts = run.parts(sharding.create_mesh(2, 2, 2), **tower)
    traced, _ = benchmark.traced(run, kind, parts)
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "callback" not in text
        if kind in (programs.STEP, programs.HEAD):
            donated = text.count("tf.aliasing_output") + text.count("jax.buffer_donor")
            assert donated >= len(jax.tree.leaves(parts.like.opt_state))


def test_a_row_of_the_table(monkeypatch):
    small_search(monkeypatch)
    run, kind, tower = tiny("search")
    mesh = sharding.create_mesh(1, 8, 1)
    found = benchmark.program(run, kind, run.parts(mesh, **tower))
    cells = benchmark.row("h100:8", "fsdp:8", "search", found).strip("| ").split(" | ")
    assert len(cells) == len(benchmark.COLUMNS) and cells[:3] == ["h100:8", "fsdp:8", "search, 64"]
    flops = 2 * 64 * 20_000 * 64 / 8
    assert found.work.products["float32, highest"] == flops
    assert float(cells[8]) == pytest.approx(1e3 * flops / 67e12, abs=0.01)


def test_meshes_of_a_group_of_devices():
    devices = jax.devices()
    kinds = ["fsdp", "tensor", "replica"]
    found = [(name, *mesh.shape.values()) for name, mesh in benchmark.meshes(devices, kinds)]
    assert found == [
        ("fsdp:8", 1, 8, 1), ("fsdp:4,tensor:2", 1, 4, 2), ("replica:8", 8, 1, 1),
    ]  # fmt: skip
    assert [name for name, _ in benchmark.meshes(devices[:1], kinds)] == ["1"]


GPU = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None,
    reason="the compiler for GPUs (extra gpu-plan) is not installed",
)
TPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu cannot be imported"
)
GROUPS = [
    pytest.param("h100:1", "fsdp", marks=GPU),
    *(pytest.param("h100:8", kind, marks=GPU) for kind in ("fsdp", "tensor", "replica")),
    pytest.param("v5e:2x4", "fsdp", marks=TPU),
    pytest.param("v6e:2x4", "tensor", marks=TPU),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", benchmark.RUNS)
@pytest.mark.parametrize(("devices", "mesh"), GROUPS)
def test_programs_compile_and_are_sound(devices, mesh, name, monkeypatch):
    small_search(monkeypatch)
    run, kind, tower = tiny(name)
    ((_, mesh),) = benchmark.meshes(absent_devices.find(devices), [mesh])
    parts = run.parts(mesh, **tower)
    try:
        found = benchmark.program(run, kind, parts)
    except InputError as error:  # As of libtpu 0.0.52 for v6e by JAX 0.10.2.
        if "cannot be read by JAX" not in str(error):
            raise
        pytest.skip(str(error))
    assert_sound(name, found, parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "devices", [pytest.param("h100:1", marks=GPU), pytest.param("v5e:1x1", marks=TPU)]
)
def test_image_embedding_compiles(devices):
    ((_, mesh),) = benchmark.meshes(absent_devices.find(devices), ["fsdp"])
    found = benchmark.image_program(SIGLIP, 4, mesh)
    assert not [mark for mark in HOST if mark in found.compiled.as_text()]
    assert not collectives.read_collectives(found.compiled.as_text())
    assert found.work.times(accelerators.find(mesh.devices.flat[0].device_kind)).compute > 0
