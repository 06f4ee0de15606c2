"""Steps that train the label head: against float64, equal on several devices, sparse, in place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import sparse

from vixml_jax.config import Config
from vixml_jax.data import sampling
from vixml_jax.data.packing import Layout
from vixml_jax.flag_groups import HeadConfig, LabelsConfig, ModelConfig
from vixml_jax.models.bert import BertConfig
from vixml_jax.parallel import sharding
from vixml_jax.structs import HeadBatch, Shard
from vixml_jax.training import build, flops, head_trainer, memory_planner, train_step
from vixml_jax.training.memory_planner import DataSizes

NUM_LABELS, NUM_QUERIES, SIZE, WIDTH = 300, 96, 16, 16
TOWER = BertConfig(
    vocab_size=64, num_layers=1, width=WIDTH, num_heads=2, mlp_width=32, max_positions=16,
    dropout=0.0, attention_dropout=0.0,
)  # fmt: skip


def make_step(mesh, **head):
    """The parts of a head epoch and a state with a random bank and random parameters."""
    head = {"only": True, "loss": "softmax", "mlp_width": 8, "batch_size": SIZE, **head}
    config = Config(head=HeadConfig(**head), labels=LabelsConfig(num_heads=2))
    sizes = DataSizes(NUM_QUERIES, NUM_LABELS, 3.0)
    parts = build.assemble(config, TOWER, Layout(0), sizes, mesh)
    like = head_trainer.own_state(parts.head.like)
    rng = np.random.default_rng(0)
    params = {
        "vectors": rng.normal(size=(NUM_LABELS, WIDTH)),
        "bias": rng.normal(size=NUM_LABELS),
        "mlp": {
            "up": {"kernel": rng.normal(size=(WIDTH, 8)), "bias": rng.normal(size=8)},
            "down": {"kernel": rng.normal(size=(8, WIDTH)), "bias": rng.normal(size=WIDTH)},
        },
    }
    params = {"head": jax.tree.map(lambda x: jnp.asarray(0.3 * x, jnp.float32), params)}
    params = jax.device_put(
        sharding.pad(params, like.params), jax.tree.map(lambda x: x.sharding, like.params)
    )
    bank = rng.normal(size=(NUM_QUERIES, WIDTH)).astype(np.float32)
    bank /= np.linalg.norm(bank, axis=1, keepdims=True)
    shardings = jax.tree.map(lambda x: x.sharding, like.opt_state)
    state = like._replace(
        step=sharding.replicate(np.int32(0), mesh),
        params=params,
        opt_state=jax.jit(parts.head.optimizer.init, out_shardings=shardings)(params),
        bank=sharding.spread_rows(Shard(np.arange(NUM_QUERIES), bank), NUM_QUERIES, mesh),
    )
    return parts, state


def relevance():
    rng = np.random.default_rng(7)
    columns = np.concatenate([rng.choice(NUM_LABELS, 3, replace=False) for _ in range(NUM_QUERIES)])
    rows = np.repeat(np.arange(NUM_QUERIES), 3)
    shape = (NUM_QUERIES, NUM_LABELS)
    return sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape)


def make_batch(seed, mesh):
    query_ids = np.random.default_rng(seed).permutation(NUM_QUERIES)[:SIZE].astype(np.int32)
    query_ids[-2:] = -1
    positives = sampling.positives_of(relevance(), query_ids, 8, 8)
    return query_ids, sharding.to_devices(HeadBatch(query_ids, positives), mesh)


def mesh_of(replica, fsdp):
    return sharding.create_mesh(replica, fsdp, 1, devices=jax.devices()[: replica * fsdp])


def run(mesh, steps=3, **head):
    parts, state = make_step(mesh, **head)
    scalars = []
    for seed in range(steps):
        _, batch = make_batch(seed, mesh)
        state, found = parts.head.step(state, batch, jax.random.key(3))
        scalars.append(jax.device_get(found))
    return jax.device_get(state), scalars


def softmax_loss(params, queries, labels_of):
    """The loss in float64, as in the formula: over all labels, mean of each query's positives."""
    mlp = params["mlp"]
    hidden = jax.nn.gelu(queries @ mlp["up"]["kernel"] + mlp["up"]["bias"], approximate=False)
    g = queries + hidden @ mlp["down"]["kernel"] + mlp["down"]["bias"]
    g /= jnp.linalg.norm(g, axis=1, keepdims=True)
    logits = jax.nn.log_softmax(20.0 * g @ params["vectors"].T + params["bias"], axis=1)
    rows = [jnp.mean(logits[i, labels]) for i, labels in enumerate(labels_of)]
    return -jnp.mean(jnp.array(rows))


def test_first_step_is_adam_with_the_gradient_of_the_formula():
    mesh = mesh_of(1, 8)
    parts, state = make_step(mesh, learning_rate=0.01)
    query_ids, batch = make_batch(0, mesh)
    before = jax.device_get(state)
    after, scalars = parts.head.step(state, batch, jax.random.key(0))
    with jax.enable_x64(True):
        real = query_ids[query_ids >= 0]
        head = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), before.params["head"])
        head |= {name: head[name][:NUM_LABELS] for name in ("vectors", "bias")}
        queries = jnp.asarray(before.bank[real], jnp.float64)
        labels_of = [relevance()[i].indices for i in real]
        loss, gradient = jax.value_and_grad(softmax_loss)(head, queries, labels_of)
        norm = float(optax.tree.norm(gradient))
        # The first step of Adam divides each gradient by its own size.
        expected = jax.tree.map(lambda x, g: x - 0.01 * g / (abs(g) + 1e-8), head, gradient)
    np.testing.assert_allclose(scalars["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(scalars["gradient_norm"], norm, rtol=1e-4)
    found = jax.device_get(after.params["head"])
    found |= {name: found[name][:NUM_LABELS] for name in ("vectors", "bias")}
    clear = jax.tree.map(lambda g: np.abs(np.asarray(g)) > 1e-6, gradient)
    for x, y, at in zip(*map(jax.tree.leaves, (found, expected, clear)), strict=True):
        assert at.mean() > 0.3
        np.testing.assert_allclose(x[at], np.asarray(y)[at], atol=2e-5)
    np.testing.assert_array_equal(jax.device_get(after.bank), before.bank)
    assert int(after.step) == 1


@pytest.mark.parametrize("loss", ["softmax", "decoupled_softmax", "bce"])
def test_steps_are_equal_on_any_number_of_devices(loss):
    expected, history = run(mesh_of(1, 1), loss=loss)
    for shape in ((1, 8), (2, 2)):
        state, found = run(mesh_of(*shape), loss=loss)
        for one, other in zip(history, found, strict=True):
            np.testing.assert_allclose(other["loss"], one["loss"], rtol=2e-5)
        for x, y in zip(*map(jax.tree.leaves, (state.params, expected.params)), strict=True):
            rows = min(len(x), len(y))
            np.testing.assert_allclose(x[:rows], y[:rows], atol=2e-4)


def test_sampled_step_changes_only_labels_that_it_scored():
    """The labels of its queries are among them; all other rows and moments stay bit for bit."""
    mesh = mesh_of(2, 2)
    parts, state = make_step(mesh, sample_above=10, num_sampled=40)
    assert parts.model.head.num_sampled == 40
    for seed in range(3):
        query_ids, batch = make_batch(seed, mesh)
        before = jax.device_get(state)
        state, scalars = parts.head.step(state, batch, jax.random.key(1))
        after = jax.device_get(state)
        old, new = (x.params["head"]["vectors"][:NUM_LABELS] for x in (before, after))
        moved = (old != new).any(axis=1)
        positive = np.unique(relevance()[query_ids[query_ids >= 0]].indices)
        assert moved[positive].all()
        assert len(positive) < moved.sum() <= len(positive) + 40
        moments = zip(*map(jax.tree.leaves, (before.opt_state, after.opt_state)), strict=True)
        tables = [(x, y) for x, y in moments if x.shape == before.params["head"]["vectors"].shape]
        assert len(tables) == 2
        for x, y in tables:
            np.testing.assert_array_equal(x[:NUM_LABELS][~moved], y[:NUM_LABELS][~moved])
        assert np.isfinite(scalars["loss"])


def test_head_step_fits_its_abstract_batch_and_plan():
    """The planned step is that of a real batch; the state it does not take counts as held."""
    mesh = mesh_of(1, 4)
    parts, _ = make_step(mesh)
    abstract, key = memory_planner.abstract_head_batch(parts.model, SIZE, 3.0)
    _, real = make_batch(0, mesh)
    described = jax.tree.map(lambda x: (x.shape[1:], x.dtype, x.sharding), (abstract, real))
    assert described[0] == described[1] and abstract.query_ids.shape == (SIZE,)
    own = head_trainer.own_state(parts.head.like)
    plan = memory_planner.plan_memory(
        parts.head.like, lambda: parts.head.step.program(abstract, key), own
    )
    rows = 4 * (NUM_LABELS / 4) * (WIDTH + 1)
    assert plan.held["optimizer"] >= 2 * rows
    frozen = memory_planner.bytes_per_device(parts.head.like.frozen)
    assert plan.held["frozen parameters"] == frozen > 64 * WIDTH  # Sharded over four devices.
    assert 0 < plan.step < 2**24
    bigger = plan._replace(step=plan.step + 1)
    assert memory_planner.largest([plan, bigger, plan]) is bigger


@pytest.mark.parametrize("loss", ["softmax", "decoupled_softmax", "bce"])
@pytest.mark.parametrize("precision", ["default", "high", "highest"])
def test_all_products_of_the_head_have_the_precision_of_the_run(precision, loss):
    """In the head epochs, whose gradients have rules of their own, and in steps of both."""
    mesh = mesh_of(1, 1)
    config = Config(
        model=ModelConfig(matmul_precision=precision),
        head=HeadConfig(weight=1.0, refit=True, loss=loss, mlp_width=8),
        labels=LabelsConfig(num_heads=2),
    )
    sizes = DataSizes(NUM_QUERIES, NUM_LABELS, 3.0)
    parts = build.assemble(config, TOWER, Layout(0), sizes, mesh)
    key = jax.random.key(0)
    batch = memory_planner.abstract_head_batch(parts.model, SIZE, 3.0)[0]
    head = str(parts.head.step.traced(batch, key).jaxpr)
    products, name = head.count("dot_general["), f"Precision.{precision.upper()}"
    # Two layers and logits: forward, and backward for both factors but the queries.
    assert products >= 3 * 3 - 1
    expected = 0 if precision == "default" else products
    assert head.count(f"precision=({name}, {name})") == expected
    batch = memory_planner.abstract_batch(parts.model, SIZE, 4.0, has_images=[False] * 2, width=0)
    joint = str(parts.step.traced(batch[0], key).jaxpr)
    # Similarities of the loss over the batch have the highest one in each run.
    similarities = 0 if precision == "highest" else joint.count("precision=(Precision.HIGHEST, ")
    others = joint.count("dot_general[") - similarities
    assert others > products
    expected = 0 if precision == "default" else others
    assert joint.count(f"precision=({name}, {name})") == expected


def test_operations_of_the_head_are_counted():
    """Against the products that one batch needs, written out."""
    model = make_step(mesh_of(1, 1))[0].model
    b, e, m, n = 10, WIDTH, 8, NUM_LABELS
    counted = flops.head_flops(model.head, b, 30)
    logits, layers = 2 * b * n * e, 2 * (2 * b * e * m)
    assert counted.forward == logits + layers
    assert counted.step == 3 * (logits + layers)
    # Without gradients of the queries, the first layer has none of its input.
    frozen = flops.head_flops(model.head, b, 30, frozen_queries=True)
    assert counted.step - frozen.step == 2 * b * e * m
    sampled = make_step(mesh_of(1, 1), sample_above=10, num_sampled=40)[0].model.head
    assert flops.head_flops(sampled, b, 30).forward == 2 * b * (40 + 30) * e + layers


def test_mean_similarity_is_that_of_all_pairs():
    rng = np.random.default_rng(3)
    for shift in (0.0, 3.0):
        x = rng.normal(size=(9, 5)) + shift
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        mask = np.arange(9) < 7
        products = (x[:7] @ x[:7].T)[~np.eye(7, dtype=bool)]
        found = train_step.mean_similarity(jnp.asarray(x, jnp.float32), jnp.asarray(mask))
        np.testing.assert_allclose(found, products.mean(), rtol=1e-5, atol=1e-6)
