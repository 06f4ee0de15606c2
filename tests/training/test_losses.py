"""Tests of the losses and their gradients, against the paper's formulas in float64 in PyTorch."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.pairs import as_pairs
from vixml_jax.structs import Positives
from vixml_jax.training import losses

SETTINGS = {"num_negatives": 3, "margin_min": 0.1, "margin_max": 0.3, "temperature": 0.1}


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def call(loss, *arrays, **settings):
    """Calls a loss with numpy arrays moved to the device."""
    on_device = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in arrays]
    return loss(*on_device, **settings)


def all_real(scores):
    return np.ones(scores.shape[0], bool), np.ones(scores.shape[1], bool)


def reference_triplet(
    scores,
    positive,
    chosen,
    rows,
    columns,
    *,
    num_negatives,
    margin_min,
    margin_max,
    temperature,
    tie_gradient=True,
):
    """`triplet_loss`, row by row and negative by negative; `chosen[i]` is the positive of row i."""
    total, violators, num_rows = torch.zeros((), dtype=torch.float64), 0, 0
    zero = torch.zeros((), dtype=torch.float64)
    for i in np.flatnonzero(rows):
        num_rows += 1
        if not np.any(positive[i] & columns):
            continue
        negatives = [j for j in np.flatnonzero(columns) if not positive[i, j]]
        negatives = sorted(negatives, key=lambda j: -scores[i, j].item())[:num_negatives]
        if not negatives:
            continue
        hinges, logits = [], []
        for j in negatives:
            gap = scores[i, chosen[i]] - scores[i, j]
            x = abs(gap.item())
            x = -gap + min(max(x, margin_min), margin_max)
            hinge = torch.maximum(x, zero) if tie_gradient else torch.relu(x)
            hinges.append(hinge)
            logits.append(scores[i, j] if hinge > 0 else zero - 50.0)
        weights = torch.softmax(torch.stack(logits) / temperature, dim=0)
        weighted = weights * torch.stack(hinges)
        total = total + weighted.sum()
        violators += int((weighted > 0).sum())
    return total / max(num_rows, 1), violators / max(num_rows, 1)


def reference_margin(raw, prototype, positive, chosen, rows, columns, *, num_negatives, margin=0.1):
    """`prototype_margin_loss`, row by row; `chosen[i]` is the positive of row i."""
    at_positive, at_negative = [], []
    for i in np.flatnonzero(rows):
        if np.any(positive[i] & columns):
            at_positive.append(raw[i, chosen[i]] - prototype[i, chosen[i]] + margin)
        negatives = [j for j in np.flatnonzero(columns) if not positive[i, j]]
        for j in sorted(negatives, key=lambda j: -prototype[i, j].item())[:num_negatives]:
            at_negative.append(prototype[i, j] - raw[i, j] + margin)
    total = torch.zeros((), dtype=torch.float64)
    for values in (at_positive, at_negative):
        active = [value for value in values if value > 0]
        if active:
            total = total + sum(active) / len(active) / 2
    return total


def reference_total(q, u, z, positive, rows, columns, *, regulariser=0.1, **settings):
    """`total_loss`, for relevance with one positive in each row and column."""
    by_row, by_column = positive.argmax(1), positive.argmax(0)
    raw = q @ u.T
    text = reference_triplet(raw, positive, by_row, rows, columns, **settings)[0]
    if z is None:
        return text
    prototype = reference_triplet(q @ z.T, positive, by_row, rows, columns, **settings)[0]
    label = reference_triplet(raw.T, positive.T, by_column, columns, rows, **settings)[0]
    margin = reference_margin(
        raw, q @ z.T, positive, by_row, rows, columns, num_negatives=settings["num_negatives"]
    )
    return text + prototype + label + regulariser * margin


def as_torch(*arrays):
    return [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in arrays]


def check_triplet(scores, positive, rows=None, columns=None, **changes):
    """Compares loss, violators and gradient with the reference; rows have at most one positive."""
    settings = {**SETTINGS, **changes}
    scores = np.asarray(scores, np.float32)
    positive = np.asarray(positive, bool)
    rows = np.ones(scores.shape[0], bool) if rows is None else rows
    columns = np.ones(scores.shape[1], bool) if columns is None else columns

    def loss(scores):
        return call(
            losses.triplet_loss, scores, positive, rows, columns, jax.random.key(0), **settings
        )

    (value, violators), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        jnp.asarray(scores)
    )
    (reference,) = as_torch(scores)
    expected, expected_violators = reference_triplet(
        reference, positive, positive.argmax(1), rows, columns, **settings
    )
    if expected.requires_grad:
        expected.backward()
    expected_gradient = np.zeros_like(scores) if reference.grad is None else reference.grad.numpy()
    np.testing.assert_allclose(value, expected.item(), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(violators, expected_violators, rtol=1e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=1e-6)
    return float(value), np.asarray(gradient)


@pytest.mark.parametrize("tie_gradient", [True, False])
@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(7, 7), (5, 11), (11, 4)])
def test_triplet_loss_matches_reference(shape, spread, tie_gradient):
    rng = np.random.default_rng((shape[0], int(spread * 100)))
    scores = rng.uniform(-spread, spread, shape)
    positive = rng.integers(shape[1], size=shape[0])[:, None] == np.arange(shape[1])
    check_triplet(scores, positive, tie_gradient=tie_gradient)


@pytest.mark.parametrize("bounds", [(0.3, 0.3), (0.0, 0.2), (0.1, 2.0)])
def test_triplet_loss_matches_reference_for_other_margin_bounds(bounds):
    rng = np.random.default_rng(3)
    check_triplet(rng.uniform(-1, 1, (9, 9)), np.eye(9), margin_min=bounds[0], margin_max=bounds[1])


def test_satisfied_row_has_half_the_gradient_with_tie_gradient():
    """Gaps of 0.25 are satisfied: the loss is 0, and the k negatives share half a gradient."""
    scores, positive = [[0.75, 0.5, 0.5, 0.5]], [[1, 0, 0, 0]]
    value, gradient = check_triplet(scores, positive)
    assert value == 0.0
    np.testing.assert_allclose(gradient, [[-0.5, 1 / 6, 1 / 6, 1 / 6]], rtol=1e-6)

    value, gradient = check_triplet(scores, positive, tie_gradient=False)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((1, 4)))


def test_gap_above_the_largest_margin_has_no_gradient():
    value, gradient = check_triplet([[0.9, 0.4, 0.3, 0.2]], [[1, 0, 0, 0]])
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((1, 4)))


def test_triplet_loss_with_ties_and_active_hinges_in_one_batch():
    scores = [
        [0.75, 0.5, 0.55, 0.6],  # All tied.
        [0.5, 0.75, 0.7, 0.5],  # One active, two tied, which have no weight.
        [0.2, 0.1, 0.3, 0.9],  # All violated.
        [0.0, 0.0, 0.0, 0.0],
    ]
    check_triplet(scores, np.eye(4), tie_gradient=True)
    check_triplet(scores, np.eye(4), tie_gradient=False)


@pytest.mark.parametrize("num_negatives", [4, 9, 50])
def test_rows_with_fewer_negatives_than_num_negatives(num_negatives):
    """Neither positives nor padding become negatives in rows with few real columns."""
    rng = np.random.default_rng(5)
    scores = rng.uniform(-1, 1, (6, 9)).astype(np.float32)
    positive = np.arange(6)[:, None] == np.arange(9)
    columns = np.arange(9) < 6
    columns[2] = False  # Row 2 has no positive then.
    check_triplet(scores, positive, np.arange(6) != 4, columns, num_negatives=num_negatives)
    check_triplet(scores, positive, num_negatives=num_negatives)


def test_satisfied_row_gives_weight_to_real_negatives_only():
    value, gradient = check_triplet(
        [[0.75, 0.5, 0.55, 0.0]], [[1, 0, 0, 0]], columns=np.array([1, 1, 1, 0], bool)
    )
    assert value == 0.0
    np.testing.assert_allclose(gradient, [[-0.5, 0.25, 0.25, 0.0]], rtol=1e-6)


def test_row_without_negatives_adds_no_loss():
    scores = np.array([[0.1, 0.2, 0.3], [0.5, 0.6, 0.4]], np.float32)
    positive = np.array([[1, 1, 1], [0, 1, 0]], bool)
    key = jax.random.key(1)
    both, _ = call(losses.triplet_loss, scores, positive, *all_real(scores), key, **SETTINGS)
    alone, _ = call(
        losses.triplet_loss, scores[1:], positive[1:], *all_real(scores[1:]), key, **SETTINGS
    )
    np.testing.assert_allclose(both, alone / 2, rtol=1e-6)


def test_positives_are_drawn_uniformly_and_never_serve_as_negatives():
    """Every loss is that of one of the row's positives, and all are equally frequent."""
    scores = np.array([[0.1, 0.3, 0.9, 0.35, 0.2, 0.95, 0.42]], np.float32)
    positive = np.array([[1, 1, 0, 1, 1, 0, 0]], bool)
    columns = np.array([1, 1, 1, 1, 1, 1, 0], bool)
    options = np.flatnonzero(positive)
    expected = [
        reference_triplet(*as_torch(scores), positive, [j], [True], columns, **SETTINGS)[0].item()
        for j in options
    ]
    assert min(abs(a - b) for a, b in itertools.combinations(expected, 2)) > 1e-3

    num_draws = 4000
    values = jax.vmap(
        lambda key: call(
            losses.triplet_loss, scores, positive, np.ones(1, bool), columns, key, **SETTINGS
        )[0]
    )(jax.random.split(jax.random.key(0), num_draws))
    distance = np.abs(np.asarray(values)[:, None] - np.array(expected))
    assert distance.min(axis=1).max() < 1e-6
    counts = np.bincount(distance.argmin(axis=1), minlength=len(options))
    # Chi-squared with 3 degrees of freedom; 16.3 is its 99.9th percentile.
    assert np.sum((counts - num_draws / 4) ** 2 / (num_draws / 4)) < 16.3


