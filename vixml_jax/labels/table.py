"""The label table: one row a label, spread over the mesh; gathered and scattered by id."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from vixml_jax.parallel import sharding
from vixml_jax.parallel.sharding import ROWS
from vixml_jax.structs import LabelState, Share


class LabelTable:
    """Free vectors and centroids of all labels, rows over (replica, fsdp).

    The paper's label table (section 3): a trained free vector shared by the labels of a cluster,
    and the mean of the unit embeddings of a label's training queries. Arrays are padded to a
    multiple of the row shards; the padding is never asked for.

    Attributes:
      mesh: Where the rows lie.
      num_labels: Real rows of the centroids.
      num_free: Real rows of the free vectors, at most `num_labels`.
      width: Width of the embeddings.
    """

    def __init__(self, mesh: Mesh, num_labels: int, num_free: int, width: int):
        self.mesh = mesh
        self.num_labels = num_labels
        self.num_free = min(num_free, num_labels)
        self.width = width

    def init_free(self, key: Array) -> Float[Array, "f e"]:
        """Xavier-uniform free vectors: bound sqrt(6 / (free vectors + width)); not padded."""
        bound = (6.0 / (self.num_free + self.width)) ** 0.5
        return jax.random.uniform(key, (self.num_free, self.width), jnp.float32, -bound, bound)

    @property
    def abstract_state(self) -> LabelState:
        """Logical shapes and axes of the state."""
        return LabelState(
            centroids=sharding.boxed(
                jax.ShapeDtypeStruct((self.num_labels, self.width), np.float32), "ne"
            ),
            cluster_of=sharding.boxed(jax.ShapeDtypeStruct((self.num_labels,), np.int32), "n"),
        )

    def init_state(self, cluster_of: Int[np.ndarray, " n"]) -> LabelState:
        """Zero centroids and the given map from labels to free vectors, on the mesh."""
        rows = sharding.pad_rows(self.num_labels, self.mesh)
        ids = sharding.row_ids(self.num_labels, self.mesh)
        clusters = Share(ids, np.asarray(cluster_of, np.int32)[ids])
        zeros = functools.partial(jnp.zeros, (rows, self.width), jnp.float32)
        return LabelState(
            centroids=jax.jit(zeros, out_shardings=sharding.rows_sharding(self.mesh))(),
            cluster_of=sharding.spread_rows(clusters, self.num_labels, self.mesh),
        )

    def with_centroids(self, state: LabelState, centroids: Share) -> LabelState:
        """The state with new centroids of the real labels, each process's rows from itself."""
        spread = sharding.spread_rows(centroids, self.num_labels, self.mesh)
        return state._replace(centroids=spread)

    def gather_free(
        self, free: Float[Array, "f e"], state: LabelState, label_ids: Int[Array, " c"]
    ) -> Float[Array, "c e"]:
        """The free vector of each label; zeros for id -1. Differentiable in `free`."""
        return gather_rows(self.mesh, free, self._rows_of_free(state, label_ids))

    def gather_centroids(
        self, state: LabelState, label_ids: Int[Array, " c"]
    ) -> Float[Array, "c e"]:
        """The centroid of each label; zeros for id -1."""
        return gather_rows(self.mesh, state.centroids, label_ids)

    def distinct_free(
        self, state: LabelState, label_ids: Int[Array, " c"]
    ) -> tuple[Int[Array, " c"], Int[Array, " c"]]:
        """The rows of the free vectors that labels share, each once, then -1; and where among
        these each label's row stands."""
        rows = self._rows_of_free(state, label_ids)
        return jnp.unique(rows, return_inverse=True, size=rows.shape[0], fill_value=-1)

    def _rows_of_free(self, state: LabelState, label_ids: Int[Array, " c"]) -> Int[Array, " c"]:
        rows = gather_rows(self.mesh, state.cluster_of[:, None], label_ids)[:, 0]
        return jnp.where(label_ids >= 0, rows, -1)


def gather_rows(mesh: Mesh, rows: Array, ids: Int[Array, " c"]) -> Array:
    """`rows[ids]` of a table whose rows lie over (replica, fsdp); zeros for id -1.

    Each device looks up the ids that it holds and the pieces are summed, so what travels is
    [c, e], never the table.
    """

    def local(rows: Array, ids: Array) -> Array:
        at = ids - jax.lax.axis_index(ROWS) * rows.shape[0]
        mine = (at >= 0) & (at < rows.shape[0]) & (ids >= 0)
        found = jnp.where(mine[:, None], rows[jnp.where(mine, at, 0)], 0)
        return jax.lax.psum(found, ROWS)

    return jax.shard_map(local, mesh=mesh, in_specs=(P(ROWS), P()), out_specs=P())(rows, ids)


def scatter_rows(
    mesh: Mesh, rows: Float[Array, "n e"], ids: Int[Array, " c"], values: Float[Array, "c e"]
) -> Float[Array, "n e"]:
    """`rows` with `values` written at `ids`; id -1 writes nothing. Rows stay where they lie."""

    def local(rows: Array, ids: Array, values: Array) -> Array:
        at = ids - jax.lax.axis_index(ROWS) * rows.shape[0]
        mine = (at >= 0) & (at < rows.shape[0]) & (ids >= 0)
        return rows.at[jnp.where(mine, at, rows.shape[0])].set(values, mode="drop")

    return jax.shard_map(local, mesh=mesh, in_specs=(P(ROWS), P(), P()), out_specs=P(ROWS))(
        rows, ids, values
    )
