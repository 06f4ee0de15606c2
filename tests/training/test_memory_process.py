"""The plan of a CPU includes the process; that of other devices does not."""

import types

import jax
import numpy as np
import pytest

from vixml_jax.errors import InputError
from vixml_jax.parallel import sharding
from vixml_jax.runtime import host_memory
from vixml_jax.structs import TrainState
from vixml_jax.training import memory_planner
from vixml_jax.training.memory_planner import GIB, MemoryPlan


def state_on(device, rows):
    """A state with a step and parameters of `rows` x 256 float32 values on one device."""
    place = types.SimpleNamespace(device_set=(device,), shard_shape=lambda shape: shape)

    def array(*shape):
        return types.SimpleNamespace(shape=shape, dtype=np.dtype("float32"), sharding=place)

    return TrainState(array(), {"kernel": array(rows, 256)}, {"base": array(64)}, (), None, None)


def test_process_of_a_cpu_is_planned():
    rows = int(np.random.default_rng(7).integers(10, 1000))
    like = state_on(jax.devices()[0], rows)
    plan = MemoryPlan({"trained parameters": GIB}, 2 * GIB, 0)
    found = memory_planner.with_process(plan, like, 3 * GIB)
    share = (host_memory.resident() + memory_planner.LATER_PROGRAMS) / jax.local_device_count()
    assert found.process == pytest.approx(share, rel=0.2)
    assert found.saving == 4 + rows * 256 * 4  # Frozen parameters are not saved again.
    # Evaluation and steps are at different times; a checkpoint may be written during both.
    assert found.total == found.process + GIB + found.saving + 3 * GIB
    assert found._replace(evaluation=GIB).total == found.total - GIB


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_plan_of_an_accelerator_has_no_process(platform):
    like = state_on(types.SimpleNamespace(platform=platform), 10)
    plan = MemoryPlan({"labels": GIB}, GIB, 4 * GIB)
    assert memory_planner.with_process(plan, like, 9 * GIB) == plan
    assert str(plan) == (
        "memory per device (GiB): labels 1.00, training step 1.00, total 2.00 of 4.0"
    )


def test_parts_are_named_and_a_run_that_does_not_fit_is_refused():
    plan = MemoryPlan({"labels": GIB}, 2 * GIB, 5 * GIB, GIB, GIB // 2, GIB // 4)
    assert str(plan) == (
        "memory per device (GiB): process 1.00, labels 1.00, training step 2.00 (or evaluation "
        "0.25), checkpoint writing 0.50, total 4.50 of 5.0"
    )
    plan.check()
    with pytest.raises(InputError, match=r"total 4.50 of 4.0: the run does not fit"):
        plan._replace(device=4 * GIB).check()


@pytest.mark.parametrize(
    "items,rows",
    [
        ([(64, 1000), (2, 10)], 256),  # A block of queries, each as long as a row.
        ([(64, 40), (2, 10)], 40),  # Fewer queries than a block.
        ([(64, 40), (16, 5000)], 64),  # The labels need more rows.
    ],
)
def test_blocks_hold_no_more_items_than_there_are(items, rows):
    sizes = types.SimpleNamespace
    model = sizes(
        tower=sizes(config=sizes(mlp_width=6, width=2, num_heads=1)),
        mesh=sharding.create_mesh(devices=jax.devices()[:1]),
        table=sizes(width=2),
        row_width=64,
        row_sizes=lambda length, count, shards: sizes(least=int(length) * count // 64 // shards),
    )
    found = memory_planner.evaluation_bytes(model, items, block=256, labels=4)
    values = 3 * (6 + 3 * 2 + 64)  # Of a position: layers, and a row of scores.
    assert found == 4 * rows * 64 * values


def test_capacity_of_a_cpu_is_bounded_by_what_is_available(monkeypatch):
    monkeypatch.setattr(host_memory, "available", lambda: 3 * 2**20)
    device = jax.devices("cpu")[0]
    found = host_memory.device_memory(device) * jax.local_device_count()
    assert 3 * 2**20 < found < 3 * 2**20 + 2 * host_memory.resident()


def test_large_blocks_are_returned_when_freed():
    host_memory.bound_freed_pages()
    before = host_memory.resident()
    block = np.ones(64 << 20, np.uint8)
    small = [np.ones(1 << 20, np.uint8) for _ in range(8)]  # Would pin the end of a heap.
    assert host_memory.resident() > before + (60 << 20)
    del block
    assert host_memory.resident() < before + (40 << 20)
    del small
