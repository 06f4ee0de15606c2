"""Exact search: blocks of inner products, a running top-k, rows of the labels over the mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from vixml_jax import sharding
from vixml_jax.search import index
from vixml_jax.sharding import ROWS
from vixml_jax.structs import SearchResult, Share


class ExactIndex:
    """All inner products in float32, of which never more than one block exists.

    Attributes:
      settings: Sizes of the blocks.
    """

    def __init__(
        self,
        vectors: Float[np.ndarray, "n e"] | Share,
        *,
        num_labels: int | None = None,
        query_block: int = 1024,
        label_block: int = 32768,
        mesh: Mesh | None = None,
    ):
        """Places the vectors.

        Args:
          vectors: Of the labels; a label's id is its row. Or, over a mesh, those that this process
            holds.
          num_labels: Of all processes together; None: `vectors` are all.
          query_block: Queries searched at a time.
          label_block: Labels scored at a time on each device: the scores of a block hold
            query_block * label_block float32.
          mesh: Whose (replica, fsdp) axes share the rows; None: the default device has them all.
        """
        self.settings: dict[str, Any] = {"query_block": query_block, "label_block": label_block}
        if not isinstance(vectors, Share):
            vectors = Share(np.arange(len(vectors)), vectors)
        values = np.asarray(vectors.values, np.float32)
        self._num_labels = len(values) if num_labels is None else num_labels
        self._query_block, self._mesh = query_block, mesh
        if mesh is None:
            self._vectors = jax.device_put(values)
        else:
            share = vectors._replace(values=values)
            self._vectors = sharding.spread_rows(share, self._num_labels, mesh)
        devices = 1 if mesh is None else sharding.num_row_shards(mesh)
        self._num_blocks = max(1, -(-(self._vectors.shape[0] // devices) // label_block))

    def search(self, queries: Float[np.ndarray, "q e"], k: int) -> SearchResult:
        """Returns the k best labels of each query, best first, of equal scores the lower id first.

        Where k exceeds the number of labels, rows end in id -1, score -inf.
        """
        few = min(k, self._num_labels)
        scores = np.empty((len(queries), few), np.float32)
        ids = np.empty((len(queries), few), np.int32)
        # One program for all blocks; of few queries, one of the next power of two.
        size = min(self._query_block, 1 << max(3, (len(queries) - 1).bit_length()))
        block = np.zeros((size, queries.shape[1]), np.float32)
        for start in range(0, len(queries) if few else 0, size):
            part = slice(start, min(start + size, len(queries)))
            count = part.stop - part.start
            block[:count] = queries[part]
            found = _top_k(
                self._vectors,
                block,
                k=few,
                num_labels=self._num_labels,
                num_blocks=self._num_blocks,
                mesh=self._mesh,
            )
            scores[part], ids[part] = (np.asarray(x)[:count] for x in found)
        return index.pad_columns(SearchResult(scores, ids), k)


@functools.partial(jax.jit, static_argnames=("k", "num_labels", "num_blocks", "mesh"))
def _top_k(
    vectors: Float[Array, "n e"],
    queries: Float[Array, "q e"],
    *,
    k: int,
    num_labels: int,
    num_blocks: int,
    mesh: Mesh | None,
) -> SearchResult:
    """The k best of the first `num_labels` rows, those of a device in `num_blocks` blocks."""
    local = functools.partial(_local_top_k, k=k, num_labels=num_labels, num_blocks=num_blocks)
    if mesh is None:
        return local(vectors, queries, 0)

    def shared(rows: Float[Array, "n e"], queries: Float[Array, "q e"]) -> SearchResult:
        found = local(rows, queries, jax.lax.axis_index(ROWS) * rows.shape[0])
        # [q, devices * k] candidates, in the same order on every device.
        found = jax.tree.map(lambda x: jax.lax.all_gather(x, ROWS, axis=1, tiled=True), found)
        return _best(found, k)

    # The results are equal on all devices, which the type of all_gather does not tell.
    search = jax.shard_map(
        shared, mesh=mesh, in_specs=(P(ROWS), P()), out_specs=P(), check_vma=False
    )
    return search(vectors, queries)


def _local_top_k(
    rows: Float[Array, "n e"],
    queries: Float[Array, "q e"],
    first: Int[Array, ""] | int,
    *,
    k: int,
    num_labels: int,
    num_blocks: int,
) -> SearchResult:
    """The k best rows of one device, whose first row is label `first`."""
    size = -(-rows.shape[0] // num_blocks)

    def add_block(best: SearchResult, start: Array) -> tuple[SearchResult, None]:
        # The last block ends with the rows: what it shares with the one before counts once.
        at = jnp.minimum(start, rows.shape[0] - size) + jnp.arange(size, dtype=jnp.int32)
        vectors = jax.lax.dynamic_slice_in_dim(rows, at[0], size)
        scores = jnp.einsum(
            "qe,ne->qn",
            queries,
            vectors,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        ids = jnp.asarray(first + at, jnp.int32)
        scores = jnp.where((at >= start) & (ids < num_labels), scores, -jnp.inf)
        scores, chosen = jax.lax.top_k(scores, min(k, size))
        both = jax.tree.map(
            lambda a, b: jnp.concatenate([a, b], axis=1), best, SearchResult(scores, ids[chosen])
        )
        return _best(both, k), None

    empty = SearchResult(
        jnp.full((queries.shape[0], k), -jnp.inf, jnp.float32),
        jnp.full((queries.shape[0], k), -1, jnp.int32),
    )
    return jax.lax.scan(add_block, empty, jnp.arange(num_blocks, dtype=jnp.int32) * size)[0]


def _best(found: SearchResult, k: int) -> SearchResult:
    """The k best columns; of equal scores the earlier column, which must hold the lower id."""
    scores, at = jax.lax.top_k(found.scores, k)
    return SearchResult(scores, jnp.take_along_axis(found.ids, at, axis=1))
