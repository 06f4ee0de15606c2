"""Decoder-only language models as towers: Qwen2.5, Qwen3, Llama 3 and Gemma 3 by their sizes.

Sources: the published checkpoints' configurations and `transformers`' models of the same names.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vixml_jax.models import layers

LORA_MAPS = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embeddings: base, and how positions were stretched after pretraining.

    Attributes:
      theta: Base of the wavelengths.
      factor: Every position is divided by it; with `original_positions`, only where the
        wavelength is long.
      low_freq_factor: Llama 3: wavelengths above `original_positions / low_freq_factor` are
        stretched whole,
      high_freq_factor: those below `original_positions / high_freq_factor` not at all.
      original_positions: Llama 3's pretraining length; 0: positions are stretched alike.
    """

    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 0

    def frequencies(self, head_width: int) -> Float[np.ndarray, " a/2"]:
        """Radians a position, float64, of each pair of a head's entries."""
        found = self.theta ** -(np.arange(0, head_width, 2) / head_width)
        if not self.original_positions:
            return found / self.factor
        turns = self.original_positions * found / (2 * math.pi)  # Over the original length.
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = np.clip(share, 0.0, 1.0)
        return found * (share + (1.0 - share) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder, and how it is computed.

    Attributes:
      vocab_size: Rows of the word embeddings.
      num_layers: Blocks.
      width: Of the states, and of the vector that comes out.
      num_heads: Query heads.
      num_kv_heads: Key and value heads, shared by equal groups of query heads.
      head_width: Of one head.
      mlp_width: Of the gated feed-forward layer.
      max_positions: Longest text of the pretraining, for checks alone.
      qkv_bias: Whether queries, keys and values have biases (Qwen2.5).
      qk_norm: Whether queries and keys are normalised, head by head (Qwen3, Gemma 3).
      post_norms: Whether each branch is normalised once more before its sum (Gemma 3).
      unit_offset: Whether a norm multiplies by 1 + its weight (Gemma 3).
      activation: Of the gate: "silu" or "gelu_tanh".
      word_scale: What word embeddings are multiplied by (Gemma 3: sqrt(width)).
      attention_scale: What scores are multiplied by.
      norm_eps: Added to mean squares.
      rope: Positions of layers that see all.
      window: Positions seen by a sliding layer, itself included; 0: no layer slides.
      global_every: Of so many layers the last sees all (Gemma 3: 6).
      local_rope: Positions of sliding layers.
      causal: Whether a position sees only those before it, as pretrained.
      pooling: "mean" of an item's positions, or its "last".
      initializer_range: Standard deviation of fresh weights.
      lora_rank: Rank of the adapters; 0: none.
      lora_alpha: Adapters are multiplied by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).
      lora_maps: Which of `LORA_MAPS` have adapters.
      image_width: Width of an image embedding; 0: the tower reads no pictures.
      dtype: What is computed in; norms, softmax and pooling are float32 always.
      scan: Loop over one compiled block. Off: all blocks written out.
      remat: Recompute each block in the backward pass.
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
    word_scale: float = 1.0
    attention_scale: float = 0.0  # 0: head_width ** -0.5.
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
                f"{self.num_heads} query heads do not share {self.num_kv_heads} key heads evenly"
            )
        if self.activation not in layers.ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}")
        unknown = sorted(set(self.lora_maps) - set(LORA_MAPS))
        if unknown:
            raise ValueError(f"unknown maps {unknown}: expected some of {', '.join(LORA_MAPS)}")

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each letter of `axes.LETTERS` that a weight of the tower has."""
        return {"d": self.width, "m": self.mlp_width, "h": self.num_heads,
                "g": self.num_kv_heads, "a": self.head_width, "r": self.lora_rank,
                "w": self.vocab_size, "v": self.image_width}  # fmt: skip

    @property
    def lora_scale(self) -> float:
        """What the output of an adapter is multiplied by."""
        return self.lora_alpha / math.sqrt(self.lora_rank)

    def einsum(self, equation: str, name: str, *, bias: bool = False) -> layers.Einsum:
        """A contraction with fresh weights, and an adapter where it is asked for."""
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
        """A normalisation of the states, or of the entries of a head."""
        return layers.RMSNorm(letter, self.norm_eps, unit_offset=self.unit_offset, name=name)

    @property
    def slides(self) -> Bool[np.ndarray, " layers"]:
        """Which layers see only a window."""
        nth = np.arange(1, self.num_layers + 1)
        return (nth % self.global_every != 0) & (self.window > 0)


class Block(nn.Module):
    """Grouped-query attention, then a gated feed-forward layer, each normalised before."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "p s d"],
        views: tuple[tuple[Array, Array, Array], ...],
        slides: Bool[Array, ""],
    ) -> tuple[Float[Array, "p s d"], None]:
        """One layer.

        Args:
          x: States.
          views: (mask [p s s], cosines and sines [p s a/2]) of layers that see all, and of those
            that slide, if any.
          slides: Whether this one slides.
        """
        c = self.config
        mask, cos, sin = (
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
        y = layers.attend_grouped(q, k, v, mask, scale=c.attention_scale or c.head_width**-0.5)
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
    """Embeddings in, normalised states out.

    The parameters of the blocks are stacked, `[layers, ...]`, however they are run.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "p s d"],
        positions: Int[Array, "p s"],
        segments: Int[Array, "p s"],
        *,
        deterministic: bool,
    ) -> Float[Array, "p s d"]:
        """States of all positions.

        Args:
          x: Word embeddings or projected pictures.
          positions: Position within the item.
          segments: Positions see those of their own segment; -1 = nothing is here.
          deterministic: Nothing is dropped either way: these towers are trained without dropout.
        """
        del deterministic
        c = self.config
        at = jnp.arange(x.shape[1])
        back = at[:, None] - at[None, :]  # How far before it a position looks.
        mask = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, None, :]
        if c.causal:
            mask &= back >= 0
        views = [(mask, *layers.turns(positions, c.rope.frequencies(c.head_width)))]
        if c.slides.any():
            near = mask & (jnp.abs(back) < c.window)
            views.append((near, *layers.turns(positions, c.local_rope.frequencies(c.head_width))))
        x = layers.constrain(x.astype(c.dtype), "psd")
        x = layers.run_blocks(self, Block, c, x, (tuple(views),), c.slides)
        return c.norm("final_norm")(x)