def test_relevance_is_that_of_the_pairs():
    """Candidates repeat and some are padding; labels of queries need not be candidates."""
    rng = np.random.default_rng()
    for _ in range(5):
        relevance = rng.random((9, 20)) < 0.3
        label_ids = rng.integers(-1, 20, 14).astype(np.int32)
        pairs = rng.permutation(np.argwhere(relevance)).astype(np.int32)
        pairs = np.concatenate([pairs, np.full((3, 2), -1, np.int32)])
        expected = relevance.T[label_ids] & (label_ids >= 0)[:, None]
        found = losses.relevance_of(label_ids, Positives(*jnp.asarray(pairs.T)), 9)
        np.testing.assert_array_equal(found, expected)
        # Of a shard with the queries 4, 5 and 6.
        shifted = Positives(*jnp.asarray(pairs.T - np.array([[4], [0]], np.int32)))
        found = losses.relevance_of(label_ids, shifted, 3)
        np.testing.assert_array_equal(found, expected[:, 4:7])


@pytest.mark.parametrize("num_columns", [5, 128, 700])
def test_draw_is_the_position_in_the_order_of_columns(num_columns):
    rng = np.random.default_rng()
    positive = rng.random((40, num_columns)) < rng.random((40, 1)) ** 4
    positive[3], positive[4] = False, True
    key = jax.random.key(rng.integers(1 << 30))
    chosen, has_positive = jax.jit(losses._draw_positive, static_argnums=2)(positive, key, ())
    np.testing.assert_array_equal(has_positive, positive.any(axis=1))
    for row, uniform in enumerate(np.asarray(jax.random.uniform(key, (40,)))):
        columns = np.flatnonzero(positive[row])
        if len(columns):
            assert chosen[row] == columns[int(uniform * np.float32(len(columns)))]


