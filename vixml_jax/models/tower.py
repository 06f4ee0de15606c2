"""The tower: packed items in, pictures injected as tokens, one pooled vector an item out."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vixml_jax.models import layers
from vixml_jax.models.bert import BertConfig, Encoder
from vixml_jax.models.decoder import Decoder, DecoderConfig
from vixml_jax.parallel import axis_names
from vixml_jax.structs import PackedItems

TowerConfig = BertConfig | DecoderConfig
ENCODERS = {BertConfig: Encoder, DecoderConfig: Decoder}


class Shares(NamedTuple):
    """How a batch is dealt out to devices, so that each works on its own items alone.

    The items are `sides` equal runs (queries, then labels); the n-th of equal parts of the rows
    holds the n-th part of each run, and the n-th of equal parts of the pictures is theirs.
    """

    devices: int = 1
    sides: int = 1


ALONE = Shares()


class _Rows(NamedTuple):
    """Packed rows without their pictures; [x p s] of x devices."""

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
        shares: Shares = ALONE,
        chunks: int = 0,
    ) -> Float[Array, "b d"]:
        """Mean of the states over the positions of each item, or the last; float32, no unit length.

        Args:
          packed: Items in rows; which share a row changes nothing. `packed.images` may have no
            row, whatever its width; without `image_width` no position may name a picture.
          num_items: How many items there are; one that no position belongs to comes out zero.
          deterministic: Whether dropout is off; else rng "dropout" is needed.
          shares: Of the devices. What is not dealt out so is lost.
          chunks: The rows of each device are read in so many equal parts, one after another, each
            computed again in the backward pass, so that memory holds the activations of one part
            alone; 0: all at once.
        """
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        words = self.param(
            "word_embeddings",
            nn.with_logical_partitioning(init, axis_names.logical("wd")),
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

        devices = shares.devices
        if projected is not None:
            projected = projected.reshape(devices, -1, c.width)

        def pooled(rows: _Rows, encode: Callable[..., Array]) -> tuple[Array, Array]:
            """Sum of the states of each device's items [x b d], and of how many [x b]."""
            flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)
            x = layers.look_up(words, flat.tokens)
            if c.word_scale != 1.0:  # Rounded as the tower was trained, to what it computes in.
                x = x.astype(c.dtype) * jnp.asarray(c.word_scale, c.dtype)
            if images.shape[0] and projected is not None:
                placed = jax.vmap(layers.place_rows)(
                    x.reshape(*rows.tokens.shape, -1), projected, rows.image_at
                )
                x = placed.reshape(x.shape)
            x = encode(x, flat.positions, flat.segments, deterministic=deterministic)
            segments = rows.segments
            if c.pooling == "last":
                segments = layers.last_of_segments(flat.segments).reshape(segments.shape)
            sums = functools.partial(layers.sum_by_segment, num_segments=num_items // devices)
            return jax.vmap(sums)(x.reshape(*segments.shape, -1), segments)

        rows = _Rows(*(x.reshape(devices, -1, x.shape[1]) for x in packed[:4]))
        rows = rows._replace(
            segments=_own(rows.segments, num_items, shares.sides),
            image_at=_own(rows.image_at, images.shape[0], 1),
        )
        if not chunks or self.is_initializing():
            total, count = pooled(rows, ENCODERS[type(c)](c, name="encoder"))
        else:
            total, count = self._in_chunks(rows, chunks, pooled, num_items, deterministic)
        means = total / jnp.maximum(count, 1.0)[..., None]
        means = means.reshape(devices, shares.sides, -1, c.width).swapaxes(0, 1)
        return means.reshape(num_items, c.width)

    def _in_chunks(
        self,
        rows: _Rows,
        chunks: int,
        pooled: Callable[..., tuple[Array, Array]],
        num_items: int,
        deterministic: bool,
    ) -> tuple[Array, Array]:
        c = self.config
        devices, _, width = rows.tokens.shape
        rows = jax.tree.map(lambda x: x.reshape(devices, chunks, -1, width).swapaxes(0, 1), rows)
        encoder = ENCODERS[type(c)](c, parent=None)
        weights = nn.unbox(self.variables["params"]["encoder"])
        keys = None if deterministic else jax.random.split(self.make_rng("dropout"), chunks)

        @jax.checkpoint
        def read(one: tuple[_Rows, Array | None]) -> tuple[Array, Array]:
            part, key = one
            rngs = None if key is None else {"dropout": key}
            return pooled(part, functools.partial(encoder.apply, {"params": weights}, rngs=rngs))

        def step(sums: tuple[Array, Array], one: Any) -> tuple[tuple[Array, Array], None]:
            return jax.tree.map(jnp.add, sums, read(one)), None

        own = num_items // devices
        start = jnp.zeros((devices, own, c.width)), jnp.zeros((devices, own))
        return jax.lax.scan(step, start, (rows, keys))[0]


def _own(ids: Int[Array, "x p s"], num: int, sides: int) -> Int[Array, "x p s"]:
    """Numbers among a batch's `num` items (pictures), as each device counts its own; -1 stays."""
    devices, a_side = ids.shape[0], max(num // sides, 1)
    part = a_side // devices
    side, at = ids // a_side, ids % a_side
    mine = side * part + at - jnp.arange(devices)[:, None, None] * part
    return jnp.where(ids >= 0, mine, -1)
