"""Losses of several widths of the vectors (`--loss.widths`), against float64 in PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.labels import test_head as heads
from tests.training import test_losses as full
from vixml_jax.parallel import sharding
from vixml_jax.training import flops, losses, optimizer

WIDTHS = [3, 7]


def torch_prefix(x, width):
    """The first columns of length 1."""
    x = x[:, :width]
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("has_prototypes", [True, False])
@pytest.mark.parametrize("widths", [WIDTHS, [16, *WIDTHS]])
def test_total_loss_is_the_mean_over_widths(has_prototypes, widths):
    q, u, z, positive = full.random_batch(24, 16, seed=int(np.random.default_rng().integers(1e9)))
    rows = np.arange(24) != 1
    columns = positive[rows].any(axis=0)
    value, scalars, gradient = full.value_and_gradient(
        q, u, z if has_prototypes else None, positive, rows, columns, widths=tuple(widths)
    )
    vectors = full.as_torch(q, u, z)
    expected = [
        full.reference_total(
            *[torch_prefix(x, width) for x in vectors[: 2 + has_prototypes]],
            *[None] * (not has_prototypes),
            positive,
            rows,
            columns,
            **full.SETTINGS,
        )
        for width in (*WIDTHS, 16)
    ]
    loss = sum(expected) / 3
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=2e-5)
    for found, reference in zip(gradient, vectors[: 2 + has_prototypes], strict=False):
        # Those of the reference, which also scales the full vectors, have no part along them.
        along = np.sum(found * reference.detach().numpy(), axis=1, keepdims=True)
        found = np.asarray(found) - along * reference.detach().numpy()
        np.testing.assert_allclose(found, reference.grad.numpy(), rtol=2e-4, atol=5e-6)
    assert all(np.ndim(x) == 0 for x in scalars.values())


@pytest.mark.parametrize("kind", ["triplet", "softmax", "decoupled_softmax"])
def test_one_device_equals_eight(kind):
    q, u, z, positive = full.random_batch(21, 16, seed=5)
    pairs = full.as_pairs(positive)
    masks = np.arange(21) != 4, np.arange(21) != 9

    def run(mesh):
        def loss(vectors):
            return losses.total_loss(
                *vectors, *pairs, *map(jnp.asarray, masks), jax.random.key(1),
                **full.SETTINGS, kind=kind, widths=WIDTHS, mesh=mesh,
            )[0]  # fmt: skip

        return jax.jit(jax.value_and_grad(loss))((q, u, z))

    one, eight = run(None), run(sharding.create_mesh(2, 4, 1))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-7), one, eight)


def dense(head, params, q, positives, mask):
    """The loss of the head with its widths, as the mean of losses of narrower heads."""
    found = []
    for width in (*head.widths, head.width):
        g = q
        up, down = params["mlp"]["up"], params["mlp"]["down"]
        hidden = torch.nn.functional.gelu(q @ up["kernel"] + up["bias"])
        g = torch_prefix(q + hidden @ down["kernel"] + down["bias"], width)
        s = 20.0 * g @ params["vectors"][: head.num_labels, :width].T
        s = s + params["bias"][: head.num_labels]
        of_query = {i: [] for i in np.flatnonzero(np.asarray(mask))}
        for i, label in np.asarray(positives).T:
            if i >= 0:
                of_query[i].append(label)
        costs, pairs = [], sum(map(len, of_query.values()))
        for i, labels in of_query.items():
            if head.loss == "bce":
                costs.append(torch.nn.functional.softplus(s[i]).sum() - s[i, labels].sum())
            for label in labels if head.loss != "bce" else []:
                others = [x for x in range(head.num_labels) if x == label or x not in labels]
                others = others if head.loss == "decoupled_softmax" else slice(None)
                cost = torch.logsumexp(s[i, others], 0) - s[i, label]
                costs.append(cost / len(labels))
        found.append(sum(costs) / (pairs if head.loss == "bce" else len(of_query)))
    return sum(found) / len(found)


@pytest.mark.parametrize("mesh", ["one", "eight"])
@pytest.mark.parametrize("kind", heads.KINDS)
def test_the_head_is_trained_for_its_widths(kind, mesh):
    """Loss, all gradients, and the step by blocks."""
    rng = np.random.default_rng()
    head = heads.make(kind, mesh, label_block=10, widths=(2, 4))
    params, batch = heads.random_params(head, rng), heads.random_batch(head, rng)
    loss, gradient = jax.jit(jax.value_and_grad(head.loss_of, argnums=(0, 1)))(params, *batch)
    leaves, structure = jax.tree.flatten((params, batch[0]))
    leaves = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in leaves]
    expected = dense(head, *structure.unflatten(leaves), *batch[1:])
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=5e-6)
    heads.assert_close(gradient, structure.unflatten([x.grad.numpy() for x in leaves]), 5e-5)

    tx = optimizer.head_optimizer(
        optimizer.schedule(0.05, warmup_steps=0, total_steps=9), "float32"
    )
    by_gradient, by_blocks = (
        heads.steps(head, params, [batch], tx, fused=fused) for fused in (False, True)
    )
    heads.assert_close(by_blocks, by_gradient, rtol=5e-4)


def test_flops_are_those_of_all_widths():
    head = heads.make("softmax", n=29, width=6, mlp_width=5)
    wide = dataclasses.replace(head, widths=(2, 4))
    more = flops.head_flops(wide, 10, 30).step - flops.head_flops(head, 10, 30).step
    assert more == 3 * 2 * (2 * 10 * 29 * 6)  # Two prefixes, padded to the full width.
