"""Tests of the training step on several devices: equal results, communication, sparse updates."""

import collections
import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from vixml_jax import frozen_weights, workdir
from vixml_jax.config import Config, LabelsConfig, LossConfig
from vixml_jax.data.packing import Layout
from vixml_jax.models.bert import BertConfig
from vixml_jax.parallel import collectives, sharding
from vixml_jax.structs import Batch, PackedItems, Positives, Shard
from vixml_jax.training import losses, optimizer, train_step
from vixml_jax.training import train_state as state_lib

NUM_LABELS, NUM_FREE, NUM_QUERIES, SIZE = 3000, 1000, 5000, 32


def mesh_of(replica, fsdp, tensor=1):
    devices = jax.devices()[: replica * fsdp * tensor]
    return sharding.create_mesh(replica, fsdp, tensor, devices=devices)


def make_step(mesh, *, num_free=NUM_FREE, sparse=False, dropout=0.0, clip_norm=0.1, moving=False):
    """A step, a random state and the model on a mesh; the values do not depend on the mesh."""
    tower = BertConfig(
        vocab_size=64, num_layers=1, width=16, num_heads=2, mlp_width=32, max_positions=16,
        dropout=dropout, attention_dropout=dropout,
    )  # fmt: skip
    config = Config(
        labels=LabelsConfig(num_free=num_free, num_heads=2, mlp_width=32, dropout=dropout)
    )
    model = workdir.build_model(config, tower, Layout(0), NUM_LABELS, mesh)
    tx = optimizer.make_optimizer(
        learning_rate=1e-2, label_learning_rate=1e-2, image_learning_rate=1e-2, weight_decay=0.1,
        warmup_steps=1, clip_norm=clip_norm, total_steps=100,
    )  # fmt: skip
    trained, frozen = frozen_weights.split(model.abstract_params, tower)
    like = state_lib.abstract_state(model, trained, frozen, tx, NUM_QUERIES)
    loss = functools.partial(losses.total_loss, **dataclasses.asdict(LossConfig(num_negatives=4)))
    train = train_step.make_train_step(
        model, loss, tx, like, sparse_free=sparse, centroid_momentum=0.9 if moving else None
    )
    rng = np.random.default_rng(0)
    params = nn.unbox(jax.jit(model.init_params)(jax.random.key(0)))
    params["free"] = rng.normal(size=(num_free, 16)).astype(np.float32)
    params = sharding.pad(params, like.params)
    labels = model.table.init_state(rng.integers(0, num_free, NUM_LABELS).astype(np.int32))
    labels = model.table.with_centroids(
        labels,
        Shard(np.arange(NUM_LABELS), rng.normal(size=(NUM_LABELS, 16)).astype(np.float32)),
    )
    bank = state_lib.empty_bank(model, NUM_QUERIES)
    return train, state_lib.place_state(like, params, {}, tx, labels, bank), model


def random_batch(rng):
    """Items of random lengths, a query and its label per row; the last are padding, one label
    occurs twice."""
    rows, width = SIZE, 16
    tokens = rng.integers(0, 64, (rows, width), np.int32)
    segments = np.full((rows, width), -1, np.int32)
    positions = np.zeros((rows, width), np.int32)
    for row in range(rows):
        for half, item in enumerate((row, SIZE + row)):
            length = rng.integers(1, 9)
            at = slice(8 * half, 8 * half + length)
            segments[row, at], positions[row, at] = item, np.arange(length)
    packed = PackedItems(
        tokens, segments, positions, np.full_like(tokens, -1), np.zeros((0, 1), np.float16)
    )
    query_ids = rng.choice(NUM_QUERIES, SIZE, replace=False).astype(np.int32)
    label_ids = rng.integers(0, NUM_LABELS, SIZE).astype(np.int32)
    label_ids[3] = label_ids[7]
    query_ids[-1] = label_ids[-1] = -1
    return Batch(
        packed, query_ids, label_ids, Positives(np.arange(SIZE, dtype=np.int32), label_ids)
    )


def run(mesh, batches, **settings):
    train, state, _ = make_step(mesh, **settings)
    history = []
    for batch in batches:
        placed = sharding.to_devices(batch, mesh)
        state, scalars = train(state, placed, jax.random.key(1))
        history.append(jax.device_get(scalars))
    return jax.device_get(state), history


def named_leaves(state):
    """Names and arrays of a state, without padding rows."""
    rows = {"free": NUM_FREE, "bank": NUM_QUERIES, "labels": NUM_LABELS}
    flat = jax.tree_util.tree_leaves_with_path(state)
    for path, leaf in flat:
        name = jax.tree_util.keystr(path)
        num_rows = next((n for part, n in rows.items() if part in name), None)
        yield name, np.asarray(leaf)[:num_rows] if np.ndim(leaf) else leaf


