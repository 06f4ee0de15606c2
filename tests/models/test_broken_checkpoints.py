"""Checkpoints as people have them: with prefixes, incomplete, or broken; each fault is one line."""

import json

import jax
import numpy as np
import pytest
import torch
from safetensors import torch as safetensors

from tests import random_models
from vixml_jax.errors import InputError
from vixml_jax.models import hf_checkpoints

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 22713216\n"


@pytest.fixture
def model():
    return random_models.text_model("bert", num_hidden_layers=2)


def refusal(path):
    """The message for a broken directory: one short line that names it."""
    with pytest.raises(InputError) as error:
        hf_checkpoints.load_hf_tower(str(path))
    message = str(error.value)
    assert "\n" not in message and str(path) in message
    assert len(message) - 2 * len(str(path)) < 350, message
    return message


@pytest.mark.parametrize("family,prefix", [
    ("bert", "module."),
    ("bert", "0.auto_model."),
    ("bert", "module.0.auto_model."),
    ("bert", "_orig_mod.model.bert."),
    ("mpnet", "encoder."),  # Also what names within the tower begin with.
    ("roberta", "text_encoder.roberta."),
    ("qwen2", "base_model.model.model."),
    ("modernbert", "module.model."),
])  # fmt: skip
def test_any_prefix_is_found(family, prefix, tmp_path):
    model = random_models.text_model(family)
    model.save_pretrained(tmp_path)
    _, plain = hf_checkpoints.load_hf_tower(str(tmp_path))
    state = {prefix + name: value.clone() for name, value in model.state_dict().items()}
    outer = prefix.split(".")[0] + "."
    state |= {
        outer + "cls.predictions.bias": torch.zeros(3),
        outer + "lm_head.layer_norm.weight": torch.zeros(3),
        "classifier.weight": torch.zeros(3),
    }
    safetensors.save_file(state, tmp_path / "model.safetensors")
    _, found = hf_checkpoints.load_hf_tower(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, plain, found)


def test_a_dense_layer_among_the_weights_is_not_dropped(model, tmp_path):
    model.save_pretrained(tmp_path)
    state = {"0.auto_model." + name: value for name, value in model.state_dict().items()}
    state["2.linear.weight"] = torch.zeros(8, 24)
    safetensors.save_file(state, tmp_path / "model.safetensors")
    assert "2.linear.weight is unexpected" in refusal(tmp_path)


def test_two_models_in_a_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    state = {
        prefix + name: value.clone()
        for prefix in ("query.", "passage.")
        for name, value in model.state_dict().items()
    }
    safetensors.save_file(state, tmp_path / "model.safetensors")
    assert "holds 2 models, with the prefixes 'passage.' and 'query.'" in refusal(tmp_path)


@pytest.mark.parametrize("name,value", [
    ("encoder.layer.1.output.dense.weight", float("nan")),
    ("embeddings.word_embeddings.weight", float("inf")),
    ("embeddings.LayerNorm.bias", float("-inf")),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite(name, value, dtype, model, tmp_path):
    model.to(dtype).save_pretrained(tmp_path)
    state = model.state_dict()
    state[name].view(-1)[-1] = value
    safetensors.save_file(state, tmp_path / "model.safetensors")
    assert f"{name} holds NaN or infinite values" in refusal(tmp_path)


def test_a_lost_file_of_several(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 2
    parts[1].unlink()
    message = refusal(tmp_path)
    assert f"{parts[1].name}: not found; 1 of the {len(parts)} files in" in message
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "its parts need model.safetensors.index.json" in refusal(tmp_path)
    # One part under the name of a complete file: many tensors are missing, few are listed.
    parts[0].rename(tmp_path / "model.safetensors")
    assert "more of this kind" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_an_index_without_files(content, model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "weight_map" in refusal(tmp_path)


@pytest.mark.parametrize("name", [
    "model.safetensors", "config.json", "model.safetensors.index.json"
])  # fmt: skip
def test_pointers_of_git_lfs(name, model, tmp_path):
    model.save_pretrained(tmp_path)
    if "index" in name:
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text(LFS)
    message = refusal(tmp_path)
    assert f"{name}: a git-lfs pointer" in message and "git lfs pull" in message


@pytest.mark.parametrize("content", [b"", b"\x00" * 4, b"PK\x03\x04 a zip file of torch"])
def test_files_that_are_no_safetensors(content, model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors: truncated or not safetensors" in refusal(tmp_path)


def test_weights_in_a_pickle(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    message = refusal(tmp_path)
    assert "model.safetensors: not found" in message and "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_adapters_are_not_left_out(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    assert "holds adapters (adapter_config.json), which are not read" in refusal(tmp_path)


def test_quantised_weights(model, tmp_path):
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    name = "encoder.layer.0.intermediate.dense.weight"
    state[name] = (state[name] * 10).to(torch.int8)
    safetensors.save_file(state, tmp_path / "model.safetensors")
    assert f"{name} has dtype I8, expected one of F32" in refusal(tmp_path)


def test_double_precision_is_read(model, tmp_path):
    model.save_pretrained(tmp_path)
    _, single = hf_checkpoints.load_hf_tower(str(tmp_path))
    model.double().save_pretrained(tmp_path)
    _, double = hf_checkpoints.load_hf_tower(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, single, double)
