"""The tower: packed items in, pictures injected as tokens, one pooled vector an item out."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vixml_jax import axes
from vixml_jax.models import layers
from vixml_jax.models.bert import BertConfig, Encoder
from vixml_jax.models.decoder import Decoder, DecoderConfig
from vixml_jax.structs import PackedItems

TowerConfig = BertConfig | DecoderConfig
ENCODERS = {BertConfig: Encoder, DecoderConfig: Decoder}


class Tower(nn.Module):
    """Reads packed items: at each position a word or a projected picture (paper, section 3).

    Attributes:
      config: Sizes, and how it is computed.
    """

    config: TowerConfig

    @nn.compact
    def __call__(
        self, packed: PackedItems, num_items: int, *, deterministic: bool
    ) -> Float[Array, "b d"]:
        """Mean of the states over the positions of each item, or the last; float32, no unit length.

        Args:
          packed: Items in rows; which share a row changes nothing. `packed.images` may have no
            row, whatever its width; without `image_width` no position may name a picture.
          num_items: How many items there are; one that no position belongs to comes out zero.
          deterministic: Whether dropout is off; else rng "dropout" is needed.
        """
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        words = self.param(
            "word_embeddings",
            nn.with_logical_partitioning(init, axes.logical("wd")),
            (c.vocab_size, c.width),
        )
        x = layers.look_up(words, packed.tokens)
        if c.word_scale != 1.0:  # Rounded as the tower was trained, to what it computes in.
            x = x.astype(c.dtype) * jnp.asarray(c.word_scale, c.dtype)
        images = packed.images
        if c.image_width:
            if not images.shape[0]:  # Without a picture the width says nothing.
                images = jnp.zeros((0, c.image_width), jnp.float32)
            uniform = layers.fan_in_uniform(c.image_width)
            project = layers.Einsum(
                "iv,vd->id", c.sizes, uniform, uniform, c.dtype, name="image_projection"
            )
            projected = project(images)
            if images.shape[0]:
                x = layers.place_rows(x, projected, packed.image_at)
        encoder = ENCODERS[type(c)](c, name="encoder")
        x = encoder(x, packed.positions, packed.segments, deterministic=deterministic)
        segments = packed.segments
        if c.pooling == "last":
            segments = layers.last_of_segments(segments)
        return layers.mean_by_segment(x, segments, num_items)
