"""The label table on eight devices against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vixml_jax.labels import table
from vixml_jax.parallel import sharding
from vixml_jax.structs import LabelState, Shard
from vixml_jax.training import train_step


@pytest.fixture(scope="module")
def mesh():
    return sharding.create_mesh(2, 4, 1)


def test_rows_are_sharded_over_the_mesh(mesh):
    labels = table.LabelTable(mesh, num_labels=21, num_free=100, width=6)
    assert labels.num_free == 21
    state = labels.init_state(np.arange(21))
    assert state.centroids.shape == (24, 6)
    assert {shard.data.shape for shard in state.centroids.addressable_shards} == {(3, 6)}


@pytest.mark.parametrize("seed", range(3))
def test_gather_and_scatter_match_numpy(mesh, seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(40, 5)).astype(np.float32)
    ids = rng.permutation(np.r_[rng.choice(40, 12, replace=False), -1, -1]).astype(np.int32)
    values = rng.normal(size=(14, 5)).astype(np.float32)
    placed = jax.device_put(rows, sharding.rows_sharding(mesh))
    found = jax.jit(lambda r, i: table.gather_rows(mesh, r, i))(placed, ids)
    np.testing.assert_array_equal(found, np.where(ids[:, None] >= 0, rows[ids], 0))
    written = jax.jit(lambda r, i, v: table.scatter_rows(mesh, r, i, v))(placed, ids, values)
    expected = rows.copy()
    expected[ids[ids >= 0]] = values[ids >= 0]
    np.testing.assert_array_equal(written, expected)


def test_gradient_reaches_the_shared_free_vectors(mesh):
    rng = np.random.default_rng(0)
    labels = table.LabelTable(mesh, num_labels=20, num_free=8, width=4)
    cluster_of = rng.integers(0, 8, 20).astype(np.int32)
    state = labels.init_state(cluster_of)
    free = labels.init_free(jax.random.key(0))
    assert float(jnp.abs(free).max()) <= (6 / (8 + 4)) ** 0.5
    ids = np.array([3, 3, 19, -1, 0], np.int32)
    weights = rng.normal(size=(5, 4)).astype(np.float32)
    gradient = jax.jit(
        jax.grad(lambda free: jnp.sum(labels.gather_free(free, state, ids) * weights))
    )(free)
    expected = np.zeros((8, 4))
    np.add.at(expected, cluster_of[ids[ids >= 0]], weights[ids >= 0])
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_moving_centroids_move_towards_the_mean_of_their_queries(mesh):
    rng = np.random.default_rng(2)
    labels = table.LabelTable(mesh, num_labels=10, num_free=10, width=4)
    old = rng.normal(size=(10, 4)).astype(np.float32)
    state = labels.with_centroids(labels.init_state(np.arange(10)), Shard(np.arange(10), old))
    ids = np.array([7, 2, 7, -1], np.int32)
    queries = rng.normal(size=(4, 4)).astype(np.float32)
    moved = jax.jit(lambda s: train_step.move_centroids(labels, s, ids, queries, 0.95))(state)
    expected = old.copy()
    expected[7] = 0.95 * old[7] + 0.05 * (queries[0] + queries[2]) / 2
    expected[2] = 0.95 * old[2] + 0.05 * queries[1]
    np.testing.assert_allclose(moved.centroids[:10], expected, rtol=1e-5)
    assert isinstance(moved, LabelState)
