"""Decoder-only language models as towers: Qwen2.5, Qwen3, Llama 3 and Gemma 3.

Sources: the configurations of the published checkpoints, and the models of the same names in
`transformers`.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vixml_jax.models import attention as attention_lib
from vixml_jax.models import layers

LORA_MAPS = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embeddings, and how positions were scaled after pretraining.

    Attributes:
      theta: Base of the wavelengths.
      factor: Divides every position; with `original_positions`, only at long wavelengths.
      low_freq_factor: Llama 3 scales wavelengths above `original_positions / low_freq_factor` by
        the full factor.
      high_freq_factor: Llama 3 leaves wavelengths below `original_positions / high_freq_factor`
        unscaled, and interpolates in between.
      original_positions: Context length of Llama 3's pretraining; 0 scales all wavelengths alike.
    """

    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 0

    def frequencies(self, head_width: int) -> Float[np.ndarray, " a/2"]:
        """Rotation per position of each pair of a head's entries, in radians, float64."""
        frequencies = self.theta ** -(np.arange(0, head_width, 2) / head_width)
        if not self.original_positions:
            return frequencies / self.factor
        # Number of full rotations within the original context length.
        turns = self.original_positions * frequencies / (2 * math.pi)
        unscaled = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        unscaled = np.clip(unscaled, 0.0, 1.0)
        return frequencies * (unscaled + (1.0 - unscaled) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and computation settings of a decoder.

    Attributes:
      vocab_size: Number of token embeddings.
      num_layers: Number of blocks.
      width: Width of the hidden states and of the output vector.
      num_heads: Number of query heads.
      num_kv_heads: Number of key and value heads, shared by equal groups of query heads.
      head_width: Width of one head.
      mlp_width: Width of the gated feed-forward layer.
      max_positions: Context length of the pretraining; used in checks only.
      qkv_bias: Whether queries, keys and values have biases (Qwen2.5).
      qk_norm: Whether queries and keys are normalised per head (Qwen3, Gemma 3).
      post_norms: Whether each branch is normalised again before its residual sum (Gemma 3).
      unit_offset: Whether a norm multiplies by 1 + its weight (Gemma 3).
      activation: Activation of the gate, "silu" or "gelu_tanh".
      embedding_scale: Factor applied to token embeddings (Gemma 3: sqrt(width)).
      attention_scale: Factor applied to attention scores; 0 means head_width ** -0.5.
      norm_eps: Added to mean squares.
      rope: Rotary embeddings of layers with full attention.
      window: Number of positions a sliding-window layer attends to, including its own; 0 if all
        layers have full attention.
      global_every: Every layer whose number (from 1) is a multiple of this has full attention
        (Gemma 3: 6).
      local_rope: Rotary embeddings of sliding-window layers.
      causal: Whether a position attends only to itself and earlier ones, as in pretraining.
      pooling: "mean" of an item's positions, or its "last" position.
      initializer_range: Standard deviation of freshly initialised weights.
      lora_rank: Rank of the LoRA adapters; 0 for none.
      lora_alpha: Adapter outputs are multiplied by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
      lora_maps: Which of `LORA_MAPS` have adapters.
      image_width: Width of an image embedding; 0 if the tower reads no images.
      dtype: Computation dtype; norms, softmax and pooling are always float32.
      scan: Whether to scan over one compiled block instead of unrolling all blocks.
      remat: Whether to recompute each block in the backward pass.
    """

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    max_positions: int = 32_768
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    unit_offset: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    attention_scale: float = 0.0
    norm_eps: float = 1e-6
    rope: Rope = Rope()
    window: int = 0
    global_every: int = 1
    local_rope: Rope = Rope()
    causal: bool = True
    pooling: str = "mean"
    initializer_range: float = 0.02
    lora_rank: int = 0
    lora_alpha: float = 256.0
    lora_maps: tuple[str, ...] = LORA_MAPS
    image_width: int = 0
    dtype: str = "float32"
    scan: bool = True
    remat: bool = True

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.activation not in layers.ACTIVATIONS:
            raise ValueError(
                f"unknown activation {self.activation!r}: expected one of "
                f"{', '.join(layers.ACTIVATIONS)}"
            )
        unknown = sorted(set(self.lora_maps) - set(LORA_MAPS))
        if unknown:
            raise ValueError(f"unknown lora_maps {unknown}: expected any of {', '.join(LORA_MAPS)}")

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each letter of `axis_names.LETTERS` used by the tower's weights."""
        return {"d": self.width, "m": self.mlp_width, "h": self.num_heads,
                "g": self.num_kv_heads, "a": self.head_width, "r": self.lora_rank,
                "w": self.vocab_size, "v": self.image_width}  # fmt: skip

    @property
    def lora_scale(self) -> float:
        """Factor applied to the output of an adapter."""
        return self.lora_alpha / math.sqrt(self.lora_rank)

    def attention_needs(self, row_width: int, *, training: bool) -> attention_lib.Needs:
        """What the tower asks of its attention.

        Args:
          row_width: Number of positions of a row.
          training: Ignored, because these towers are trained without dropout.
        """
        del training
        return attention_lib.Needs(
            self.dtype,
            row_width,
            self.num_heads,
            self.num_kv_heads,
            self.head_width,
            causal=self.causal,
            beyond_items="sliding windows" if self.slides_within(row_width) else "",
        )

    def slides_within(self, row_width: int) -> bool:
        """Whether sliding windows leave out keys of rows of a width."""
        return bool(self.slides.any()) and row_width > self.window

    def einsum(self, equation: str, name: str, *, bias: bool = False) -> layers.Einsum:
        """A contraction, with an adapter if `lora_maps` names it."""
        adapted = self.lora_rank and name in self.lora_maps
        return layers.Einsum(
            equation,
            self.sizes,
            nn.initializers.normal(self.initializer_range),
            dtype=self.dtype,
            use_bias=bias,
            lora_rank=self.lora_rank if adapted else 0,
            lora_scale=self.lora_scale if adapted else 1.0,
            name=name,
        )

    def norm(self, name: str, letter: str = "d") -> layers.RMSNorm:
        """An RMS norm of the hidden states, or of the entries of a head."""
        return layers.RMSNorm(letter, self.norm_eps, unit_offset=self.unit_offset, name=name)

    @property
    def slides(self) -> Bool[np.ndarray, " layers"]:
        """Which layers have sliding-window attention."""
        number = np.arange(1, self.num_layers + 1)
        return (number % self.global_every != 0) & (self.window > 0)


class Block(nn.Module):
    """Grouped-query attention and a gated feed-forward layer, each with a norm in front."""

    config: DecoderConfig
    attention: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "p s d"],
        views: tuple[tuple[Array, Array, Array], ...],
        slides: Bool[Array, ""],
    ) -> tuple[Float[Array, "p s d"], None]:
        """Hidden states after this block.

        Args:
          x: Hidden states.
          views: (mask [p s s], cosines [p s a/2], sines [p s a/2]) for full attention and, if the
            model has such layers, for sliding-window attention.
          slides: Whether this block has sliding-window attention.
        """
        c = self.config
        allowed, cos, sin = (
            views[0]
            if len(views) == 1
            else tuple(jnp.where(slides, local, full) for full, local in zip(*views, strict=True))
        )
        y = c.norm("attention_norm")(x)
        q = c.einsum("psd,dha->psha", "query", bias=c.qkv_bias)(y)
        k = c.einsum("psd,dga->psga", "key", bias=c.qkv_bias)(y)
        v = c.einsum("psd,dga->psga", "value", bias=c.qkv_bias)(y)
        if c.qk_norm:
            q, k = c.norm("query_norm", "a")(q), c.norm("key_norm", "a")(k)
        q, k = layers.rotate(q, cos, sin), layers.rotate(k, cos, sin)
        y = attention_lib.attend(
            q,
            k,
            v,
            allowed,
            scale=c.attention_scale or None,
            implementation=self.attention,
            causal=c.causal,
        )
        y = c.einsum("psha,had->psd", "out")(y)
        if c.post_norms:
            y = c.norm("attention_post_norm")(y)
        x = x + y
        y = c.norm("mlp_norm")(x)
        gate = layers.ACTIVATIONS[c.activation](c.einsum("psd,dm->psm", "gate")(y))
        y = c.einsum("psm,md->psd", "down")(gate * c.einsum("psd,dm->psm", "up")(y))
        if c.post_norms:
            y = c.norm("mlp_post_norm")(y)
        return layers.constrain(x + y, "psd"), None


