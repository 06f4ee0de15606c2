"""Sizes of towers, read from the config.json of Hugging Face checkpoints and written to it."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import msgspec

from vixml_jax.errors import InputError
from vixml_jax.models.bert import BertConfig
from vixml_jax.models.decoder import DecoderConfig, Rope
from vixml_jax.models.modernbert import ModernBertConfig
from vixml_jax.models.siglip import SiglipConfig

# model_type of a multimodal model -> the field with the config of the half that is supported here,
# and the model_type of that half.
_NESTED = {
    "gemma3": ("text_config", "gemma3_text"),
    "siglip": ("vision_config", "siglip_vision_model"),
}
# The largest sizes that are accepted, well above those of published models.
_LARGEST = {
    "num_layers": 1000,
    "width": 1 << 16,
    "mlp_width": 1 << 19,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_width": 1 << 14,
    "lora_rank": 1 << 14,
    "first_position": 1 << 12,
    "type_vocab_size": 1 << 12,
    "distance_buckets": 1 << 12,
    "image_width": 1 << 16,
    "image_size": 1 << 13,
    "patch_size": 1 << 13,
}
_POSITIVE = {
    *("vocab_size", "width", "num_heads", "num_kv_heads", "head_width", "mlp_width"),
    *("max_positions", "image_size", "patch_size", "global_every"),
}
_MOST_PARAMETERS = 1 << 40
MPNET_BUCKETS = 32  # transformers computes with this number, whatever the file says.

# Bounds far above those of published models; a size in a file must not decide on memory or time.
_Layers = Annotated[int, msgspec.Meta(ge=1, le=1000)]
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 19)]
_Side = Annotated[int, msgspec.Meta(ge=1, le=1 << 13)]  # Of an image or a patch.
_Types = Annotated[int, msgspec.Meta(ge=0, le=1 << 12)]  # Of tokens; some models have none.
_Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]  # Of tokens or positions.
_Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]
_Rate = Annotated[float, msgspec.Meta(ge=0, lt=1)]
_Epsilon = Annotated[float, msgspec.Meta(gt=0, le=1)]
_Scale = Annotated[float, msgspec.Meta(ge=1e-6, le=1e12)]
_Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Object = dict[str, Any]
_SHOWN = 60  # Characters of a value in a message.


class _Fields:
    """The fields of a config.json; errors name the file and the field."""

    def __init__(self, path: str, values: Mapping[str, Any]):
        self.path, self.values = path, values

    def get(self, name: str, kind: Any, *default: Any) -> Any:
        """The field's value, or `default` if it is absent or null.

        Args:
          name: Of the field.
          kind: A type that msgspec knows, with bounds.
          *default: Without one, the field must be there.
        """
        value = self.values.get(name)
        if value is None:
            if not default:
                raise InputError(f"{self.path}: {name} is missing")
            return default[0]
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            reason = str(error).replace("Expected", "expected")
            raise InputError(f"{self.path}: {name} is {_shown(value)}: {reason}") from None

    def require(self, **expected: Any) -> None:
        """Raises an `InputError` if a field has another value; absent or null is accepted."""
        for name, value in expected.items():
            if self.values.get(name) not in (value, None):
                raise InputError(
                    f"{self.path}: {name} is {_shown(self.values[name])}, expected {_shown(value)}"
                )

    def nested(self, name: str) -> "_Fields":
        """The fields of an object in a field; empty if it is absent or null."""
        return _Fields(f"{self.path}: {name}", self.get(name, _Object, {}))


def _shown(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def read_config(
    path: str, values: Mapping[str, Any], families: Collection[str]
) -> tuple[str, BertConfig | ModernBertConfig | DecoderConfig | SiglipConfig]:
    """The family and the sizes given by a config.json.

    Args:
      path: Path of the file, for error messages.
      values: Content of the file.
      families: Accepted families, keys of `hf_names.TENSORS`.

    Raises:
      InputError: If the model is of another family, or has features that are not supported.
    """
    fields = _Fields(path, values)
    family = fields.get("model_type", str, None)
    if family in _NESTED:
        field, family = _NESTED[family]
        fields = fields.nested(field)
    if family not in families:
        raise InputError(
            f"{path}: model_type is {_shown(family)}, expected one of {', '.join(sorted(families))}"
        )
    read = _READ.get(family)
    try:
        config = read(fields) if read else _pre_norm(fields, family)
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        raise InputError(f"{path}: a field has a wrong type or value ({error})") from None
    check_sizes(path, config)
    return family, config


def end_token(path: str, values: Mapping[str, Any]) -> int | None:
    """The end-of-text token id given by a config.json; None if it has none.

    Args:
      path: Path of the file, for error messages.
      values: Content of the file.

    Raises:
      InputError: If it is no token of the model.
    """
    fields = _Fields(path, values)
    fields = _Fields(path, {**values, **fields.nested("text_config").values})
    end = fields.get("eos_token_id", _Id | list[_Id], [])
    ends = end if isinstance(end, list) else [end]
    vocab_size = fields.get("vocab_size", _Count, None)
    if ends and vocab_size is not None and ends[0] >= vocab_size:
        raise InputError(
            f"{path}: eos_token_id is {ends[0]}, expected less than vocab_size, {vocab_size}"
        )
    return ends[0] if ends else None


def check_sizes(
    path: str, config: BertConfig | ModernBertConfig | DecoderConfig | SiglipConfig
) -> None:
    """Checks types and ranges of all sizes, before anything of these sizes is made.

    Args:
      path: Of the file that they were read from, for messages.
      config: Sizes of a tower.

    Raises:
      InputError: If a size has another type, is not finite, negative, or larger than any model's.
    """
    try:
        msgspec.convert(dataclasses.asdict(config), type(config))
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: {error}") from None
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{path}: {field.name} is {value}, expected a finite number")
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        least, most = int(field.name in _POSITIVE), _LARGEST.get(field.name, 1 << 24)
        if not least <= value <= most:
            raise InputError(f"{path}: {field.name} is {value:,}, expected {least} to {most:,}")
    matrices = config.num_layers * config.width * (4 * config.width + 3 * config.mlp_width)
    parameters = matrices + getattr(config, "vocab_size", 0) * config.width
    if parameters > _MOST_PARAMETERS:
        raise InputError(
            f"{path}: describes about {parameters:,} parameters, expected at most "
            f"{_MOST_PARAMETERS:,}"
        )


def write_config(config: BertConfig | DecoderConfig) -> dict[str, Any]:
    """The config.json of a tower trained from random weights: a BERT or a Qwen3.

    `embedding_scale` has no field in it: the caller multiplies the token embeddings by it.

    Raises:
      InputError: If `transformers` has no such decoder.
    """
    values: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.width,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_width,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.initializer_range,
    }
    if isinstance(config, BertConfig):
        return values | {
            "model_type": "bert",
            "hidden_act": "gelu",
            "type_vocab_size": config.type_vocab_size,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.attention_dropout,
            "layer_norm_eps": config.layer_norm_eps,
        }
    values |= {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "attention_bias": False,
        "tie_word_embeddings": True,
    }
    kept = ("causal", "pooling", "embedding_scale", "image_width", "dtype", "scan", "remat")
    same = {name: getattr(config, name) for name in kept}
    read = _pre_norm(_Fields("config.json", values), "qwen3")
    if dataclasses.replace(read, **same) != config:
        raise InputError(
            "the decoder's sizes fit no model of transformers (tried qwen3): it cannot be exported"
        )
    return values


def _siglip(fields: _Fields) -> SiglipConfig:
    fields.require(hidden_act="gelu_pytorch_tanh", num_channels=3, vision_use_head=True)
    return SiglipConfig(
        image_size=fields.get("image_size", _Side, 224),
        patch_size=fields.get("patch_size", _Side, 16),
        num_layers=fields.get("num_hidden_layers", _Layers, 12),
        width=fields.get("hidden_size", _Size, 768),
        num_heads=fields.get("num_attention_heads", _Size, 12),
        mlp_width=fields.get("intermediate_size", _Size, 3072),
        layer_norm_eps=fields.get("layer_norm_eps", _Epsilon, 1e-6),
    )


def _bert(fields: _Fields) -> BertConfig:
    fields.require(
        hidden_act="gelu",
        position_embedding_type="absolute",
        is_decoder=False,
        add_cross_attention=False,
    )
    return BertConfig(
        vocab_size=fields.get("vocab_size", _Count),
        num_layers=fields.get("num_hidden_layers", _Layers),
        width=fields.get("hidden_size", _Size),
        num_heads=fields.get("num_attention_heads", _Size),
        mlp_width=fields.get("intermediate_size", _Size),
        max_positions=fields.get("max_position_embeddings", _Count),
        type_vocab_size=fields.get("type_vocab_size", _Types, 2),
        dropout=fields.get("hidden_dropout_prob", _Rate, 0.1),
        attention_dropout=fields.get("attention_probs_dropout_prob", _Rate, 0.1),
        layer_norm_eps=fields.get("layer_norm_eps", _Epsilon, 1e-12),
        initializer_range=fields.get("initializer_range", _Fraction, 0.02),
    )


def _roberta(fields: _Fields) -> BertConfig:
    """RoBERTa and XLM-R: a BERT whose positions are counted from the padding token's id + 1."""
    config, first = _bert(fields), fields.get("pad_token_id", _Id, 1) + 1
    return dataclasses.replace(
        config, first_position=first, max_positions=config.max_positions - first
    )