def test_rows_draw_independently():
    """Two equal rows with two positives each: all four pairs of draws are equally frequent."""
    scores = np.array([[0.0, 0.2, 0.5]], np.float32).repeat(2, axis=0)
    positive = np.array([[1, 1, 0]], bool).repeat(2, axis=0)

    def gradient(key):
        return jax.grad(
            lambda s: call(losses.triplet_loss, s, positive, *all_real(scores), key, **SETTINGS)[0]
        )(jnp.asarray(scores))

    gradients = np.asarray(jax.jit(jax.vmap(gradient))(jax.random.split(jax.random.key(2), 2000)))
    drew_second = gradients[:, :, 1] != 0
    counts = np.bincount(drew_second @ [1, 2], minlength=4)
    assert np.sum((counts - 500) ** 2 / 500) < 16.3


def random_batch(num, width, seed):
    """Queries, labels and prototypes so close to each other that hinges of all kinds occur."""
    rng = np.random.default_rng(seed)
    q = unit(rng.normal(size=(num, width)))
    u = unit(q + 1.2 * rng.normal(size=(num, width)) / np.sqrt(width))
    z = unit(u + 0.7 * rng.normal(size=(num, width)) / np.sqrt(width))
    order = rng.permutation(num)
    return q, u[order], z[order], order[None, :] == np.arange(num)[:, None]


@functools.cache
def compiled(**settings):
    def loss(vectors, positive, rows, columns, key):
        pairs = as_pairs(positive)
        return losses.total_loss(*vectors, *pairs, rows, columns, key, **settings)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def value_and_gradient(q, u, z, positive, rows, columns, **settings):
    (value, scalars), gradient = compiled(**{**SETTINGS, **settings})(
        (q, u, z), positive, rows, columns, jax.random.key(0)
    )
    return value, scalars, gradient


@pytest.mark.parametrize("has_prototypes", [True, False])
@pytest.mark.parametrize("num,width", [(6, 4), (24, 16)])
def test_total_loss_matches_reference(num, width, has_prototypes):
    q, u, z, positive = random_batch(num, width, seed=num)
    rows = np.arange(num) != 1
    columns = positive[rows].any(axis=0)
    value, scalars, gradient = value_and_gradient(
        q, u, z if has_prototypes else None, positive, rows, columns
    )

    references = as_torch(q, u, z) if has_prototypes else [*as_torch(q, u), None]
    expected = reference_total(*references, positive, rows, columns, **SETTINGS)
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=2e-5)
    for ours, reference in zip(gradient, references, strict=True):
        if reference is not None:
            np.testing.assert_allclose(ours, reference.grad.numpy(), rtol=2e-4, atol=2e-6)
    terms = [scalars[f"loss_{name}"] for name in ("text", "prototype", "label")]
    np.testing.assert_allclose(value, sum(terms) + 0.1 * scalars["loss_margin"], rtol=1e-6)
    assert value.dtype == jnp.float32 and all(x.dtype == jnp.float32 for x in scalars.values())
    if not has_prototypes:
        assert gradient[2] is None
        assert value == scalars["loss_text"] and scalars["loss_label"] == 0.0


@pytest.mark.parametrize("regulariser", [0.0, 2.0])
def test_regulariser_is_the_weight_of_the_margin_term(regulariser):
    batch = random_batch(8, 6, seed=1)
    value, _, _ = value_and_gradient(*batch, *all_real(batch[3]), regulariser=regulariser)
    expected = reference_total(
        *as_torch(*batch[:3]), batch[3], *all_real(batch[3]), regulariser=regulariser, **SETTINGS
    )
    np.testing.assert_allclose(value, expected.item(), rtol=2e-5)


def test_margin_term_without_active_entries_is_zero():
    raw = np.zeros((3, 3), np.float32)
    better = np.where(np.eye(3, dtype=bool), 0.5, -0.5).astype(np.float32)

    def loss(raw, prototype):
        return call(
            losses.prototype_margin_loss,
            raw,
            prototype,
            np.eye(3, dtype=bool),
            *all_real(raw),
            jax.random.key(0),
            num_negatives=2,
        )

    value, gradient = jax.value_and_grad(loss, argnums=(0, 1))(raw, better)
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3, 3)))
    # Only the term of the positives is active: prototypes score them no better than raw vectors.
    np.testing.assert_allclose(loss(raw, np.minimum(better, 0.0)), 0.05, rtol=1e-6)


