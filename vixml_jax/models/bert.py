"""Post-norm encoder of the BERT family.

BERT, MiniLM, E5 and DistilBERT differ in sizes only. RoBERTa and XLM-R begin to count positions
later, and MPNet (arXiv 2004.09297) adds a bias to attention scores that depends on the distance.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from vixml_jax.models import attention as attention_lib
from vixml_jax.models import layers
from vixml_jax.parallel import axis_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes and computation settings of a tower of the BERT family.

    Attributes:
      vocab_size: Number of token embeddings.
      num_layers: Number of blocks.
      width: Width of the hidden states and of the output vector.
      num_heads: Number of attention heads; must divide `width`.
      mlp_width: Width of the feed-forward layer.
      max_positions: Number of position embeddings that items can use.
      first_position: Row of the first of them in the table; the rows before are not used
        (RoBERTa, MPNet: 2).
      type_vocab_size: Number of token type embeddings, of which only type 0 is used; 0 if the
        model has none (DistilBERT, MPNet).
      distance_buckets: Number of attention biases by distance, which all layers share; 0: none.
      dropout: Dropout rate of the embeddings and of both branches of each block, in training.
      attention_dropout: Probability with which a key is hidden from a position, in training; see
        `attention.hide_keys`.
      layer_norm_eps: Added to variances.
      initializer_range: Standard deviation of freshly initialised weights.
      pooling: How the states of an item become its vector; see `layers.pooling_weights`.
      image_width: Width of an image embedding; 0 if the tower reads no images.
      dtype: Computation dtype, "float32" or "bfloat16". Parameters, norms, softmax and pooling are
        always float32.
      scan: Whether to scan over one compiled block, which compiles faster. Unrolled blocks run
        faster. The parameters are the same either way.
      remat: Whether to recompute each block in the backward pass instead of storing its
        activations.
    """

    vocab_size: int = 30522
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 512
    first_position: int = 0
    type_vocab_size: int = 2
    distance_buckets: int = 0
    dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
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
    def sizes(self) -> dict[str, int]:
        """Size of each letter of `axis_names.LETTERS` used by the tower's weights."""
        heads, head_width = self.num_heads, self.width // self.num_heads
        return {"d": self.width, "m": self.mlp_width, "h": heads, "a": head_width,
                "w": self.vocab_size, "v": self.image_width}  # fmt: skip

    def attention_needs(self, row_width: int, *, training: bool) -> attention_lib.Needs:
        """What the tower asks of its attention.

        Args:
          row_width: Number of positions of a row.
          training: Whether weights are dropped out.
        """
        beyond = "biases by distance" if self.distance_buckets else ""
        if training and self.attention_dropout:
            beyond = "dropout"
        heads, head_width = self.num_heads, self.width // self.num_heads
        return attention_lib.Needs(
            self.dtype, row_width, heads, heads, head_width, beyond_items=beyond
        )

    def einsum(self, equation: str, name: str) -> layers.Einsum:
        """A contraction whose weights are initialised as BERT's are."""
        normal = nn.initializers.normal(self.initializer_range)
        return layers.Einsum(equation, self.sizes, normal, dtype=self.dtype, name=name)

    def norm(self, name: str) -> layers.LayerNorm:
        """A layer norm of the hidden states."""
        return layers.LayerNorm("d", self.layer_norm_eps, name=name)


def distance_buckets(ahead: Int[np.ndarray, " n"], num_buckets: int) -> Int[np.ndarray, " n"]:
    """The bucket of each distance: its own for short ones, then on a log scale up to 128.

    The formula is that of `MPNetEncoder.relative_position_bucket` in transformers, in float32 too.

    Args:
      ahead: Position of the key less that of the query; positive distances have their own half.
      num_buckets: Number of buckets.
    """
    half = num_buckets // 2
    alone = half // 2
    distance = np.abs(ahead)
    far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(alone))
    far = far / np.float32(math.log(128 / alone)) * np.float32(half - alone)
    bucket = np.where(
        distance < alone, distance, np.minimum(alone + far.astype(np.int64), half - 1)
    )
    return bucket + np.where(ahead > 0, half, 0)


class Block(nn.Module):
    """Self-attention and a feed-forward layer, each normalised after its residual sum."""

    config: BertConfig
    attention: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "p s d"],
        allowed: Bool[Array, "p s s"] | Int[Array, "p s"],
        bias: Float[Array, "p h s s"] | None,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "p s d"], None]:
        c = self.config
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        q = c.einsum("psd,dha->psha", "query")(x)
        k = c.einsum("psd,dha->psha", "key")(x)
        v = c.einsum("psd,dha->psha", "value")(x)
        allowed = attention_lib.hide_keys(allowed, c.attention_dropout, keys[0])
        y = attention_lib.attend(q, k, v, allowed, bias=bias, implementation=self.attention)
        y = c.einsum("psha,had->psd", "out")(y)
        x = c.norm("attention_norm")(x + layers.dropout(y, c.dropout, keys[1]))
        y = layers.gelu(c.einsum("psd,dm->psm", "up")(x))
        y = c.einsum("psm,md->psd", "down")(y)
        x = c.norm("mlp_norm")(x + layers.dropout(y, c.dropout, keys[2]))
        return layers.constrain(x, "psd"), None


class Encoder(nn.Module):
    """Turns embeddings into hidden states.

    Adds position embeddings and token type 0, normalises, and runs the blocks. The parameters of
    the blocks are stacked, `[layers, ...]`, whether or not the blocks are scanned.

    Attributes:
      config: Sizes and computation settings.
      attention: Implementation of the attention.
    """

    config: BertConfig
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
        table = self._table("position_embeddings", c.max_positions + c.first_position)
        x = x + layers.look_up_small(table, positions + c.first_position)
        if c.type_vocab_size:
            x = x + self._table("type_embeddings", c.type_vocab_size)[0]
        x = c.norm("embeddings_norm")(x)
        keys = None
        if not deterministic:
            first, rest = jax.random.split(self.make_rng("dropout"))
            x = layers.dropout(x, c.dropout, first)
            keys = jax.random.split(rest, c.num_layers)
        x = layers.constrain(x.astype(c.dtype), "psd")
        allowed = attention_lib.within_items(segments, self.attention)
        bias = self._distance_bias(positions) if c.distance_buckets else None
        return layers.run_blocks(self, Block, x, (allowed, bias), keys)

    def _distance_bias(self, positions: Int[Array, "p s"]) -> Float[Array, "p h s s"]:
        """What is added to the attention scores of each pair of positions, by their distance."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        boxed = nn.with_logical_partitioning(init, axis_names.logical("lh"))
        table = self.param("distance_bias", boxed, (c.distance_buckets, c.num_heads))
        farthest = c.max_positions - 1
        buckets = distance_buckets(np.arange(-farthest, farthest + 1), c.distance_buckets)
        ahead = positions[:, None, :] - positions[:, :, None]  # From each query to each key.
        biases = layers.look_up_small(table, jnp.asarray(buckets))  # [distances, h]
        return biases.at[ahead + farthest].get(mode="promise_in_bounds").transpose(0, 3, 1, 2)

    def _table(self, name: str, rows: int) -> Float[Array, "w d"]:
        init = nn.initializers.normal(self.config.initializer_range)
        boxed = nn.with_logical_partitioning(init, (None, *axis_names.logical("d")))
        return self.param(name, boxed, (rows, self.config.width))
