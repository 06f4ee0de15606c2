"""Tests of the optimizer against PyTorch's AdamW with the same groups and schedule."""

import jax.numpy as jnp
import numpy as np
import optax
import torch

from vixml_jax.training import optimizer


def test_updates_match_torch_adamw_with_groups():
    rng = np.random.default_rng(0)
    params = {
        "tower": {
            "word_embeddings": rng.normal(size=(5, 3)),
            "norm": {"scale": rng.normal(size=3), "bias": rng.normal(size=3)},
            "image_projection": {"kernel": rng.normal(size=(2, 3)), "bias": rng.normal(size=3)},
        },
        "combiner": {"linear": {"kernel": rng.normal(size=(3, 3)), "bias": rng.normal(size=3)}},
        "free": rng.normal(size=(4, 3)),
    }
    peaks = {"tower": 1e-2, "combiner": 3e-2, "free": 3e-2, "image_projection": 5e-2}
    total, warmup, decay = 12, 4, 0.1

    flat, torch_params, groups = {}, {}, []

    def walk(tree, path):
        for name, value in tree.items():
            if isinstance(value, dict):
                walk(value, (*path, name))
            else:
                flat[(*path, name)] = value

    walk(params, ())
    for path, value in flat.items():
        torch_params[path] = torch.nn.Parameter(torch.tensor(value))
        key = "image_projection" if "image_projection" in path else path[0]
        decays = path[0] != "free" and path[-1] not in ("bias", "scale")
        groups.append(
            {
                "params": [torch_params[path]],
                "lr": peaks[key],
                "weight_decay": decay if decays else 0.0,
            }
        )
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-6)
    multiplier = torch.optim.lr_scheduler.LambdaLR(
        adamw,
        lambda i: i / warmup if i < warmup else max(0.0, (total - i) / (total - warmup)),
    )
    ours = optimizer.make_optimizer(
        learning_rate=1e-2,
        label_learning_rate=3e-2,
        image_learning_rate=5e-2,
        weight_decay=decay,
        warmup_steps=warmup,
        clip_norm=1.0,
        total_steps=total,
    )
    params = {k: _as_jax(v) for k, v in params.items()}
    state = ours.init(params)
    for _ in range(total):
        gradients = {path: rng.normal(size=value.shape) for path, value in flat.items()}
        for path, parameter in torch_params.items():
            parameter.grad = torch.tensor(gradients[path])
        torch.nn.utils.clip_grad_norm_(list(torch_params.values()), 1.0)
        adamw.step()
        multiplier.step()
        updates, state = ours.update(_nest(gradients), state, params)
        params = optax.apply_updates(params, updates)
    for path, parameter in torch_params.items():
        value = params
        for name in path:
            value = value[name]
        np.testing.assert_allclose(value, parameter.detach().numpy(), atol=2e-5, err_msg=path)


def _as_jax(tree):
    if isinstance(tree, dict):
        return {name: _as_jax(value) for name, value in tree.items()}
    return jnp.asarray(tree, jnp.float32)


def _nest(flat):
    tree = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = jnp.asarray(value, jnp.float32)
    return tree


def test_schedule_starts_at_zero_and_ends_at_zero():
    rate = optimizer.schedule(2.0, warmup_steps=10, total_steps=50)
    assert float(rate(0)) == 0.0
    assert float(rate(10)) == 2.0
    np.testing.assert_allclose(rate(30), 1.0)
    assert float(rate(50)) == 0.0
