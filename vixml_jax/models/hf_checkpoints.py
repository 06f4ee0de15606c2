"""Loads towers from Hugging Face safetensors checkpoints."""

import dataclasses
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vixml_jax.errors import InputError
from vixml_jax.models import hf_configs, hf_files, hf_names, sentence_modules
from vixml_jax.models.siglip import SiglipConfig
from vixml_jax.models.tower import TowerConfig
from vixml_jax.parallel import axis_names, sharding

AUTO = "auto"  # Pooling as the checkpoint says.
_DTYPES = ("F32", "F16", "BF16", "F64")
_LONG_NAME = 100  # Characters of a tensor's name in a message; real ones are shorter.
_SHOWN = 2  # Mismatches of a kind that a message lists.


def read_pooling(directory_or_name: str) -> sentence_modules.Pooling:
    """How the checkpoint turns token states into a vector; the mean if it does not say.

    Raises:
      InputError: If there is no such model, or it asks for more than a tower can do.
    """
    directory = hf_files.resolve(directory_or_name, weights=False)
    return sentence_modules.read(directory) or sentence_modules.Pooling("mean")


def read_hf_config(directory_or_name: str, *, pooling: str = AUTO) -> TowerConfig:
    """The sizes of a tower, as `load_hf_tower` returns them, without reading its weights.

    Args:
      directory_or_name: See `load_hf_tower`.
      pooling: See `load_hf_tower`.

    Raises:
      InputError: If there is no such model, it belongs to an unsupported family, or its pooling is
        not supported.
    """
    path = hf_files.config_path(directory_or_name)
    config = hf_configs.read_config(path, hf_files.read_json(path), hf_names.TOWERS)[1]
    return _with_pooling(config, directory_or_name, pooling)


def _with_pooling(config: TowerConfig, directory_or_name: str, pooling: str) -> TowerConfig:
    kind = read_pooling(directory_or_name).kind if pooling == AUTO else pooling
    return dataclasses.replace(config, pooling=kind)


def load_hf_tower(
    directory_or_name: str,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    pooling: str = AUTO,
) -> tuple[TowerConfig, dict[str, Any]]:
    """The sizes and the parameters of a text tower: one of the encoders or decoders supported.

    The parameters are those of `Tower.init`, without image projection and adapters. All names and
    shapes are checked before any tensor is read. Tensors are then loaded one at a time: each device
    reads only its own shard, and transposes and casts it itself.

    Args:
      directory_or_name: A directory with config.json and model.safetensors (one file, or several
        with an index), as transformers or sentence-transformers writes it, or the name of a model
        on the Hugging Face hub.
      dtype: Dtype of the parameters, "float32" or "bfloat16".
      mesh: Mesh to shard the parameters over, by their logical axes; None for unsharded parameters
        on the first device.
      pooling: How states become a vector. "auto": as the files of sentence-transformers say, or
        the mean where there are none.

    Raises:
      InputError: If there is no such model, it belongs to an unsupported family, its files are
        incomplete or its tensors do not match its config.
    """
    config, params = _load(directory_or_name, hf_names.TOWERS, dtype, mesh)
    return _with_pooling(config, directory_or_name, pooling), params


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
    directory = hf_files.resolve(directory_or_name)
    directory = os.path.join(directory, hf_files.transformer_path(directory))
    path = os.path.join(directory, hf_files.CONFIG)
    family, config = hf_configs.read_config(path, hf_files.read_json(path), families)
    sizes = sizes_of(config)
    expected = hf_names.TENSORS[family].expected(config)
    found = _matched(directory, expected, sizes, f"{family}, {config.num_layers} layers")

    mesh = mesh or sharding.create_mesh(devices=jax.local_devices()[:1])
    layers: dict[hf_names.Place, dict[int | None, hf_files.Tensor]] = {}
    for name, (place, layer) in expected.items():
        layers.setdefault(place, {})[layer] = found[name]
    # The largest parameters are loaded first, while memory still has room for the temporary copies.
    order = sorted(layers, key=lambda place: -math.prod(place.shape(sizes)))
    return config, _nest(
        {
            place.path: _parameter(place, layers[place], config.num_layers, sizes, dtype, mesh)
            for place in order
        }
    )


