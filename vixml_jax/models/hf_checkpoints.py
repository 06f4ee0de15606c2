"""Loads towers from Hugging Face safetensors checkpoints, and writes them back."""

import json
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from vixml_jax.errors import InputError
from vixml_jax.models import hf_configs, hf_names
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.models.siglip import SiglipConfig
from vixml_jax.models.tower import TowerConfig
from vixml_jax.parallel import axis_names, sharding

CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def read_hf_config(directory_or_name: str) -> TowerConfig:
    """The sizes of a tower, as `load_hf_tower` returns them, without reading its weights.

    Raises:
      InputError: If there is no such model, or it belongs to an unsupported family.
    """
    path = os.path.join(resolve(directory_or_name, weights=False), CONFIG)
    return hf_configs.read_config(path, _read_json(path), hf_names.TOWERS)[1]


def load_hf_tower(
    directory_or_name: str, *, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[TowerConfig, dict[str, Any]]:
    """The sizes and the parameters of a text tower: the BERT family, or one of four decoders.

    The parameters are those of `Tower.init`, without image projection and adapters. All names and
    shapes are checked before any tensor is read. Tensors are then loaded one at a time: each device
    reads only its own shard, and transposes and casts it itself.

    Args:
      directory_or_name: A directory with config.json and model.safetensors (one file, or several
        with an index), or the name of a model on the Hugging Face hub.
      dtype: Dtype of the parameters, "float32" or "bfloat16".
      mesh: Mesh to shard the parameters over, by their logical axes; None for unsharded parameters
        on the first device.

    Raises:
      InputError: If there is no such model, it belongs to an unsupported family, or its tensors do
        not match its config; the message lists all mismatches.
    """
    return _load(directory_or_name, hf_names.TOWERS, dtype, mesh)


def load_hf_vision(
    directory_or_name: str, *, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[SiglipConfig, dict[str, Any]]:
    """The sizes of a SigLIP vision tower, and its parameters as in `VisionTower.init`.

    Args:
      directory_or_name: See `load_hf_tower`; a SigLIP model with a text half is accepted too.
      dtype: Dtype of the parameters, "float32" or "bfloat16".
      mesh: See `load_hf_tower`.

    Raises:
      InputError: As for `load_hf_tower`.
    """
    return _load(directory_or_name, hf_names.VISION, dtype, mesh)


def _load(
    directory_or_name: str, families: Collection[str], dtype: str, mesh: Mesh | None
) -> tuple[Any, dict[str, Any]]:
    directory = resolve(directory_or_name)
    path = os.path.join(directory, CONFIG)
    family, config = hf_configs.read_config(path, _read_json(path), families)
    sizes = sizes_of(config)
    expected = hf_names.TENSORS[family].expected(config)
    tensors, mismatches = {}, []
    for name, tensor in _tensors(directory):
        short = re.sub(hf_names.PREFIXES, "", name)
        # Checkpoints converted from TensorFlow name the weight and bias of a norm gamma and beta.
        short = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", short))
        if any(re.fullmatch(pattern, short) for pattern in hf_names.IGNORED):
            continue
        if short not in expected:
            mismatches.append(f"{name} is unexpected")
            continue
        tensors[short] = tensor
        shape, expected_shape = tensor.get_shape(), list(expected[short][0].shape(sizes))
        if shape != expected_shape:
            mismatches.append(f"{name} has shape {shape}, expected {expected_shape}")
    mismatches += [f"{name} is missing" for name in expected if name not in tensors]
    if mismatches:
        raise InputError(
            f"{directory}: the tensors do not match {CONFIG} ({family}, {config.num_layers} layers "
            f"of width {config.width}): {'; '.join(mismatches)}"
        )

    mesh = mesh or sharding.create_mesh(devices=jax.local_devices()[:1])
    layers: dict[hf_names.Place, dict[int | None, Any]] = {}
    for name, (place, layer) in expected.items():
        layers.setdefault(place, {})[layer] = tensors[name]
    # The largest parameters are loaded first, while memory still has room for the temporary copies.
    order = sorted(layers, key=lambda place: -math.prod(place.shape(sizes)))
    return config, _nest(
        {place.path: _parameter(place, layers[place], sizes, dtype, mesh) for place in order}
    )


def _parameter(
    place: hf_names.Place,
    layers: Mapping[int | None, Any],
    sizes: Mapping[str, int],
    dtype: str,
    mesh: Mesh,
) -> jax.Array:
    """A sharded parameter.

    Args:
      place: The parameter.
      layers: Its tensors by layer; a single one under None if the parameter is not stacked.
      sizes: Size of each letter.
      dtype: Dtype of the parameter.
      mesh: Mesh to shard it over.
    """
    shape, target = sharding.stored(
        tuple(sizes[i] for i in place.letters), axis_names.logical(place.letters), mesh
    )
    # A dimension of the tensor is sharded and padded as its first letter is, so that a device reads
    # no more than it keeps. Sharding by a later letter is applied after the transposition.
    mesh_axes = dict(zip(place.letters, target.spec, strict=True))
    source = NamedSharding(mesh, P(*(mesh_axes.get(group[:1]) for group in place.hf_letters)))
    first = {group[:1] for group in place.hf_letters}
    longer = {i: size for i, size in zip(place.letters, shape, strict=True) if i in first}
    padded, letters = {**sizes, **longer}, "".join(place.hf_letters)
    split, order = tuple(padded[i] for i in letters), tuple(letters.index(i) for i in place.letters)
    convert = jax.jit(_converted, static_argnums=(1, 2, 3, 4), out_shardings=target)

    def read(tensor: Any, cast: str | None) -> jax.Array:
        slices: dict[str, np.ndarray] = {}  # Slices held by several devices are read once.

        def read_once(index: tuple[slice, ...]) -> np.ndarray:
            if str(index) not in slices:
                slices[str(index)] = _read_slice(tensor, index, place.shape(sizes))
            return slices[str(index)]

        unconverted = jax.make_array_from_callback(place.shape(padded), source, read_once)
        return convert(unconverted, split, order, shape, cast)

    if None in layers:
        return read(layers[None], dtype).block_until_ready()
    stacked = NamedSharding(mesh, P(None, *target.spec))
    stack = jnp.zeros((len(layers), *shape), dtype, device=stacked)
    set_layer = jax.jit(_set_layer, donate_argnums=0, out_shardings=stacked)
    for layer, tensor in layers.items():
        # Cast in `set_layer`: XLA's CPU backend takes twice as long to transpose and cast at once.
        # Waiting here frees this tensor before the next one is read.
        stack = set_layer(stack, read(tensor, None), layer).block_until_ready()
    return stack


def _read_slice(tensor: Any, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Reads `tensor[index]`; entries beyond the tensor's shape are zero."""
    bounds = [(axis.start or 0, axis.stop) for axis in index]
    if all(stop is None or stop <= size for (_, stop), size in zip(bounds, shape, strict=True)):
        return tensor[index]
    lengths, inside = [], []
    for (start, stop), size in zip(bounds, shape, strict=True):
        lengths.append((size if stop is None else stop) - start)
        # safetensors requires that even an empty slice starts within the tensor.
        inside.append(slice(start, min(start + lengths[-1], size)) if start < size else slice(0, 0))
    part = tensor[tuple(inside)]
    return np.pad(part, [(0, n - m) for n, m in zip(lengths, part.shape, strict=True)])


def _converted(
    tensor: jax.Array,
    split: tuple[int, ...],
    order: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: str | None,
) -> jax.Array:
    """A tensor split, transposed, padded to `shape`, and cast unless `dtype` is None."""
    x = tensor.reshape(split).transpose(order)
    if x.shape != shape:
        x = jnp.pad(x, [(0, b - a) for a, b in zip(x.shape, shape, strict=True)])
    return x if dtype is None else x.astype(dtype)


def _set_layer(stack: jax.Array, values: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, values.astype(stack.dtype), layer, 0)


def end_token(directory_or_name: str) -> int | None:
    """The end-of-text token id in the checkpoint's config.json; None if it has none."""
    fields = _read_json(os.path.join(resolve(directory_or_name, weights=False), CONFIG))
    fields = {**fields, **fields.get("text_config", {})}
    end = fields.get("eos_token_id")
    return end[0] if isinstance(end, list) else end


def sizes_of(config: TowerConfig | SiglipConfig) -> dict[str, int]:
    """Size of each letter in `hf_names`, including s (positions) and t (token types)."""
    if isinstance(config, SiglipConfig):
        return config.sizes
    types = getattr(config, "type_vocab_size", 0)
    return {**config.sizes, "s": config.max_positions, "t": types}


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
        like, fields = directory, hf_configs.write_config(config)
    else:
        fields = _read_json(os.path.join(resolve(like), CONFIG))
    if fields.get("model_type") == "gemma3":
        fields = {"model_type": "gemma3_text", **fields["text_config"]}
    path = os.path.join(like, CONFIG)
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
    weights = os.path.join(directory, WEIGHTS)
    safetensors.numpy.save_file(tensors, weights + ".tmp", metadata={"format": "pt"})
    os.replace(weights + ".tmp", weights)
    with open(os.path.join(directory, CONFIG), "w", encoding="utf-8") as file:
        json.dump(fields, file, indent=2)


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
    fields = _read_json(os.path.join(resolve(base), CONFIG))
    family, _ = hf_configs.read_config(os.path.join(base, CONFIG), fields, hf_names.TOWERS)
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
    safetensors.numpy.save_file(tensors, weights + ".tmp", metadata={"format": "pt"})
    os.replace(weights + ".tmp", weights)
    with open(os.path.join(directory, "adapter_config.json"), "w", encoding="utf-8") as file:
        json.dump(
            {
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
            },
            file,
            indent=2,
        )


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


def resolve(directory_or_name: str, *, weights: bool = True) -> str:
    """The local directory of a model; a model on the Hugging Face hub is downloaded first.

    Args:
      directory_or_name: A local directory, or the name of a model on the hub.
      weights: Whether to download the weights too, or only the configuration.

    Raises:
      InputError: If there is neither a directory nor a model on the hub.
    """
    if os.path.isdir(directory_or_name):
        return directory_or_name
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", directory_or_name):
        raise InputError(
            f"{directory_or_name}: no such directory; expected a Hugging Face model directory or "
            "the name of a model on the hub"
        )
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.snapshot_download(
            directory_or_name,
            allow_patterns=[CONFIG, PROCESSOR, *([INDEX, "model*.safetensors"] if weights else ())],
        )
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{directory_or_name}: not a directory, and cannot be downloaded from the Hugging Face "
            f"hub ({type(error).__name__}: {reason})"
        ) from error


def _tensors(directory: str) -> Iterator[tuple[str, Any]]:
    """Yields (name, lazy slice) of each tensor, from one file or from all files in the index."""
    import safetensors

    index, files = os.path.join(directory, INDEX), [WEIGHTS]
    if not os.path.exists(os.path.join(directory, WEIGHTS)) and os.path.exists(index):
        files = sorted(set(_read_json(index).get("weight_map", {}).values()))
    for file in files:
        path = os.path.join(directory, file)
        if not os.path.exists(path):
            raise InputError(
                f"{path}: not found; expected {WEIGHTS}, or the files listed in {INDEX}"
            )
        try:
            tensors = safetensors.safe_open(path, framework="np")
            yield from ((name, tensors.get_slice(name)) for name in tensors.keys())
        except safetensors.SafetensorError as error:
            raise InputError(f"{path}: truncated or not safetensors: {error}") from None


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            fields = json.load(file)
    except FileNotFoundError:
        raise InputError(
            f"{path}: not found; expected a Hugging Face model directory with this file"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(fields).__name__}")
    return fields


def _nest(flat: Mapping[str, jax.Array]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        *parents, leaf = path.split("/")
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree
