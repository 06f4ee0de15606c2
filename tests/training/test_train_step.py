"""The training step over devices: the same on any number, what travels, rows left alone."""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

from vixml_jax import workdir
from vixml_jax.config import Config, LabelsConfig, LossConfig
from vixml_jax.data.packing import Layout
from vixml_jax.models.bert import BertConfig
from vixml_jax.parallel import collectives, sharding
from vixml_jax.structs import Batch, PackedItems, Share
from vixml_jax.training import losses, optimizer, train_step
from vixml_jax.training import train_state as state_lib

NUM_LABELS, NUM_FREE, NUM_QUERIES, SIZE = 3000, 1000, 5000, 32


def mesh_of(replica, fsdp, tensor=1):
    devices = jax.devices()[: replica * fsdp * tensor]
    return sharding.create_mesh(replica, fsdp, tensor, devices=devices)


def made(mesh, *, num_free=NUM_FREE, sparse=False, dropout=0.0, clip_norm=0.1, moving=False):
    """A step on a mesh and a state that has seen some training, random but for the mesh."""
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
    trained, frozen = workdir.split_params(model.abstract_params, tower)
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
        Share(np.arange(NUM_LABELS), rng.normal(size=(NUM_LABELS, 16)).astype(np.float32)),
    )
    bank = state_lib.empty_bank(model, NUM_QUERIES)
    return train, state_lib.place_state(like, params, {}, tx, labels, bank), model


def a_batch(rng):
    """Items of random lengths, a query and its label a row; the last not real; labels repeat."""
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
    relevance = np.eye(SIZE, dtype=bool) | (label_ids[:, None] == label_ids[None])
    query_ids[-1] = label_ids[-1] = -1
    relevance[-1] = relevance[:, -1] = False
    return Batch(packed, query_ids, label_ids, relevance)


def run(mesh, batches, **settings):
    train, state, _ = made(mesh, **settings)
    seen = []
    for batch in batches:
        placed = sharding.to_devices(batch, mesh)
        state, scalars = train(state, placed, jax.random.key(1))
        seen.append(jax.device_get(scalars))
    return jax.device_get(state), seen


def real(state):
    """The leaves of a state without the padding of its tables."""
    rows = {"free": NUM_FREE, "bank": NUM_QUERIES, "labels": NUM_LABELS}
    flat = jax.tree_util.tree_leaves_with_path(state)
    for path, leaf in flat:
        named = jax.tree_util.keystr(path)
        kind = next((n for name, n in rows.items() if name in named), None)
        yield named, np.asarray(leaf)[:kind] if np.ndim(leaf) else leaf


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_any_number_of_devices_gives_the_same_run(sparse):
    """Loss, gradient and all of the state, dropout included."""
    batches = [a_batch(np.random.default_rng(seed)) for seed in range(3)]
    settings = {"sparse": sparse, "dropout": 0.1, "moving": True}
    whole, said = run(mesh_of(1, 1), batches, **settings)
    assert all(0 < scalars["loss"] for scalars in said)
    assert said[0]["gradient_norm"] > 0.1  # It was clipped.
    for sizes in [(2, 2)] if sparse else [(1, 8), (2, 2, 2)]:
        found, scalars = run(mesh_of(*sizes), batches, **settings)
        for one, other in zip(said, scalars, strict=True):
            for name, value in one.items():
                np.testing.assert_allclose(other[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
        for (name, one), (_, other) in zip(real(whole), real(found), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-3, atol=2e-5, err_msg=f"{sizes} {name}")


def test_sparse_updates_are_those_of_the_batchs_rows():
    """Rows that labels of the batch share move as under the dense update, all others not at all."""
    mesh = mesh_of(2, 2)
    sparse, state, _ = made(mesh, sparse=True)
    dense, _, _ = made(mesh)
    rng = np.random.default_rng(5)
    for i in range(4):
        batch = a_batch(rng)
        placed = sharding.to_devices(batch, mesh)
        before = jax.device_get(state)
        by_all, _ = dense(jax.tree.map(lambda x: x.copy(), state), placed, jax.random.key(2))
        state, _ = sparse(state, placed, jax.random.key(2))
        touched = np.zeros(NUM_FREE, bool)
        touched[before.labels.cluster_of[batch.label_ids[batch.label_ids >= 0]]] = True
        assert 0.5 * SIZE < touched.sum() < SIZE
        moved = zip(real(before), real(jax.device_get(by_all)), real(jax.device_get(state)),
                    strict=True)  # fmt: skip
        leaves = 0
        for (name, old), (_, wanted), (_, found) in moved:
            if "'free'" in name:
                leaves += 1
                np.testing.assert_array_equal(found[~touched], old[~touched], err_msg=name)
                if i or "params" not in name:  # The first rate is zero.
                    assert (found[touched] != old[touched]).any(axis=1).all()
                wanted, found = wanted[touched], found[touched]
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7, err_msg=name)
        assert leaves == 3  # The vectors and two moments.
    assert int(optax.tree.get(state.opt_state, "count", filtering=lambda p, _: len(p) < 3)) == 4


def test_untouched_rows_cost_nothing():
    """Of the free vectors and their moments a sparse step makes nothing new: it writes in place."""

    def operations(sparse):
        mesh = mesh_of(1, 1)
        train, _, _ = made(mesh, sparse=sparse)
        batch = sharding.to_devices(a_batch(np.random.default_rng(0)), mesh)
        program = train.program(batch, jax.random.key(0))
        found = re.findall(rf" = f32\[{NUM_FREE},16\]\S* ([\w-]+)\(", program.as_text())
        return set(found), found.count("scatter"), found.count("fusion")

    kinds, scatters, fusions = operations(sparse=True)
    assert kinds <= {"parameter", "scatter", "fusion"}
    assert scatters == 3 and fusions <= scatters  # A fusion around each, at most.
    kinds, _, _ = operations(sparse=False)
    assert {"multiply", "add"} <= kinds


@pytest.mark.parametrize(
    ("sparse", "moving"), [(False, False), (True, True)], ids=["dense, stale", "sparse, moving"]
)
def test_neither_the_label_table_nor_the_bank_travels(sparse, moving):
    mesh = mesh_of(2, 4)
    train, _, _ = made(mesh, sparse=sparse, moving=moving)
    batch = sharding.to_devices(a_batch(np.random.default_rng(0)), mesh)
    found = collectives.collectives(train.program(batch, jax.random.key(0)))
    longest = max(max(shape, default=1) for c in found for shape in c.shapes)
    assert longest < NUM_FREE // 8  # Not even one device's share of the smallest of them.
    # Vectors come to every device; scores stay where they are.
    assert not any(shape[-2:] == (SIZE, SIZE) for c in found for shape in c.shapes)
