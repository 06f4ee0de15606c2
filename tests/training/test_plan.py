"""The memory that is planned: held arrays by hand, chunks against batches, no frozen gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from vixml_jax import memory as memory_lib
from vixml_jax import sharding
from vixml_jax.benchmarks import memory, towers
from vixml_jax.errors import InputError
from vixml_jax.training.plan import MemoryPlan, bytes_a_device

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


def test_what_does_not_fit_is_refused(monkeypatch):
    assert memory_lib.of_a_device() > 2**28
    plan = MemoryPlan({"labels": 3 * 2**30, "optimizer": 0}, 2**30, 5 * 2**30)
    plan.check()
    assert str(plan) == "memory a device, GiB: labels 3.00, a step 1.00: 4.00 of 5.0"
    with pytest.raises(InputError, match=r"4.00 of 3.5: it does not fit.*encode_chunk"):
        plan._replace(device=int(3.5 * 2**30)).check()
    plan._replace(device=0).check()  # A device that does not say.
