"""Vectors of whole data sets: items through the tower in packed blocks, labels through the
combiner."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from vixml_jax import sharding
from vixml_jax.data import packing
from vixml_jax.data.store import Items
from vixml_jax.labels.combiner import Combiner
from vixml_jax.labels.table import LabelTable
from vixml_jax.models.tower import Tower
from vixml_jax.structs import LabelState, PackedItems


def unit(x: Float[Array, "... e"]) -> Float[Array, "... e"]:
    """Rows of length one; a zero row stays zero (floor 1e-12, as the paper's program)."""
    norm = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))
    return x / norm


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Tower, combiner and label table together, and how items are packed for them.

    Attributes:
      tower: Packed items -> one vector an item, not normalised.
      combiner: Tower vector, free vector, centroid -> unit prototype; None: no prototypes.
      table: The rows of the labels.
      mesh: Where all of it runs.
      row_width: Positions of a packed row.
      layout: How the sequence of an item is written.
      encode_chunk: Rows a device that the tower reads at a time in training; 0: all at once.
    """

    tower: Tower
    combiner: Combiner | None
    table: LabelTable
    mesh: Mesh
    row_width: int
    layout: packing.Layout
    encode_chunk: int = 0

    def mean_length(self, items: Items) -> float:
        """Positions that an item takes in a packed row, on average."""
        lengths = packing.item_lengths(items, width=self.row_width, layout=self.layout)
        return float(np.mean(lengths))

    def tower_vectors(
        self,
        params: Any,
        packed: PackedItems,
        num_items: int,
        *,
        dropout: Array | None = None,
    ) -> Float[Array, "b d"]:
        """Pooled tower vectors, float32, not normalised; with a key, as in training."""
        shards = sharding.num_row_shards(self.mesh)
        chunks = None
        if dropout is not None and self.encode_chunk:
            chunks = shards, packed.tokens.shape[0] // shards // self.encode_chunk
        with sharding.laid_out(self.mesh):
            return self.tower.apply(
                {"params": params["tower"]},
                packed,
                num_items,
                deterministic=dropout is None,
                rngs=None if dropout is None else {"dropout": dropout},
                chunks=chunks,
            )

    def prototypes(
        self,
        params: Any,
        labels: LabelState,
        vectors: Float[Array, "c d"],
        label_ids: Int[Array, " c"],
        *,
        dropout: Array | None = None,
    ) -> Float[Array, "c e"]:
        """What a label is searched by: the combiner's unit output, or its own unit vector."""
        if self.combiner is None:
            return unit(vectors)
        free, centroids = self.table.gather(params["free"], labels, label_ids)
        return self.combiner.apply(
            {"params": params["combiner"]},
            vectors,
            free,
            centroids,
            deterministic=dropout is None,
            rngs=None if dropout is None else {"dropout": dropout},
        )

    def encode_queries(
        self, params: Any, items: Items, *, block: int, title: str = ""
    ) -> Float[np.ndarray, "n e"]:
        """Unit vectors of all items, float32 on the host."""
        return self._stream(
            lambda packed, ids: self._encode_block(params, packed, len(ids)), items, block, title
        )

    def encode_labels(
        self, params: Any, labels: LabelState, items: Items, *, block: int, title: str = ""
    ) -> Float[np.ndarray, "n e"]:
        """Unit prototypes of all labels, float32 on the host."""
        return self._stream(
            lambda packed, ids: self._label_block(params, labels, packed, ids, len(ids)),
            items,
            block,
            title,
        )

    @functools.cached_property
    def _encode_block(self) -> Any:
        def encode(params: Any, packed: PackedItems, num_items: int) -> Float[Array, "b e"]:
            return unit(self.tower_vectors(params, packed, num_items))

        return jax.jit(encode, static_argnums=2, out_shardings=sharding.replicated(self.mesh))

    @functools.cached_property
    def _label_block(self) -> Any:
        def encode(
            params: Any,
            labels: LabelState,
            packed: PackedItems,
            label_ids: Int[Array, " b"],
            num_items: int,
        ) -> Float[Array, "b e"]:
            vectors = self.tower_vectors(params, packed, num_items)
            return self.prototypes(params, labels, vectors, label_ids)

        return jax.jit(encode, static_argnums=4, out_shardings=sharding.replicated(self.mesh))

    def _stream(self, encode: Any, items: Items, block: int, title: str) -> np.ndarray:
        """Runs `encode` over blocks of items; the device works while the host packs."""
        import tqdm

        shards = sharding.num_row_shards(self.mesh)
        block = -(-block // shards) * shards
        rows = packing.RowSizes.expected(
            self.mean_length(items),
            batch_size=block,
            width=self.row_width,
            blocks=shards,
        )
        vectors = np.empty((len(items), self.table.width), np.float32)
        pending: tuple[int, Any] | None = None

        def store(pending: tuple[int, Any]) -> None:
            start, found = pending
            count = min(block, len(items) - start)
            vectors[start : start + count] = np.asarray(found)[:count]

        starts = range(0, len(items), block)
        for start in tqdm.tqdm(starts, desc=title, unit="block", disable=not title, leave=False):
            ids = np.arange(start, start + block)
            ids[ids >= len(items)] = -1
            packed = packing.pack(
                items,
                ids,
                width=self.row_width,
                layout=self.layout,
                rows=rows,
                blocks=shards,
            )
            packed, label_ids = sharding.to_devices((packed, ids.astype(np.int32)), self.mesh)
            found = encode(packed, label_ids)
            if pending is not None:
                store(pending)
            pending = (start, found)
        if pending is not None:
            store(pending)
        return vectors
