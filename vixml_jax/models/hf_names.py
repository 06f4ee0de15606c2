"""What Hugging Face calls the sizes and the tensors of each family of towers."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from vixml_jax.errors import InputError
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.decoder import DecoderConfig, Rope
from vixml_jax.models.siglip import SiglipConfig

BLOCKS = "encoder/blocks"


class Place(NamedTuple):
    """Where a tensor goes, in letters of `axes.LETTERS` (s and t: rows of positions and types)."""

    path: str
    theirs: tuple[str, ...]  # Letters of each dimension of the tensor.
    ours: str  # Letters of our array, without that of the layers.

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.theirs)


class Tensors(NamedTuple):
    """The tensors of a family, by the name that `transformers` gives them in the bare model."""

    whole: dict[str, Place]
    layer: str  # Name of a layer, with {} for its number.
    in_layer: dict[str, Place]  # By what follows it.

    def expected(self, config: Any) -> dict[str, tuple[Place, int | None]]:
        """Name -> (place, layer or None) of all tensors that a tower of these sizes has."""
        unused = _unused(config)
        found: dict[str, tuple[Place, int | None]] = {
            name: (place, None) for name, place in self.whole.items() if place.path not in unused
        }
        for i in range(config.num_layers):
            for name, place in self.in_layer.items():
                if place.path not in unused:
                    found[self.layer.format(i) + name] = place, i
        return found


def _unused(config: Any) -> set[str]:
    """Paths of the tables that a tower of these sizes has not."""
    if isinstance(config, SiglipConfig):
        return set()
    if isinstance(config, BertConfig):
        return set() if config.type_vocab_size else {"encoder/type_embeddings"}
    absent = set()
    if not config.qkv_bias:
        absent |= {f"{BLOCKS}/{name}/bias" for name in ("query", "key", "value")}
    if not config.qk_norm:
        absent |= {f"{BLOCKS}/{name}/scale" for name in ("query_norm", "key_norm")}
    return absent


def _linear(theirs: str, ours: str, output: str, summed: str, *, bias: bool) -> dict[str, Place]:
    """A linear layer, whose weight Hugging Face keeps as [output, input]."""
    found = {f"{theirs}.weight": Place(f"{ours}/kernel", (output, summed), summed + output)}
    if bias:
        found[f"{theirs}.bias"] = Place(f"{ours}/bias", (output,), output)
    return found


def _norm(theirs: str, ours: str) -> dict[str, Place]:
    return {
        f"{theirs}.weight": Place(f"{ours}/scale", ("d",), "d"),
        f"{theirs}.bias": Place(f"{ours}/bias", ("d",), "d"),
    }


def _rms_norm(theirs: str, ours: str, letter: str = "d") -> dict[str, Place]:
    return {f"{theirs}.weight": Place(f"{ours}/scale", (letter,), letter)}


def _table(theirs: str, ours: str, rows: str) -> dict[str, Place]:
    return {f"{theirs}.weight": Place(ours, (rows, "d"), rows + "d")}


def _encoder(layer: str, names: tuple[str, ...]) -> Tensors:
    """A tower of the BERT family; `names` in the order of the assignment below."""
    query, key, value, out, attention_norm, up, down, mlp_norm = names
    return Tensors(
        whole={
            **_table("embeddings.word_embeddings", "word_embeddings", "w"),
            **_table("embeddings.position_embeddings", "encoder/position_embeddings", "s"),
            **_table("embeddings.token_type_embeddings", "encoder/type_embeddings", "t"),
            **_norm("embeddings.LayerNorm", "encoder/embeddings_norm"),
        },
        layer=layer,
        in_layer={
            **_linear(query, f"{BLOCKS}/query", "ha", "d", bias=True),
            **_linear(key, f"{BLOCKS}/key", "ha", "d", bias=True),
            **_linear(value, f"{BLOCKS}/value", "ha", "d", bias=True),
            **_linear(out, f"{BLOCKS}/out", "d", "ha", bias=True),
            **_norm(attention_norm, f"{BLOCKS}/attention_norm"),
            **_linear(up, f"{BLOCKS}/up", "m", "d", bias=True),
            **_linear(down, f"{BLOCKS}/down", "d", "m", bias=True),
            **_norm(mlp_norm, f"{BLOCKS}/mlp_norm"),
        },
    )


def _decoder(norms: Mapping[str, str]) -> Tensors:
    """A decoder; `norms`: what the layers call each of our norms of the states."""
    return Tensors(
        whole={
            **_table("embed_tokens", "word_embeddings", "w"),
            **_rms_norm("norm", "encoder/final_norm"),
        },
        layer="layers.{}.",
        in_layer={
            **_linear("self_attn.q_proj", f"{BLOCKS}/query", "ha", "d", bias=True),
            **_linear("self_attn.k_proj", f"{BLOCKS}/key", "ga", "d", bias=True),
            **_linear("self_attn.v_proj", f"{BLOCKS}/value", "ga", "d", bias=True),
            **_linear("self_attn.o_proj", f"{BLOCKS}/out", "d", "ha", bias=False),
            **_rms_norm("self_attn.q_norm", f"{BLOCKS}/query_norm", "a"),
            **_rms_norm("self_attn.k_norm", f"{BLOCKS}/key_norm", "a"),
            **_linear("mlp.gate_proj", f"{BLOCKS}/gate", "m", "d", bias=False),
            **_linear("mlp.up_proj", f"{BLOCKS}/up", "m", "d", bias=False),
            **_linear("mlp.down_proj", f"{BLOCKS}/down", "d", "m", bias=False),
            **{
                name: place
                for theirs, ours in norms.items()
                for name, place in _rms_norm(theirs, f"{BLOCKS}/{ours}").items()
            },
        },
    )


_BLOCK = "blocks"

_VISION = Tensors(
    whole={
        "embeddings.patch_embedding.weight": Place("patches/kernel", ("d", "z", "y", "x"), "yxzd"),
        "embeddings.patch_embedding.bias": Place("patches/bias", ("d",), "d"),
        **_table("embeddings.position_embedding", "positions", "s"),
        **_norm("post_layernorm", "final_norm"),
        "head.probe": Place("pool/probe", ("", "", "d"), "d"),
        "head.attention.in_proj_weight": Place("pool/query_key_value/kernel", ("jha", "d"), "djha"),
        "head.attention.in_proj_bias": Place("pool/query_key_value/bias", ("jha",), "jha"),
        **_linear("head.attention.out_proj", "pool/out", "d", "ha", bias=True),
        **_norm("head.layernorm", "pool/norm"),
        **_linear("head.mlp.fc1", "pool/mlp/up", "m", "d", bias=True),
        **_linear("head.mlp.fc2", "pool/mlp/down", "d", "m", bias=True),
    },
    layer="encoder.layers.{}.",
    in_layer={
        **_norm("layer_norm1", f"{_BLOCK}/attention_norm"),
        **_linear("self_attn.q_proj", f"{_BLOCK}/query", "ha", "d", bias=True),
        **_linear("self_attn.k_proj", f"{_BLOCK}/key", "ha", "d", bias=True),
        **_linear("self_attn.v_proj", f"{_BLOCK}/value", "ha", "d", bias=True),
        **_linear("self_attn.out_proj", f"{_BLOCK}/out", "d", "ha", bias=True),
        **_norm("layer_norm2", f"{_BLOCK}/mlp_norm"),
        **_linear("mlp.fc1", f"{_BLOCK}/mlp/up", "m", "d", bias=True),
        **_linear("mlp.fc2", f"{_BLOCK}/mlp/down", "d", "m", bias=True),
    },
)

_PRE_NORM = _decoder({"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"})

# model_type -> its tensors.
TENSORS = {
    "bert": _encoder(
        "encoder.layer.{}.",
        (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "attention.output.LayerNorm",
            "intermediate.dense",
            "output.dense",
            "output.LayerNorm",
        ),
    ),
    "distilbert": _encoder(
        "transformer.layer.{}.",
        (
            "attention.q_lin",
            "attention.k_lin",
            "attention.v_lin",
            "attention.out_lin",
            "sa_layer_norm",
            "ffn.lin1",
            "ffn.lin2",
            "output_layer_norm",
        ),
    ),
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "llama": _PRE_NORM,
    "gemma3_text": _decoder(
        {
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "attention_post_norm",
            "pre_feedforward_layernorm": "mlp_norm",
            "post_feedforward_layernorm": "mlp_post_norm",
        }
    ),
    "siglip_vision_model": _VISION,
}

VISION = ("siglip_vision_model",)
TOWERS = tuple(family for family in TENSORS if family not in VISION)

# model_type of two models in one -> where the half known here stands, and its model_type.
_WITHIN = {
    "gemma3": ("text_config", "gemma3_text"),
    "siglip": ("vision_config", "siglip_vision_model"),
}

BARE_MODELS = {
    "bert": "BertModel",
    "distilbert": "DistilBertModel",
    "qwen2": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "llama": "LlamaModel",
    "gemma3_text": "Gemma3TextModel",
}

# What may stand before a tensor's name: a model with a head, or one that sees (Gemma 3).
PREFIXES = r"^((bert|distilbert|model|language_model|vision_model)\.)+"

# What a checkpoint may hold beside the tower; its vectors need none of it.
IGNORED = (
    r"embeddings\.position_ids",
    r"pooler\.dense\.(weight|bias)",
    r"cls\..*",
    r"vocab_(transform|layer_norm|projector)\..*",
    r"(pre_)?classifier\..*",
    r"qa_outputs\..*",
    r"lm_head\.weight",
    r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    r"vision_tower\..*",
    r"text_model\..*",
    r"logit_(scale|bias)",
    r"multi_modal_projector\..*",
)


class _About:
    """A config.json, read field by field; what is wrong with it names the file and the field."""

    def __init__(self, path: str, values: Mapping[str, Any]):
        self.path, self.values = path, values

    def get(self, name: str, *default: Any) -> Any:
        """The field; `default` where it is absent or null."""
        value = self.values.get(name)
        if value is None:
            if not default:
                raise InputError(f"{self.path}: {name} is missing")
            return default[0]
        return value

    def demand(self, **wanted: Any) -> None:
        """Refuses a field that says something else; absent or null says nothing."""
        for name, value in wanted.items():
            if self.values.get(name) not in (value, None):
                raise InputError(
                    f"{self.path}: {name} is {self.values[name]!r}, expected {value!r}"
                )

    def below(self, name: str) -> "_About":
        """A field that is itself an object; empty where it is absent or null."""
        return _About(f"{self.path}: {name}", self.get(name, {}))


def read_config(
    path: str, values: Mapping[str, Any], families: Collection[str]
) -> tuple[str, BertConfig | DecoderConfig | SiglipConfig]:
    """The family and the sizes that a config.json says.

    Args:
      path: Its name, for what is wrong with it.
      values: Its content.
      families: Those that will do, of `TENSORS`.

    Raises:
      InputError: If it is of no family known here, or asks for what no tower here does.
    """
    about, family = _About(path, values), values.get("model_type")
    if family in _WITHIN:  # One that reads and sees: the half that is asked for stands within.
        field, family = _WITHIN[family]
        about = about.below(field)
    if family not in families:
        raise InputError(
            f"{path}: model_type is {family!r}, expected one of {', '.join(sorted(families))}"
        )
    read = _READ.get(family)
    try:
        return family, read(about) if read else _pre_norm(about, family)
    except (TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: {error}") from None


def write_config(config: BertConfig | DecoderConfig) -> dict[str, Any]:
    """The config.json of a tower that was trained from nothing: a BERT, or a Qwen3.

    What a decoder multiplies its words by is not in there: it is to be part of the words.

    Raises:
      InputError: If `transformers` has no such decoder.
    """
    about: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
    }
    if isinstance(config, BertConfig):
        return about | {
            "model_type": "bert",
            "hidden_act": "gelu",
            "type_vocab_size": config.type_vocab_size,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "layer_norm_eps": config.layer_norm_eps,
        }
    about |= {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "attention_bias": False,
        "tie_word_embeddings": True,
    }
    kept = ("causal", "pooling", "word_scale", "image_width", "dtype", "scan", "remat")
    same = {name: getattr(config, name) for name in kept}
    read = _pre_norm(_About("config.json", about), "qwen3")
    if dataclasses.replace(read, **same) != config:
        raise InputError("a decoder of no family that transformers has; it cannot be written")
    return about


def _siglip(about: _About) -> SiglipConfig:
    about.demand(hidden_act="gelu_pytorch_tanh", num_channels=3, vision_use_head=True)
    return SiglipConfig(
        image_size=about.get("image_size", 224),
        patch_size=about.get("patch_size", 16),
        num_layers=about.get("num_hidden_layers", 12),
        width=about.get("hidden_size", 768),
        num_heads=about.get("num_attention_heads", 12),
        mlp_width=about.get("intermediate_size", 3072),
        layer_norm_eps=about.get("layer_norm_eps", 1e-6),
    )


def _bert(about: _About) -> BertConfig:
    about.demand(
        hidden_act="gelu",
        position_embedding_type="absolute",
        is_decoder=False,
        add_cross_attention=False,
    )
    return BertConfig(
        vocab_size=about.get("vocab_size"),
        num_layers=about.get("num_hidden_layers"),
        width=about.get("hidden_size"),
        num_heads=about.get("num_attention_heads"),
        mlp_width=about.get("intermediate_size"),
        max_positions=about.get("max_position_embeddings"),
        type_vocab_size=about.get("type_vocab_size", 2),
        dropout=about.get("hidden_dropout_prob", 0.1),
        attention_dropout=about.get("attention_probs_dropout_prob", 0.1),
        layer_norm_eps=about.get("layer_norm_eps", 1e-12),
        initializer_range=about.get("initializer_range", 0.02),
    )


def _distilbert(about: _About) -> BertConfig:
    about.demand(activation="gelu")
    return BertConfig(
        vocab_size=about.get("vocab_size"),
        num_layers=about.get("n_layers"),
        width=about.get("dim"),
        num_heads=about.get("n_heads"),
        mlp_width=about.get("hidden_dim"),
        max_positions=about.get("max_position_embeddings"),
        type_vocab_size=0,
        dropout=about.get("dropout", 0.1),
        attention_dropout=about.get("attention_dropout", 0.1),
        initializer_range=about.get("initializer_range", 0.02),
    )


def _pre_norm(about: _About, family: str) -> DecoderConfig:
    """Qwen2.5, Qwen3 and Llama 3: defaults as `transformers` has them."""
    about.demand(hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False)
    width, num_heads = about.get("hidden_size"), about.get("num_attention_heads")
    kv_heads = {"qwen2": 32, "qwen3": 32, "llama": num_heads}[family]
    return DecoderConfig(
        vocab_size=about.get("vocab_size"),
        num_layers=about.get("num_hidden_layers"),
        width=width,
        num_heads=num_heads,
        num_kv_heads=about.get("num_key_value_heads", kv_heads),
        head_width=about.get("head_dim", 128 if family == "qwen3" else width // num_heads),
        mlp_width=about.get("intermediate_size"),
        max_positions=about.get("max_position_embeddings"),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        norm_eps=about.get("rms_norm_eps", 1e-6),
        initializer_range=about.get("initializer_range", 0.02),
        rope=_rope(
            about, about.values.get("rope_parameters") or about.values.get("rope_scaling"), 10_000.0
        ),
    )


def _gemma(about: _About) -> DecoderConfig:
    """Gemma 3: published files leave out what `transformers` has as defaults."""
    about.demand(
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        attn_logit_softcapping=None,
        use_bidirectional_attention=False,
    )
    width, num_layers = about.get("hidden_size", 2304), about.get("num_hidden_layers", 26)
    every = about.get("sliding_window_pattern", about.get("_sliding_window_pattern", 6))
    types = [
        "full_attention" if i % every == 0 else "sliding_attention"
        for i in range(1, num_layers + 1)
    ]
    about.demand(layer_types=types)
    ropes = about.get("rope_parameters", {})
    full = ropes.get("full_attention") or about.values.get("rope_scaling")
    return DecoderConfig(
        vocab_size=about.get("vocab_size", 262_208),
        num_layers=num_layers,
        width=width,
        num_heads=about.get("num_attention_heads", 8),
        num_kv_heads=about.get("num_key_value_heads", 4),
        head_width=about.get("head_dim", 256),
        mlp_width=about.get("intermediate_size", 9216),
        max_positions=about.get("max_position_embeddings", 131_072),
        qk_norm=True,
        post_norms=True,
        unit_offset=True,
        activation="gelu_tanh",
        word_scale=math.sqrt(width),
        attention_scale=about.get("query_pre_attn_scalar", 256) ** -0.5,
        norm_eps=about.get("rms_norm_eps", 1e-6),
        initializer_range=about.get("initializer_range", 0.02),
        window=about.get("sliding_window", 4096),
        global_every=every,
        rope=_rope(about, full, 1_000_000.0),
        local_rope=Rope(
            theta=ropes.get("sliding_attention", {}).get(
                "rope_theta", about.get("rope_local_base_freq", 10_000.0)
            )
        ),
    )


def _rope(about: _About, scaling: Mapping[str, Any] | None, theta: float) -> Rope:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    found = _About(f"{about.path}: rope_parameters", scaling or {})
    kind = found.get("rope_type", found.get("type", "default"))
    theta = found.get("rope_theta", about.get("rope_theta", theta))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, factor=found.get("factor"))
    if kind == "llama3":
        return Rope(
            theta=theta,
            factor=found.get("factor"),
            low_freq_factor=found.get("low_freq_factor"),
            high_freq_factor=found.get("high_freq_factor"),
            original_positions=found.get("original_max_position_embeddings"),
        )
    raise InputError(f"{found.path}: rope_type is {kind!r}, expected default, linear or llama3")


_READ = {
    "bert": _bert,
    "distilbert": _distilbert,
    "gemma3_text": _gemma,
    "siglip_vision_model": _siglip,
}
