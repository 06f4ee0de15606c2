"""Writes the golden files: tiny random checkpoints, and what `transformers` says of them.

    python tests/golden/make.py

Each family has a directory: config.json and model.safetensors as `transformers` saves them, and
expected.npz, float32:
  decoders and encoders: `words` and `lengths` of three texts (one after the other), `states`, the
    embeddings and the states of each layer of the longest, the final norm's last, `means` and
    `lasts` of the states of all, [3, d];
  siglip: `pixels` [2, side, side, 3] and `vectors` [2, d].
Made with torch 2.13.0 and transformers 5.23.0; anything newer should agree to 1e-5.
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
LENGTHS = (21, 5, 9)  # The longest is longer than Gemma's window.
DECODER = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip
LLAMA_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
FAMILIES = {
    "bert": transformers.BertModel(
        transformers.BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=24, max_position_embeddings=32,
        ),
        add_pooling_layer=False,
    ),
    "distilbert": transformers.DistilBertModel(
        transformers.DistilBertConfig(
            vocab_size=40, dim=16, n_layers=2, n_heads=4, hidden_dim=24,
            max_position_embeddings=32,
        )
    ),
    "qwen2": transformers.Qwen2Model(transformers.Qwen2Config(**DECODER)),
    "qwen3": transformers.Qwen3Model(transformers.Qwen3Config(**DECODER, head_dim=8)),
    "llama": transformers.LlamaModel(
        transformers.LlamaConfig(**DECODER, rope_scaling=LLAMA_ROPE)
    ),
    "gemma3_text": transformers.Gemma3TextModel(
        transformers.Gemma3TextConfig(
            **DECODER, head_dim=8, sliding_window=7, sliding_window_pattern=3,
            query_pre_attn_scalar=10, rope_scaling={"rope_type": "linear", "factor": 8.0},
        )
    ),
    "siglip": transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            image_size=16, patch_size=7,
        )
    ),
}  # fmt: skip


def randomise(model: torch.nn.Module, rng: np.random.Generator) -> None:
    """Moves every weight, biases and norms included, away from what it starts at."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            start = np.ones if "norm" in name.lower() and value.ndim == 1 else np.zeros
            drawn = start(value.shape) + rng.normal(size=value.shape) * 0.3
            value.copy_(torch.from_numpy(drawn.astype(np.float32)))


def texts_of(model: torch.nn.Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What the model says of three texts, each on its own."""
    texts = [rng.integers(1, 40, length) for length in LENGTHS]
    with torch.no_grad():
        found = [model(torch.from_numpy(words)[None], output_hidden_states=True) for words in texts]
    longest = [x[0].numpy() for x in found[0].hidden_states[:-1]]
    last = [x.last_hidden_state[0].numpy() for x in found]
    return {
        "words": np.concatenate(texts).astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "states": np.stack([*longest, last[0]]),
        "means": np.stack([x.mean(0) for x in last]),
        "lasts": np.stack([x[-1] for x in last]),
    }


def pictures_of(model: torch.nn.Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What the vision model says of two pictures."""
    side = model.config.image_size
    pixels = rng.normal(size=(2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        found = model(torch.from_numpy(pixels).permute(0, 3, 1, 2)).pooler_output
    return {"pixels": pixels, "vectors": found.numpy()}


def main() -> None:
    for family, model in FAMILIES.items():
        rng = np.random.default_rng(0)
        randomise(model.eval(), rng)
        path = HERE / family
        shutil.rmtree(path, ignore_errors=True)
        model.save_pretrained(path)
        said = (pictures_of if family == "siglip" else texts_of)(model, rng)
        np.savez_compressed(path / "expected.npz", **said)


if __name__ == "__main__":
    main()
