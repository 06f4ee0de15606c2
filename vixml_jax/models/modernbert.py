"""ModernBERT (arXiv 2412.13663): a pre-norm encoder with rotary positions and local attention.

Sources: the configurations of the published checkpoints, and `ModernBertModel` in `transformers`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from vixml_jax.models import attention as attention_lib
from vixml_jax.models import layers
from vixml_jax.models.decoder import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModernBertConfig:
    """Sizes and computation settings of a ModernBERT tower.

    Attributes:
      vocab_size: Number of token embeddings.
      num_layers: Number of blocks.
      width: Width of the hidden states and of the output vector.
      num_heads: Number of attention heads; must divide `width`.
      mlp_width: Width of the gated feed-forward layer.
      rope: Rotary embeddings of layers with full attention.
      local_rope: Rotary embeddings of layers with local attention.
      max_positions: Context length of the pretraining; used in checks only.
      dropout: Dropout rate of the embeddings and within the feed-forward layer, in training.
      attention_dropout: Probability with which a key is hidden from a position, in training (see
        `attention.hide_keys`), and dropout rate of the output of the attention.
      norm_eps: Added to variances.
      window: Positions attend to those at a smaller distance, in layers with local attention.
      global_every: Every layer whose number (from 0) is a multiple of this has full attention.
      initializer_range: Standard deviation of freshly initialised weights.
      pooling: How the states of an item become its vector; see `layers.pooling_weights`.
      image_width: Width of an image embedding; 0 if the tower reads no images.
      dtype: Computation dtype, "float32" or "bfloat16"; norms, softmax and pooling are float32.
      scan: Whether to scan over one compiled block instead of unrolling all blocks.
      remat: Whether to recompute each block in the backward pass.
    """

    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    mlp_width: int
    rope: Rope
    local_rope: Rope
    max_positions: int = 8192
    dropout: float = 0.0
    attention_dropout: float = 0.0
    norm_eps: float = 1e-5
    window: int = 65
    global_every: int = 3
    initializer_range: float = 0.02
    pooling: str = "mean"
    image_width: int = 0
    dtype: str = "float32"
    scan: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.num_heads} heads")

    embedding_scale = 1.0  # Factor applied to token embeddings.

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.width // self.num_heads

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each letter of `axis_names.LETTERS` used by the tower's weights."""
        return {"d": self.width, "m": self.mlp_width, "u": 2, "j": 3, "h": self.num_heads,
                "a": self.head_width, "w": self.vocab_size, "v": self.image_width}  # fmt: skip

    @property
    def slides(self) -> Bool[np.ndarray, " layers"]:
        """Which layers have local attention."""
        return np.arange(self.num_layers) % self.global_every != 0

    def attention_needs(self, row_width: int, *, training: bool) -> attention_lib.Needs:
        """What the tower asks of its attention.

        Args:
          row_width: Number of positions of a row.
          training: Whether weights are dropped out.
        """
        beyond = "local layers" if self.slides.any() else ""
        if training and self.attention_dropout:
            beyond = "dropout"
        heads = self.num_heads
        return attention_lib.Needs(
            self.dtype, row_width, heads, heads, self.head_width, beyond_items=beyond
        )

    def einsum(self, equation: str, name: str) -> layers.Einsum:
        """A contraction without a bias."""
        normal = nn.initializers.normal(self.initializer_range)
        return layers.Einsum(
            equation, self.sizes, normal, dtype=self.dtype, use_bias=False, name=name
        )

    def norm(self, name: str) -> layers.LayerNorm:
        """A layer norm of the hidden states, without a bias."""
        return layers.LayerNorm("d", self.norm_eps, use_bias=False, name=name)


class Block(nn.Module):
    """Self-attention and a gated feed-forward layer, each with a norm in front.

    The first block has no norm in front of its attention, because the embeddings are normalised
    already. Its parameter exists, as blocks are stacked, and is not used.
    """

    config: ModernBertConfig
    attention: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "p s d"],
        views: tuple[tuple[Array, Array, Array], tuple[Array, Array, Array]],
        kind: tuple[Bool[Array, ""], Bool[Array, ""], Key[Array, ""] | None],
    ) -> tuple[Float[Array, "p s d"], None]:
        """Hidden states after this block.

        Args:
          x: Hidden states.
          views: (mask [p s s], cosines [p s a/2], sines [p s a/2]) for full and local attention.
          kind: Whether the block is the first, whether its attention is local, and the random key
            of its dropout; None for no dropout.
        """
        c = self.config
        first, local, key = kind
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        allowed, cos, sin = (jnp.where(local, a, b) for b, a in zip(*views, strict=True))
        y = jnp.where(first, x, c.norm("attention_norm")(x))
        qkv = c.einsum("psd,djha->psjha", "query_key_value")(y)
        q, k, v = (qkv[:, :, j] for j in range(3))
        q, k = layers.rotate(q, cos, sin), layers.rotate(k, cos, sin)
        allowed = attention_lib.hide_keys(allowed, c.attention_dropout, keys[0])
        y = attention_lib.attend(q, k, v, allowed, implementation=self.attention)
        y = c.einsum("psha,had->psd", "out")(y)
        x = x + layers.dropout(y, c.attention_dropout, keys[1])
        up = c.einsum("psd,dum->psum", "up")(c.norm("mlp_norm")(x))
        y = layers.dropout(layers.gelu(up[:, :, 0]) * up[:, :, 1], c.dropout, keys[2])
        return layers.constrain(x + c.einsum("psm,md->psd", "down")(y), "psd"), None


class ModernEncoder(nn.Module):
    """Turns embeddings into normalised hidden states.

    The parameters of the blocks are stacked, `[layers, ...]`, whether or not the blocks are
    scanned.

    Attributes:
      config: Sizes and computation settings.
      attention: Implementation of the attention.
    """

    config: ModernBertConfig
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
          deterministic: Whether dropout is off; otherwise the rng "dropout" is needed.
        """
        c = self.config
        x = c.norm("embeddings_norm")(x)
        keys = None
        if not deterministic:
            first, rest = jax.random.split(self.make_rng("dropout"))
            x = layers.dropout(x, c.dropout, first)
            keys = jax.random.split(rest, c.num_layers)
        x = layers.constrain(x.astype(c.dtype), "psd")
        allowed = local = attention_lib.within_items(segments, self.attention)
        if c.slides.any():
            local &= jnp.abs(positions[:, :, None] - positions[:, None, :]) < c.window
        views = tuple(
            (keys_of, *layers.rope_angles(positions, rope.frequencies(c.head_width)))
            for keys_of, rope in ((allowed, c.rope), (local, c.local_rope))
        )
        kinds = (np.arange(c.num_layers) == 0, c.slides, keys)
        x = layers.run_blocks(self, Block, x, (views,), kinds)
        return c.norm("final_norm")(x)
