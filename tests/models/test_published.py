"""Parameter counts of published checkpoints, from their config.json without any weights."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import linen as nn

from vixml_jax.errors import InputError
from vixml_jax.models import published_towers as towers
from vixml_jax.models.tower import Tower
from vixml_jax.structs import PackedItems

# Published numbers of parameters, without those that a tower lacks: pooler (BERT), untied output
# layer (Qwen2.5-7B), vision half (Gemma 3: 4,300,079,472 less 419,816,304).
PUBLISHED = {
    "sentence-transformers/paraphrase-MiniLM-L3-v2": 17_389_824 - (384 * 384 + 384),
    "sentence-transformers/all-MiniLM-L6-v2": 22_713_216 - (384 * 384 + 384),
    "distilbert/distilbert-base-uncased": 66_362_880,
    "intfloat/e5-base-v2": 109_482_240 - (768 * 768 + 768),
    "intfloat/multilingual-e5-base": 278_043_648 - (768 * 768 + 768),
    # Published with the pooler and 514 position ids.
    "sentence-transformers/all-mpnet-base-v2": 109_486_978 - (768 * 768 + 768) - 514,
    # Published with the head of its pretraining; the first block has a norm that is not used.
    "answerdotai/ModernBERT-base": 149_655_232 - (768 * 768 + 768 + 50368) + 768,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512 - 152064 * 3584,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "google/gemma-3-4b-it": 4_300_079_472 - 419_816_304,
    "Qwen/Qwen3-Embedding-4B": 4_021_774_336,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_of_parameters_are_those_published(name):
    config, count = towers.config_of(name), PUBLISHED[name]
    packed = PackedItems(*[np.zeros((1, 2), np.int32)] * 4, np.zeros((0, 1), np.float16))

    def num_parameters(config):
        params = jax.eval_shape(
            lambda: nn.unbox(Tower(config).init(jax.random.key(0), packed, 1, deterministic=True))
        )
        return sum(x.size for x in jax.tree.leaves(params))

    assert num_parameters(config) == count
    if hasattr(config, "lora_rank"):
        adapted = num_parameters(dataclasses.replace(config, lora_rank=16)) - count
        d, m, rank = config.width, config.mlp_width, 16
        q, kv = config.num_heads * config.head_width, config.num_kv_heads * config.head_width
        pairs = [(d, q), (d, kv), (d, kv), (q, d), (d, m), (d, m), (m, d)]
        assert adapted == config.num_layers * rank * sum(rows + columns for rows, columns in pairs)


def test_rope_of_llama_and_gemma():
    llama = towers.config_of("llama-3.2-3b")
    assert (llama.rope.theta, llama.rope.factor) == (500000.0, 32.0)
    assert llama.rope.original_positions == 8192
    gemma = towers.config_of("gemma-3-4b")
    assert (gemma.rope.theta, gemma.rope.factor, gemma.local_rope.theta) == (1e6, 8.0, 1e4)
    assert (gemma.window, gemma.slides.sum(), gemma.slides[5]) == (1024, 29, False)
    assert gemma.attention_scale == 256**-0.5 and gemma.embedding_scale == 2560**0.5


def test_positions_of_xlm_roberta_mpnet_and_modernbert():
    multilingual = towers.config_of("multilingual-e5")
    assert (multilingual.max_positions, multilingual.first_position) == (512, 2)
    mpnet = towers.config_of("all-mpnet")
    assert (mpnet.max_positions, mpnet.distance_buckets, mpnet.type_vocab_size) == (512, 32, 0)
    modern = towers.config_of("modernbert")
    assert (modern.rope.theta, modern.local_rope.theta, modern.window) == (160000.0, 10000.0, 65)
    assert [i for i in range(22) if not modern.slides[i]] == [0, 3, 6, 9, 12, 15, 18, 21]


def test_unknown_names_are_refused():
    assert PUBLISHED.keys() == towers.CONFIGS.keys()
    for name in ("qwen2.5", "gpt2"):
        with pytest.raises(InputError, match="expected one of sentence"):
            towers.config_of(name)
