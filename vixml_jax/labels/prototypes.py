"""The prototype network: combines a label's text embedding, free vector and centroid."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vixml_jax.models import attention, layers


class Combiner(nn.Module):
    """One post-norm transformer layer over three tokens per label, then their normalised mean.

    The tokens are the label's tower vector, its free vector and its centroid; the last two can be
    left out to measure what they add. They have no positions, so their order does not matter
    (paper, section 3; PRIME, arXiv 2410.20626). Weights are initialised as in
    `torch.nn.TransformerEncoderLayer`.

    Attributes:
      num_heads: Number of attention heads.
      mlp_width: Width of the feed-forward layer.
      dropout: Dropout rate of the attention weights, of both branches and of the feed-forward
        layer, in training.
      uses_free: Whether the free vector is a token.
      uses_centroid: Whether the centroid is a token.
    """

    num_heads: int = 8
    mlp_width: int = 1024
    dropout: float = 0.1
    uses_free: bool = True
    uses_centroid: bool = True

    @nn.compact
    def __call__(
        self,
        u: Float[Array, "c e"],
        free: Float[Array, "c e"] | None,
        centroid: Float[Array, "c e"] | None,
        *,
        deterministic: bool,
    ) -> Float[Array, "c e"]:
        """Unit prototypes, float32.

        Args:
          u: Tower vectors of the labels, not normalised.
          free: Free vectors of the labels; not read without `uses_free`.
          centroid: Mean unit vector of each label's training queries; may be zero. Not read without
            `uses_centroid`.
          deterministic: Whether dropout is off; otherwise the rng "dropout" is needed.
        """
        keys = (None,) * 4 if deterministic else jax.random.split(self.make_rng("dropout"), 4)
        width = u.shape[-1]
        sizes = {"e": width, "m": self.mlp_width, "h": self.num_heads,
                 "a": width // self.num_heads}  # fmt: skip
        narrow, wide = layers.fan_in_uniform(width), layers.fan_in_uniform(self.mlp_width)
        xavier = layers.uniform(
            (6.0 / (width + 3 * width)) ** 0.5
        )  # For the fused [3 e, e] weight.

        tokens = [u]
        tokens += [free] if self.uses_free else []
        tokens += [centroid] if self.uses_centroid else []
        x = jnp.stack(tokens, axis=1).astype(jnp.float32)  # [c, s, e]
        q, k, v = (
            layers.Einsum("cse,eha->csha", sizes, xavier, name=name)(x)
            for name in ("query", "key", "value")
        )
        y = attention.attend(q, k, v, None, rate=self.dropout, key=keys[0])
        y = layers.Einsum("csha,hae->cse", sizes, narrow, name="out")(y)
        x = layers.LayerNorm("e", 1e-5, name="attention_norm")(
            x + layers.dropout(y, self.dropout, keys[1])
        )
        y = layers.Einsum("cse,em->csm", sizes, narrow, narrow, name="up")(x)
        y = layers.dropout(layers.gelu(y), self.dropout, keys[2])
        y = layers.Einsum("csm,me->cse", sizes, wide, wide, name="down")(y)
        x = layers.LayerNorm("e", 1e-5, name="mlp_norm")(
            x + layers.dropout(y, self.dropout, keys[3])
        )
        x = jnp.mean(x, axis=1)
        # The floor is inside the root, where the gradient of a zero row stays finite.
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
