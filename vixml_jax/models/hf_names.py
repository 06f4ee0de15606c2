"""Names of the tensors in the Hugging Face checkpoints of each family of towers."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from vixml_jax.models.bert import BertConfig
from vixml_jax.models.modernbert import ModernBertConfig
from vixml_jax.models.siglip import SiglipConfig

BLOCKS = "encoder/blocks"


class Place(NamedTuple):
    """The parameter that a tensor of a checkpoint becomes.

    Dimensions are spelled with the letters of `axis_names.LETTERS`; here s counts position
    embeddings, t token types and l buckets of distances.

    Attributes:
      path: Path of the parameter in the tower, with slashes.
      hf_letters: Letters of each dimension of the tensor; several letters are one flattened
        dimension.
      letters: Letters of the parameter, without the leading dimension of stacked layers.
    """

    path: str
    hf_letters: tuple[str, ...]
    letters: str

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the tensor in the checkpoint."""
        return tuple(math.prod(sizes[letter] for letter in group) for group in self.hf_letters)


class Tensors(NamedTuple):
    """The tensors of a family, by their names in the bare model of `transformers`.

    Attributes:
      unstacked: Tensors outside the layers.
      layer: Prefix of the tensors of a layer, with {} for its number.
      in_layer: Tensors of a layer, by the name after the prefix.
      not_in_first: Those of them that the first layer lacks.
    """

    unstacked: dict[str, Place]
    layer: str
    in_layer: dict[str, Place]
    not_in_first: tuple[str, ...] = ()

    def expected(self, config: Any) -> dict[str, tuple[Place, int | None]]:
        """Name -> (place, layer or None) of all tensors of a tower with this config."""
        absent = _absent(config)
        tensors: dict[str, tuple[Place, int | None]] = {
            name: (place, None)
            for name, place in self.unstacked.items()
            if place.path not in absent
        }
        for i in range(config.num_layers):
            for name, place in self.in_layer.items():
                if place.path not in absent and (i or name not in self.not_in_first):
                    tensors[self.layer.format(i) + name] = place, i
        return tensors


def _absent(config: Any) -> set[str]:
    """Paths of the family's parameters that a tower with this config lacks."""
    if isinstance(config, (SiglipConfig, ModernBertConfig)):
        return set()
    if isinstance(config, BertConfig):
        optional = {
            "encoder/type_embeddings": config.type_vocab_size,
            "encoder/distance_bias": config.distance_buckets,
        }
        return {path for path, size in optional.items() if not size}
    absent = set()
    if not config.qkv_bias:
        absent |= {f"{BLOCKS}/{name}/bias" for name in ("query", "key", "value")}
    if not config.qk_norm:
        absent |= {f"{BLOCKS}/{name}/scale" for name in ("query_norm", "key_norm")}
    return absent


def _linear(name: str, path: str, output: str, summed: str, *, bias: bool) -> dict[str, Place]:
    """A linear layer, whose weight Hugging Face stores as [output, input]."""
    places = {f"{name}.weight": Place(f"{path}/kernel", (output, summed), summed + output)}
    if bias:
        places[f"{name}.bias"] = Place(f"{path}/bias", (output,), output)
    return places


def _norm(name: str, path: str) -> dict[str, Place]:
    return {
        f"{name}.weight": Place(f"{path}/scale", ("d",), "d"),
        f"{name}.bias": Place(f"{path}/bias", ("d",), "d"),
    }


def _rms_norm(name: str, path: str, letter: str = "d") -> dict[str, Place]:
    return {f"{name}.weight": Place(f"{path}/scale", (letter,), letter)}


def _table(name: str, path: str, rows: str) -> dict[str, Place]:
    return {f"{name}.weight": Place(path, (rows, "d"), rows + "d")}