class Decoder(nn.Module):
    """Turns embeddings into normalised hidden states.

    The parameters of the blocks are stacked, `[layers, ...]`, whether or not the blocks are
    scanned.

    Attributes:
      config: Sizes and computation settings.
      attention: Implementation of the attention.
    """

    config: DecoderConfig
    attention: str = attention_lib.XLA

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "p s d"],
        positions: Int[Array, "p s"],
        segments: Int[Array, "p s"],
        *,
        deterministic: bool,
    ) -> Float[Array, "p s d"]:
        """Hidden states of all positions.

        Args:
          x: Token embeddings or projected image embeddings.
          positions: Position within the item.
          segments: Item at each position; attention stays within an item. -1 for empty positions.
          deterministic: Ignored, because these towers are trained without dropout.
        """
        del deterministic
        c = self.config
        allowed = attention_lib.within_items(segments, self.attention, causal=c.causal)
        views = [(allowed, *layers.rope_angles(positions, c.rope.frequencies(c.head_width)))]
        if c.slides.any():
            local = allowed
            if c.slides_within(x.shape[1]):
                column = jnp.arange(x.shape[1])
                local &= jnp.abs(column[:, None] - column[None, :]) < c.window
            local_frequencies = c.local_rope.frequencies(c.head_width)
            views.append((local, *layers.rope_angles(positions, local_frequencies)))
        x = layers.constrain(x.astype(c.dtype), "psd")
        x = layers.run_blocks(self, Block, x, (tuple(views),), c.slides)
        return c.norm("final_norm")(x)
