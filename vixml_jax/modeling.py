"""The model: tower, prototype network, label table and head; embeddings of whole data sets."""

import collections
import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from vixml_jax.data import packing
from vixml_jax.data.store import Items, Ragged
from vixml_jax.labels import head as head_lib
from vixml_jax.labels import head_words
from vixml_jax.labels.head import LabelHead
from vixml_jax.labels.prototypes import Combiner
from vixml_jax.labels.table import LabelTable
from vixml_jax.models import attention as attention_lib
from vixml_jax.models import layers
from vixml_jax.models.layers import unit
from vixml_jax.models.tower import ShardLayout, Tower
from vixml_jax.parallel import sharding
from vixml_jax.runtime import background, progress
from vixml_jax.structs import LabelState, PackedItems, Shard

# Numbers of queries that the label head reads at a time, so that few programs are compiled.
_HEAD_BLOCKS = (8, 64, 512, 4096)
_BLOCKS_AHEAD = 2  # Blocks of items that are packed, and that are sent to the devices, ahead.


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """Tower, prototype network, label table and head, and how items are packed for them.

    Attributes:
      tower: Maps packed items to one vector per item, not normalised.
      combiner: Maps tower vector, free vector and centroid of a label to its unit prototype; None
        if labels are represented by their own vectors.
      table: The label table.
      mesh: Mesh on which the model runs.
      row_width: Number of positions of a packed row.
      layout: Layout of items.
      matmul_precision: Precision of float32 products in tower, prototype network and head:
        "default" of the device, "high" or "highest", as `jax.lax.Precision` has them.
      microbatch_rows: Rows per device that the tower processes at a time in training; 0 for all.
      head: The label head; None if the run has none. Its parameters are `params["head"]`, which are
        absent as long as nothing has trained it.
    """

    tower: Tower
    combiner: Combiner | None
    table: LabelTable
    mesh: Mesh
    row_width: int
    layout: packing.Layout
    matmul_precision: str = "default"
    microbatch_rows: int = 0
    head: LabelHead | None = None

    def init_params(self, key: Array) -> Any:
        """Initial parameters of tower, combiner and free vectors, boxed with logical axes."""
        tower_key, combiner_key, free_key = jax.random.split(key, 3)
        row = jnp.zeros((1, 8), jnp.int32)
        packed = PackedItems(
            tokens=row,
            segments=row,
            positions=row,
            image_at=row - 1,
            images=jnp.zeros((1, max(self.tower.config.image_width, 1)), jnp.float16),
        )
        params = {"tower": self.tower.init(tower_key, packed, 1, deterministic=True)["params"]}
        if self.combiner is not None:
            x = jnp.zeros((1, self.table.width))
            params["combiner"] = self.combiner.init(combiner_key, x, x, x, deterministic=True)[
                "params"
            ]
            if self.combiner.uses_free:
                params["free"] = sharding.boxed(self.table.init_free(free_key), "fe")
        return params

    def precision(self) -> contextlib.AbstractContextManager:
        """The context in which tower, prototype network, head and their gradients are traced."""
        if self.matmul_precision == "default":  # Of the device, or as JAX is configured.
            return contextlib.nullcontext()
        return jax.default_matmul_precision(self.matmul_precision)

    @property
    def uses_centroids(self) -> bool:
        """Whether the prototypes of labels depend on their centroids."""
        return self.combiner is not None and self.combiner.uses_centroid

    @functools.cached_property
    def abstract_params(self) -> Any:
        """Logical shapes, dtypes and axes of all parameters but those of the head.

        On a mesh they are stored with the padded shapes of `sharding.stored_tree`. The methods of
        this class cut them to their logical shapes.
        """
        return jax.eval_shape(lambda: self.init_params(jax.random.key(0)))

    @functools.cached_property
    def abstract_head(self) -> Any:
        """Logical shapes, dtypes and axes of the parameters of the head."""
        return jax.eval_shape(lambda: self.head.init_params(jax.random.key(0)))

    def row_sizes(self, length: float, batch_size: int, num_shards: int) -> packing.RowSizes:
        """Possible numbers of rows of one shard of a training batch.

        Args:
          length: Mean number of positions of a query and a label together.
          batch_size: Number of queries, and of labels.
          num_shards: Number of shards of a batch; a multiple of the row shards of the mesh.
        """
        shards_per_device = num_shards // sharding.num_row_shards(self.mesh)
        return packing.RowSizes.expected(
            length,
            batch_size=batch_size,
            width=self.row_width,
            blocks=num_shards,
            chunk=self.microbatch_rows
            and self.microbatch_rows // math.gcd(self.microbatch_rows, shards_per_device),
        )

    def mean_length(self, items: Items) -> float:
        """Mean number of positions of an item in a packed row."""
        lengths = packing.item_lengths(items, width=self.row_width, layout=self.layout)
        return float(np.mean(lengths))

    def attention(self, row_width: int, *, training: bool) -> attention_lib.Choice:
        """The implementation of the tower's attention on this mesh.

        Args:
          row_width: Number of positions of a packed row.
          training: Whether the program is a training step.
        """
        return attention_lib.choose(
            self.tower.config.attention_needs(row_width, training=training),
            self.mesh.devices.flat[0],
            self.mesh.shape["tensor"],
        )

    def tower_vectors(
        self,
        params: Any,
        packed: PackedItems,
        num_items: int,
        *,
        sides: int = 1,
        dropout: Array | None = None,
    ) -> Float[Array, "b d"]:
        """Pooled tower vectors, float32, not normalised.

        Args:
          params: Parameters of the model; the tower's may be `layers.unstacked`.
          packed: Items packed in blocks, one or several per device.
          num_items: Number of items over all devices.
          sides: 2 if the items are queries followed by as many labels, otherwise 1.
          dropout: Random key of dropout in training; None to disable dropout and microbatches.
        """
        devices = sharding.num_row_shards(self.mesh)
        shards = ShardLayout(devices, sides)
        num_microbatches = 0
        if dropout is not None and self.microbatch_rows:
            num_microbatches = packed.tokens.shape[0] // devices // self.microbatch_rows
        like = layers.abstract_like(params["tower"], self.abstract_params["tower"])
        weights = sharding.unpad(params["tower"], like)
        attention = self.attention(packed.tokens.shape[1], training=dropout is not None)
        with sharding.activation_sharding(self.mesh), self.precision():
            return self.tower.clone(attention=attention.implementation).apply(
                {"params": weights},
                packed,
                num_items,
                deterministic=dropout is None,
                rngs=None if dropout is None else {"dropout": dropout},
                shards=shards,
                num_microbatches=num_microbatches,
            )

    def prototypes(
        self,
        params: Any,
        labels: LabelState | None,
        vectors: Float[Array, "c d"],
        label_ids: Int[Array, " c"] | None,
        *,
        free: Float[Array, "c e"] | None = None,
        centroids: Float[Array, "c e"] | None = None,
        dropout: Array | None = None,
    ) -> Float[Array, "c e"]:
        """Unit prototypes of labels: the combiner's output, or without it their tower vectors.

        Args:
          params: Parameters of the model.
          labels: Label state.
          vectors: Tower vectors of the labels, not normalised.
          label_ids: Ids of the labels.
          free: Free vectors of the labels; None to look them up in `params`.
          centroids: Centroids of the labels; None to look them up in `labels`. If both `free` and
            `centroids` are given, `labels` and `label_ids` may be None.
          dropout: Random key of dropout in training; None to disable it.
        """
        if self.combiner is None:
            return unit(vectors)
        if free is None and self.combiner.uses_free:
            free = self.table.gather_free(params["free"], labels, label_ids)
        if centroids is None and self.combiner.uses_centroid:
            centroids = self.table.gather_centroids(labels, label_ids)
        combiner = sharding.unpad(params["combiner"], self.abstract_params["combiner"])
        with self.precision():
            return self.combiner.apply(
                {"params": combiner},
                vectors,
                free,
                centroids,
                deterministic=dropout is None,
                rngs=None if dropout is None else {"dropout": dropout},
            )

    def encode_queries(self, params: Any, items: Items, *, block: int, title: str = "") -> Shard:
        """Unit vectors of the items, float32, on the host.

        Args:
          params: Parameters of the model.
          items: Tokens and images of the items.
          block: Number of items encoded at a time, over all devices.
          title: Title of the progress display; empty for none.

        Returns:
          The rows that belong to this process (`sharding.row_ids`); a single process gets all.
        """
        return self._stream(
            lambda packed, ids: self._encode_block(params, packed, ids.shape[0]),
            items,
            block,
            title,
        )

    def encode_labels(
        self, params: Any, labels: LabelState, items: Items, *, block: int, title: str = ""
    ) -> Shard:
        """Unit prototypes of the labels; arguments and result as for `encode_queries`."""
        return self._stream(
            lambda packed, ids: self._label_block(params, labels, packed, ids, ids.shape[0]),
            items,
            block,
            title,
        )

    def encode_labels_both_ways(
        self, params: Any, labels: LabelState, items: Items, *, block: int, title: str = ""
    ) -> tuple[Shard, Shard]:
        """Unit vectors of the labels from the tower, and their unit prototypes, in one pass.

        Arguments and results as for `encode_queries`.
        """
        if self.combiner is None:
            vectors = self.encode_queries(params, items, block=block, title=title)
            return vectors, vectors
        both = self._stream(
            lambda packed, ids: self._both_block(params, labels, packed, ids, ids.shape[0]),
            items,
            block,
            title,
            width=2 * self.table.width,
        )
        vectors, prototypes = np.split(both.values, 2, axis=1)
        return Shard(both.ids, vectors), Shard(both.ids, prototypes)

    @property
    def word_tokens(self) -> int:
        """Tokens of a query that the head reads at most; 0 if it reads no words."""
        if self.head is None or not self.head.num_words:
            return 0
        return max(1, min(head_words.MAX_TOKENS, self.row_width - self.layout.overhead))

    def reader_of_words(
        self, tokens: Ragged
    ) -> Callable[[Int[np.ndarray, " b"]], Int[np.ndarray, "b t"]] | None:
        """Returns a function from rows of texts to the tokens that the head reads of them.

        Args:
          tokens: Of all texts, as in the prepared data.

        Returns:
          The function; None if the head reads no words.
        """
        if not self.word_tokens:
            return None
        return functools.partial(
            packing.text_tokens, tokens, layout=self.layout, length=self.word_tokens
        )

    def head_queries(
        self, params: Any, queries: Float[np.ndarray, "n e"], tokens: Ragged
    ) -> Float[np.ndarray, "n e"]:
        """The vectors with which the head scores queries.

        Args:
          params: Parameters of the model, those of the head among them.
          queries: Unit vectors of the tower.
          tokens: Tokens of the same queries, as in the prepared data.
        """
        if not len(queries):
            return np.zeros(queries.shape, np.float32)
        reading = head_lib.query_params(params["head"])
        if jax.process_count() > 1:  # Each applies the replicated network to its own queries.
            reading = jax.tree.map(np.asarray, reading)
        size = next((s for s in _HEAD_BLOCKS if s >= len(queries)), _HEAD_BLOCKS[-1])
        read_words = self.reader_of_words(tokens)
        parts = []
        for start in range(0, len(queries), size):
            rows = np.arange(start, start + size)
            rows = np.where(rows < len(queries), rows, -1)
            block = np.pad(queries[start : start + size], ((0, np.sum(rows < 0)), (0, 0)))
            words = read_words and read_words(rows)
            parts.append(np.asarray(self._head_block(reading, block, words)))
        return np.concatenate(parts)[: len(queries)]

    @functools.cached_property
    def _head_block(self) -> Any:
        def queries(reading: Any, queries: Array, words: Array | None) -> Float[Array, "b e"]:
            with self.precision():
                return self.head.queries(reading, queries, words)

        return jax.jit(queries)

    def head_rows(self, params: Any) -> tuple[Shard, Shard]:
        """Vectors [n, e] and biases [n] of the labels in the head, on the host.

        Each is the part that belongs to this process (`sharding.row_ids`).
        """
        vectors, bias = (
            sharding.shard_of(params["head"][name], self.table.num_labels, self.mesh)
            for name in ("vectors", "bias")
        )
        return vectors, bias

    def encode_packed(
        self, params: Any, packed: PackedItems, num_items: int
    ) -> Float[Array, "b e"]:
        """Unit vectors of packed items; compiled once per shape."""
        return self._encode_block(params, packed, num_items)

    def trace_encoding(self, params: Any, packed: PackedItems, num_items: int) -> jax.stages.Traced:
        """The program of `encode_packed`, from shapes and shardings alone; not compiled."""
        return self._encode_block.trace(params, packed, num_items)

    def new_prototypes(
        self,
        params: Any,
        packed: PackedItems,
        free: Float[Array, "c e"],
        centroids: Float[Array, "c e"],
    ) -> Float[Array, "c e"]:
        """Unit prototypes of labels that are not in the label table."""
        return self._new_block(params, packed, free, centroids)

    @functools.cached_property
    def _new_block(self) -> Any:
        def encode(params: Any, packed: PackedItems, free: Array, centroids: Array) -> Array:
            vectors = self.tower_vectors(params, packed, free.shape[0])
            return self.prototypes(params, None, vectors, None, free=free, centroids=centroids)

        return jax.jit(encode, out_shardings=sharding.rows_sharding(self.mesh))

    @functools.cached_property
    def _encode_block(self) -> Any:
        def encode(params: Any, packed: PackedItems, num_items: int) -> Float[Array, "b e"]:
            return unit(self.tower_vectors(params, packed, num_items))

        return jax.jit(encode, static_argnums=2, out_shardings=sharding.rows_sharding(self.mesh))

    @functools.cached_property
    def _label_block(self) -> Any:
        return self._label_program(lambda vectors, prototypes: prototypes)

    @functools.cached_property
    def _both_block(self) -> Any:
        return self._label_program(
            lambda vectors, prototypes: jnp.concatenate([unit(vectors), prototypes], axis=1)
        )

    def _label_program(self, result: Callable[[Array, Array], Array]) -> Any:
        """A jitted function of a block of labels: `result` of tower vectors and prototypes."""

        def encode(
            params: Any,
            labels: LabelState,
            packed: PackedItems,
            label_ids: Int[Array, " b"],
            num_items: int,
        ) -> Float[Array, "b w"]:
            vectors = self.tower_vectors(params, packed, num_items)
            return result(vectors, self.prototypes(params, labels, vectors, label_ids))

        return jax.jit(encode, static_argnums=4, out_shardings=sharding.rows_sharding(self.mesh))

    def _stream(
        self, encode: Any, items: Items, block: int, title: str, width: int | None = None
    ) -> Shard:
        """Encodes items in blocks; a thread packs the next ones while the devices encode.

        Each device encodes the items of its own rows, so that the results need no communication.
        """
        mesh, num = self.mesh, len(items)
        shards, local_shards = sharding.num_row_shards(mesh), sharding.row_shards(mesh)
        per_shard = sharding.pad_rows(num, mesh) // shards
        size = min(-(-block // shards), per_shard)  # Rows of a shard encoded at a time.
        rows = packing.RowSizes.expected(
            self.mean_length(items), batch_size=size * shards, width=self.row_width, blocks=shards
        )
        width = width or self.table.width
        vectors = np.empty((len(local_shards), per_shard, width), np.float32)

        def pack(start: int) -> tuple[int, PackedItems, Int[np.ndarray, "shards m"]]:
            rows_of_shard = start + np.arange(size)
            ids = np.arange(shards)[:, None] * per_shard + rows_of_shard
            ids[(ids >= num) | (rows_of_shard >= per_shard)] = -1
            packed = packing.pack(
                items,
                ids.reshape(-1),
                width=self.row_width,
                layout=self.layout,
                rows=rows,
                blocks=shards,
                read=local_shards,
            )
            return start, packed, ids

        def store(start: int, encoded: Array) -> None:
            count = min(size, per_shard - start)
            values = sharding.shard_of(encoded, encoded.shape[0], mesh).values
            values = values.reshape(len(local_shards), size, -1)
            vectors[:, start : start + count] = values[:, :count]

        encoding: collections.deque[tuple[int, Array]] = collections.deque()
        blocks = background.ahead(pack, range(0, per_shard, size), _BLOCKS_AHEAD)
        with (
            progress.track(title, num, shown=bool(title)) as update,
            contextlib.closing(blocks),
        ):
            for start, packed, ids in blocks:
                local_ids = ids[local_shards].reshape(-1).astype(np.int32)
                encoded = encode(*sharding.to_devices((packed, local_ids), mesh))
                encoding.append((start, encoded))
                if len(encoding) > _BLOCKS_AHEAD:
                    store(*encoding.popleft())
                update(np.count_nonzero(ids >= 0))
            while encoding:
                store(*encoding.popleft())
        ids = sharding.row_ids(num, mesh)
        return Shard(ids, vectors.reshape(-1, width)[: len(ids)])
