"""Tests of the memory plan: stored arrays, microbatches, frozen parameters, and its messages."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.tiny import configuration, make_data
from vixml_jax import workdir
from vixml_jax.benchmarks.memory import __main__ as memory
from vixml_jax.data import input_pipeline
from vixml_jax.data.packing import Layout
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.models import published_towers as towers
from vixml_jax.models.bert import BertConfig
from vixml_jax.parallel import accelerators, sharding
from vixml_jax.runtime import host_memory
from vixml_jax.structs import LabelState, TrainState
from vixml_jax.training import memory_planner
from vixml_jax.training.memory_planner import MemoryPlan, bytes_per_device

SIZES = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 4096,
}  # fmt: skip
SETTINGS = {
    "tower": "qwen2.5-0.5b", "dtype": "float32", "length": 32, "batch": 64, "chunk": 0, "rank": 4,
}  # fmt: skip


@pytest.fixture
def one_device(monkeypatch):
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    mesh = Mesh(devices, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    monkeypatch.setattr(sharding, "create_mesh", lambda: mesh)


@pytest.fixture(autouse=True)
def _small_models(monkeypatch):
    name = "Qwen/Qwen2.5-0.5B-Instruct"
    monkeypatch.setitem(towers.CONFIGS, name, {**towers.CONFIGS[name], **SIZES})
    monkeypatch.setattr(memory, "NUM_LABELS", 64)


def test_bytes_per_device_counts_one_shard():
    mesh = sharding.create_mesh()
    rows, replicated = sharding.rows_sharding(mesh), sharding.replicated(mesh)
    tree = {
        "sharded": jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=rows),
        "replicated": jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=replicated),
    }
    assert bytes_per_device(tree) == 16 // sharding.num_row_shards(mesh) * 3 * 4 + 5 * 2


@pytest.mark.slow
def test_step_memory_grows_with_the_microbatch_not_with_the_batch(one_device):
    def step(batch, chunk):
        return memory.plan({**SETTINGS, "batch": batch, "chunk": chunk}).step

    full, full_of_twice = step(256, 0), step(512, 0)
    assert full_of_twice > 1.6 * full
    micro, micro_of_twice = step(256, 8), step(512, 8)
    assert micro < 0.5 * full and micro_of_twice < 0.35 * full_of_twice
    assert micro_of_twice - micro < 0.2 * (full_of_twice - full)
    assert step(256, 16) > 1.2 * micro


def test_gradients_of_frozen_parameters_are_never_allocated(one_device, monkeypatch):
    # A large model and few positions: the frozen parameters are larger than all activations.
    name = "Qwen/Qwen2.5-0.5B-Instruct"
    wide = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 16}
    monkeypatch.setitem(towers.CONFIGS, name, {**towers.CONFIGS[name], **wide})
    settings = {**SETTINGS, "batch": 16, "length": 4}
    adapted, full = (memory.plan({**settings, "rank": rank}) for rank in (4, 0))
    base = adapted.held["frozen parameters"]
    assert full.held["frozen parameters"] == 0
    # The optimizer holds two moments of the trained parameters and little else.
    for plan in (adapted, full):
        moments = plan.held["optimizer"] - 2 * plan.held["trained parameters"]
        assert 0 <= moments < 100
    assert full.step > full.held["trained parameters"]
    assert adapted.step < 0.5 * base


def state_of(mesh):
    def array(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

    kernel = array((1024, 1024), jnp.float32, "fsdp", "tensor")
    return TrainState(
        step=array((), jnp.int32),
        params={"tower": {"kernel": kernel, "bias": array((8,), jnp.float32)}},
        frozen={},
        opt_state=({"mu": {"tower": {"kernel": kernel}}}, array((), jnp.int32)),
        labels=LabelState(
            array((2**20, 8), jnp.float32, sharding.ROWS, None), array((2**20,), jnp.int32)
        ),
        bank=array((4096, 512), jnp.bfloat16, sharding.ROWS, None),
    )


def test_array_table_lists_every_large_array(monkeypatch):
    monkeypatch.setattr(memory_planner, "NUM_SHOWN", 5)
    like = state_of(sharding.create_mesh(2, 2, 2))
    expected = [
        "array                            shape      dtype     sharded over    MiB per device",
        "trained parameters: tower/kernel 1024x1024  float32   fsdp tensor     1.00",
        "trained parameters: 1 smaller 0.00",
        "optimizer: mu/tower/kernel       1024x1024  float32   fsdp tensor     1.00",
        "optimizer: 1 smaller 0.00",
        "labels: centroids                1048576x8  float32   replica+fsdp .  8.00",
        "labels: cluster_of               1048576    int32     replicated      4.00",
        "query embeddings: bank           4096x512   bfloat16  replica+fsdp .  1.00",
    ]
    found = memory_planner.array_table(like).splitlines()
    assert [line.split() for line in found] == [line.split() for line in expected]
    assert len({len(line) for line in found}) == 1  # Columns are aligned.
    monkeypatch.setattr(memory_planner, "NUM_SHOWN", 6)  # However small they are.
    assert "tower/bias" in memory_planner.array_table(like)


def test_error_of_the_compiler_is_reported_with_the_stored_arrays():
    like = state_of(sharding.create_mesh(2, 2, 2))

    def out_of_memory():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.20G of 15.75G hbm. "
            "Exceeded hbm capacity by 1.45G."
        )

    message = (
        r"labels 0.01, .*the compiler reports 'Used 17.20G of 15.75G hbm': the run does not fit; to"
    )
    with pytest.raises(InputError, match=message):
        memory_planner.plan_memory(like, out_of_memory)

    def internal_error():
        raise jax.errors.JaxRuntimeError("INTERNAL: another error")

    with pytest.raises(jax.errors.JaxRuntimeError, match="another error"):
        memory_planner.plan_memory(like, internal_error)


@pytest.mark.parametrize("num_images", [0, 1])
def test_abstract_batch_matches_a_real_batch(num_images, tmp_path):
    config = configuration(make_data(tmp_path), tmp_path / "run")
    dataset = PreparedDataset.open(config.data)
    layout, mesh = Layout(num_images), sharding.create_mesh(2, 2, 2)
    tower = BertConfig(vocab_size=99, num_layers=1, width=16, num_heads=2, mlp_width=16)
    model = workdir.build_model(config, tower, layout, dataset.num_labels, mesh)
    length = model.mean_length(dataset.train) + model.mean_length(dataset.labels)
    abstract, _ = memory_planner.abstract_batch(
        model,
        64,
        length,
        has_images=[True, False],
        width=dataset.image_width,
        labels_per_query=dataset.train_relevance.nnz / len(dataset.train),
    )
    rows = model.row_sizes(length, 64, 8)
    batches = input_pipeline.epoch_batches(
        dataset, np.arange(90), epoch=0, seed=0, batch_size=64, width=model.row_width,
        layout=layout, weights=None, rows=rows, shards=sharding.num_shards(mesh),
    )  # fmt: skip
    real = sharding.to_devices(next(batches), mesh)
    described = jax.tree.map(lambda x: (x.shape[1:], x.dtype, x.sharding), (abstract, real))
    assert described[0] == described[1]
    assert abstract.items.images.shape == real.items.images.shape
    assert abstract.query_ids.shape == (64,)
    assert abstract.positives.labels.shape == real.positives.labels.shape
    assert 0.5 < abstract.items.tokens.shape[0] / real.items.tokens.shape[0] <= 1


def test_tpu_kinds_have_published_sizes():
    kinds = {kind for kind, _ in accelerators.TPUS.values()}
    assert len(kinds) == len(accelerators.TPUS) == 4
    assert all(accelerators.find(kind) for kind in kinds)


def test_plan_that_does_not_fit_is_refused():
    assert host_memory.device_memory() > 2**28
    plan = MemoryPlan({"labels": 3 * 2**30, "optimizer": 0}, 2**30, 5 * 2**30)
    plan.check()
    expected = "memory per device (GiB): labels 3.00, training step 1.00, total 4.00 of 5.0"
    assert str(plan) == expected
    with pytest.raises(InputError, match=r"4.00 of 3.5: the run does not fit.*microbatch_rows"):
        plan._replace(device=int(3.5 * 2**30)).check()
    plan._replace(device=0).check()  # The memory of the device is unknown.


@pytest.mark.parametrize(
    ("variables", "taken"),
    [
        ({}, "75% by default"),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, "XLA_CLIENT_MEM_FRACTION=0.5"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".6"}, "XLA_PYTHON_CLIENT_MEM_FRACTION=.6"),
    ],
)
def test_a_refusal_on_a_gpu_says_how_jax_takes_more_of_its_memory(variables, taken, monkeypatch):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    plan = MemoryPlan({"labels": 3 * 2**30}, 2**30, int(3.5 * 2**30))
    for platform in ("cpu", "tpu", ""):
        with pytest.raises(InputError) as refused:
            plan._replace(platform=platform).check()
        assert str(refused.value).endswith(memory_planner.HELP)
    with pytest.raises(InputError) as refused:
        plan._replace(platform="gpu").check()
    assert str(refused.value) == (
        "memory per device (GiB): labels 3.00, training step 1.00, total 4.00 of 3.5: the run does "
        f"not fit; {memory_planner.HELP}; on a GPU the limit is the part of its memory that JAX "
        f"takes, {taken}: if no other program uses the GPU, set XLA_CLIENT_MEM_FRACTION=0.95 in "
        "the environment (XLA_PYTHON_CLIENT_PREALLOCATE=false takes memory step by step and leaves "
        "the limit as it is)"
    )


@pytest.mark.parametrize(
    ("kind", "platform", "variables", "part"),
    [
        ("TPU v6 lite", "tpu", {"XLA_CLIENT_MEM_FRACTION": "0.5"}, 1.0),
        ("NVIDIA H100 80GB HBM3", "gpu", {}, 0.75),
        ("NVIDIA L40S", "gpu", {"XLA_CLIENT_MEM_FRACTION": "0.95"}, 0.95),
        ("NVIDIA L40S", "gpu", {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, 0.5),
    ],
)
def test_memory_of_absent_devices(kind, platform, variables, part, monkeypatch):
    """The published memory; of a GPU the part that JAX takes."""
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    device = types.SimpleNamespace(device_kind=kind, platform=platform)
    along = types.SimpleNamespace(device_set=[device])
    like = types.SimpleNamespace(step=types.SimpleNamespace(sharding=along))
    expected = int(part * accelerators.KNOWN[kind].memory)
    assert memory_planner._device_memory(like) == expected


@pytest.mark.parametrize("value", ["half", "0", "-1", "nan", "inf", "95%"])
def test_a_fraction_that_is_none_is_refused(value, monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", value)
    device = types.SimpleNamespace(device_kind="NVIDIA L40S", platform="gpu")
    along = types.SimpleNamespace(device_set=[device])
    like = types.SimpleNamespace(step=types.SimpleNamespace(sharding=along))
    with pytest.raises(InputError, match=f"XLA_PYTHON_CLIENT_MEM_FRACTION={value} in the env"):
        memory_planner._device_memory(like)


def test_the_platform_of_a_plan_is_that_of_its_devices(monkeypatch):
    like = state_of(sharding.create_mesh(2, 2, 2))

    def out_of_memory():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to plan")

    with pytest.raises(InputError) as refused:
        memory_planner.plan_memory(like, out_of_memory)
    assert str(refused.value).endswith(memory_planner.HELP)
    monkeypatch.setattr(memory_planner, "_platform", lambda like: "gpu")
    with pytest.raises(InputError, match=r"XLA_CLIENT_MEM_FRACTION=0\.95"):
        memory_planner.plan_memory(like, out_of_memory)
    compiled = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((8,), jnp.float32)).compile()
    assert memory_planner.plan_memory(like, lambda: compiled).platform == "gpu"
