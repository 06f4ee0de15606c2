"""The BERT encoder: scan and remat, gradients against torch, dropout, sharding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from safetensors import torch as safetensors

from vixml_jax.models import hf_checkpoints, layers
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.tower import Tower
from vixml_jax.parallel import sharding

TINY = BertConfig(
    vocab_size=40, num_layers=2, width=16, num_heads=4, mlp_width=24, max_positions=20,
)  # fmt: skip
WEIGHTS = np.random.default_rng(2).normal(size=(5, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def packed(pack, draw_items):
    items = draw_items(np.random.default_rng(1), 5, vocab_size=40, longest=8)
    return pack(items, [[0, 1], [2, 3], [4]], width=18)


def init(config, packed):
    make = jax.jit(lambda: Tower(config).init(jax.random.key(0), packed, 5, deterministic=True))
    return nn.unbox(make())["params"]


@pytest.fixture(scope="module")
def params(packed):
    """Random parameters; no norm or bias has its initial value of one or zero."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), init(TINY, packed)
    )


def objective(config, params, packed, key=None):
    """A weighted sum of the vectors, and the vectors."""
    vectors = Tower(config).apply(
        {"params": params}, packed, 5, deterministic=key is None,
        rngs=None if key is None else {"dropout": key},
    )  # fmt: skip
    return jnp.sum(vectors * WEIGHTS), vectors


@functools.cache
def _compiled(config, with_gradients):
    def run(*operands):
        return objective(config, *operands)

    return jax.jit(jax.grad(run, has_aux=True) if with_gradients else run)


def gradients_and_vectors(config, params, packed, key=None):
    return _compiled(config, True)(params, packed, key)


def vectors(config, params, packed, key=None):
    return _compiled(config, False)(params, packed, key)[1]


def assert_trees_close(found, expected, atol):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, expected)


@pytest.mark.parametrize("scan,remat", [(False, True), (True, False), (True, True)])
def test_scan_and_remat_do_not_change_vectors_or_gradients(packed, params, scan, remat):
    other = dataclasses.replace(TINY, scan=scan, remat=remat)
    gradients, found = gradients_and_vectors(other, params, packed)
    expected_gradients, expected = gradients_and_vectors(TINY, params, packed)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert_trees_close(gradients, expected_gradients, atol=2e-5)


def test_dropout_is_the_same_with_scan_and_remat(packed, params):
    key, other = jax.random.key(3), dataclasses.replace(TINY, scan=True, remat=True)
    np.testing.assert_allclose(
        vectors(other, params, packed, key), vectors(TINY, params, packed, key), atol=2e-6
    )


def test_scan_and_remat_appear_in_the_program(packed, params):
    def text(**changes):
        config = dataclasses.replace(TINY, **changes)
        run = jax.grad(lambda p: objective(config, p, packed)[0])
        return str(jax.make_jaxpr(run)(params))

    assert "scan[" not in text() and "remat" not in text()
    assert "scan[" in text(scan=True) and "remat" in text(remat=True)


def test_blocks_are_stacked_and_initialised_as_in_bert(packed):
    config = dataclasses.replace(TINY, width=64, mlp_width=128, num_layers=2)
    blocks = init(config, packed)["encoder"]["blocks"]
    assert blocks["query"]["kernel"].shape == (2, 64, 4, 16)
    assert blocks["down"]["kernel"].shape == (2, 128, 64)
    assert not np.allclose(*blocks["up"]["kernel"])  # Each layer has its own random weights.
    np.testing.assert_allclose(np.std(blocks["up"]["kernel"]), 0.02, rtol=0.05)
    assert not np.any(blocks["up"]["bias"])
    assert np.all(blocks["mlp_norm"]["scale"] == 1)


