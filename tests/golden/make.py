"""Writes the golden files: tiny checkpoints, and the outputs of `transformers` (torch) for them.

Run `python -m tests.golden.make` where torch and transformers are installed. For each family it
replaces these files in tests/golden/<family>/:

  config.json, model.safetensors   written by `save_pretrained`
  expected.npz                     inputs and float32 outputs:
    text: tokens [b, s] and lengths [b]; states [layers + 1, b, s, d], embeddings first; final
      [b, s, d], the states after the final norm; mean and last [b, d], the pooled vectors. States
      are zero at padding.
    vision: pixels [b, height, width, 3]; pooled [b, d].

Inputs are the same each time. Outputs are bit-identical only with the same version of torch.
"""

import pathlib

import numpy as np
import torch

from tests import random_models

HERE = pathlib.Path(__file__).parent
LENGTHS = (20, 1, 9, 5)  # The first is longer than Gemma's sliding window.
_EPS = 1e-3  # Not the default, and large enough that a tower which ignores it fails.
_DECODER = dict(
    vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, rms_norm_eps=_EPS
)
TEXT = {
    "bert": dict(hidden_size=16, intermediate_size=24, layer_norm_eps=_EPS),
    "distilbert": dict(dim=18, hidden_dim=24),
    "qwen2": {**_DECODER, "rope_theta": 300.0},
    "qwen3": {**_DECODER, "head_dim": 8, "rope_theta": 300.0},
    "llama": {**_DECODER, "head_dim": 8},  # Has short, long and intermediate wavelengths.
    "gemma3_text": {**_DECODER, "head_dim": 8, "rope_theta": 300.0, "rope_local_base_freq": 30.0},
}
VISION = dict(
    image_size=16, patch_size=5, hidden_size=16, intermediate_size=24, layer_norm_eps=_EPS
)


def write(family, model, expected):
    """Writes a checkpoint with its inputs and outputs."""
    directory = HERE / family
    model.save_pretrained(directory)
    np.savez_compressed(directory / "expected.npz", **expected)


def text(model):
    """Inputs and outputs of an encoder or decoder."""
    rng = np.random.default_rng(0)
    lengths = np.array(LENGTHS)
    mask = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.where(mask, rng.integers(1, model.config.vocab_size, mask.shape), 0)
    last_layer = []  # The last of `hidden_states` is already normalised.
    if hasattr(model, "norm"):
        model.norm.register_forward_pre_hook(lambda _, args: last_layer.extend(args))
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            output_hidden_states=True,
        )
    final = output.last_hidden_state.numpy() * mask[..., None]
    states = [*output.hidden_states[:-1], *(last_layer or output.hidden_states[-1:])]
    return {
        "tokens": tokens.astype(np.int32),
        "lengths": lengths.astype(np.int32),
        "states": np.stack([x.numpy() for x in states]) * mask[..., None],
        "final": final,
        "mean": final.sum(1) / lengths[:, None].astype(np.float32),
        "last": final[np.arange(len(lengths)), lengths - 1],
    }


def vision(model):
    """Inputs and outputs of a vision tower."""
    side = model.config.image_size
    pixels = np.random.default_rng(0).normal(size=(2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        pooled = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).pooler_output
    return {"pixels": pixels, "pooled": pooled.numpy()}


def main():
    for family, changes in TEXT.items():
        model = random_models.text_model(family, **changes)
        write(family, model, text(model))
    model = random_models.vision_model(**VISION)
    write("siglip_vision_model", model, vision(model))


if __name__ == "__main__":
    main()
