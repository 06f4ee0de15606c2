"""The text tower: maps packed items, with images injected as tokens, to one vector per item."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vixml_jax.models import attention as attention_lib
from vixml_jax.models import layers
from vixml_jax.models.bert import BertConfig, Encoder
from vixml_jax.models.decoder import Decoder, DecoderConfig
from vixml_jax.models.modernbert import ModernBertConfig, ModernEncoder
from vixml_jax.parallel import axis_names
from vixml_jax.structs import PackedItems

EncoderConfig = BertConfig | ModernBertConfig
TowerConfig = EncoderConfig | DecoderConfig
ENCODERS = {BertConfig: Encoder, ModernBertConfig: ModernEncoder, DecoderConfig: Decoder}


class ShardLayout(NamedTuple):
    """How a batch is sharded over devices, so that each device pools only its own items.

    The items are `sides` runs of equal length (queries, then labels). Device n holds the n-th of
    `devices` equal parts of the rows, of each run of items, and of the images.
    """

    devices: int = 1
    sides: int = 1


UNSHARDED = ShardLayout()


class _Rows(NamedTuple):
    """Packed rows without their images, [x p s] for x devices."""

    tokens: Int[Array, "p s"]
    segments: Int[Array, "p s"]
    positions: Int[Array, "p s"]
    image_at: Int[Array, "p s"]


class Tower(nn.Module):
    """Encodes packed items; each position is a token or a projected image (paper, section 3).

    Attributes:
      config: Sizes and computation settings.
      attention: Implementation of the attention; see `attention.choose`.
    """

    config: TowerConfig
    attention: str = attention_lib.XLA

    @nn.compact
    def __call__(
        self,
        packed: PackedItems,
        num_items: int,
        *,
        deterministic: bool,
        shards: ShardLayout = UNSHARDED,
        num_microbatches: int = 0,
    ) -> Float[Array, "b d"]:
        """Pooled vectors of the items, float32, not normalised.

        Args:
          packed: Items in rows; items that share a row do not affect each other. `packed.images`
            may have zero rows of any width; without `image_width` no position may be an image.
          num_items: Number of items; the vector of an item without positions is zero.
          deterministic: Whether dropout is off; otherwise the rng "dropout" is needed.
          shards: How the batch is sharded over devices. Positions of items that belong to another
            device's shard are ignored.
          num_microbatches: The rows of each device are processed in this many equal parts, one
            after another, and recomputed in the backward pass, so that only the activations of one
            part are held in memory. 0 processes all rows at once.
        """
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        embeddings = self.param(
            "word_embeddings",
            nn.with_logical_partitioning(init, axis_names.logical("wd")),
            (c.vocab_size, c.width),
        )
        images, projected = packed.images, None
        if c.image_width:
            if not images.shape[0]:  # Without images the array may have any width.
                images = jnp.zeros((0, c.image_width), jnp.float32)
            uniform = layers.fan_in_uniform(c.image_width)
            project = layers.Einsum(
                "iv,vd->id", c.sizes, uniform, uniform, c.dtype, name="image_projection"
            )
            projected = project(images)

        devices = shards.devices
        if projected is not None:
            projected = projected.reshape(devices, -1, c.width)

        def pooled(rows: _Rows, encode: Callable[..., Array]) -> tuple[Array, Array]:
            """Sums of the states of each device's items [x b d], and of their weights [x b]."""
            flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)
            x = layers.look_up(embeddings, flat.tokens)
            if c.embedding_scale != 1.0:  # In the computation dtype, as the model was trained.
                x = x.astype(c.dtype) * jnp.asarray(c.embedding_scale, c.dtype)
            if images.shape[0] and projected is not None:
                placed = jax.vmap(layers.place_rows)(
                    x.reshape(*rows.tokens.shape, -1), projected, rows.image_at
                )
                x = placed.reshape(x.shape)
            x = encode(x, flat.positions, flat.segments, deterministic=deterministic)
            shape = rows.segments.shape
            weights = layers.pooling_weights(
                c.pooling, flat.segments, flat.positions, flat.image_at
            )
            weights = None if weights is None else weights.reshape(shape)
            sums = functools.partial(layers.sum_by_segment, num_segments=num_items // devices)
            return jax.vmap(lambda x, segments, weights: sums(x, segments, weights=weights))(
                x.reshape(*shape, -1), rows.segments, weights
            )

        rows = _Rows(*(x.reshape(devices, -1, x.shape[1]) for x in packed[:4]))
        rows = rows._replace(
            segments=_local_ids(rows.segments, num_items, shards.sides),
            image_at=_local_ids(rows.image_at, images.shape[0], 1),
        )
        if not num_microbatches or self.is_initializing():
            total, count = pooled(rows, ENCODERS[type(c)](c, self.attention, name="encoder"))
        else:
            total, count = self._in_microbatches(
                rows, num_microbatches, pooled, num_items, deterministic
            )
        means = total / jnp.maximum(count, 1.0)[..., None]
        means = means.reshape(devices, shards.sides, -1, c.width).swapaxes(0, 1)
        return means.reshape(num_items, c.width)

    def _in_microbatches(
        self,
        rows: _Rows,
        num_microbatches: int,
        pooled: Callable[..., tuple[Array, Array]],
        num_items: int,
        deterministic: bool,
    ) -> tuple[Array, Array]:
        c = self.config
        devices, _, width = rows.tokens.shape
        rows = jax.tree.map(
            lambda x: x.reshape(devices, num_microbatches, -1, width).swapaxes(0, 1), rows
        )
        encoder = ENCODERS[type(c)](c, self.attention, parent=None)
        weights = nn.unbox(self.variables["params"]["encoder"])
        keys = None
        if not deterministic:
            keys = jax.random.split(self.make_rng("dropout"), num_microbatches)

        @jax.checkpoint
        def pool_one(microbatch: tuple[_Rows, Array | None]) -> tuple[Array, Array]:
            part, key = microbatch
            rngs = None if key is None else {"dropout": key}
            return pooled(part, functools.partial(encoder.apply, {"params": weights}, rngs=rngs))

        def step(sums: tuple[Array, Array], microbatch: Any) -> tuple[tuple[Array, Array], None]:
            return jax.tree.map(jnp.add, sums, pool_one(microbatch)), None

        items_per_device = num_items // devices
        totals = jnp.zeros((devices, items_per_device, c.width))
        counts = jnp.zeros((devices, items_per_device))
        return jax.lax.scan(step, (totals, counts), (rows, keys))[0]


def _local_ids(ids: Int[Array, "x p s"], num: int, sides: int) -> Int[Array, "x p s"]:
    """Ids of items (or images) in a batch of `num`, renumbered on each device; -1 stays -1."""
    devices, per_side = ids.shape[0], max(num // sides, 1)
    part = per_side // devices
    side, offset = ids // per_side, ids % per_side
    local = side * part + offset - jnp.arange(devices)[:, None, None] * part
    return jnp.where(ids >= 0, local, -1)
