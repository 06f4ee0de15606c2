"""Towers against golden files of `transformers` (tests/golden/make.py); torch is not needed."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vixml_jax.models import hf
from vixml_jax.models.decoder import Decoder
from vixml_jax.models.siglip import VisionTower
from vixml_jax.models.tower import Tower

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
ENCODERS, DECODERS = ("bert", "distilbert"), ("qwen2", "qwen3", "llama", "gemma3_text")


def open_golden(family):
    with np.load(GOLDEN / family / "expected.npz", allow_pickle=False) as expected:
        return dict(expected)


def texts_of(expected):
    return [(words, []) for words in np.split(expected["words"], expected["lengths"].cumsum()[:-1])]


@pytest.mark.parametrize(
    "family,pooling",
    [(f, "means") for f in (*ENCODERS, *DECODERS)] + [(f, "lasts") for f in DECODERS],
)
def test_pooled_vectors(family, pooling, pack):
    expected = open_golden(family)
    config, params = hf.load_hf_tower(str(GOLDEN / family))
    if pooling == "lasts":
        config = dataclasses.replace(config, pooling="last")
    packed = pack(texts_of(expected), [[2, 1], [0]], width=24)
    found = jax.jit(
        lambda params: Tower(config).apply({"params": params}, packed, 3, deterministic=True)
    )(params)
    np.testing.assert_allclose(found, expected[pooling], atol=1e-4)


@pytest.mark.parametrize("family", DECODERS)
def test_every_layer_of_a_decoder(family, pack):
    expected = open_golden(family)
    config, params = hf.load_hf_tower(str(GOLDEN / family))
    text = texts_of(expected)[0]
    length = len(text[0])
    packed = pack([text], [[0]], width=24)
    x = jnp.asarray(params["word_embeddings"])[packed.tokens] * config.word_scale
    np.testing.assert_allclose(x[0, :length], expected["states"][0], atol=1e-5)
    for layer in range(1, config.num_layers + 1):
        weights = {**params["encoder"]}
        weights["blocks"] = jax.tree.map(lambda w, n=layer: w[:n], weights["blocks"])
        wanted = expected["states"][layer]
        if layer < config.num_layers:
            # With unit weights the final norm only divides by the length.
            scale = np.zeros if config.unit_offset else np.ones
            weights["final_norm"] = {"scale": scale(config.width, np.float32)}
            square = np.mean(wanted**2, axis=-1, keepdims=True)
            wanted = wanted / np.sqrt(square + config.norm_eps)
        found = Decoder(dataclasses.replace(config, num_layers=layer)).apply(
            {"params": weights}, x, packed.positions, packed.segments, deterministic=True
        )
        np.testing.assert_allclose(found[0, :length], wanted, atol=1e-4, err_msg=f"layer {layer}")


def test_pictures():
    expected = open_golden("siglip")
    config, params = hf.load_hf_vision(str(GOLDEN / "siglip"))
    found = VisionTower(config).apply({"params": params}, expected["pixels"])
    np.testing.assert_allclose(found, expected["vectors"], atol=1e-4)


def test_none_of_it_needs_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import pytest; "
        f"sys.exit(pytest.main(['-q', '-k', 'bert or pictures', {__file__!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
