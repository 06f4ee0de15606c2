"""The config.json of published checkpoints: read, built without memory, counted."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from vixml_jax.models import hf_names
from vixml_jax.models.tower import Tower
from vixml_jax.structs import PackedItems

BERT = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512}
QWEN2 = {
    "model_type": "qwen2", "hidden_act": "silu", "max_position_embeddings": 32768,
    "rope_theta": 1e6, "rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": 32768,
}  # fmt: skip


def sizes(width, layers, heads, kv_heads, mlp, vocab):
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocab,
    }  # fmt: skip


# Parameters as published, less what a tower has not: pooler (BERT), untied output (Qwen2.5-7B),
# the vision half (Gemma 3: 4,300,079,472 less 419,816,304).
PUBLISHED = {
    "paraphrase-MiniLM-L3-v2": (
        {**BERT, "hidden_size": 384, "num_hidden_layers": 3, "num_attention_heads": 12,
         "intermediate_size": 1536},
        17_389_824 - (384 * 384 + 384),
    ),
    "distilbert-base-uncased": (
        {"model_type": "distilbert", "vocab_size": 30522, "dim": 768, "n_layers": 6,
         "n_heads": 12, "hidden_dim": 3072, "max_position_embeddings": 512,
         "sinusoidal_pos_embds": False},
        66_362_880,
    ),
    "intfloat/e5-base-v2": (
        {**BERT, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "intermediate_size": 3072},
        109_482_240 - (768 * 768 + 768),
    ),
    "Qwen/Qwen2.5-0.5B": ({**QWEN2, **sizes(896, 24, 14, 2, 4864, 151936)}, 494_032_768),
    "Qwen/Qwen2.5-3B": ({**QWEN2, **sizes(2048, 36, 16, 2, 11008, 151936)}, 3_085_938_688),
    "Qwen/Qwen2.5-7B": (
        {**QWEN2, **sizes(3584, 28, 28, 4, 18944, 152064)},
        7_615_616_512 - 152064 * 3584,
    ),
    "meta-llama/Llama-3.2-3B": (
        {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
         "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
         "rope_theta": 500000.0,
         "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                          "original_max_position_embeddings": 8192, "rope_type": "llama3"},
         **sizes(3072, 28, 24, 8, 8192, 128256)},
        3_212_749_824,
    ),
    "google/gemma-3-4b-it": (
        {"model_type": "gemma3",
         "text_config": {"hidden_size": 2560, "intermediate_size": 10240,
                         "model_type": "gemma3_text", "num_hidden_layers": 34,
                         "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                         "sliding_window": 1024},
         "vision_config": {}},
        4_300_079_472 - 419_816_304,
    ),
    "Qwen/Qwen3-Embedding-4B": (
        {"model_type": "qwen3", "hidden_act": "silu", "attention_bias": False, "head_dim": 128,
         "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_scaling": None,
         "rope_theta": 1000000, "use_sliding_window": False, "sliding_window": None,
         **sizes(2560, 36, 32, 8, 9728, 151665)},
        4_021_774_336,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    about, count = PUBLISHED[name]
    _, config = hf_names.read_config("config.json", about, hf_names.TOWERS)
    packed = PackedItems(*[np.zeros((1, 2), np.int32)] * 4, np.zeros((0, 1), np.float16))

    def counted(config):
        made = jax.eval_shape(
            lambda: nn.unbox(Tower(config).init(jax.random.key(0), packed, 1, deterministic=True))
        )
        return sum(x.size for x in jax.tree.leaves(made))

    assert counted(config) == count
    if hasattr(config, "lora_rank"):
        adapted = counted(dataclasses.replace(config, lora_rank=16)) - count
        d, m, rank = config.width, config.mlp_width, 16
        q, kv = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
        pairs = [(d, q), (d, kv), (d, kv), (q, d), (d, m), (d, m), (m, d)]
        assert adapted == config.num_layers * rank * sum(one + other for one, other in pairs)


def test_the_rope_of_llama_and_gemma():
    _, llama = hf_names.read_config(
        "config.json", PUBLISHED["meta-llama/Llama-3.2-3B"][0], hf_names.TOWERS
    )
    assert (llama.rope.theta, llama.rope.factor) == (500000.0, 32.0)
    assert llama.rope.original_positions == 8192
    _, gemma = hf_names.read_config(
        "config.json", PUBLISHED["google/gemma-3-4b-it"][0], hf_names.TOWERS
    )
    assert (gemma.rope.theta, gemma.rope.factor, gemma.local_rope.theta) == (1e6, 8.0, 1e4)
    assert (gemma.window, gemma.slides.sum(), gemma.slides[5]) == (1024, 29, False)
    assert gemma.attention_scale == 256**-0.5 and gemma.word_scale == 2560**0.5
