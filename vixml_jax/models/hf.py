"""Towers from Hugging Face checkpoints: safetensors, one tensor at a time, by a table of names."""

import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from vixml_jax.errors import InputError
from vixml_jax.models.bert import BertConfig

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


class _Rule(NamedTuple):
    """Where a tensor goes, in letters of `axes.LETTERS` (s and t: rows of positions and types)."""

    path: str
    theirs: tuple[str, ...]  # Letters of each dimension of the tensor.
    ours: str  # Letters of our array, without that of the layers.


def _linear(theirs: str, ours: str, output: str, summed: str) -> dict[str, _Rule]:
    """A linear layer, whose weight Hugging Face keeps as [output, input]."""
    return {
        rf"{theirs}\.weight": _Rule(f"{ours}/kernel", (output, summed), summed + output),
        rf"{theirs}\.bias": _Rule(f"{ours}/bias", (output,), output),
    }


def _norm(theirs: str, ours: str) -> dict[str, _Rule]:
    # Checkpoints made from TensorFlow's call the two gamma and beta.
    return {
        rf"{theirs}\.(?:weight|gamma)": _Rule(f"{ours}/scale", ("d",), "d"),
        rf"{theirs}\.(?:bias|beta)": _Rule(f"{ours}/bias", ("d",), "d"),
    }


def _table(theirs: str, ours: str, rows: str) -> dict[str, _Rule]:
    return {rf"embeddings\.{theirs}\.weight": _Rule(ours, (rows, "d"), rows + "d")}


_BLOCKS = "encoder/blocks"
_EMBEDDINGS = {
    **_table("word_embeddings", "word_embeddings", "w"),
    **_table("position_embeddings", "encoder/position_embeddings", "s"),
    **_norm(r"embeddings\.LayerNorm", "encoder/embeddings_norm"),
}


def _blocks(layer: str, names: tuple[str, ...]) -> dict[str, _Rule]:
    """The rules of one layer, whose number is the pattern's only group."""
    query, key, value, out, attention_norm, up, down, mlp_norm = (layer + name for name in names)
    return {
        **_linear(query, f"{_BLOCKS}/query", "ha", "d"),
        **_linear(key, f"{_BLOCKS}/key", "ha", "d"),
        **_linear(value, f"{_BLOCKS}/value", "ha", "d"),
        **_linear(out, f"{_BLOCKS}/out", "d", "ha"),
        **_norm(attention_norm, f"{_BLOCKS}/attention_norm"),
        **_linear(up, f"{_BLOCKS}/up", "m", "d"),
        **_linear(down, f"{_BLOCKS}/down", "d", "m"),
        **_norm(mlp_norm, f"{_BLOCKS}/mlp_norm"),
    }


# model_type: pattern of a tensor's name -> where it goes.
RULES = {
    "bert": {
        **_EMBEDDINGS,
        **_table("token_type_embeddings", "encoder/type_embeddings", "t"),
        **_blocks(
            r"encoder\.layer\.(\d+)\.",
            (
                r"attention\.self\.query",
                r"attention\.self\.key",
                r"attention\.self\.value",
                r"attention\.output\.dense",
                r"attention\.output\.LayerNorm",
                r"intermediate\.dense",
                r"output\.dense",
                r"output\.LayerNorm",
            ),
        ),
    },
    "distilbert": {
        **_EMBEDDINGS,
        **_blocks(
            r"transformer\.layer\.(\d+)\.",
            (
                r"attention\.q_lin",
                r"attention\.k_lin",
                r"attention\.v_lin",
                r"attention\.out_lin",
                r"sa_layer_norm",
                r"ffn\.lin1",
                r"ffn\.lin2",
                r"output_layer_norm",
            ),
        ),
    },
}

# What a checkpoint may hold beside the encoder; the mean of its states needs none of it.
IGNORED = (
    r"embeddings\.position_ids",
    r"pooler\.dense\.(weight|bias)",
    r"cls\..*",
    r"vocab_(transform|layer_norm|projector)\..*",
    r"(pre_)?classifier\..*",
    r"qa_outputs\..*",
)

# model_type: our field -> name in config.json; a default where a file may leave it out.
_FIELDS: dict[str, dict[str, str | tuple[str, Any]]] = {
    "bert": {
        "vocab_size": "vocab_size",
        "num_layers": "num_hidden_layers",
        "width": "hidden_size",
        "num_heads": "num_attention_heads",
        "mlp_width": "intermediate_size",
        "max_positions": "max_position_embeddings",
        "type_vocab_size": ("type_vocab_size", 2),
        "dropout": ("hidden_dropout_prob", 0.1),
        "attention_dropout": ("attention_probs_dropout_prob", 0.1),
        "layer_norm_eps": ("layer_norm_eps", 1e-12),
        "initializer_range": ("initializer_range", 0.02),
    },
    "distilbert": {
        "vocab_size": "vocab_size",
        "num_layers": "n_layers",
        "width": "dim",
        "num_heads": "n_heads",
        "mlp_width": "hidden_dim",
        "max_positions": "max_position_embeddings",
        "dropout": ("dropout", 0.1),
        "attention_dropout": ("attention_dropout", 0.1),
        "initializer_range": ("initializer_range", 0.02),
    },
}