def test_gradients_match_torch(tmp_path, pack, draw_items):
    torch.manual_seed(0)
    hf_config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=24, max_position_embeddings=20,
    )  # fmt: skip
    model = transformers.BertModel(hf_config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    items = draw_items(rng, 5, vocab_size=40, longest=8)
    means = [
        model(input_ids=torch.tensor(tokens)[None]).last_hidden_state[0].mean(0)
        for tokens, _ in items
    ]
    torch.sum(torch.stack(means) * torch.tensor(WEIGHTS)).backward()

    config, params = hf_checkpoints.load_hf_tower(str(tmp_path))
    packed = pack(items, [[4, 2], [1, 0, 3]], width=24)
    found, _ = gradients_and_vectors(config, params, packed)
    # Writing and loading torch's gradients as a checkpoint gives them our names and shapes.
    safetensors.save_file(
        {name: value.grad for name, value in model.named_parameters()},
        tmp_path / "model.safetensors",
    )
    _, expected = hf_checkpoints.load_hf_tower(str(tmp_path))
    assert_trees_close(found, expected, atol=2e-5)


def test_bfloat16_vectors_are_close_and_returned_as_float32(packed, params):
    half = dataclasses.replace(TINY, dtype="bfloat16")
    _, exact = gradients_and_vectors(TINY, params, packed)
    gradients, found = gradients_and_vectors(half, params, packed)
    assert found.dtype == jnp.float32
    error = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert 1e-5 < error.max() < 0.03
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("rate_name", ["dropout", "attention_dropout"])
def test_each_dropout_applies_only_in_training(packed, params, rate_name):
    none = dataclasses.replace(TINY, dropout=0.0, attention_dropout=0.0)
    some, key = dataclasses.replace(none, **{rate_name: 0.3}), jax.random.key(0)
    _, exact = gradients_and_vectors(TINY, params, packed)
    np.testing.assert_allclose(vectors(none, params, packed, key), exact, atol=1e-6)
    found = vectors(some, params, packed, key)
    assert np.abs(found - exact).max() > 1e-2
    np.testing.assert_array_equal(found, vectors(some, params, packed, key))
    assert not np.allclose(found, vectors(some, params, packed, jax.random.key(1)))


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("width", [1, 400, 401])
def test_dropout_rate_and_independence(rate, width):
    x = np.asarray(layers.dropout(jnp.ones((300, width)), rate, jax.random.key(0)))
    kept = x[x != 0]
    np.testing.assert_allclose(kept, 1 / (1 - rate), rtol=2e-5)
    # Within four or five standard deviations: overall, by column, and of pairs of neighbours.
    deviation = (rate * (1 - rate)) ** 0.5
    np.testing.assert_allclose(np.mean(x == 0), rate, atol=4 * deviation / x.size**0.5)
    np.testing.assert_allclose(np.mean(x == 0, 0), rate, atol=5 * deviation / 300**0.5)
    half = (width + 1) // 2
    for a, b in ((x[:, : width // 2], x[:, half:]), (x[:, :-1], x[:, 1:]), (x[:-1], x[1:])):
        if a.size:
            both = np.mean((a == 0) & (b == 0))
            np.testing.assert_allclose(both, rate**2, atol=5 * rate / a.size**0.5)


def test_gelu_and_its_derivative_are_exact():
    x = jnp.linspace(-8, 8, 2001)
    exact = torch.tensor(np.asarray(x), dtype=torch.float64, requires_grad=True)
    y = torch.nn.functional.gelu(exact)
    y.sum().backward()
    np.testing.assert_allclose(layers.gelu(x), y.detach().numpy(), atol=1e-6)
    derivative = jax.vmap(jax.grad(layers.gelu))(x)
    np.testing.assert_allclose(derivative, exact.grad.numpy(), atol=1e-6)


def test_eight_devices_match_one_device(packed, params):
    boxed = jax.eval_shape(
        lambda: Tower(TINY).init(jax.random.key(0), packed, 1, deterministic=True)
    )["params"]
    mesh = sharding.create_mesh(2, 2, 2)
    shardings = jax.tree.map(lambda x: x.sharding, sharding.stored_tree(boxed, mesh))
    sharded = jax.device_put(params, shardings)
    assert not sharded["encoder"]["blocks"]["up"]["kernel"].is_fully_replicated
    rows = jax.device_put(packed, sharding.replicated(mesh))
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.AXIS_RULES):
        gradients, found = gradients_and_vectors(TINY, sharded, rows)
    expected_gradients, expected = gradients_and_vectors(TINY, params, packed)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert_trees_close(gradients, expected_gradients, atol=2e-5)