@pytest.mark.parametrize("has_prototypes", [True, False])
def test_padding_does_not_change_losses_or_gradients(has_prototypes):
    """With several positives per row too: padding does not change the draws."""
    rng = np.random.default_rng(8)
    q, u, z, positive = random_batch(12, 8, seed=8)
    positive = positive | (rng.random((12, 12)) < 0.2)
    if not has_prototypes:
        z = None
    value, scalars, gradient = value_and_gradient(q, u, z, positive, *all_real(positive))

    def pad(x, num):
        return None if x is None else np.concatenate([x, unit(rng.normal(size=(num, 8)))])

    wide = np.ones((17, 15), bool)  # Padding is marked as relevant.
    wide[:12, :12] = positive
    padded_value, padded_scalars, padded_gradient = value_and_gradient(
        pad(q, 5), pad(u, 3), pad(z, 3), wide, np.arange(17) < 12, np.arange(15) < 12
    )
    np.testing.assert_allclose(padded_value, value, rtol=1e-6)
    for name in scalars:
        np.testing.assert_allclose(padded_scalars[name], scalars[name], rtol=1e-6)
    for padded, plain in zip(padded_gradient[: 2 + has_prototypes], gradient, strict=False):
        np.testing.assert_allclose(padded[:12], plain, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(padded[12:], 0.0)


def test_loss_does_not_depend_on_the_order_of_the_batch():
    q, u, z, positive = random_batch(10, 6, seed=4)
    rows, columns = np.arange(10) != 3, np.arange(10) != 7
    value, _, gradient = value_and_gradient(q, u, z, positive, rows, columns)
    rng = np.random.default_rng(4)
    by_row, by_column = rng.permutation(10), rng.permutation(10)
    other, _, moved = value_and_gradient(
        q[by_row],
        u[by_column],
        z[by_column],
        positive[by_row][:, by_column],
        rows[by_row],
        columns[by_column],
    )
    np.testing.assert_allclose(other, value, rtol=1e-6)
    np.testing.assert_allclose(moved[0], gradient[0][by_row], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(moved[1], gradient[1][by_column], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(moved[2], gradient[2][by_column], rtol=1e-5, atol=1e-7)


def test_terms_draw_positives_independently():
    """One query with two positives: the text and the prototype term draw independently."""
    q = np.array([[1.0, 0.0]], np.float32)
    angle = np.arccos(np.array([0.2, 0.4, 0.9]))
    u = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    positive = np.array([[1, 1, 0]], bool)

    def terms(key):
        _, scalars = call(
            losses.total_loss, q, u, u, *as_pairs(positive), *all_real(positive), key, **SETTINGS
        )
        return scalars["loss_text"], scalars["loss_prototype"]

    text, prototype = jax.jit(jax.vmap(terms))(jax.random.split(jax.random.key(0), 2000))
    middle = (np.max(text) + np.min(text)) / 2
    counts = np.bincount((text > middle) + 2 * (prototype > middle), minlength=4)
    assert np.sum((counts - 500) ** 2 / 500) < 16.3


@pytest.mark.parametrize("temperature", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("case", ["zeros", "no positives", "all positive", "nothing real", "one"])
def test_gradients_are_finite(case, temperature):
    num = 1 if case == "one" else 5
    q, u, z, positive = random_batch(num, 4, seed=0)
    rows, columns = all_real(positive)
    if case == "zeros":
        q, u, z = np.zeros_like(q), np.zeros_like(u), np.zeros_like(z)
    elif case in ("no positives", "all positive"):
        positive = np.full_like(positive, case == "all positive")
    elif case == "nothing real":
        rows, columns = ~rows, ~columns
    value, scalars, gradient = value_and_gradient(
        q, u, z, positive, rows, columns, temperature=temperature
    )
    assert all(np.all(np.isfinite(x)) for x in (value, *scalars.values(), *gradient))
    if case in ("nothing real", "no positives", "all positive"):
        assert scalars["loss_text"] == scalars["loss_label"] == 0.0


def test_gradient_passes_through_weights_but_not_through_the_margin():
    """Three violated negatives: the gradient follows the formula with a constant margin."""
    s, p = np.array([0.5, 0.45, 0.3]), 0.2
    hinge = s - p + np.clip(np.abs(p - s), 0.1, 0.3)
    weights = np.exp(s / 0.1) * (hinge > 0)
    weights /= weights.sum()
    mean = (weights * hinge).sum()
    slope = weights + weights * (hinge - mean) / 0.1
    _, gradient = check_triplet([[p, *s]], [[1, 0, 0, 0]])
    np.testing.assert_allclose(gradient[0, 1:], slope, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient[0, 0], -weights.sum(), rtol=1e-6)
