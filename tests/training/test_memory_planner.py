"""The memory that is planned: held arrays by hand, chunks against batches, no frozen gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.tiny import configuration, make_data
from vixml_jax import workdir
from vixml_jax.benchmarks import memory
from vixml_jax.benchmarks.support import towers
from vixml_jax.data import input_pipeline
from vixml_jax.data.packing import Layout
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError
from vixml_jax.models.bert import BertConfig
from vixml_jax.parallel import accelerators, sharding
from vixml_jax.runtime import host_memory as memory_lib
from vixml_jax.structs import LabelState, TrainState
from vixml_jax.training import memory_planner as plan_lib
from vixml_jax.training.memory_planner import MemoryPlan, bytes_a_device

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
def small(monkeypatch):
    name = "Qwen/Qwen2.5-0.5B-Instruct"
    monkeypatch.setitem(towers.CONFIGS, name, {**towers.CONFIGS[name], **SIZES})
    monkeypatch.setattr(memory, "NUM_LABELS", 64)


def test_what_a_device_holds():
    mesh = sharding.create_mesh()
    rows, whole = sharding.rows_sharding(mesh), sharding.replicated(mesh)
    tree = {
        "spread": jax.ShapeDtypeStruct((16, 3), jnp.float32, sharding=rows),
        "whole": jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=whole),
    }
    assert bytes_a_device(tree) == 16 // sharding.num_row_shards(mesh) * 3 * 4 + 5 * 2


def test_a_step_grows_with_the_chunk_not_with_the_batch(one_device):
    def step(batch, chunk):
        return memory.plan({**SETTINGS, "batch": batch, "chunk": chunk}).step

    whole, twice = step(256, 0), step(512, 0)
    assert twice > 1.6 * whole
    part, part_of_twice = step(256, 8), step(512, 8)
    assert part < 0.5 * whole and part_of_twice < 0.35 * twice
    assert part_of_twice - part < 0.2 * (twice - whole)
    assert step(256, 16) > 1.2 * part


def test_gradients_of_the_frozen_base_are_never_made(one_device, monkeypatch):
    # Much to learn from few positions: the base is larger than all activations.
    name = "Qwen/Qwen2.5-0.5B-Instruct"
    wide = {"hidden_size": 256, "intermediate_size": 2048, "num_hidden_layers": 16}
    monkeypatch.setitem(towers.CONFIGS, name, {**towers.CONFIGS[name], **wide})
    settings = {**SETTINGS, "batch": 16, "length": 4}
    adapted, full = (memory.plan({**settings, "rank": rank}) for rank in (4, 0))
    base = adapted.held["frozen parameters"]
    assert full.held["frozen parameters"] == 0
    # Two moments of what is trained, and next to nothing else.
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


def test_every_large_array_has_a_line(monkeypatch):
    monkeypatch.setattr(plan_lib, "NUM_SHOWN", 5)
    like = state_of(sharding.create_mesh(2, 2, 2))
    expected = [
        "array                            shape      dtype     spread over     MiB a device",
        "trained parameters: tower/kernel 1024x1024  float32   fsdp tensor     1.00",
        "trained parameters: 1 smaller 0.00",
        "optimizer: mu/tower/kernel       1024x1024  float32   fsdp tensor     1.00",
        "optimizer: 1 smaller 0.00",
        "labels: centroids                1048576x8  float32   replica+fsdp .  8.00",
        "labels: cluster_of               1048576    int32     whole           4.00",
        "embeddings of the queries: bank  4096x512   bfloat16  replica+fsdp .  1.00",
    ]
    found = plan_lib.array_table(like).splitlines()
    assert [line.split() for line in found] == [line.split() for line in expected]
    assert len({len(line) for line in found}) == 1  # Columns stand below each other.
    monkeypatch.setattr(plan_lib, "NUM_SHOWN", 6)  # However small the largest are.
    assert "tower/bias" in plan_lib.array_table(like)


def test_what_the_compiler_refuses_is_said_with_what_is_held():
    like = state_of(sharding.create_mesh(2, 2, 2))

    def refused():
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.20G of 15.75G hbm. "
            "Exceeded hbm capacity by 1.45G."
        )

    said = r"labels 0.01, .* compiler says 'Used 17.20G of 15.75G hbm': it does not fit; the step's"
    with pytest.raises(InputError, match=said):
        plan_lib.plan_memory(like, refused)

    def broken():
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault of ours")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault of ours"):
        plan_lib.plan_memory(like, broken)


@pytest.mark.parametrize("num_images", [0, 1])
def test_a_batch_in_the_abstract_is_as_the_first_one(num_images, tmp_path):
    config = configuration(make_data(tmp_path), tmp_path / "run")
    dataset = PreparedDataset.open(config.data)
    layout, mesh = Layout(num_images), sharding.create_mesh(2, 2, 2)
    tower = BertConfig(vocab_size=99, num_layers=1, width=16, num_heads=2, mlp_width=16)
    model = workdir.build_model(config, tower, layout, dataset.num_labels, mesh)
    length = model.mean_length(dataset.train) + model.mean_length(dataset.labels)
    found, _ = plan_lib.abstract_batch(
        model, 64, length, pictures=[True, False], width=dataset.image_width
    )
    rows = model.row_sizes(length, 64, 8)
    batches = input_pipeline.epoch_batches(
        dataset, np.arange(90), epoch=0, seed=0, batch_size=64, width=model.row_width,
        layout=layout, weights=None, rows=rows, shares=sharding.num_shares(mesh),
    )  # fmt: skip
    real = sharding.to_devices(next(batches), mesh)
    same = jax.tree.map(lambda x: (x.shape[1:], x.dtype, x.sharding), (found, real))
    assert same[0] == same[1]
    assert found.items.images.shape == real.items.images.shape
    assert found.relevance.shape == (64, 64) and found.query_ids.shape == (64,)
    assert 0.5 < found.items.tokens.shape[0] / real.items.tokens.shape[0] <= 1


def test_tpus_are_known_by_what_jax_calls_them():
    kinds = {kind for kind, _ in accelerators.TPUS.values()}
    assert len(kinds) == len(accelerators.TPUS) == 4
    assert all(accelerators.about(kind) for kind in kinds)


def test_what_does_not_fit_is_refused(monkeypatch):
    assert memory_lib.of_a_device() > 2**28
    plan = MemoryPlan({"labels": 3 * 2**30, "optimizer": 0}, 2**30, 5 * 2**30)
    plan.check()
    assert str(plan) == "memory a device, GiB: labels 3.00, a step 1.00: 4.00 of 5.0"
    with pytest.raises(InputError, match=r"4.00 of 3.5: it does not fit.*encode_chunk"):
        plan._replace(device=int(3.5 * 2**30)).check()
    plan._replace(device=0).check()  # A device that does not say.