@pytest.mark.parametrize(
    "sparse",
    [pytest.param(False, marks=pytest.mark.slow, id="dense"), pytest.param(True, id="sparse")],
)
def test_steps_are_equal_on_any_number_of_devices(sparse):
    """Loss, gradient norm and the whole state are equal, with dropout."""
    batches = [random_batch(np.random.default_rng(seed)) for seed in range(3)]
    settings = {"sparse": sparse, "dropout": 0.1, "moving": True}
    expected, expected_history = run(mesh_of(1, 1), batches, **settings)
    assert all(0 < scalars["loss"] for scalars in expected_history)
    assert expected_history[0]["gradient_norm"] > 0.1  # It was clipped.
    for sizes in [(2, 2)] if sparse else [(1, 8), (2, 2, 2)]:
        state, history = run(mesh_of(*sizes), batches, **settings)
        for expected_scalars, scalars in zip(expected_history, history, strict=True):
            for name, value in expected_scalars.items():
                np.testing.assert_allclose(scalars[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
        pairs = zip(named_leaves(expected), named_leaves(state), strict=True)
        for (name, value), (_, found) in pairs:
            np.testing.assert_allclose(
                found, value, rtol=1e-3, atol=2e-5, err_msg=f"{sizes} {name}"
            )


def test_sparse_step_updates_only_the_free_vectors_of_the_batch():
    """Free vectors of the batch's labels move as in a dense step; all others are unchanged."""
    mesh = mesh_of(2, 2)
    sparse, state, _ = make_step(mesh, sparse=True)
    dense, _, _ = make_step(mesh)
    rng = np.random.default_rng(5)
    for i in range(4):
        batch = random_batch(rng)
        placed = sharding.to_devices(batch, mesh)
        before = jax.device_get(state)
        dense_state, _ = dense(jax.tree.map(lambda x: x.copy(), state), placed, jax.random.key(2))
        state, _ = sparse(state, placed, jax.random.key(2))
        touched = np.zeros(NUM_FREE, bool)
        touched[before.labels.cluster_of[batch.label_ids[batch.label_ids >= 0]]] = True
        assert 0.5 * SIZE < touched.sum() < SIZE
        after = (jax.device_get(dense_state), jax.device_get(state))
        num_free_leaves = 0
        for (name, old), (_, expected), (_, new) in zip(
            *map(named_leaves, (before, *after)), strict=True
        ):
            if "'free'" in name:
                num_free_leaves += 1
                np.testing.assert_array_equal(new[~touched], old[~touched], err_msg=name)
                if i or "params" not in name:  # The first learning rate is zero.
                    assert (new[touched] != old[touched]).any(axis=1).all()
                expected, new = expected[touched], new[touched]
            np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-7, err_msg=name)
        assert num_free_leaves == 3  # The vectors and two moments.
    assert int(optax.tree.get(state.opt_state, "count", filtering=lambda p, _: len(p) < 3)) == 4


def test_sparse_step_updates_free_vectors_in_place():
    """A sparse step allocates no array as large as the free vectors; it writes in place."""

    def operations(sparse):
        mesh = mesh_of(1, 1)
        train, _, _ = make_step(mesh, sparse=sparse)
        batch = sharding.to_devices(random_batch(np.random.default_rng(0)), mesh)
        program = train.program(batch, jax.random.key(0))
        kinds = re.findall(rf" = f32\[{NUM_FREE},16\]\S* ([\w-]+)\(", program.as_text())
        return collections.Counter(kinds)

    kinds = operations(sparse=True)
    # A scatter may be written as a loop that updates one row at a time.
    in_place = kinds["scatter"] + kinds["dynamic-update-slice"]
    passed_on = {"parameter", "get-tuple-element"}
    assert kinds.keys() <= {"scatter", "dynamic-update-slice", "fusion"} | passed_on
    assert in_place == 3 and kinds["fusion"] <= in_place  # At most one fusion around each.
    assert {"multiply", "add"} <= operations(sparse=False).keys()


@pytest.mark.parametrize(
    ("sparse", "moving"), [(False, False), (True, True)], ids=["dense, stale", "sparse, moving"]
)
def test_label_table_bank_and_scores_are_not_communicated(sparse, moving):
    mesh = mesh_of(2, 4)
    train, _, _ = make_step(mesh, sparse=sparse, moving=moving)
    batch = sharding.to_devices(random_batch(np.random.default_rng(0)), mesh)
    program = train.program(batch, jax.random.key(0))
    shapes = [shape for c in collectives.collectives(program) for shape in c.shapes]
    # Smaller than one device's shard of the smallest of these arrays.
    assert max(max(shape, default=1) for shape in shapes) < NUM_FREE // 8
    assert not any(shape[-2:] == (SIZE, SIZE) for shape in shapes)  # Scores.
