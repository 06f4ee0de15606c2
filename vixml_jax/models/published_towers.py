"""Published towers by name: the sizes in their config.json.

Enough to build a tower with random weights, or count its parameters, without a download.
"""

from typing import Any

from vixml_jax.errors import InputError
from vixml_jax.models import hf_configs, hf_names
from vixml_jax.models.tower import TowerConfig

_BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512}
_QWEN2 = {
    "model_type": "qwen2", "hidden_act": "silu", "max_position_embeddings": 32768,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": 32768,
}  # fmt: skip


def _bert(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        **_BERT, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }  # fmt: skip


def _decoder(
    width: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int
) -> dict[str, Any]:
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocab,
    }  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "sentence-transformers/paraphrase-MiniLM-L3-v2": _bert(384, 3, 12),
    "sentence-transformers/all-MiniLM-L6-v2": _bert(384, 6, 12),
    "distilbert/distilbert-base-uncased": {
        "model_type": "distilbert", "vocab_size": 30522, "dim": 768, "n_layers": 6, "n_heads": 12,
        "hidden_dim": 3072, "max_position_embeddings": 512, "sinusoidal_pos_embds": False,
    },
    "intfloat/e5-base-v2": _bert(768, 12, 12),
    "intfloat/multilingual-e5-base": {
        **_bert(768, 12, 12), "model_type": "xlm-roberta", "vocab_size": 250002,
        "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
        "pad_token_id": 1,
    },
    "sentence-transformers/all-mpnet-base-v2": {
        **_bert(768, 12, 12), "model_type": "mpnet", "vocab_size": 30527,
        "max_position_embeddings": 514, "layer_norm_eps": 1e-5, "pad_token_id": 1,
        "relative_attention_num_buckets": 32,
    },
    "answerdotai/ModernBERT-base": {
        "model_type": "modernbert", "vocab_size": 50368, "hidden_size": 768,
        "num_hidden_layers": 22, "num_attention_heads": 12, "intermediate_size": 1152,
        "max_position_embeddings": 8192, "norm_eps": 1e-5, "local_attention": 128,
        "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0,
    },
    "Qwen/Qwen2.5-0.5B-Instruct": {**_QWEN2, **_decoder(896, 24, 14, 2, 4864, 151936)},
    "Qwen/Qwen2.5-3B-Instruct": {**_QWEN2, **_decoder(2048, 36, 16, 2, 11008, 151936)},
    "Qwen/Qwen2.5-7B-Instruct": {**_QWEN2, **_decoder(3584, 28, 28, 4, 18944, 152064)},
    "meta-llama/Llama-3.2-3B-Instruct": {
        "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        **_decoder(3072, 28, 24, 8, 8192, 128256),
    },
    "google/gemma-3-4b-it": {
        "model_type": "gemma3",
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
                        "model_type": "gemma3_text", "num_hidden_layers": 34,
                        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                        "sliding_window": 1024},
        "vision_config": {},
    },
    "Qwen/Qwen3-Embedding-4B": {
        "model_type": "qwen3", "hidden_act": "silu", "attention_bias": False, "head_dim": 128,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 1000000, "use_sliding_window": False, "sliding_window": None,
        **_decoder(2560, 36, 32, 8, 9728, 151665),
    },
}  # fmt: skip


def about(name: str) -> dict[str, Any]:
    """The config.json of a tower, by its hub name or a beginning of that without its owner.

    "qwen2.5-0.5b" will do for "Qwen/Qwen2.5-0.5B-Instruct".

    Raises:
      InputError: If no tower is called so, or several are.
    """
    if name in CONFIGS:
        return CONFIGS[name]
    found = [one for one in CONFIGS if one.split("/")[1].lower().startswith(name.lower())]
    if len(found) != 1:
        raise InputError(f"--tower={name}: expected one of {', '.join(CONFIGS)}")
    return CONFIGS[found[0]]


def config_of(name: str) -> TowerConfig:
    """The sizes of a published tower."""
    return hf_configs.read_config(f"config.json of {name}", about(name), hf_names.TOWERS)[1]
