"""A label table of ten million rows (15.4 GB of centroids) on eight host devices."""

import functools
import resource

import jax
import numpy as np
import pytest

from vixml_jax.labels import table
from vixml_jax.parallel import sharding
from vixml_jax.training import train_step
from vixml_jax.training.memory_planner import bytes_per_device

NUM_LABELS, WIDTH, BATCH = 10_000_000, 384, 4096


@pytest.mark.slow
def test_ten_million_labels():
    mesh = sharding.create_mesh(2, 4, 1)
    labels = table.LabelTable(mesh, NUM_LABELS, 65536, WIDTH)
    planned = bytes_per_device(sharding.stored_tree(labels.abstract_state, mesh))
    assert planned == NUM_LABELS // 8 * (WIDTH + 1) * 4
    rng = np.random.default_rng(0)
    state = labels.init_state(rng.integers(0, 65536, NUM_LABELS))
    bytes_held = {}
    for x in state:
        for shard in x.addressable_shards:
            bytes_held[shard.device] = bytes_held.get(shard.device, 0) + shard.data.nbytes
    assert set(bytes_held.values()) == {planned} and len(bytes_held) == 8

    move = jax.jit(
        functools.partial(train_step.move_centroids, labels, momentum=0.5), donate_argnums=0
    )
    gather = jax.jit(functools.partial(table.gather_rows, mesh))
    ids = rng.choice(NUM_LABELS, BATCH, replace=False).astype(np.int32)
    queries = rng.normal(size=(BATCH, WIDTH)).astype(np.float32)
    pointer = state.centroids.addressable_shards[0].data.unsafe_buffer_pointer()
    for times in (1, 2):
        state = move(state, ids, queries)
        found = gather(state.centroids, ids)
        np.testing.assert_allclose(found, (1 - 0.5**times) * queries, rtol=1e-6)
    assert state.centroids.addressable_shards[0].data.unsafe_buffer_pointer() == pointer
    others = np.setdiff1d(rng.integers(0, NUM_LABELS, BATCH), ids).astype(np.int32)
    assert not np.asarray(gather(state.centroids, others)).any()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak < 8 * planned + 2e9  # The table is updated in place.
