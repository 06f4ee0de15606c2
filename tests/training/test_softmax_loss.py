"""The softmax losses of a batch and their gradients, against PyTorch in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.pairs import as_pairs
from vixml_jax.parallel import sharding
from vixml_jax.training import losses

KINDS = ("softmax", "decoupled_softmax")
TRIPLET = {"num_negatives": 3, "margin_min": 0.1, "margin_max": 0.3, "temperature": 0.1}


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def reference(scores, positive, rows, columns, *, temperature, decoupled):
    """Loss and mean violators, positive by positive."""
    total, violators = torch.zeros((), dtype=torch.float64), 0
    for i in np.flatnonzero(rows):
        logits = scores[i] / temperature
        mine = [j for j in np.flatnonzero(columns) if positive[i, j]]
        others = [j for j in np.flatnonzero(columns) if not positive[i, j]]
        for j in mine:
            rivals = [j, *others] if decoupled else [*mine, *others]
            total = total - torch.log_softmax(logits[rivals], 0)[rivals.index(j)] / len(mine)
        if mine:
            violators += sum((logits[j] > logits[mine].min()).item() for j in others)
    return total / max(rows.sum(), 1), violators / max(rows.sum(), 1)


def as_torch(x):
    return torch.tensor(np.asarray(x, np.float64), requires_grad=True)


def random_scores(rng, shape=(7, 9)):
    """Scores, some positives in most rows, and masks; column 4 is column 1 once more."""
    scores = rng.uniform(-1, 1, shape).astype(np.float32)
    positive = rng.random(shape) < 0.3
    positive[2] = False
    scores[:, 4], positive[:, 4] = scores[:, 1], positive[:, 1]
    positive[0, [1, 4]] = True
    return scores, positive, np.arange(shape[0]) != 5, np.arange(shape[1]) != 3


@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
@pytest.mark.parametrize("decoupled", [False, True])
def test_softmax_loss_matches_float64(decoupled, temperature):
    rng = np.random.default_rng(int(100 * temperature))
    scores, positive, rows, columns = random_scores(rng)
    settings = {"temperature": temperature, "decoupled": decoupled}
    (value, violators), gradient = jax.value_and_grad(
        lambda scores: losses.softmax_loss(
            scores, *map(jnp.asarray, (positive, rows, columns)), **settings
        ),
        has_aux=True,
    )(jnp.asarray(scores))
    of = as_torch(scores)
    expected, expected_violators = reference(of, positive, rows, columns, **settings)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=2e-6)
    np.testing.assert_allclose(violators, expected_violators, rtol=1e-6)
    largest = of.grad.abs().max().item()
    np.testing.assert_allclose(gradient, of.grad.numpy(), atol=2e-6 * largest, rtol=2e-5)
    # No gradient for what is not real, nor for the row without positives.
    assert not np.any(np.asarray(gradient)[[2, 5]]) and not np.any(gradient[:, 3])


def test_positives_compete_unless_decoupled():
    """Two positives of equal score: together they cannot have more than half each."""
    scores = jnp.asarray([[1.0, 1.0, -1.0]])
    positive, real = jnp.asarray([[True, True, False]]), (jnp.ones(1, bool), jnp.ones(3, bool))
    run = functools.partial(losses.softmax_loss, scores, positive, *real, temperature=0.01)
    np.testing.assert_allclose(run()[0], np.log(2), rtol=1e-5)
    assert run(decoupled=True)[0] < 1e-30


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("case", ["all positive", "no positive", "nothing real"])
def test_softmax_loss_without_negatives_or_positives(case, decoupled):
    rng = np.random.default_rng(1)
    scores = jnp.asarray(rng.uniform(-1, 1, (4, 5)), jnp.float32)
    positive = jnp.full((4, 5), case != "no positive")
    rows, columns = (jnp.full(n, case != "nothing real") for n in (4, 5))
    (value, violators), gradient = jax.value_and_grad(
        lambda scores: losses.softmax_loss(
            scores, positive, rows, columns, temperature=1e-3, decoupled=decoupled
        ),
        has_aux=True,
    )(scores)
    assert violators == 0.0 and np.all(np.isfinite(gradient))
    if case == "all positive" and not decoupled:
        assert value > 100  # They compete with each other.
    else:
        assert value == 0.0 and not np.any(gradient)


def random_vectors(rng, b=24, c=20, width=8):
    q, u, z = (unit(rng.normal(size=(n, width))) for n in (b, c, c))
    positive = rng.random((b, c)) < 0.1
    positive[np.arange(c), np.arange(c)] = True
    u[7], z[7], positive[:, 7] = u[3], z[3], positive[:, 3]  # A label drawn twice.
    return (q, u, z), positive, np.arange(b) != 2, np.arange(c) < c - 2


@functools.cache
def compiled(devices, **settings):
    mesh = sharding.create_mesh(2, 4) if devices == 8 else None

    def loss(vectors, positive, rows, columns, key):
        return losses.total_loss(
            *vectors, *as_pairs(positive), rows, columns, key, mesh=mesh, **TRIPLET, **settings
        )

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize("has_prototypes", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_total_loss_is_the_sum_of_its_terms(kind, has_prototypes):
    (q, u, z), positive, rows, columns = random_vectors(np.random.default_rng(2))
    vectors = (q, u, z if has_prototypes else None)
    (value, scalars), gradient = compiled(1, kind=kind, softmax_temperature=0.1, regulariser=0.0)(
        vectors, positive, rows, columns, jax.random.key(0)
    )
    q, u, z = (as_torch(x) for x in (q, u, z))
    cost = functools.partial(reference, temperature=0.1, decoupled=kind == "decoupled_softmax")
    expected = {"loss_text": cost(q @ u.T, positive, rows, columns)[0]}
    if has_prototypes:
        expected["loss_prototype"] = cost(q @ z.T, positive, rows, columns)[0]
        expected["loss_label"] = cost(u @ q.T, positive.T, columns, rows)[0]
    for name, term in expected.items():
        np.testing.assert_allclose(scalars[name], term.item(), rtol=2e-6)
    total = sum(expected.values())
    total.backward()
    np.testing.assert_allclose(value, total.item(), rtol=2e-6)
    for ours, theirs in zip(gradient[: 2 + has_prototypes], (q, u, z), strict=False):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("has_prototypes", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_one_device_equals_eight(kind, has_prototypes):
    """Also where neither queries nor labels divide among the devices."""
    (q, u, z), positive, rows, columns = random_vectors(np.random.default_rng(3), b=21, c=19)
    batch = ((q, u, z if has_prototypes else None), positive, rows, columns, jax.random.key(1))
    one, eight = (compiled(devices, kind=kind)(*batch) for devices in (1, 8))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), one, eight)


@pytest.mark.parametrize("kind", KINDS)
def test_the_margin_term_is_that_of_the_triplet_loss(kind):
    batch = (*random_vectors(np.random.default_rng(4)), jax.random.key(2))
    (value, scalars), _ = compiled(1, kind=kind, regulariser=2.0)(*batch)
    (_, of_triplet), _ = compiled(1, kind="triplet", regulariser=2.0)(*batch)
    assert scalars["loss_margin"] == of_triplet["loss_margin"] > 0
    terms = [scalars[f"loss_{name}"] for name in ("text", "prototype", "label")]
    np.testing.assert_allclose(value, sum(terms) + 2.0 * scalars["loss_margin"], rtol=1e-6)
    assert terms[0] != of_triplet["loss_text"]