def _mpnet(fields: _Fields) -> BertConfig:
    """MPNet: a RoBERTa without token types, with an attention bias by distance."""
    fields.require(relative_attention_num_buckets=MPNET_BUCKETS, pad_token_id=1)
    return dataclasses.replace(_roberta(fields), type_vocab_size=0, distance_buckets=MPNET_BUCKETS)


def _modernbert(fields: _Fields) -> ModernBertConfig:
    fields.require(hidden_activation="gelu", norm_bias=False, attention_bias=False, mlp_bias=False)
    num_layers, every = (
        fields.get("num_hidden_layers", _Layers),
        fields.get("global_attn_every_n_layers", _Layers, 3),
    )
    types = ["sliding_attention" if i % every else "full_attention" for i in range(num_layers)]
    fields.require(layer_types=types)
    dropout = fields.get("mlp_dropout", _Rate, 0.0)
    fields.require(embedding_dropout=dropout)
    ropes = fields.nested("rope_parameters")
    return ModernBertConfig(
        vocab_size=fields.get("vocab_size", _Count),
        num_layers=num_layers,
        width=fields.get("hidden_size", _Size),
        num_heads=fields.get("num_attention_heads", _Size),
        mlp_width=fields.get("intermediate_size", _Size),
        max_positions=fields.get("max_position_embeddings", _Count),
        dropout=dropout,
        attention_dropout=fields.get("attention_dropout", _Rate, 0.0),
        norm_eps=fields.get("norm_eps", _Epsilon, 1e-5),
        initializer_range=fields.get("initializer_range", _Fraction, 0.02),
        window=fields.get("local_attention", _Count, 128) // 2 + 1,  # Both ends included.
        global_every=every,
        rope=_modern_rope(
            ropes.nested("full_attention"), fields.get("global_rope_theta", _Scale, 160_000.0)
        ),
        local_rope=_modern_rope(
            ropes.nested("sliding_attention"), fields.get("local_rope_theta", _Scale, 10_000.0)
        ),
    )


