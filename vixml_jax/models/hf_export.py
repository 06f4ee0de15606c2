"""Writes towers as Hugging Face checkpoints, for `transformers`, and adapters for `peft`."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from vixml_jax.errors import InputError
from vixml_jax.models import hf_configs, hf_files, hf_names
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.models.hf_checkpoints import sizes_of
from vixml_jax.models.tower import TowerConfig
from vixml_jax.storage import atomic, json_files


def save_hf_tower(
    directory: str, params: Mapping[str, Any], *, config: TowerConfig, like: str | None
) -> None:
    """Writes a directory that `transformers.AutoModel.from_pretrained` loads.

    Adapters are merged into their weights. The image projection, for which Hugging Face has no
    name, is not written.

    Args:
      directory: Created if needed; its model.safetensors and config.json are replaced.
      params: Parameters of the tower.
      config: Sizes of the tower, including its adapters.
      like: The Hugging Face directory or name that the tower was loaded from, whose config.json is
        copied; None if the tower was trained from random weights.

    Raises:
      InputError: If `like` is of another family or size than the tower.
    """
    import safetensors.numpy

    if like is None:
        path, fields = directory, hf_configs.write_config(config)
    else:
        path = hf_files.config_path(like)
        fields = hf_files.read_json(path)
    if fields.get("model_type") == "gemma3":
        fields = {"model_type": "gemma3_text", **fields["text_config"]}
    family, copied = hf_configs.read_config(path, fields, hf_names.TOWERS)
    sizes, added = sizes_of(config), {"v": 0, "r": 0}  # Image projection and adapters.
    if (type(copied), sizes_of(copied) | added) != (type(config), sizes | added):
        raise InputError(
            f"{path}: describes a model of another family or size than the tower; expected the "
            "model that the tower was loaded from"
        )
    tensors = {}
    for name, (place, layer) in hf_names.TENSORS[family].expected(config).items():
        value = _merged(params, place, config, layer)
        letters = "".join(place.hf_letters)
        value = value.reshape([sizes[i] for i in place.letters])
        value = value.transpose([place.letters.index(i) for i in letters])
        tensors[name] = np.ascontiguousarray(value.reshape(place.shape(sizes)))
    dtype = str(next(iter(tensors.values())).dtype)
    fields |= {"dtype": dtype, "architectures": [hf_names.BARE_MODELS[family]]}
    fields.pop("torch_dtype", None)
    os.makedirs(directory, exist_ok=True)
    weights = os.path.join(directory, hf_files.WEIGHTS)
    with atomic.file(weights) as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    json_files.write(os.path.join(directory, hf_files.CONFIG), fields)


def save_hf_adapters(
    directory: str, params: Mapping[str, Any], *, config: DecoderConfig, base: str
) -> None:
    """Writes only the adapters, for `peft.PeftModel.from_pretrained` to load onto the base model.

    Args:
      directory: Created if needed; its adapter_model.safetensors and adapter_config.json are
        replaced.
      params: Parameters of the tower.
      config: Sizes of the tower.
      base: The Hugging Face directory or name that the tower was loaded from.

    Raises:
      InputError: If the tower has no adapters.
    """
    import safetensors.numpy

    if not config.lora_rank:
        raise InputError(
            f"{directory}: the tower has no adapters to write; expected a run with --lora.rank > 0"
        )
    path = hf_files.config_path(base)
    family, _ = hf_configs.read_config(path, hf_files.read_json(path), hf_names.TOWERS)
    tensors, modules = {}, set()
    for name, (place, layer) in hf_names.TENSORS[family].expected(config).items():
        node: Any = params
        *parents, leaf = place.path.split("/")
        for part in parents:
            node = node[part]
        if leaf != "kernel" or "lora_a" not in node:
            continue
        module = name.removesuffix(".weight")
        modules.add(module.rsplit(".", 1)[-1])
        down, up = _adapter(node, place, config, layer)
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ascontiguousarray(down.T)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ascontiguousarray(up.T)
    os.makedirs(directory, exist_ok=True)
    weights = os.path.join(directory, "adapter_model.safetensors")
    with atomic.file(weights) as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    about = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "use_rslora": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "inference_mode": True,
    }
    json_files.write(os.path.join(directory, "adapter_config.json"), about)


def _merged(
    params: Mapping[str, Any], place: hf_names.Place, config: TowerConfig, layer: int | None
) -> np.ndarray:
    """A parameter (of one layer, if stacked) with its adapter added in float32."""
    *parents, leaf = place.path.split("/")
    node: Any = params
    for name in parents:
        node = node[name]
    value = _unpadded(node[leaf], place.letters, config, layer)
    if leaf != "kernel" or "lora_a" not in node:
        return value
    down, up = _adapter(node, place, config, layer)
    added = (down @ up * config.lora_scale).reshape(value.shape)
    return (value.astype(np.float32) + added).astype(value.dtype)


def _adapter(
    node: Mapping[str, Any], place: hf_names.Place, config: TowerConfig, layer: int | None
) -> tuple[Float[np.ndarray, "i r"], Float[np.ndarray, "r o"]]:
    """Both factors of a weight's adapter as float32 matrices."""
    summed = node["lora_a"].ndim - 1 - (layer is not None)
    down = _unpadded(node["lora_a"], place.letters[:summed] + "r", config, layer)
    up = _unpadded(node["lora_b"], "r" + place.letters[summed:], config, layer)
    rank = config.lora_rank
    return (
        down.astype(np.float32).reshape(-1, rank),
        up.astype(np.float32).reshape(rank, -1),
    )


def _unpadded(stored: Any, letters: str, config: TowerConfig, layer: int | None) -> np.ndarray:
    """A parameter (of one layer, if stacked) without its padding."""
    sizes = sizes_of(config)
    padded = stored if layer is None else stored[layer]
    return np.asarray(padded[tuple(slice(sizes[letter]) for letter in letters)])