# What else config.json must say, where it says it.
_FIXED = {
    "hidden_act": "gelu",
    "activation": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def load_hf_tower(directory_or_name: str) -> tuple[BertConfig, dict[str, Any]]:
    """The sizes and the float32 numpy parameters of a BertModel or DistilBertModel.

    The parameters are those of `Tower.init`, without an image projection.

    Args:
      directory_or_name: A directory with config.json and model.safetensors (whole, or in parts
        with their index), or the name of a model on the Hugging Face hub.

    Raises:
      InputError: If there is no such model, if it is none of the family, or if its tensors are
        not those that its config asks for; all that differ are named.
    """
    directory = _resolve(directory_or_name)
    family, config = _read_config(os.path.join(directory, CONFIG))
    sizes = {**config.sizes, "s": config.max_positions, "t": config.type_vocab_size}
    params: dict[str, np.ndarray] = {}
    expected = set()
    for path, _, ours in RULES[family].values():
        shape = tuple(sizes[letter] for letter in ours)
        stacked = path.startswith(_BLOCKS)
        params[path] = np.empty((config.num_layers, *shape) if stacked else shape, np.float32)
        expected |= {(path, i) for i in (range(config.num_layers) if stacked else (None,))}

    faults, missing = [], set(expected)
    for name, tensor in _tensors(directory):
        short = re.sub(rf"^({family}|model)\.", "", name)
        if any(re.fullmatch(pattern, short) for pattern in IGNORED):
            continue
        rule, layer = _match(RULES[family], short)
        if rule is None or (rule.path, layer) not in expected:
            faults.append(f"{name} is unexpected")
            continue
        missing.discard((rule.path, layer))
        wanted = [int(np.prod([sizes[i] for i in letters])) for letters in rule.theirs]
        found = list(tensor.get_shape())
        if found != wanted:
            faults.append(f"{name} has shape {found}, expected {wanted}")
            continue
        letters = "".join(rule.theirs)
        value = tensor[:].reshape([sizes[i] for i in letters])
        value = value.transpose([letters.index(i) for i in rule.ours])
        params[rule.path][... if layer is None else layer] = value
    for path, layer in sorted(missing, key=str):
        faults.append(f"{path}{'' if layer is None else f' of layer {layer}'} is missing")
    if faults:
        raise InputError(
            f"{directory}: the tensors are not those that {CONFIG} asks for ({family}, "
            f"{config.num_layers} layers of width {config.width}): {'; '.join(faults)}"
        )
    return config, _nest(params)


def _resolve(directory_or_name: str) -> str:
    """The directory itself, or where the hub's files lie after a download."""
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
            directory_or_name, allow_patterns=[CONFIG, INDEX, "model*.safetensors"]
        )
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{directory_or_name}: neither a directory nor to be had from the Hugging Face hub "
            f"({type(error).__name__}: {reason})"
        ) from error


def _read_config(path: str) -> tuple[str, BertConfig]:
    about = _read_json(path)
    family = about.get("model_type")
    if family not in RULES:
        raise InputError(
            f"{path}: model_type is {family!r}, expected one of {', '.join(sorted(RULES))}"
        )
    for name, wanted in _FIXED.items():
        if about.get(name, wanted) not in (wanted, None):
            raise InputError(f"{path}: {name} is {about[name]!r}, expected {wanted!r}")
    values: dict[str, Any] = {} if family == "bert" else {"type_vocab_size": 0}
    for field, name in _FIELDS[family].items():
        name, *default = (name,) if isinstance(name, str) else name
        if name not in about and not default:
            raise InputError(f"{path}: {name} is missing")
        values[field] = about.get(name, *default)
    try:
        return family, BertConfig(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


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
            with safetensors.safe_open(path, framework="np") as tensors:
                for name in tensors.keys():
                    yield name, tensors.get_slice(name)
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


def _match(rules: dict[str, _Rule], name: str) -> tuple[_Rule | None, int | None]:
    for pattern, rule in rules.items():
        found = re.fullmatch(pattern, name)
        if found:
            return rule, int(found[1]) if found.groups() else None
    return None, None


def _nest(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        node = tree
        *parents, leaf = path.split("/")
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree
