"""Towers from Hugging Face checkpoints and back: safetensors, one tensor at a time."""

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
from vixml_jax.models import hf_names
from vixml_jax.models.decoder import DecoderConfig
from vixml_jax.models.siglip import SiglipConfig
from vixml_jax.models.tower import TowerConfig
from vixml_jax.parallel import axis_names, sharding

CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


def read_hf_config(directory_or_name: str) -> TowerConfig:
    """The sizes of a tower, as `load_hf_tower` gives them, without reading a weight.

    Raises:
      InputError: If there is no such model, or if it is none of the families.
    """
    path = os.path.join(resolve(directory_or_name, weights=False), CONFIG)
    return hf_names.read_config(path, _read_json(path), hf_names.TOWERS)[1]


def load_hf_tower(
    directory_or_name: str, *, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[TowerConfig, dict[str, Any]]:
    """The sizes and the parameters of a tower: BERT family, or one of four decoders.

    The parameters are those of `Tower.init`, without image projection and adapters. Names and
    shapes are checked before anything is read. Then one tensor at a time goes from its file
    straight to where it stays: each device reads its own part, and turns and casts it itself.

    Args:
      directory_or_name: A directory with config.json and model.safetensors (whole, or in parts
        with their index), or the name of a model on the Hugging Face hub.
      dtype: Of the parameters: "float32" or "bfloat16".
      mesh: Where they lie, by their logical axes; None: whole, on the first device.

    Raises:
      InputError: If there is no such model, if it is none of the families, or if its tensors are
        not those that its config asks for; all that differ are named.
    """
    return _load(directory_or_name, hf_names.TOWERS, dtype, mesh)


def load_hf_vision(
    directory_or_name: str, *, dtype: str = "float32", mesh: Mesh | None = None
) -> tuple[SiglipConfig, dict[str, Any]]:
    """The sizes and the parameters of a SigLIP vision tower, those of `VisionTower.init`.

    Args:
      directory_or_name: As for `load_hf_tower`; a whole SigLIP model will do.
      dtype: Of the parameters: "float32" or "bfloat16".
      mesh: Where they lie, by their logical axes; None: whole, on the first device.

    Raises:
      InputError: As `load_hf_tower`.
    """
    return _load(directory_or_name, hf_names.VISION, dtype, mesh)


def _load(
    directory_or_name: str, families: Collection[str], dtype: str, mesh: Mesh | None
) -> tuple[Any, dict[str, Any]]:
    directory = resolve(directory_or_name)
    path = os.path.join(directory, CONFIG)
    family, config = hf_names.read_config(path, _read_json(path), families)
    sizes = sizes_of(config)
    expected = hf_names.TENSORS[family].expected(config)
    found, faults = {}, []
    for name, tensor in _tensors(directory):
        short = re.sub(hf_names.PREFIXES, "", name)
        # Checkpoints made from TensorFlow's call the weight and bias of a norm gamma and beta.
        short = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", short))
        if any(re.fullmatch(pattern, short) for pattern in hf_names.IGNORED):
            continue
        if short not in expected:
            faults.append(f"{name} is unexpected")
            continue
        found[short] = tensor
        shape, wanted = tensor.get_shape(), list(expected[short][0].shape(sizes))
        if shape != wanted:
            faults.append(f"{name} has shape {shape}, expected {wanted}")
    faults += [f"{name} is missing" for name in expected if name not in found]
    if faults:
        raise InputError(
            f"{directory}: the tensors are not those that {CONFIG} asks for ({family}, "
            f"{config.num_layers} layers of width {config.width}): {'; '.join(faults)}"
        )

    mesh = mesh or sharding.create_mesh(devices=jax.local_devices()[:1])
    layers: dict[hf_names.Place, dict[int | None, Any]] = {}
    for name, (place, layer) in expected.items():
        layers.setdefault(place, {})[layer] = found[name]
    # Largest first: what stands beside a tensor on its way is small once most are there.
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
    """A parameter, laid out, from its tensors by layer, or from the one that it is, under None."""
    shape, ours = sharding.stored(
        tuple(sizes[i] for i in place.ours), axis_names.logical(place.ours), mesh
    )
    # Their dimensions are spread, and padded, as the first letter of each is, so that a device
    # reads no more than it keeps; what is spread by a letter within is cut when it is turned.
    spread = dict(zip(place.ours, ours.spec, strict=True))
    theirs = NamedSharding(mesh, P(*(spread.get(group[:1]) for group in place.theirs)))
    first = {group[:1] for group in place.theirs}
    longer = {i: size for i, size in zip(place.ours, shape, strict=True) if i in first}
    padded, letters = {**sizes, **longer}, "".join(place.theirs)
    split, order = tuple(padded[i] for i in letters), tuple(letters.index(i) for i in place.ours)
    turn = jax.jit(_turned, static_argnums=(1, 2, 3, 4), out_shardings=ours)

    def read(tensor: Any, cast: str | None) -> jax.Array:
        parts: dict[str, np.ndarray] = {}  # What several devices keep is read once.

        def part(index: tuple[slice, ...]) -> np.ndarray:
            if str(index) not in parts:
                parts[str(index)] = _part(tensor, index, place.shape(sizes))
            return parts[str(index)]

        found = jax.make_array_from_callback(place.shape(padded), theirs, part)
        return turn(found, split, order, shape, cast)

    if None in layers:
        return read(layers[None], dtype).block_until_ready()
    whole = NamedSharding(mesh, P(None, *ours.spec))
    stack = jnp.zeros((len(layers), *shape), dtype, device=whole)
    put = jax.jit(_put, donate_argnums=0, out_shardings=whole)
    for layer, tensor in layers.items():
        # XLA's CPU backend takes twice as long where it turns and casts at once. The next tensor
        # must not be read before this one is gone.
        stack = put(stack, read(tensor, None), layer).block_until_ready()
    return stack


def _part(tensor: Any, index: tuple[slice, ...], shape: tuple[int, ...]) -> np.ndarray:
    """What lies at `index` of a tensor of `shape`, read lazily; zeros beyond its ends."""
    ends = [(at.start or 0, at.stop) for at in index]
    if all(stop is None or stop <= size for (_, stop), size in zip(ends, shape, strict=True)):
        return tensor[index]
    wanted, there = [], []
    for (start, stop), size in zip(ends, shape, strict=True):
        wanted.append((size if stop is None else stop) - start)
        # Of what lies wholly beyond an end, nothing: an empty slice must begin within.
        there.append(slice(start, min(start + wanted[-1], size)) if start < size else slice(0, 0))
    found = tensor[tuple(there)]
    return np.pad(found, [(0, n - have) for n, have in zip(wanted, found.shape, strict=True)])


def _turned(
    tensor: jax.Array,
    split: tuple[int, ...],
    order: tuple[int, ...],
    shape: tuple[int, ...],
    dtype: str | None,
) -> jax.Array:
    """A tensor of Hugging Face's as ours is stored; its dtype kept where there is none to cast
    to."""
    turned = tensor.reshape(split).transpose(order)
    if turned.shape != shape:
        turned = jnp.pad(turned, [(0, b - a) for a, b in zip(turned.shape, shape, strict=True)])
    return turned if dtype is None else turned.astype(dtype)


def _put(stack: jax.Array, one: jax.Array, layer: jax.Array) -> jax.Array:
    """The stack with one of its layers in place."""
    return jax.lax.dynamic_update_index_in_dim(stack, one.astype(stack.dtype), layer, 0)


def end_token(directory_or_name: str) -> int | None:
    """The token that ends a text, as the checkpoint's config.json says; None where it does not."""
    about = _read_json(os.path.join(resolve(directory_or_name, weights=False), CONFIG))
    about = {**about, **about.get("text_config", {})}
    end = about.get("eos_token_id")
    return end[0] if isinstance(end, list) else end


def sizes_of(config: TowerConfig | SiglipConfig) -> dict[str, int]:
    """Size of each letter in `hf_names`: the tower's, and rows of positions and types."""
    if isinstance(config, SiglipConfig):
        return config.sizes
    types = getattr(config, "type_vocab_size", 0)
    return {**config.sizes, "s": config.max_positions, "t": types}


def save_hf_tower(
    directory: str, params: Mapping[str, Any], *, config: TowerConfig, like: str | None
) -> None:
    """Writes a directory that `transformers.AutoModel.from_pretrained` loads.

    Adapters are merged into the weights they stand beside. What Hugging Face has no name for (the
    image projection) is not written.

    Args:
      directory: Made; its model.safetensors and config.json are replaced.
      params: Of the tower.
      config: Its sizes, adapters included.
      like: The Hugging Face directory or name that the tower was loaded from, whose config.json
        is copied; None: it was trained from nothing.

    Raises:
      InputError: If `like` is of another family or size.
    """
    import safetensors.numpy

    if like is None:
        like, about = directory, hf_names.write_config(config)
    else:
        about = _read_json(os.path.join(resolve(like), CONFIG))
    if about.get("model_type") == "gemma3":
        about = {"model_type": "gemma3_text", **about["text_config"]}
    family, found = hf_names.read_config(os.path.join(like, CONFIG), about, hf_names.TOWERS)
    sizes = sizes_of(config)
    if (type(found), sizes_of(found) | {"v": 0, "r": 0}) != (
        type(config),
        sizes | {"v": 0, "r": 0},
    ):
        raise InputError(f"{like}: {CONFIG} is of another family or size than the tower")
    tensors = {}
    for name, (place, layer) in hf_names.TENSORS[family].expected(config).items():
        value = _merged(params, place, config, layer)
        letters = "".join(place.theirs)
        value = value.reshape([sizes[i] for i in place.ours])
        value = value.transpose([place.ours.index(i) for i in letters])
        tensors[name] = np.ascontiguousarray(value.reshape(place.shape(sizes)))
    dtype = str(next(iter(tensors.values())).dtype)
    about |= {"dtype": dtype, "architectures": [hf_names.BARE_MODELS[family]]}
    about.pop("torch_dtype", None)
    os.makedirs(directory, exist_ok=True)
    weights = os.path.join(directory, WEIGHTS)
    safetensors.numpy.save_file(tensors, weights + ".tmp", metadata={"format": "pt"})
    os.replace(weights + ".tmp", weights)
    with open(os.path.join(directory, CONFIG), "w", encoding="utf-8") as file:
        json.dump(about, file, indent=2)


def save_hf_adapters(
    directory: str, params: Mapping[str, Any], *, config: DecoderConfig, base: str
) -> None:
    """Writes the adapters alone, as `peft.PeftModel.from_pretrained` loads them onto the base.

    Args:
      directory: Made; its adapter_model.safetensors and adapter_config.json are replaced.
      params: Of the tower.
      config: Its sizes.
      base: The Hugging Face directory or name that the tower was loaded from.

    Raises:
      InputError: If the tower has no adapters.
    """
    import safetensors.numpy

    if not config.lora_rank:
        raise InputError(f"{directory}: the tower has no adapters to write")
    about = _read_json(os.path.join(resolve(base), CONFIG))
    family, _ = hf_names.read_config(os.path.join(base, CONFIG), about, hf_names.TOWERS)
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
    """An array of the tower, of one layer where it is stacked, its adapter added in float32."""
    *parents, leaf = place.path.split("/")
    node: Any = params
    for name in parents:
        node = node[name]
    value = _cut(node[leaf], place.ours, config, layer)
    if leaf != "kernel" or "lora_a" not in node:
        return value
    down, up = _adapter(node, place, config, layer)
    added = (down @ up * config.lora_scale).reshape(value.shape)
    return (value.astype(np.float32) + added).astype(value.dtype)


def _adapter(
    node: Mapping[str, Any], place: hf_names.Place, config: TowerConfig, layer: int | None
) -> tuple[Float[np.ndarray, "i r"], Float[np.ndarray, "r o"]]:
    """Both halves of the adapter beside a weight, as matrices, float32."""
    summed = node["lora_a"].ndim - 1 - (layer is not None)
    down = _cut(node["lora_a"], place.ours[:summed] + "r", config, layer)
    up = _cut(node["lora_b"], "r" + place.ours[summed:], config, layer)
    rank = config.lora_rank
    return (
        down.astype(np.float32).reshape(-1, rank),
        up.astype(np.float32).reshape(rank, -1),
    )


def _cut(stored: Any, letters: str, config: TowerConfig, layer: int | None) -> np.ndarray:
    """A parameter, of one layer where it is stacked, without what it is padded with."""
    sizes = sizes_of(config)
    one = stored if layer is None else stored[layer]
    return np.asarray(one[tuple(slice(sizes[letter]) for letter in letters)])


def resolve(directory_or_name: str, *, weights: bool = True) -> str:
    """The directory itself, or where the hub's files lie after a download.

    Args:
      directory_or_name: On disk, or on the hub.
      weights: Whether more is needed than its configuration.

    Raises:
      InputError: If there is neither.
    """
    if os.path.isdir(directory_or_name):
        return directory_or_name
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", directory_or_name):
        raise InputError(
            f"{directory_or_name}: no such directory; expected a Hugging Face model directory, "
            "or a name on the hub"
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
            f"{directory_or_name}: neither a directory nor to be had from the Hugging Face hub "
            f"({type(error).__name__}: {reason})"
        ) from error


def _tensors(directory: str) -> Iterator[tuple[str, Any]]:
    """(name, lazy slice) of each tensor, in one file or in those that the index names."""
    import safetensors

    index, files = os.path.join(directory, INDEX), [WEIGHTS]
    if not os.path.exists(os.path.join(directory, WEIGHTS)) and os.path.exists(index):
        files = sorted(set(_read_json(index).get("weight_map", {}).values()))
    for file in files:
        path = os.path.join(directory, file)
        if not os.path.exists(path):
            raise InputError(
                f"{path}: not found; expected the weights as {WEIGHTS}, or in parts with {INDEX}"
            )
        try:
            tensors = safetensors.safe_open(path, framework="np")
            yield from ((name, tensors.get_slice(name)) for name in tensors.keys())
        except safetensors.SafetensorError as error:
            raise InputError(f"{path}: truncated or not safetensors: {error}") from None


def _read_json(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except FileNotFoundError:
        raise InputError(
            f"{path}: not found; expected a Hugging Face model directory with it"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def _nest(flat: Mapping[str, jax.Array]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        *parents, leaf = path.split("/")
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree
