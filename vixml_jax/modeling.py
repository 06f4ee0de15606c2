"""Vectors of whole data sets: items through the tower in packed blocks, labels through the
combiner, image files through a frozen vision model."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from vixml_jax.data import packing
from vixml_jax.data.images import image_files
from vixml_jax.data.store import Items
from vixml_jax.labels.prototypes import Combiner
from vixml_jax.labels.table import LabelTable
from vixml_jax.models.siglip import VisionTower
from vixml_jax.models.tower import Shares, Tower
from vixml_jax.parallel import sharding
from vixml_jax.structs import LabelState, PackedItems, Share


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

    def init_params(self, key: Array) -> Any:
        """Fresh parameters of tower, combiner and free vectors, boxed with their logical axes."""
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
            params["free"] = sharding.boxed(self.table.init_free(free_key), "fe")
        return params

    @functools.cached_property
    def abstract_params(self) -> Any:
        """Logical shapes, dtypes and axes of all parameters.

        On a mesh they are stored as `sharding.stored_tree` says, where need be with zeros at their
        ends; here, where they are used, they are cut to these shapes.
        """
        return jax.eval_shape(lambda: self.init_params(jax.random.key(0)))

    def row_sizes(self, length: float, batch_size: int, shares: int) -> packing.RowSizes:
        """How many rows a share of a training batch may have.

        Args:
          length: Positions of a query and a label together, on average.
          batch_size: Queries, and labels.
          shares: Of a batch; a multiple of the row shards of the mesh.
        """
        each = shares // sharding.num_row_shards(self.mesh)  # Shares of a device.
        return packing.RowSizes.expected(
            length,
            batch_size=batch_size,
            width=self.row_width,
            blocks=shares,
            chunk=self.encode_chunk and self.encode_chunk // math.gcd(self.encode_chunk, each),
        )

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
        sides: int = 1,
        dropout: Array | None = None,
    ) -> Float[Array, "b d"]:
        """Pooled tower vectors, float32, not normalised; with a key, as in training.

        Args:
          params: Of the model.
          packed: Packed in blocks, one a device or several.
          num_items: Over all devices.
          sides: 2 where they are queries, then as many labels.
          dropout: A key.
        """
        devices = sharding.num_row_shards(self.mesh)
        shares = Shares(devices, sides)
        chunks = 0
        if dropout is not None and self.encode_chunk:
            chunks = packed.tokens.shape[0] // devices // self.encode_chunk
        tower = sharding.unpad(params["tower"], self.abstract_params["tower"])
        with sharding.laid_out(self.mesh):
            return self.tower.apply(
                {"params": tower},
                packed,
                num_items,
                deterministic=dropout is None,
                rngs=None if dropout is None else {"dropout": dropout},
                shares=shares,
                chunks=chunks,
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
        """What a label is searched by: the combiner's unit output, or its own unit vector.

        Args:
          params, labels: Of the model.
          vectors: The tower's, not normalised.
          label_ids: Whose they are.
          free, centroids: Theirs, where the caller has them; None: looked up in `params` and
            `labels`. With both, `labels` and `label_ids` may be None.
          dropout: A key, in training.
        """
        if self.combiner is None:
            return unit(vectors)
        if free is None:
            free = self.table.gather_free(params["free"], labels, label_ids)
        if centroids is None:
            centroids = self.table.gather_centroids(labels, label_ids)
        combiner = sharding.unpad(params["combiner"], self.abstract_params["combiner"])
        return self.combiner.apply(
            {"params": combiner},
            vectors,
            free,
            centroids,
            deterministic=dropout is None,
            rngs=None if dropout is None else {"dropout": dropout},
        )

    def encode_queries(self, params: Any, items: Items, *, block: int, title: str = "") -> Share:
        """Unit vectors of items, float32 on the host: those rows that this process would hold of an
        array of them spread over the mesh (`sharding.row_ids`); alone, all."""
        return self._stream(
            lambda packed, ids: self._encode_block(params, packed, ids.shape[0]),
            items,
            block,
            title,
        )

    def encode_labels(
        self, params: Any, labels: LabelState, items: Items, *, block: int, title: str = ""
    ) -> Share:
        """Unit prototypes of labels, as `encode_queries` has them."""
        return self._stream(
            lambda packed, ids: self._label_block(params, labels, packed, ids, ids.shape[0]),
            items,
            block,
            title,
        )

    def encode_packed(
        self, params: Any, packed: PackedItems, num_items: int
    ) -> Float[Array, "b e"]:
        """Unit vectors of packed items, compiled once a shape."""
        return self._encode_block(params, packed, num_items)

    def new_prototypes(
        self,
        params: Any,
        packed: PackedItems,
        free: Float[Array, "c e"],
        centroids: Float[Array, "c e"],
    ) -> Float[Array, "c e"]:
        """Unit prototypes of labels that the table does not have."""
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
        def encode(
            params: Any,
            labels: LabelState,
            packed: PackedItems,
            label_ids: Int[Array, " b"],
            num_items: int,
        ) -> Float[Array, "b e"]:
            vectors = self.tower_vectors(params, packed, num_items)
            return self.prototypes(params, labels, vectors, label_ids)

        return jax.jit(encode, static_argnums=4, out_shardings=sharding.rows_sharding(self.mesh))

    def _stream(self, encode: Any, items: Items, block: int, title: str) -> Share:
        """Runs `encode` over blocks of items; the device works while the host packs.

        A device reads the items of its own rows, so that what it finds lies where it belongs.
        """
        import tqdm

        mesh, num = self.mesh, len(items)
        shards, here = sharding.num_row_shards(mesh), sharding.row_shards(mesh)
        each = sharding.pad_rows(num, mesh) // shards  # Rows of a device.
        size = min(-(-block // shards), each)  # Of these, so many at a time.
        rows = packing.RowSizes.expected(
            self.mean_length(items), batch_size=size * shards, width=self.row_width, blocks=shards
        )
        vectors = np.empty((len(here), each, self.table.width), np.float32)
        pending: tuple[int, Any] | None = None

        def store(pending: tuple[int, Any]) -> None:
            start, found = pending
            count = min(size, each - start)
            share = sharding.share_of(found, found.shape[0], mesh)
            vectors[:, start : start + count] = share.values.reshape(len(here), size, -1)[:, :count]

        starts = range(0, each, size)
        for start in tqdm.tqdm(starts, desc=title, unit="block", disable=not title, leave=False):
            at = start + np.arange(size)
            ids = np.arange(shards)[:, None] * each + at  # [shards, size]
            ids[(ids >= num) | (at >= each)] = -1
            packed = packing.pack(
                items,
                ids.reshape(-1),
                width=self.row_width,
                layout=self.layout,
                rows=rows,
                blocks=shards,
                read=here,
            )
            ids = ids[here].reshape(-1).astype(np.int32)
            found = encode(*sharding.to_devices((packed, ids), mesh))
            if pending is not None:
                store(pending)
            pending = (start, found)
        if pending is not None:
            store(pending)
        ids = sharding.row_ids(num, mesh)
        return Share(ids, vectors.reshape(-1, self.table.width)[: len(ids)])


def embed_files(
    tower: VisionTower,
    params: Any,
    paths: Sequence[str],
    store: image_files.EmbeddingStore,
    processor: image_files.ImageProcessor,
    *,
    batch: int,
    keep_aspect: bool,
    threads: int,
) -> tuple[dict[str, int], dict[str, str]]:
    """Embeds image files, each content once, those first that are named first.

    Args:
      tower: A frozen vision model.
      params: Its parameters.
      paths: Of the files; several may have the same content.
      store: Where vectors go, and from where they are not made again.
      processor: What the model wants its pixels to be.
      batch: Pictures embedded together.
      keep_aspect: See `images.load_pixels`.
      threads: That read and decode files.

    Returns:
      The row of each path's vector in the store, and what is wrong with the paths that have none.
    """
    import concurrent.futures

    import tqdm

    encode = jax.jit(lambda params, pixels: tower.apply({"params": params}, pixels))
    params = jax.device_put(params)
    paths = list(dict.fromkeys(paths))
    broken: dict[str, str] = {}

    def decode(path: str) -> np.ndarray | str:
        try:
            return image_files.load_pixels(path, processor, keep_aspect=keep_aspect)
        except (OSError, ValueError) as error:
            return " ".join(str(error).split())

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        digests = dict(zip(paths, pool.map(image_files.digest, paths), strict=True))
        first = {}  # Digest -> the first path that has it, if it is not embedded yet.
        for path, found in digests.items():
            if found is not None and found not in store.row_of:
                first.setdefault(found, path)
        todo = list(first.items())
        with tqdm.tqdm(total=len(todo), desc="pictures", unit="", disable=not todo) as bar:
            for start in range(0, len(todo), batch):
                part = todo[start : start + batch]
                decoded = list(pool.map(decode, (path for _, path in part)))
                fine = [i for i, pixels in enumerate(decoded) if not isinstance(pixels, str)]
                pixels = np.zeros((batch, processor.height, processor.width, 3), np.float32)
                for row, i in enumerate(fine):
                    pixels[row] = decoded[i]
                vectors = np.asarray(encode(params, pixels))[: len(fine)]
                with np.errstate(over="ignore"):
                    finite = np.isfinite(vectors.astype(np.float16)).all(axis=1)
                store.add([part[i][0] for i, ok in zip(fine, finite, strict=True) if ok],
                          vectors[finite])  # fmt: skip
                for i, said in enumerate(decoded):
                    if isinstance(said, str):
                        broken[part[i][0]] = said
                bar.update(len(part))
    row_of, faults = {}, {}
    for path, found in digests.items():
        if found in store.row_of:
            row_of[path] = store.row_of[found]
        else:
            faults[path] = broken.get(found, "no finite vector") if found else "cannot be read"
    return row_of, faults