def _modern_rope(rope: _Fields, theta: float) -> Rope:
    rope.require(rope_type="default")
    return Rope(theta=rope.get("rope_theta", _Scale, theta))


def _distilbert(fields: _Fields) -> BertConfig:
    fields.require(activation="gelu")
    return BertConfig(
        vocab_size=fields.get("vocab_size", _Count),
        num_layers=fields.get("n_layers", _Layers),
        width=fields.get("dim", _Size),
        num_heads=fields.get("n_heads", _Size),
        mlp_width=fields.get("hidden_dim", _Size),
        max_positions=fields.get("max_position_embeddings", _Count),
        type_vocab_size=0,
        dropout=fields.get("dropout", _Rate, 0.1),
        attention_dropout=fields.get("attention_dropout", _Rate, 0.1),
        initializer_range=fields.get("initializer_range", _Fraction, 0.02),
    )


def _pre_norm(fields: _Fields, family: str) -> DecoderConfig:
    """Qwen2.5, Qwen3 and Llama 3, with the defaults of `transformers`."""
    fields.require(
        hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False
    )
    width, num_heads = fields.get("hidden_size", _Size), fields.get("num_attention_heads", _Size)
    kv_heads = {"qwen2": 32, "qwen3": 32, "llama": num_heads}[family]
    return DecoderConfig(
        vocab_size=fields.get("vocab_size", _Count),
        num_layers=fields.get("num_hidden_layers", _Layers),
        width=width,
        num_heads=num_heads,
        num_kv_heads=fields.get("num_key_value_heads", _Size, kv_heads),
        head_width=fields.get("head_dim", _Size, 128 if family == "qwen3" else width // num_heads),
        mlp_width=fields.get("intermediate_size", _Size),
        max_positions=fields.get("max_position_embeddings", _Count),
        qkv_bias=family == "qwen2",
        causal=fields.get("is_causal", bool, True),
        qk_norm=family == "qwen3",
        norm_eps=fields.get("rms_norm_eps", _Epsilon, 1e-6),
        initializer_range=fields.get("initializer_range", _Fraction, 0.02),
        rope=_rope(
            fields,
            fields.get("rope_parameters", _Object, fields.get("rope_scaling", _Object, {})),
            10_000.0,
        ),
    )


def _gemma(fields: _Fields) -> DecoderConfig:
    """Gemma 3; published files omit fields that have their default values in `transformers`."""
    fields.require(
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        attn_logit_softcapping=None,
        use_bidirectional_attention=False,
        is_causal=True,
    )
    width, num_layers = (
        fields.get("hidden_size", _Size, 2304),
        fields.get("num_hidden_layers", _Layers, 26),
    )
    every = fields.get(
        "sliding_window_pattern", _Layers, fields.get("_sliding_window_pattern", _Layers, 6)
    )
    types = [
        "full_attention" if i % every == 0 else "sliding_attention"
        for i in range(1, num_layers + 1)
    ]
    fields.require(layer_types=types)
    ropes = fields.nested("rope_parameters")
    full = ropes.get("full_attention", _Object, fields.get("rope_scaling", _Object, {}))
    return DecoderConfig(
        vocab_size=fields.get("vocab_size", _Count, 262_208),
        num_layers=num_layers,
        width=width,
        num_heads=fields.get("num_attention_heads", _Size, 8),
        num_kv_heads=fields.get("num_key_value_heads", _Size, 4),
        head_width=fields.get("head_dim", _Size, 256),
        mlp_width=fields.get("intermediate_size", _Size, 9216),
        max_positions=fields.get("max_position_embeddings", _Count, 131_072),
        qk_norm=True,
        post_norms=True,
        unit_offset=True,
        activation="gelu_tanh",
        embedding_scale=math.sqrt(width),
        attention_scale=fields.get("query_pre_attn_scalar", _Scale, 256) ** -0.5,
        norm_eps=fields.get("rms_norm_eps", _Epsilon, 1e-6),
        initializer_range=fields.get("initializer_range", _Fraction, 0.02),
        window=fields.get("sliding_window", _Count, 4096),
        global_every=every,
        rope=_rope(fields, full, 1_000_000.0),
        local_rope=Rope(
            theta=ropes.nested("sliding_attention").get(
                "rope_theta", _Scale, fields.get("rope_local_base_freq", _Scale, 10_000.0)
            )
        ),
    )


def _rope(fields: _Fields, scaling: Mapping[str, Any], theta: float) -> Rope:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (earlier)."""
    rope = _Fields(f"{fields.path}: rope_parameters", scaling)
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    theta = rope.get("rope_theta", _Scale, fields.get("rope_theta", _Scale, theta))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, factor=rope.get("factor", _Scale))
    if kind == "llama3":
        return Rope(
            theta=theta,
            factor=rope.get("factor", _Scale),
            low_freq_factor=rope.get("low_freq_factor", _Scale),
            high_freq_factor=rope.get("high_freq_factor", _Scale),
            original_positions=rope.get("original_max_position_embeddings", _Count),
        )
    raise InputError(f"{rope.path}: rope_type is {kind!r}, expected default, linear or llama3")


_READ = {
    "bert": _bert,
    "roberta": _roberta,
    "xlm-roberta": _roberta,
    "camembert": _roberta,
    "mpnet": _mpnet,
    "modernbert": _modernbert,
    "distilbert": _distilbert,
    "gemma3_text": _gemma,
    "siglip_vision_model": _siglip,
}
