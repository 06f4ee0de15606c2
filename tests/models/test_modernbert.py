"""ModernBERT and MPNet: gradients against torch, local attention, biases by distance, dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors import torch as safetensors
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from tests import random_models
from vixml_jax.models import bert, hf_checkpoints, hf_export
from vixml_jax.models.tower import Tower

WEIGHTS = np.random.default_rng(2).normal(size=(4, 24)).astype(np.float32)
LENGTHS = (
    12,
    1,
    20,
    7,
)  # Longer than the window of local attention, and than MPNet's near buckets.


@pytest.fixture(scope="module", params=["modernbert", "mpnet"])
def loaded(request, tmp_path_factory, pack):
    """Model of torch, its directory, config, parameters, texts, and the same packed."""
    path, model = tmp_path_factory.mktemp("model"), random_models.text_model(request.param)
    model.save_pretrained(path)
    rng = np.random.default_rng(0)
    items = [(rng.integers(4, 50, length), []) for length in LENGTHS]
    packed = pack(items, [[1, 0, 3], [2]], width=24)
    return model, path, *hf_checkpoints.load_hf_tower(str(path)), items, packed


def vectors_of(config, params, packed, key=None):
    rngs = None if key is None else {"dropout": key}
    run = jax.jit(
        lambda p: Tower(config).apply({"params": p}, packed, 4, deterministic=not rngs, rngs=rngs)
    )
    return run(params)


def gradients_and_vectors(config, params, packed):
    def objective(params):
        vectors = vectors_of(config, params, packed)
        return jnp.sum(vectors * WEIGHTS), vectors

    return jax.jit(jax.grad(objective, has_aux=True))(params)


def assert_close(found, expected):
    """Gradients reach magnitudes of ten, so that they are compared relative to the largest."""
    np.testing.assert_allclose(found, expected, atol=3e-5 * max(1.0, np.abs(expected).max()))


def test_gradients_match_torch_with_and_without_scan(loaded, tmp_path):
    model, path, config, params, items, packed = loaded
    means = [
        model(input_ids=torch.tensor(tokens)[None]).last_hidden_state[0].mean(0)
        for tokens, _ in items
    ]
    torch.sum(torch.stack(means) * torch.tensor(WEIGHTS)).backward()
    # Loading torch's gradients as a checkpoint gives them our names and shapes.
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in model.named_parameters()
    }
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    safetensors.save_file(gradients, tmp_path / "model.safetensors")
    _, expected = hf_checkpoints.load_hf_tower(str(tmp_path))
    norm = expected["encoder"]["blocks"]["attention_norm"]["scale"]
    if model.config.model_type == "modernbert":  # The norm that the first block does not use.
        np.testing.assert_array_equal(norm[0], 1.0)
        expected["encoder"]["blocks"]["attention_norm"]["scale"] = norm.at[0].set(0.0)
    for changes in ({}, {"scan": True, "remat": True}):
        changed = dataclasses.replace(config, **changes)
        found, vectors = gradients_and_vectors(changed, params, packed)
        np.testing.assert_allclose(vectors, torch.stack(means).detach().numpy(), atol=1e-5)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        jax.tree.map(assert_close, found, expected)


def test_saved_again_it_is_the_same_checkpoint(loaded, tmp_path):
    model, path, config, params, *_ = loaded
    hf_export.save_hf_tower(str(tmp_path), params, config=config, like=str(path))
    saved = type(model).from_pretrained(tmp_path)
    for name, value in saved.named_parameters():
        if "pooler" not in name:
            assert torch.equal(value, dict(model.named_parameters())[name]), name


def test_each_dropout_applies_only_in_training(loaded):
    _, _, config, params, _, packed = loaded
    none = dataclasses.replace(config, dropout=0.0, attention_dropout=0.0)
    key = jax.random.key(0)
    exact = vectors_of(config, params, packed)
    np.testing.assert_allclose(vectors_of(none, params, packed, key), exact, atol=1e-5)
    for name in ("dropout", "attention_dropout"):
        some = dataclasses.replace(none, **{name: 0.3})
        found = vectors_of(some, params, packed, key)
        assert np.abs(found - exact).max() > 1e-2


def test_buckets_of_distances_are_those_of_transformers():
    ahead = np.arange(-600, 601)
    expected = MPNetEncoder.relative_position_bucket(torch.tensor(ahead)).numpy()
    np.testing.assert_array_equal(bert.distance_buckets(ahead, 32), expected)
