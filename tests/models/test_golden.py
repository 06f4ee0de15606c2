"""Towers against golden outputs of `transformers` (torch); neither library is needed."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import linen as nn

from vixml_jax.models import bert, decoder, hf_checkpoints
from vixml_jax.models.siglip import VisionTower
from vixml_jax.models.tower import Tower

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"  # Written by tests/golden/make.py.
ENCODERS = ("bert", "distilbert")
DECODERS = ("qwen2", "qwen3", "llama", "gemma3_text")
ROWS = [[1, 0], [2, 3]]


def read(family):
    """Directory of a checkpoint, and its expected outputs."""
    with np.load(GOLDEN / family / "expected.npz", allow_pickle=False) as file:
        return str(GOLDEN / family), dict(file)


@pytest.fixture(scope="module", params=ENCODERS + DECODERS)
def golden(request, pack):
    """Family, config, parameters, packed texts and expected outputs."""
    directory, expected = read(request.param)
    config, params = hf_checkpoints.load_hf_tower(directory)
    assert expected["lengths"].max() > getattr(config, "window", 0)
    items = [
        (tokens[:n], []) for tokens, n in zip(expected["tokens"], expected["lengths"], strict=True)
    ]
    return request.param, config, params, pack(items, ROWS, width=24), expected


def apply(config, params, packed, num_items):
    return Tower(config).apply({"params": params}, packed, num_items, deterministic=True)


@pytest.mark.parametrize("golden,pooling", [
    *[(family, "mean") for family in ENCODERS + DECODERS],
    *[(family, "last") for family in DECODERS],
], indirect=["golden"])  # fmt: skip
def test_pooled_vectors_of_texts_that_share_rows(golden, pooling):
    family, config, params, packed, expected = golden
    if config.pooling != pooling:
        config = dataclasses.replace(config, pooling=pooling)
    found = jax.jit(apply, static_argnums=(0, 3))(config, params, packed, len(expected["lengths"]))
    atol = 1e-5 if family in ENCODERS else 1e-4
    np.testing.assert_allclose(found, expected[pooling], rtol=0, atol=atol)


def test_embeddings_every_layer_and_the_final_norm(golden):
    _, config, params, packed, expected = golden
    config = dataclasses.replace(config, scan=False, remat=False)

    @jax.jit
    def run(params, packed):
        states, final = [], []

        def record(call, args, kwargs, context):
            output = call(*args, **kwargs)
            if context.method_name != "__call__":
                return output
            if isinstance(context.module, (bert.Block, decoder.Block)):
                states.extend([output[0]] if states else [args[0], output[0]])
            elif isinstance(context.module, (bert.Encoder, decoder.Decoder)):
                final.append(output)
            return output

        with nn.intercept_methods(record):
            apply(config, params, packed, len(expected["lengths"]))
        return states, final

    states, (final,) = run(params, packed)
    assert len(states) == len(expected["states"]) == config.num_layers + 1
    for item, length in enumerate(expected["lengths"]):
        here = packed.segments == item
        for layer, (found, golden_states) in enumerate(
            zip(states, expected["states"], strict=True)
        ):
            np.testing.assert_allclose(
                found[here], golden_states[item, :length], rtol=0, atol=1e-4,
                err_msg=f"text {item}, layer {layer}",
            )  # fmt: skip
        np.testing.assert_allclose(final[here], expected["final"][item, :length], rtol=0, atol=1e-4)


def test_vectors_of_images():
    directory, expected = read("siglip_vision_model")
    config, params = hf_checkpoints.load_hf_vision(directory)
    run = jax.jit(lambda params, pixels: VisionTower(config).apply({"params": params}, pixels))
    found = run(params, expected["pixels"])
    np.testing.assert_allclose(found, expected["pooled"], rtol=0, atol=1e-4)


def test_torch_and_transformers_are_not_imported():
    run = (
        "import sys, pytest; sys.modules.update(torch=None, transformers=None);"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    # One text tower and the vision tower.
    arguments = ["-q", __file__, "-k", "images or distilbert"]
    done = subprocess.run([sys.executable, "-c", run, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
