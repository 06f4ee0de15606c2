"""Tiny models of `transformers` (torch) with random weights, for tests and golden files."""

import torch
import transformers

_DECODER = dict(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
)  # fmt: skip
_LLAMA_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

# model_type -> (config class, model class, sizes).
ENCODERS = {
    "bert": (
        transformers.BertConfig,
        transformers.BertModel,
        dict(vocab_size=50, max_position_embeddings=32, hidden_size=24, num_hidden_layers=3,
             num_attention_heads=4, intermediate_size=40),
    ),
    "distilbert": (
        transformers.DistilBertConfig,
        transformers.DistilBertModel,
        dict(vocab_size=50, max_position_embeddings=32, dim=24, n_layers=2, n_heads=3,
             hidden_dim=36),
    ),
}  # fmt: skip
_ROBERTA = dict(
    vocab_size=50, max_position_embeddings=34, hidden_size=24, num_hidden_layers=2,
    num_attention_heads=4, intermediate_size=40,
)  # fmt: skip
ENCODERS |= {
    "roberta": (
        transformers.RobertaConfig,
        transformers.RobertaModel,
        {**_ROBERTA, "type_vocab_size": 1},
    ),
    "xlm-roberta": (
        transformers.XLMRobertaConfig,
        transformers.XLMRobertaModel,
        {**_ROBERTA, "pad_token_id": 3},
    ),
    "mpnet": (transformers.MPNetConfig, transformers.MPNetModel, _ROBERTA),
    "modernbert": (
        transformers.ModernBertConfig,
        transformers.ModernBertModel,
        dict(vocab_size=50, max_position_embeddings=32, hidden_size=24, num_hidden_layers=4,
             num_attention_heads=3, intermediate_size=40, local_attention=6, pad_token_id=0,
             eos_token_id=2, bos_token_id=1, cls_token_id=1, sep_token_id=2,
             rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 500.0},
                              "sliding_attention": {"rope_type": "default", "rope_theta": 90.0}}),
    ),
}  # fmt: skip
DECODERS = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2Model, _DECODER),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3Model, {**_DECODER, "head_dim": 16}),
    "llama": (
        transformers.LlamaConfig,
        transformers.LlamaModel,
        {**_DECODER, "rope_scaling": _LLAMA_ROPE},
    ),
    "gemma3_text": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3TextModel,
        {
            **_DECODER, "head_dim": 16, "sliding_window": 7, "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 20,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
}  # fmt: skip
VISION = dict(
    image_size=32, patch_size=7, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
    num_attention_heads=4,
)  # fmt: skip


def draw(model, config, scale, seed=0):
    """A model with random weights, including norms and biases.

    Args:
      model: Model class.
      config: Instance of its config class.
      scale: Standard deviation of the noise added to initial weights other than those of norms.
      seed: Random seed.
    """
    torch.manual_seed(seed)
    drawn = model(config).eval()
    with torch.no_grad():
        for name, value in drawn.named_parameters():
            value.add_(torch.randn(value.shape) * (0.3 if "norm" in name.lower() else scale))
    return drawn


def text_model(family, seed=0, **changes):
    """An encoder or decoder; `changes` replace fields of its config."""
    config_class, model_class, sizes = (ENCODERS | DECODERS)[family]
    config = config_class(**{**sizes, **changes}, attn_implementation="eager")
    return draw(model_class, config, 0.3 if family in ENCODERS else 0.15, seed)


def vision_model(seed=0, **changes):
    """A SigLIP vision tower with its pooling head; `changes` replace fields of its config."""
    config = transformers.SiglipVisionConfig(**{**VISION, **changes})
    return draw(transformers.SiglipVisionModel, config, 0.1, seed)
