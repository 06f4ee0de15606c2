"""The prototype network against `torch.nn.TransformerEncoderLayer` with equal weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from vixml_jax.labels.prototypes import Combiner

WIDTH, HEADS, MLP = 16, 4, 24


def torch_layer(width=WIDTH, heads=HEADS, mlp=MLP):
    return torch.nn.TransformerEncoderLayer(
        width, heads, mlp, dropout=0.1, activation="gelu", batch_first=True
    )


def our_params(layer, read=lambda value: value.detach().numpy()):
    """The torch layer's weights with our names and shapes."""
    weight, bias = read(layer.self_attn.in_proj_weight), read(layer.self_attn.in_proj_bias)
    split = {
        name: {
            "kernel": w.T.reshape(WIDTH, HEADS, WIDTH // HEADS),
            "bias": b.reshape(HEADS, WIDTH // HEADS),
        }
        for name, w, b in zip(
            ("query", "key", "value"), np.split(weight, 3), np.split(bias, 3), strict=True
        )
    }
    out, up, down = layer.self_attn.out_proj, layer.linear1, layer.linear2
    return {
        **split,
        "out": {
            "kernel": read(out.weight).T.reshape(HEADS, WIDTH // HEADS, WIDTH),
            "bias": read(out.bias),
        },
        "up": {"kernel": read(up.weight).T, "bias": read(up.bias)},
        "down": {"kernel": read(down.weight).T, "bias": read(down.bias)},
        "attention_norm": {"scale": read(layer.norm1.weight), "bias": read(layer.norm1.bias)},
        "mlp_norm": {"scale": read(layer.norm2.weight), "bias": read(layer.norm2.bias)},
    }


def inputs(rng, num_labels=9):
    """Inputs with the norms they have in training: large, tiny, and at most one or zero."""
    u, free, centroid = rng.normal(size=(3, num_labels, WIDTH))
    centroid[::3] = 0
    return [x.astype(np.float32) for x in (3 * u, 0.01 * free, 0.2 * centroid)]


@pytest.mark.parametrize("seed", range(3))
def test_outputs_and_gradients_match_torch(seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    layer = torch_layer().eval()
    with torch.no_grad():
        for value in layer.parameters():
            value.add_(torch.randn(value.shape) * 0.1)
    x = inputs(rng)
    torch_x = [torch.tensor(value, requires_grad=True) for value in x]
    weights = rng.normal(size=(9, WIDTH)).astype(np.float32)
    out = torch.nn.functional.normalize(layer(torch.stack(torch_x, dim=1)).mean(1), dim=-1)
    torch.sum(out * torch.tensor(weights)).backward()

    combiner, params = Combiner(HEADS, MLP), our_params(layer)

    def objective(params, x):
        z = combiner.apply({"params": params}, *x, deterministic=True)
        return jnp.sum(z * weights), z

    (gradients, input_gradients), z = jax.jit(jax.grad(objective, (0, 1), has_aux=True))(params, x)
    np.testing.assert_allclose(z, out.detach().numpy(), atol=1e-6)
    expected = our_params(layer, lambda value: value.grad.numpy())
    assert jax.tree.structure(gradients) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, expected)
    for found, value in zip(input_gradients, torch_x, strict=True):
        np.testing.assert_allclose(found, value.grad.numpy(), atol=1e-5)


def test_weights_are_initialised_as_in_torch():
    u = jnp.zeros((1, 64))
    make = jax.jit(lambda: Combiner(8, 256).init(jax.random.key(0), u, u, u, deterministic=True))
    params = nn.unbox(make())["params"]
    torch.manual_seed(0)
    layer = torch_layer(64, 8, 256)
    pairs = [
        (params["query"]["kernel"], layer.self_attn.in_proj_weight),
        (params["key"]["kernel"], layer.self_attn.in_proj_weight),
        (params["value"]["kernel"], layer.self_attn.in_proj_weight),
        (params["value"]["bias"], layer.self_attn.in_proj_bias),
        (params["out"]["kernel"], layer.self_attn.out_proj.weight),
        (params["out"]["bias"], layer.self_attn.out_proj.bias),
        (params["up"]["kernel"], layer.linear1.weight),
        (params["up"]["bias"], layer.linear1.bias),
        (params["down"]["kernel"], layer.linear2.weight),
        (params["down"]["bias"], layer.linear2.bias),
        (params["attention_norm"]["scale"], layer.norm1.weight),
        (params["mlp_norm"]["bias"], layer.norm2.bias),
    ]
    for found, expected in pairs:
        expected = expected.detach().numpy()
        np.testing.assert_allclose(np.std(found), np.std(expected), rtol=0.2)
        np.testing.assert_allclose(np.abs(found).max(), np.abs(expected).max(), rtol=0.1)
        np.testing.assert_allclose(np.mean(found), np.mean(expected), atol=0.02)


def test_the_order_of_the_three_tokens_does_not_matter():
    x = inputs(np.random.default_rng(0))
    params = our_params(torch_layer())
    first, second = (
        Combiner(HEADS, MLP).apply({"params": params}, *order, deterministic=True)
        for order in (x, x[::-1])
    )
    np.testing.assert_allclose(first, second, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-6)


def test_dropout_applies_only_in_training():
    x = inputs(np.random.default_rng(0))
    params = our_params(torch_layer())

    def run(rate, key):
        return Combiner(HEADS, MLP, rate).apply(
            {"params": params}, *x, deterministic=False, rngs={"dropout": jax.random.key(key)}
        )

    exact = Combiner(HEADS, MLP, 0.5).apply({"params": params}, *x, deterministic=True)
    np.testing.assert_allclose(run(0.0, 0), exact, atol=1e-6)
    np.testing.assert_array_equal(run(0.1, 0), run(0.1, 0))
    assert np.abs(run(0.1, 0) - exact).max() > 1e-2
    assert not np.allclose(run(0.1, 0), run(0.1, 1))


def test_a_zero_mean_has_a_finite_gradient():
    layer = torch_layer()
    params = our_params(layer)
    params["mlp_norm"] = {"scale": np.zeros(WIDTH, np.float32), "bias": np.zeros(WIDTH, np.float32)}
    x = inputs(np.random.default_rng(0))

    def objective(params):
        return jnp.sum(Combiner(HEADS, MLP).apply({"params": params}, *x, deterministic=True))

    value, gradients = jax.jit(jax.value_and_grad(objective))(params)
    assert value == 0.0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
