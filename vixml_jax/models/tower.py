"""The tower: packed items in, pictures injected as tokens, one pooled vector an item out."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vixml_jax import axes
from vixml_jax.models import layers
from vixml_jax.models.bert import BertConfig, Encoder
from vixml_jax.models.decoder import Decoder, DecoderConfig
from vixml_jax.structs import PackedItems

TowerConfig = BertConfig | DecoderConfig
ENCODERS = {BertConfig: Encoder, DecoderConfig: Decoder}


class _Rows(NamedTuple):
    """Packed rows without their pictures."""

    tokens: Int[Array, "p s"]
    segments: Int[Array, "p s"]
    positions: Int[Array, "p s"]
    image_at: Int[Array, "p s"]


class Tower(nn.Module):
    """Reads packed items: at each position a word or a projected picture (paper, section 3).

    Attributes:
      config: Sizes, and how it is computed.
    """

    config: TowerConfig

    @nn.compact
    def __call__(
        self,
        packed: PackedItems,
        num_items: int,
        *,
        deterministic: bool,
        chunks: tuple[int, int] | None = None,
    ) -> Float[Array, "b d"]:
        """Mean of the states over the positions of each item, or the last; float32, no unit length.

        Args:
          packed: Items in rows; which share a row changes nothing. `packed.images` may have no
            row, whatever its width; without `image_width` no position may name a picture.
          num_items: How many items there are; one that no position belongs to comes out zero.
          deterministic: Whether dropout is off; else rng "dropout" is needed.
          chunks: (devices, n): the rows of each device are read in n equal parts, one after
            another, each computed again in the backward pass, so that memory holds the activations
            of one part alone; None: all at once.
        """
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        words = self.param(
            "word_embeddings",
            nn.with_logical_partitioning(init, axes.logical("wd")),
            (c.vocab_size, c.width),
        )
        images, projected = packed.images, None
        if c.image_width:
            if not images.shape[0]:  # Without a picture the width says nothing.
                images = jnp.zeros((0, c.image_width), jnp.float32)
            uniform = layers.fan_in_uniform(c.image_width)
            project = layers.Einsum(
                "iv,vd->id", c.sizes, uniform, uniform, c.dtype, name="image_projection"
            )
            projected = project(images)

        def pooled(rows: _Rows, encode: Callable[..., Array]) -> tuple[Array, Array]:
            """Sum of the states of each item [b, d], and of how many [b]."""
            x = layers.look_up(words, rows.tokens)
            if c.word_scale != 1.0:  # Rounded as the tower was trained, to what it computes in.
                x = x.astype(c.dtype) * jnp.asarray(c.word_scale, c.dtype)
            if images.shape[0] and projected is not None:
                x = layers.place_rows(x, projected, rows.image_at)
            x = encode(x, rows.positions, rows.segments, deterministic=deterministic)
            segments = rows.segments
            if c.pooling == "last":
                segments = layers.last_of_segments(segments)
            return layers.sum_by_segment(x, segments, num_items)

        rows = _Rows(*packed[:4])
        if chunks is None or self.is_initializing():
            total, count = pooled(rows, ENCODERS[type(c)](c, name="encoder"))
        else:
            total, count = self._in_chunks(rows, chunks, pooled, num_items, deterministic)
        return total / jnp.maximum(count, 1.0)[:, None]

    def _in_chunks(
        self,
        rows: _Rows,
        chunks: tuple[int, int],
        pooled: Callable[..., tuple[Array, Array]],
        num_items: int,
        deterministic: bool,
    ) -> tuple[Array, Array]:
        c = self.config
        devices, n = chunks
        rows = jax.tree.map(
            lambda x: (
                x.reshape(devices, n, -1, x.shape[1]).swapaxes(0, 1).reshape(n, -1, x.shape[1])
            ),
            rows,
        )
        encoder = ENCODERS[type(c)](c, parent=None)
        weights = nn.unbox(self.variables["params"]["encoder"])
        keys = None if deterministic else jax.random.split(self.make_rng("dropout"), n)

        @jax.checkpoint
        def read(one: tuple[_Rows, Array | None]) -> tuple[Array, Array]:
            part, key = one
            rngs = None if key is None else {"dropout": key}
            return pooled(part, functools.partial(encoder.apply, {"params": weights}, rngs=rngs))

        def step(sums: tuple[Array, Array], one: Any) -> tuple[tuple[Array, Array], None]:
            return jax.tree.map(jnp.add, sums, read(one)), None

        start = jnp.zeros((num_items, c.width)), jnp.zeros(num_items)
        return jax.lax.scan(step, start, (rows, keys))[0]