def _matched(
    directory: str,
    expected: Mapping[str, tuple[hf_names.Place, int | None]],
    sizes: Mapping[str, int],
    about: str,
) -> dict[str, hf_files.Tensor]:
    """The tensors of a directory by the names expected; all are found and have the right shape."""
    present = list(hf_files.tensors(directory))
    files: dict[str, str] = {}
    for name, _, path in present:
        if files.setdefault(name, path) != path:
            raise InputError(
                f"{path}: {_shown(name)} is in {os.path.basename(files[name])} too; download the "
                "model again"
            )
    paths = {tensor.path for tensor in present}
    where = directory if len(paths) > 1 else next(iter(paths), directory)
    prefix = _prefix(directory, (tensor.name for tensor in present), expected)
    tensors, unexpected, malformed = {}, [], []
    for tensor in present:
        short = tensor.name.removeprefix(prefix)
        named = _shown(tensor.name)
        if where == directory:
            named += f" of {os.path.basename(tensor.path)}"
        # Checkpoints converted from TensorFlow name the weight and bias of a norm gamma and beta.
        short = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", short))
        if short not in expected:
            if not any(re.fullmatch(rf"(.*\.)?({x})", short) for x in hf_names.IGNORED):
                unexpected.append(f"{named} is unexpected")
            continue
        if short in tensors:
            malformed.append(f"{named} is there twice, also as {_shown(tensors[short].name)}")
        tensors[short] = tensor
        shape, expected_shape = tensor.values.get_shape(), list(expected[short][0].shape(sizes))
        if shape != expected_shape:
            malformed.append(f"{named} has shape {shape}, expected {expected_shape}")
        elif tensor.values.get_dtype() not in _DTYPES:
            malformed.append(
                f"{named} has dtype {tensor.values.get_dtype()}, expected one of "
                f"{', '.join(_DTYPES)}"
            )
    missing = [f"{name} is missing" for name in expected if name not in tensors]
    mismatches = []
    for lines in (missing, unexpected, malformed):
        mismatches += lines[:_SHOWN]
        if len(lines) > _SHOWN:
            mismatches.append(f"and {len(lines) - _SHOWN} more of this kind")
    if mismatches:
        raise InputError(
            f"{where}: the tensors do not match {hf_files.CONFIG} ({about}): "
            f"{'; '.join(mismatches)}"
        )
    return tensors


def _shown(name: str) -> str:
    """The name of a tensor as a message has it: short, and without control characters."""
    return name if name.isprintable() and len(name) <= _LONG_NAME else f"{name[:_LONG_NAME]!r}…"


def _prefix(directory: str, names: Iterable[str], expected: Collection[str]) -> str:
    """What all names of the tower begin with, such as "bert." or "module.0.auto_model."."""
    (anchor,) = (name for name in expected if name in hf_names.ANCHORS)
    found = sorted(name.removesuffix(anchor) for name in names if f".{name}".endswith(f".{anchor}"))
    if len(found) > 1:
        raise InputError(
            f"{directory}: holds {len(found)} models, with the prefixes "
            f"{' and '.join(map(_shown, map(repr, found[:3])))}; expected one"
        )
    return found[0] if found else ""


def _parameter(
    place: hf_names.Place,
    layers: Mapping[int | None, hf_files.Tensor],
    num_layers: int,
    sizes: Mapping[str, int],
    dtype: str,
    mesh: Mesh,
) -> jax.Array:
    """A sharded parameter.

    Args:
      place: The parameter.
      layers: Its tensors by layer; a single one under None if the parameter is not stacked.
      num_layers: Number of layers. The scale of a norm is one in those that have no tensor for it.
      sizes: Size of each letter.
      dtype: Dtype of the parameter.
      mesh: Mesh to shard it over.

    Raises:
      InputError: If a value is not a finite number.
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
    is_finite = jax.jit(_is_finite, out_shardings=sharding.replicated(mesh))

    def read(tensor: hf_files.Tensor, cast: str | None) -> jax.Array:
        slices: dict[str, np.ndarray] = {}  # Slices held by several devices are read once.

        def read_once(index: tuple[slice, ...]) -> np.ndarray:
            if str(index) not in slices:
                slices[str(index)] = _read_slice(tensor.values, index, place.shape(sizes))
            return slices[str(index)]

        unconverted = jax.make_array_from_callback(place.shape(padded), source, read_once)
        if not is_finite(unconverted):
            raise InputError(
                f"{tensor.path}: {_shown(tensor.name)} holds NaN or infinite values: the "
                "checkpoint is broken; download or train it again"
            )
        return convert(unconverted, split, order, shape, cast)

    if None in layers:
        return read(layers[None], dtype).block_until_ready()
    stacked = NamedSharding(mesh, P(None, *target.spec))
    absent = 0.0 if len(layers) == num_layers else 1.0
    stack = jnp.full((num_layers, *shape), absent, dtype, device=stacked)
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


def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _set_layer(stack: jax.Array, values: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, values.astype(stack.dtype), layer, 0)


def end_token(directory_or_name: str) -> int | None:
    """The end-of-text token id in the checkpoint's config.json; None if it has none.

    Raises:
      InputError: If it is no token of the model.
    """
    path = hf_files.config_path(directory_or_name)
    return hf_configs.end_token(path, hf_files.read_json(path))


def sizes_of(config: TowerConfig | SiglipConfig) -> dict[str, int]:
    """Size of each letter in `hf_names`, including those that only checkpoints have."""
    if isinstance(config, SiglipConfig):
        return config.sizes
    return {
        **config.sizes,
        "s": config.max_positions + getattr(config, "first_position", 0),
        "t": getattr(config, "type_vocab_size", 0),
        "l": getattr(config, "distance_buckets", 0),
        "u": 2,
    }


def _nest(flat: Mapping[str, jax.Array]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        *parents, leaf = path.split("/")
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree
