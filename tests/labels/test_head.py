"""The label head against dense formulas in float64, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn

from vixml_jax.labels import head_update
from vixml_jax.labels.head import SCALE, LabelHead
from vixml_jax.parallel import sharding
from vixml_jax.structs import Positives
from vixml_jax.training import optimizer

KINDS = ("softmax", "decoupled_softmax", "bce")
MESHES = {"one": (1, 1, 1), "eight": (2, 4, 1), "tensor": (2, 2, 2)}
NUM_LABELS, WIDTH, NUM_QUERIES = 29, 6, 16  # 29 labels on 8 shards: the last holds 1, of 4 rows.


def mesh_of(name):
    sizes = MESHES[name]
    return sharding.create_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def make(kind, mesh="one", *, n=NUM_LABELS, width=WIDTH, mlp_width=5, **changes):
    return LabelHead(mesh_of(mesh), n, width, mlp_width, kind, **changes)


def random_params(head, rng, scale=1.0):
    """Parameters as stored: rows sharded and padded with zeros."""

    def fill(x):
        return jnp.asarray(scale * rng.normal(size=x.shape), jnp.float32)

    boxed = head.init_params(jax.random.key(0))
    like = sharding.stored_tree(jax.eval_shape(lambda: boxed), head.mesh)
    params = sharding.pad(jax.tree.map(fill, nn.unbox(boxed)), like)
    return jax.device_put(params, jax.tree.map(lambda x: x.sharding, like))


def random_batch(head, rng, *, queries=NUM_QUERIES, most=4):
    """Queries, positives of each of 8 shards with padding, and a mask; query 3 has no label."""
    q = rng.normal(size=(queries, head.width))
    q = (q / np.linalg.norm(q, axis=1, keepdims=True)).astype(np.float32)
    mask = np.ones(queries, bool)
    mask[[5, queries - 1]] = False
    labels = [rng.choice(head.num_labels, rng.integers(1, most + 1), replace=False)
              if mask[i] and i != 3 else [] for i in range(queries)]  # fmt: skip
    pairs = np.full((2, 8, queries // 8 * most + 1), -1, np.int32)
    for shard in range(8):
        own = range(shard * queries // 8, (shard + 1) * queries // 8)
        found = np.array([(i, label) for i in own for label in labels[i]], np.int32)
        where = rng.permutation(pairs.shape[2])[: len(found)]
        pairs[:, shard, where] = found.reshape(-1, 2).T
    arrays = (q, Positives(*pairs.reshape(2, -1)), mask)
    return jax.device_put(arrays, sharding.rows_sharding(head.mesh))


def reference(head, params, q, positives, mask, weight=None):
    """Loss and gradients by PyTorch, dense and in float64; `weight` is that of each label."""
    n = head.num_labels
    as_torch = lambda x: torch.tensor(np.asarray(x, np.float64), requires_grad=True)  # noqa: E731
    leaves, structure = jax.tree.flatten((params, q))
    leaves = [as_torch(x) for x in leaves]
    params, q = structure.unflatten(leaves)
    g = q
    if head.mlp_width:
        up, down = params["mlp"]["up"], params["mlp"]["down"]
        hidden = torch.nn.functional.gelu(q @ up["kernel"] + up["bias"])
        g = q + hidden @ down["kernel"] + down["bias"]
    g = g / g.norm(dim=1, keepdim=True)
    s = 20.0 * g @ params["vectors"][:n].T + params["bias"][:n]
    log_weight = torch.zeros(n) if weight is None else torch.log(torch.tensor(weight))
    label_of = {i: [] for i in np.flatnonzero(np.asarray(mask))}
    for i, label in np.asarray(positives).T:
        if i >= 0:
            label_of[i].append(label)
    total = torch.zeros((), dtype=torch.float64)
    for i, labels in label_of.items():
        if head.loss == "bce":
            total = total + (torch.nn.functional.softplus(s[i]) * torch.exp(log_weight)).sum()
            total = total - s[i, labels].sum()
        for label in labels if head.loss != "bce" else []:
            others = [x for x in range(n) if x == label or x not in labels]
            others = others if head.loss == "decoupled_softmax" else range(n)
            logits = (s[i] + log_weight)[list(others)]
            total = total + (torch.logsumexp(logits, 0) - s[i, label]) / len(labels)
    num_pairs = sum(map(len, label_of.values()))
    loss = total / max(num_pairs if head.loss == "bce" else len(label_of), 1)
    loss.backward()
    zero_or = lambda x: np.zeros(x.shape) if x.grad is None else x.grad.numpy()  # noqa: E731
    return loss.item(), structure.unflatten([zero_or(x) for x in leaves])


def assert_close(found, expected, rtol=2e-5):
    """All leaves are equal, up to a fraction of the largest entry of each."""

    def compare(path, x, y):
        tolerance = rtol * max(np.abs(y).max(), 1e-3)
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=rtol, err_msg=str(path))

    jax.tree_util.tree_map_with_path(compare, found, expected)


def check(head, params, batch, rtol=2e-5):
    """Compares the loss and the gradients of parameters and queries with the reference."""
    run = jax.jit(jax.value_and_grad(head.loss_of, argnums=(0, 1)))
    loss, gradients = run(params, *batch)
    expected, of_expected = reference(head, params, *batch)
    np.testing.assert_allclose(loss, expected, rtol=2e-6, atol=1e-6)
    assert_close(gradients, of_expected, rtol)
    return loss, gradients


@pytest.mark.parametrize("mesh", list(MESHES))
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_match_float64(kind, mesh):
    rng = np.random.default_rng((KINDS.index(kind), len(mesh)))
    head = make(kind, mesh, label_block=3)
    params, batch = random_params(head, rng), random_batch(head, rng)
    _, gradients = check(head, params, batch)
    where = gradients[0]["vectors"].sharding  # As the vectors are.
    assert where.is_equivalent_to(sharding.rows_sharding(head.mesh), ndim=2)


@pytest.mark.parametrize("block", [1, 4, 10, 28, 29, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_blocked_equals_unblocked(kind, block):
    rng = np.random.default_rng(block)
    head = make(kind, label_block=block, mlp_width=0)
    check(head, random_params(head, rng), random_batch(head, rng))


@pytest.mark.parametrize("mesh", ["one", "eight"])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits(kind, mesh):
    """Logits of up to 1e6: neither the loss nor a gradient overflows."""
    rng = np.random.default_rng(7)
    head = make(kind, mesh, label_block=2, mlp_width=0)
    params, batch = random_params(head, rng, scale=1e4), random_batch(head, rng)
    logits = SCALE * np.asarray(batch[0]) @ np.asarray(params["vectors"]).T
    assert np.abs(logits).max() > 3e5
    check(head, params, batch, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_that_has_all_labels(kind):
    rng = np.random.default_rng(8)
    head = make(kind, n=5, label_block=2)
    params, (q, _, mask) = random_params(head, rng), random_batch(head, rng)
    positives = Positives(jnp.zeros(5, jnp.int32), jnp.arange(5, dtype=jnp.int32))
    loss, _ = check(head, params, (q, positives, mask))
    if kind == "decoupled_softmax":
        assert loss == 0.0  # Nothing competes with them.


@pytest.mark.parametrize("kind", KINDS)
def test_padding_has_no_effect(kind):
    rng = np.random.default_rng(9)
    head = make(kind, "eight", label_block=3)
    params, (q, positives, mask) = random_params(head, rng), random_batch(head, rng)
    run = jax.jit(jax.value_and_grad(head.loss_of, argnums=(0, 1)))
    loss, gradients = run(params, q, positives, mask)
    other = jnp.where(mask[:, None], q, jnp.roll(q, 1, axis=0))
    dirty = {
        **params,
        "vectors": params["vectors"].at[NUM_LABELS:].set(3.0),
        "bias": params["bias"].at[NUM_LABELS:].set(50.0),
    }
    same, of_same = run(dirty, other, positives, mask)
    assert loss == same
    jax.tree.map(np.testing.assert_array_equal, gradients, of_same)
    assert np.all(np.asarray(gradients[0]["vectors"])[NUM_LABELS:] == 0)
    nothing = jax.tree.map(lambda x: jnp.full_like(x, -1), positives)
    empty, zeros = run(params, q, nothing, jnp.zeros_like(mask))
    assert empty == 0 and all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(zeros))


def test_the_head_has_no_effect_at_first():
    rng = np.random.default_rng(10)
    head = make("softmax", "eight")
    boxed = head.init_params(jax.random.key(1))
    params = nn.unbox(boxed)
    q = random_batch(head, rng)[0]
    np.testing.assert_allclose(head.queries(params, q), q, atol=1e-6)
    assert not params["vectors"].any() and not params["bias"].any()
    assert params["mlp"]["up"]["kernel"].std() > 0.1  # Else nothing would ever be learnt.
    like = sharding.stored_tree(jax.eval_shape(lambda: boxed), head.mesh)
    assert like["vectors"].shape == (32, WIDTH) and like["bias"].shape == (32,)
    assert "mlp" not in nn.unbox(make("softmax", mlp_width=0).init_params(jax.random.key(1)))


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_from_the_labels(kind):
    rng = np.random.default_rng(11)
    head = make(kind, "eight")
    params = random_params(head, rng)
    vectors, frequency = jnp.asarray(rng.normal(size=(32, WIDTH))), jnp.asarray(rng.random(32))
    start = head.with_labels(params, vectors, frequency.at[4].set(0.0))
    assert start["mlp"] is params["mlp"] and start["vectors"] is vectors
    expected = np.zeros(32)
    if kind == "bce":  # Then the probability of each label is its frequency, for a zero vector.
        expected[:NUM_LABELS] = np.log(np.asarray(frequency)[:NUM_LABELS])
        expected[4] = np.log(1e-7)
    np.testing.assert_allclose(start["bias"], expected, rtol=1e-6)


def selected(head, selection):
    """Label and weight of each selected row."""
    per_shard = sharding.pad_rows(head.num_labels, head.mesh) // sharding.num_row_shards(head.mesh)
    rows = np.asarray(selection.rows).reshape(sharding.num_row_shards(head.mesh), -1)
    assert np.all(np.diff(rows, axis=1) >= 0)
    labels = rows + per_shard * np.arange(len(rows))[:, None]
    real = rows < per_shard
    weights = np.exp(np.asarray(selection.log_weight, np.float64)).reshape(rows.shape)
    assert np.all(weights[~real] == 0)
    return labels[real], weights[real]


def taken(head, params, selection):
    """Parameters with the selected rows alone."""
    take = jax.jit(head.take)
    return params | {name: take(params[name], selection) for name in ("vectors", "bias")}


@pytest.mark.parametrize("mesh", ["one", "eight"])
def test_selected_labels_are_distinct_and_their_sums_unbiased(mesh):
    rng = np.random.default_rng(12)
    head = make("softmax", mesh, n=203, num_sampled=40)
    _, positives, _ = random_batch(head, rng)
    own = set(np.asarray(positives.labels).tolist()) - {-1}
    values = rng.gamma(0.5, size=203)
    select, sums, counts = jax.jit(head.select), [], np.zeros(203)
    for seed in range(600):
        labels, weights = selected(head, select(positives, jax.random.key(seed)))
        assert len(set(labels)) == len(labels) and set(labels) >= own and max(labels) < 203
        np.testing.assert_array_equal(weights[np.isin(labels, list(own))], 1.0)
        sums.append(np.sum(weights * values[labels]))
        counts[labels] += weights
    error = np.std(sums) / np.sqrt(len(sums))
    assert 0 < error < 0.02 * values.sum()
    assert abs(np.mean(sums) - values.sum()) < 4 * error
    # Each label alone: its mean weight is 1. Drawn with a probability of about 1 / 5.
    assert np.abs(counts / len(sums) - 1).max() < 4.5 * np.sqrt(4.1 / len(sums))


@pytest.mark.parametrize("mesh", ["one", "eight"])
@pytest.mark.parametrize("kind", KINDS)
def test_sampled_loss_and_gradients_match_float64(kind, mesh):
    rng = np.random.default_rng(13)
    head = make(kind, mesh, label_block=4, num_sampled=9)
    params, batch = random_params(head, rng), random_batch(head, rng, most=2)
    selection = jax.jit(head.select)(batch[1], jax.random.key(5))

    loss, gradients = jax.jit(jax.value_and_grad(head.loss_of, argnums=(0, 1)))(
        taken(head, params, selection), *batch, selection
    )
    labels, weights = selected(head, selection)
    weight = np.zeros(NUM_LABELS)
    weight[labels] = weights
    expected, of_expected = reference(head, params, *batch, weight=weight)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    # Rows that are not selected have the gradient 0.
    put = jax.jit(head.put)
    all_rows = dict(gradients[0])
    for name in ("vectors", "bias"):
        all_rows[name] = put(jnp.zeros_like(params[name]), selection, all_rows[name])
    assert_close((all_rows, gradients[1]), of_expected)
    others = np.setdiff1d(np.arange(len(params["bias"])), labels)
    assert len(others) and np.all(np.asarray(all_rows["vectors"])[others] == 0)


@pytest.mark.parametrize("mesh", ["one", "eight"])
def test_rows_are_taken_and_put_back(mesh):
    rng = np.random.default_rng(14)
    head = make("softmax", mesh, num_sampled=8)
    params, (_, positives, _) = random_params(head, rng), random_batch(head, rng)
    selection = jax.jit(head.select)(positives, jax.random.key(2))
    labels, _ = selected(head, selection)
    take, put = jax.jit(head.take), jax.jit(head.put)
    for rows in (params["vectors"], params["bias"]):
        some = take(rows, selection)
        real = np.asarray(selection.log_weight) > -1e29
        np.testing.assert_array_equal(np.asarray(some)[real], np.asarray(rows)[labels])
        assert np.all(np.asarray(some)[~real] == 0)
        np.testing.assert_array_equal(put(rows, selection, some), rows)
        expected = np.array(rows)
        expected[labels] += 1.0
        np.testing.assert_array_equal(put(rows, selection, some + 1.0), expected)


@pytest.mark.parametrize("mesh", ["one", "eight"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_all_labels_is_the_full_loss(kind, mesh):
    rng = np.random.default_rng(15)
    head = make(kind, mesh, num_sampled=100)
    params, batch = random_params(head, rng), random_batch(head, rng)
    selection = jax.jit(head.select)(batch[1], jax.random.key(3))
    labels, weights = selected(head, selection)
    np.testing.assert_array_equal(labels, np.arange(NUM_LABELS))
    np.testing.assert_array_equal(weights, 1.0)
    some = taken(head, params, selection)
    run = jax.jit(head.loss_of)
    sampled, full = run(some, *batch, selection), run(params, *batch)
    np.testing.assert_allclose(sampled, full, rtol=1e-6)


def steps(head, params, batches, tx, *, fused, selection=None):
    """Parameters, optimizer state and scalars after a step on each batch."""

    @jax.jit
    def step(params, state, batch):
        if fused:
            return head_update.update(head, params, state, *batch, tx, selection)
        loss, gradient = jax.value_and_grad(
            lambda params: head.loss_of(params["head"], *batch, selection)
        )(params)
        updates, state = tx.update(gradient, state, params)
        scalars = {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
        return optax.apply_updates(params, updates), state, scalars

    params = {"head": params}
    state = tx.init(params)
    for batch in batches:
        params, state, scalars = step(params, state, batch)
    return params, state, scalars


@pytest.mark.parametrize("mesh", list(MESHES))
@pytest.mark.parametrize("kind,mlp_width", [("softmax", 5), ("decoupled_softmax", 0), ("bce", 5)])
def test_update_by_blocks_is_the_update_by_the_gradient(kind, mlp_width, mesh):
    rng = np.random.default_rng(16)
    head = make(kind, mesh, mlp_width=mlp_width, label_block=3)
    params, batches = random_params(head, rng), [random_batch(head, rng) for _ in range(3)]
    tx = optimizer.head_optimizer(
        optimizer.schedule(0.05, warmup_steps=0, total_steps=9), "float32"
    )
    expected, found = (steps(head, params, batches, tx, fused=fused) for fused in (False, True))
    assert found[1].count == 3
    assert_close(found, expected, rtol=2e-4)  # Adam divides rounding errors by tiny roots.
    assert_close(found[2], expected[2], rtol=1e-6)


def test_update_by_blocks_of_selected_rows_and_bfloat16_moments():
    rng = np.random.default_rng(17)
    head = make("softmax", "eight", label_block=3, num_sampled=12)
    params, batch = random_params(head, rng), random_batch(head, rng)
    selection = jax.jit(head.select)(batch[1], jax.random.key(4))
    some = taken(head, params, selection)
    tx = optimizer.head_optimizer(optax.constant_schedule(0.05), "bfloat16")
    run = functools.partial(steps, head, some, [batch] * 2, tx, selection=selection)
    expected, found = run(fused=False), run(fused=True)
    assert found[1].nu["head"]["vectors"].dtype == jnp.bfloat16
    assert_close(found[0], expected[0], rtol=0.01)
    as_float = lambda state: jax.tree.map(lambda x: np.asarray(x, np.float32), state)  # noqa: E731
    assert_close(as_float(found[1]), as_float(expected[1]), rtol=0.02)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_an_update_does_not_grow_with_the_labels(kind, moments):
    """Beyond parameters and moments, which are updated in place."""
    temporary = {}
    for n in (20_000, 40_000):
        head = make(kind, n=n, width=64, mlp_width=0, label_block=500)
        tx = optimizer.head_optimizer(optax.constant_schedule(0.05), moments)
        params = jax.eval_shape(lambda head=head: {"head": nn.unbox(head.init_params(0))})
        batch = random_batch(head, np.random.default_rng(0))
        step = jax.jit(
            lambda params, state, batch, head=head, tx=tx: head_update.update(
                head, params, state, *batch, tx
            ),
            donate_argnums=(0, 1),
        )
        lowered = step.lower(params, jax.eval_shape(tx.init, params), batch)
        # As it is compiled outside of tests.
        used = lowered.compile({"xla_cpu_use_fusion_emitters": True}).memory_analysis()
        assert used.alias_size_in_bytes > 2 * 4 * n * 64
        temporary[n] = used.temp_size_in_bytes
    # Beside blocks, some numbers of 4 bytes for each label, far from a vector of 256 bytes. On a
    # CPU, bfloat16 moments are updated as integers, of which there is one copy of 128 bytes.
    copied = 0 if moments == "float32" else 64 * 2
    assert temporary[40_000] - temporary[20_000] < 20_000 * (4 * 4 + copied)
    assert temporary[40_000] < 40_000 * (64 * 4 / 5 + copied)
