"""The BERT family: BERT, MiniLM, E5 and DistilBERT are one post-norm encoder by its sizes."""

import dataclasses

import jax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from vixml_jax.models import layers
from vixml_jax.parallel import axis_names


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of a tower of the BERT family, and how it is computed.

    Attributes:
      vocab_size: Rows of the word embeddings.
      num_layers: Blocks.
      width: Of the states, and of the vector that comes out.
      num_heads: Attention heads; a divisor of `width`.
      mlp_width: Of the feed-forward layer.
      max_positions: Rows of the position embeddings.
      type_vocab_size: Rows of the token types, of which type 0 is used; 0: none (DistilBERT).
      dropout: Of embeddings and of each layer's two branches, in training.
      attention_dropout: Of the attention weights, in training.
      layer_norm_eps: Added to variances.
      initializer_range: Standard deviation of fresh weights.
      image_width: Width of an image embedding; 0: the tower reads no pictures.
      dtype: What is computed in: "float32" or "bfloat16". Parameters are float32 always, and so
        are norms, softmax and pooling.
      scan: Loop over one compiled block: quick to compile. Off: all blocks written out, quicker
        to run. The parameters are the same.
      remat: Recompute each block in the backward pass instead of keeping its activations.
    """

    vocab_size: int = 30522
    num_layers: int = 12
    width: int = 768
    num_heads: int = 12
    mlp_width: int = 3072
    max_positions: int = 512
    type_vocab_size: int = 2
    dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    image_width: int = 0
    dtype: str = "float32"
    scan: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of {self.num_heads} heads")

    word_scale = 1.0  # What word embeddings are multiplied by.
    pooling = "mean"

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each letter of `axes.LETTERS` that a weight of the tower has."""
        heads, head_width = self.num_heads, self.width // self.num_heads
        return {"d": self.width, "m": self.mlp_width, "h": heads, "a": head_width,
                "w": self.vocab_size, "v": self.image_width}  # fmt: skip

    def einsum(self, equation: str, name: str) -> layers.Einsum:
        """A contraction with fresh weights as BERT draws them."""
        normal = nn.initializers.normal(self.initializer_range)
        return layers.Einsum(equation, self.sizes, normal, dtype=self.dtype, name=name)

    def norm(self, name: str) -> layers.LayerNorm:
        """A normalisation of the states."""
        return layers.LayerNorm("d", self.layer_norm_eps, name=name)


class Block(nn.Module):
    """Self-attention, then a feed-forward layer, each normalised after its residual sum."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "p s d"],
        mask: Bool[Array, "p s s"],
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "p s d"], None]:
        c = self.config
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        q = c.einsum("psd,dha->psha", "query")(x)
        k = c.einsum("psd,dha->psha", "key")(x)
        v = c.einsum("psd,dha->psha", "value")(x)
        y = layers.attend(q, k, v, mask, rate=c.attention_dropout, key=keys[0])
        y = c.einsum("psha,had->psd", "out")(y)
        x = c.norm("attention_norm")(x + layers.dropout(y, c.dropout, keys[1]))
        y = layers.gelu(c.einsum("psd,dm->psm", "up")(x))
        y = c.einsum("psm,md->psd", "down")(y)
        x = c.norm("mlp_norm")(x + layers.dropout(y, c.dropout, keys[2]))
        return layers.constrain(x, "psd"), None


class Encoder(nn.Module):
    """Embeddings in, states out: adds positions and token type 0, normalises, runs the blocks.

    The parameters of the blocks are stacked, `[layers, ...]`, however they are run.
    """

    config: BertConfig

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
          positions: Row of the position embeddings.
          segments: Positions see those of their own segment; -1 = nothing is here.
          deterministic: Whether dropout is off; else rng "dropout" is needed.
        """
        c = self.config
        x = x + layers.look_up_small(self._table("position_embeddings", c.max_positions), positions)
        if c.type_vocab_size:
            x = x + self._table("type_embeddings", c.type_vocab_size)[0]
        x = c.norm("embeddings_norm")(x)
        keys = None
        if not deterministic:
            first, rest = jax.random.split(self.make_rng("dropout"))
            x = layers.dropout(x, c.dropout, first)
            keys = jax.random.split(rest, c.num_layers)
        x = layers.constrain(x.astype(c.dtype), "psd")
        mask = (segments[:, :, None] == segments[:, None, :]) & (segments >= 0)[:, None, :]
        return layers.run_blocks(self, Block, c, x, (mask,), keys)

    def _table(self, name: str, rows: int) -> Float[Array, "w d"]:
        init = nn.initializers.normal(self.config.initializer_range)
        boxed = nn.with_logical_partitioning(init, (None, *axis_names.logical("d")))
        return self.param(name, boxed, (rows, self.config.width))
