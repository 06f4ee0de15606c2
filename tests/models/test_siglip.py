"""The vision tower against `transformers` (torch), from pixels to pooled vectors."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from tests import random_models
from vixml_jax.errors import InputError
from vixml_jax.models import hf_checkpoints
from vixml_jax.models.siglip import SiglipConfig, VisionTower

SIZES = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)


def vectors(config, params, pixels):
    run = jax.jit(lambda params, pixels: VisionTower(config).apply({"params": params}, pixels))
    return np.asarray(run(params, pixels))


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    "image_size,patch_size", [(32, 7), (28, 14)]
)  # With and without leftover pixels.
def test_vectors_match_transformers(image_size, patch_size, scan, tmp_path):
    model = random_models.vision_model(image_size=image_size, patch_size=patch_size)
    model.save_pretrained(tmp_path)
    config, params = hf_checkpoints.load_hf_vision(str(tmp_path))
    config = dataclasses.replace(config, scan=scan)
    pixels = np.random.default_rng(0).normal(size=(3, image_size, image_size, 3))
    pixels = pixels.astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).pooler_output
    np.testing.assert_allclose(vectors(config, params, pixels), expected, atol=1e-4)


def test_the_vision_half_of_a_siglip_model(tmp_path):
    text = dict(vocab_size=30, max_position_embeddings=8, **SIZES)
    vision = dict(image_size=16, patch_size=8, **SIZES)
    config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    model = random_models.draw(transformers.SiglipModel, config, 0.1)
    model.save_pretrained(tmp_path)
    config, params = hf_checkpoints.load_hf_vision(str(tmp_path))
    pixels = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model.get_image_features(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    expected = getattr(expected, "pooler_output", expected)
    np.testing.assert_allclose(vectors(config, params, pixels), expected, atol=1e-4)


def test_parameters_have_the_structure_of_init(tmp_path):
    random_models.vision_model().save_pretrained(tmp_path)
    config, params = hf_checkpoints.load_hf_vision(str(tmp_path))
    fresh = jax.eval_shape(
        lambda: nn.unbox(VisionTower(config).init(jax.random.key(0), np.zeros((1, 32, 32, 3))))
    )["params"]
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, params)


@pytest.mark.parametrize("sizes,count", [
    # so400m-patch14-384 and base-patch16-224; numbers of parameters from transformers.
    (dict(image_size=384, patch_size=14, num_layers=27, width=1152, num_heads=16,
          mlp_width=4304), 428_225_600),
    (dict(), 92_884_224),
])  # fmt: skip
def test_numbers_of_parameters_of_published_sizes(sizes, count):
    config = SiglipConfig(**sizes)
    shape = (1, config.image_size, config.image_size, 3)
    fresh = jax.eval_shape(
        lambda: nn.unbox(VisionTower(config).init(jax.random.key(0), np.zeros(shape, np.float32)))
    )
    assert sum(x.size for x in jax.tree.leaves(fresh)) == count


def test_unsupported_models_are_refused(tmp_path):
    random_models.vision_model().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="model_type is 'siglip_vision_model', expected one of"):
        hf_checkpoints.load_hf_tower(str(tmp_path))
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "hidden_act": "relu"}))
    with pytest.raises(InputError, match="hidden_act is 'relu'"):
        hf_checkpoints.load_hf_vision(str(tmp_path))