def _encoder(layer: str, names: tuple[str, ...]) -> Tensors:
    """Tensors of the BERT family; `names` in the order of the assignment below."""
    query, key, value, out, attention_norm, up, down, mlp_norm = names
    return Tensors(
        unstacked={
            **_table("embeddings.word_embeddings", "word_embeddings", "w"),
            **_table("embeddings.position_embeddings", "encoder/position_embeddings", "s"),
            **_table("embeddings.token_type_embeddings", "encoder/type_embeddings", "t"),
            **_norm("embeddings.LayerNorm", "encoder/embeddings_norm"),
            "encoder.relative_attention_bias.weight": Place(
                "encoder/distance_bias", ("l", "h"), "lh"
            ),
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
    """Tensors of a decoder; `norms` maps the checkpoint's norms of hidden states to ours."""
    return Tensors(
        unstacked={
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
                for hf_name, our_name in norms.items()
                for name, place in _rms_norm(hf_name, f"{BLOCKS}/{our_name}").items()
            },
        },
    )


_BLOCK = "blocks"

_VISION = Tensors(
    unstacked={
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

_MODERN = Tensors(
    unstacked={
        **_table("embeddings.tok_embeddings", "word_embeddings", "w"),
        **_rms_norm("embeddings.norm", "encoder/embeddings_norm"),
        **_rms_norm("final_norm", "encoder/final_norm"),
    },
    layer="layers.{}.",
    in_layer={
        **_rms_norm("attn_norm", f"{BLOCKS}/attention_norm"),
        "attn.Wqkv.weight": Place(f"{BLOCKS}/query_key_value/kernel", ("jha", "d"), "djha"),
        **_linear("attn.Wo", f"{BLOCKS}/out", "d", "ha", bias=False),
        **_rms_norm("mlp_norm", f"{BLOCKS}/mlp_norm"),
        "mlp.Wi.weight": Place(f"{BLOCKS}/up/kernel", ("um", "d"), "dum"),
        **_linear("mlp.Wo", f"{BLOCKS}/down", "d", "m", bias=False),
    },
    not_in_first=("attn_norm.weight",),
)

_BERT_NAMES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)

_PRE_NORM = _decoder({"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"})

# model_type -> its tensors.
TENSORS = {
    **{
        family: _encoder("encoder.layer.{}.", _BERT_NAMES)
        for family in ("bert", "roberta", "xlm-roberta", "camembert")
    },
    "mpnet": _encoder(
        "encoder.layer.{}.",
        (
            "attention.attn.q",
            "attention.attn.k",
            "attention.attn.v",
            "attention.attn.o",
            "attention.LayerNorm",
            "intermediate.dense",
            "output.dense",
            "output.LayerNorm",
        ),
    ),
    "modernbert": _MODERN,
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

BARE_MODELS = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "camembert": "CamembertModel",
    "mpnet": "MPNetModel",
    "modernbert": "ModernBertModel",
    "distilbert": "DistilBertModel",
    "qwen2": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "llama": "LlamaModel",
    "gemma3_text": "Gemma3TextModel",
}

# The first tensor of each family. What its name begins with in a checkpoint, all others do as well.
ANCHORS = (
    "embeddings.word_embeddings.weight",
    "embeddings.tok_embeddings.weight",
    "embeddings.patch_embedding.weight",
    "embed_tokens.weight",
)

# Tensors that a checkpoint may hold besides the tower, and that the tower does not need, with or
# without anything before.
IGNORED = (
    r"embeddings\.(position|token_type)_ids",
    r"pooler\.dense\.(weight|bias)",
    r"cls\..*",
    r"vocab_(transform|layer_norm|projector)\..*",
    r"(pre_)?classifier\..*",
    r"qa_outputs\..*",
    r"lm_head\..*",
    r"head\.(dense|norm)\.(weight|bias)",
    r"decoder\.(weight|bias)",
    r"rotary_emb\.inv_freq",
    r"vision_tower\..*",
    r"text_model\..*",
    r"logit_(scale|bias)",
    r"multi_modal_projector\..*",
)
