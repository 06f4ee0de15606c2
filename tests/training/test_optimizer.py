"""Tests of the optimizers against PyTorch's AdamW and Adam with the same groups and schedule."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from vixml_jax.parallel import sharding as sharding_lib
from vixml_jax.training import optimizer, train_state


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


def _head(rng, scale=1.0):
    shapes = {"vectors": (16, 4), "bias": (16,)}
    return {name: jnp.asarray(scale * rng.normal(size=n), jnp.float32)
            for name, n in shapes.items()}  # fmt: skip


def test_head_updates_match_torch_adam_even_with_tiny_gradients():
    rng = np.random.default_rng(1)
    params, total = _head(rng), 9
    ours = optimizer.head_optimizer(
        optimizer.schedule(0.1, warmup_steps=0, total_steps=total), "float32"
    )
    theirs = {name: torch.nn.Parameter(torch.tensor(np.asarray(x, np.float64)))
              for name, x in params.items()}  # fmt: skip
    adam = torch.optim.Adam(theirs.values(), lr=0.1, eps=1e-8)
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda i: 1.0 - i / total)
    state = ours.init(params)
    for _ in range(total):
        gradient = _head(rng, scale=1e-7)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(np.asarray(gradient[name], np.float64))
        adam.step()
        falling.step()
        updates, state = jax.jit(ours.update)(gradient, state)
        params = optax.apply_updates(params, updates)
    for name, parameter in theirs.items():
        np.testing.assert_allclose(params[name], parameter.detach().numpy(), atol=1e-5)
    assert state.mu["vectors"].dtype == jnp.float32


def test_rounding_is_to_a_neighbour_and_unbiased():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(64, 5)) * 10.0 ** rng.integers(-30, 30, (64, 1)), jnp.float32)
    up_and_down = np.stack(
        [
            np.asarray(jax.jit(optimizer._stochastic_round)(x, optimizer._mixed(jnp.uint32(seed))))
            for seed in range(2000)
        ]
    )
    assert up_and_down.dtype == jnp.bfloat16
    rounded, x = up_and_down.astype(np.float64), np.asarray(x, np.float64)
    step = 2.0 ** (np.floor(np.log2(np.abs(x))) - 7)  # Between neighbours in bfloat16.
    assert np.all(np.abs(rounded - x) < step)
    # The mean of 2,000 draws of width `step`: a standard deviation of at most 0.012 steps.
    np.testing.assert_array_less(np.abs(rounded.mean(0) - x) / step, 0.06)
    assert abs(((rounded.mean(0) - x) / step).mean()) < 0.002
    assert np.all(rounded.std(0) > 0)


def test_rounding_keeps_what_bfloat16_holds():
    x = np.array([0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 2.0**-120], np.float32)
    for seed in range(20):
        rounded = optimizer._stochastic_round(jnp.asarray(x), jnp.uint32(seed))
        np.testing.assert_array_equal(rounded.astype(jnp.float32), x)


def _after(moments, gradients, sharding=None):
    """Parameters and state after a step with each of the gradients."""
    ours = optimizer.head_optimizer(optax.constant_schedule(1e-3), moments)
    params = {"head": jax.tree.map(jnp.zeros_like, gradients[0]["head"])}
    state = ours.init(params)
    if sharding is not None:
        params, state = jax.device_put((params, state), (sharding, optax.ScaleByAdamState(
            None, sharding, sharding)))  # fmt: skip

    @jax.jit
    def step(params, state, gradient):
        updates, state = ours.update(gradient, state)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params["head"], state


def test_bfloat16_moments_do_not_stall():
    """1,500 steps: the second moment follows the variance of the gradient up, and down again."""
    rng = np.random.default_rng(3)
    spread = np.repeat([1.0, 0.1], [1000, 500])
    signal = rng.normal(size=(40, 10))  # Each entry drifts, so parameters move apart.
    gradients = [
        {"head": {"vectors": jnp.asarray(s * (signal + rng.normal(size=(40, 10))), jnp.float32)}}
        for s in spread
    ]
    (exact, of_exact), (ours, of_ours) = (_after(m, gradients) for m in ("float32", "bfloat16"))
    assert of_ours.mu["head"]["vectors"].dtype == of_ours.nu["head"]["vectors"].dtype
    assert of_ours.nu["head"]["vectors"].dtype == jnp.bfloat16
    ratio = np.asarray(of_ours.nu["head"]["vectors"], np.float64) / of_exact.nu["head"]["vectors"]
    assert abs(ratio.mean() - 1) < 0.01 and 0.005 < ratio.std() < 0.06
    nearest = jnp.asarray(of_exact.nu["head"]["vectors"]).astype(jnp.bfloat16)
    stalled = (0.999 * nearest.astype(jnp.float32)).astype(jnp.bfloat16)
    assert np.mean(stalled == nearest) == 1.0  # What rounding to the nearest would do.
    moved = np.asarray(exact["vectors"]).ravel()
    off = np.asarray(ours["vectors"]).ravel() - moved
    assert np.abs(off).max() < 0.02 * np.abs(moved).max()
    assert abs(np.polyfit(moved, off, 1)[0]) < 0.005  # Neither slower nor faster.


def test_bfloat16_moments_are_the_same_on_any_mesh_and_when_resumed():
    rng = np.random.default_rng(4)
    gradients = [{"head": _head(rng)} for _ in range(5)]
    mesh = sharding_lib.create_mesh(2, 4)
    rows = sharding_lib.rows_sharding(mesh)
    one, eight = _after("bfloat16", gradients), _after("bfloat16", gradients, rows)
    assert len(eight[1].nu["head"]["vectors"].addressable_shards) == 8
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    # No two steps, moments, arrays or rows are rounded by the same numbers.
    ours = optimizer.head_optimizer(optax.constant_schedule(1e-3), "bfloat16")
    equal = jnp.full((8, 64), 10.039, jnp.float32)  # Both moments are about half way.
    state = ours.init({"a": equal, "b": equal})
    _, first = ours.update({"a": equal, "b": equal}, state)
    _, second = ours.update({"a": equal, "b": equal}, state._replace(count=state.count + 1))
    ups = [np.asarray(x, np.float32) for x in jax.tree.leaves([first.mu, second.mu, first.nu])]
    ups = [row > row.mean() for x in ups for row in x]
    correlation = np.corrcoef(ups) - np.eye(len(ups))
    assert len(ups) == 48 and np.abs(correlation).max() < 0.6  # 4.8 standard deviations.


def test_the_head_changes_nothing_for_the_rest():
    rng = np.random.default_rng(5)
    rest = {
        "tower": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32),
                  "bias": jnp.asarray(rng.normal(size=4), jnp.float32)},
        "free": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
    }  # fmt: skip
    model = optimizer.make_optimizer(
        learning_rate=1e-2, label_learning_rate=3e-2, image_learning_rate=1e-2, weight_decay=0.1,
        warmup_steps=2, clip_norm=0.5, total_steps=9,
    )  # fmt: skip
    rate = optimizer.schedule(0.1, warmup_steps=0, total_steps=9)
    for moments in ("float32", "bfloat16"):
        head = optimizer.head_optimizer(rate, moments)
        both = optimizer.with_head(model, head)
        params = {"model": rest, "head": {"head": _head(rng)}}
        params["both"] = params["model"] | params["head"]
        optimizers = {"model": model, "head": head, "both": both}
        states = {name: one.init(params[name]) for name, one in optimizers.items()}
        for _ in range(4):
            g = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
                             params["both"])  # fmt: skip
            for name, one in optimizers.items():
                gradient = {part: g[part] for part in params[name]}
                updates, states[name] = jax.jit(one.update)(gradient, states[name], params[name])
                params[name] = optax.apply_updates(params[name], updates)
        expected = params["model"] | params["head"]
        jax.tree.map(np.testing.assert_array_equal, params["both"], expected)


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_moments_are_sharded_as_their_parameters(moments):
    mesh = sharding_lib.create_mesh(2, 4)
    boxed = {
        "tower": {"kernel": sharding_lib.boxed(jnp.zeros((8, 3)), "dm")},
        "head": {
            "vectors": sharding_lib.boxed(jnp.zeros((13, 4)), "ne"),
            "bias": sharding_lib.boxed(jnp.zeros(13), "n"),
        },
    }
    centroids = sharding_lib.boxed(jax.ShapeDtypeStruct((13, 4), jnp.float32), "ne")
    model = types.SimpleNamespace(
        mesh=mesh, table=types.SimpleNamespace(width=4, abstract_state=centroids)
    )
    rate = optax.constant_schedule(1e-3)
    both = optimizer.with_head(optax.adamw(rate), optimizer.head_optimizer(rate, moments))
    like = train_state.abstract_state(model, boxed, {}, both, num_queries=5)
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(like.opt_state):
        found.setdefault(sharding_lib.path_name(path).rsplit("/")[-1], []).append(x)
    rows = sharding_lib.rows_sharding(mesh)
    for name, shape in (("vectors", (16, 4)), ("bias", (16,))):
        assert [(x.shape, x.dtype, x.sharding.spec[0]) for x in found[name]] == [
            (shape, moments, rows.spec[0])
        ] * 2
    assert [x.sharding for x in found["kernel"]] == [like.params["tower"]["kernel"].sharding] * 2
    assert all(x.sharding.is_fully_replicated for x in found["count"])
