"""The label table: one row per label, sharded over the mesh, gathered and scattered by id."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from vixml_jax.parallel import sharding
from vixml_jax.parallel.sharding import ROWS
from vixml_jax.structs import LabelState, Shard


class LabelTable:
    """Free vectors and centroids of all labels, rows sharded over (replica, fsdp).

    This is the label table of the paper (section 3): a trained free vector shared by the labels of
    a cluster, and the mean unit embedding of a label's training queries. Arrays are padded to a
    multiple of the row shards; padding rows are never gathered.

    Attributes:
      mesh: Mesh over which the rows are sharded.
      num_labels: Number of centroids without padding.
      num_free: Number of free vectors without padding, at most `num_labels`.
      width: Embedding width.
    """

    def __init__(self, mesh: Mesh, num_labels: int, num_free: int, width: int):
        self.mesh = mesh
        self.num_labels = num_labels
        self.num_free = min(num_free, num_labels)
        self.width = width

    def init_free(self, key: Array) -> Float[Array, "f e"]:
        """Unpadded Xavier-uniform free vectors, with bound sqrt(6 / (num_free + width))."""
        bound = (6.0 / (self.num_free + self.width)) ** 0.5
        return jax.random.uniform(key, (self.num_free, self.width), jnp.float32, -bound, bound)

    @property
    def abstract_state(self) -> LabelState:
        """Logical shapes and axes of the label state."""
        return LabelState(
            centroids=sharding.boxed(
                jax.ShapeDtypeStruct((self.num_labels, self.width), np.float32), "ne"
            ),
            cluster_of=sharding.boxed(jax.ShapeDtypeStruct((self.num_labels,), np.int32), "n"),
        )

    def init_state(self, cluster_of: Int[np.ndarray, " n"]) -> LabelState:
        """Label state on the mesh with zero centroids and the given cluster of each label."""
        rows = sharding.pad_rows(self.num_labels, self.mesh)
        ids = sharding.row_ids(self.num_labels, self.mesh)
        clusters = Shard(ids, np.asarray(cluster_of, np.int32)[ids])
        zeros = functools.partial(jnp.zeros, (rows, self.width), jnp.float32)
        return LabelState(
            centroids=jax.jit(zeros, out_shardings=sharding.rows_sharding(self.mesh))(),
            cluster_of=sharding.spread_rows(clusters, self.num_labels, self.mesh),
        )

    def with_centroids(self, state: LabelState, centroids: Shard) -> LabelState:
        """The state with new centroids, of which each process passes the rows it holds."""
        rows = sharding.spread_rows(centroids, self.num_labels, self.mesh)
        return state._replace(centroids=rows)

    def gather_free(
        self, free: Float[Array, "f e"], state: LabelState, label_ids: Int[Array, " c"]
    ) -> Float[Array, "c e"]:
        """Free vector of each label, zero for id -1; differentiable in `free`."""
        return gather_rows(self.mesh, free, self._rows_of_free(state, label_ids))

    def gather_centroids(
        self, state: LabelState, label_ids: Int[Array, " c"]
    ) -> Float[Array, "c e"]:
        """Centroid of each label, zero for id -1."""
        return gather_rows(self.mesh, state.centroids, label_ids)

    def distinct_free(
        self, state: LabelState, label_ids: Int[Array, " c"]
    ) -> tuple[Int[Array, " c"], Int[Array, " c"]]:
        """Distinct free-vector rows of the labels.

        Args:
          state: The label state.
          label_ids: Label ids; -1 for padding.

        Returns:
          The distinct rows, padded with -1, and each label's index among them.
        """
        rows = self._rows_of_free(state, label_ids)
        return jnp.unique(rows, return_inverse=True, size=rows.shape[0], fill_value=-1)

    def _rows_of_free(self, state: LabelState, label_ids: Int[Array, " c"]) -> Int[Array, " c"]:
        rows = gather_rows(self.mesh, state.cluster_of[:, None], label_ids)[:, 0]
        return jnp.where(label_ids >= 0, rows, -1)


def gather_rows(mesh: Mesh, rows: Array, ids: Int[Array, " c"]) -> Array:
    """`rows[ids]` for a table whose rows are sharded over (replica, fsdp); zero for id -1.

    Each device looks up the ids it holds and the results are summed over devices, so the
    communication volume is that of a [c, e] array, not of the table.
    """

    def local(rows: Array, ids: Array) -> Array:
        local_ids, held = _local_ids(rows, ids)
        values = jnp.where(held[:, None], rows[jnp.where(held, local_ids, 0)], 0)
        return jax.lax.psum(values, ROWS)

    return jax.shard_map(local, mesh=mesh, in_specs=(P(ROWS), P()), out_specs=P())(rows, ids)


def scatter_rows(
    mesh: Mesh, rows: Float[Array, "n e"], ids: Int[Array, " c"], values: Float[Array, "c e"]
) -> Float[Array, "n e"]:
    """`rows` with `values` written at `ids`, without communication; id -1 writes nothing."""

    def local(rows: Array, ids: Array, values: Array) -> Array:
        local_ids, held = _local_ids(rows, ids)
        return rows.at[jnp.where(held, local_ids, rows.shape[0])].set(values, mode="drop")

    return jax.shard_map(local, mesh=mesh, in_specs=(P(ROWS), P(), P()), out_specs=P(ROWS))(
        rows, ids, values
    )


def _local_ids(rows: Array, ids: Array) -> tuple[Array, Array]:
    """Ids relative to this device's shard of the rows, and which of them it holds."""
    local_ids = ids - jax.lax.axis_index(ROWS) * rows.shape[0]
    return local_ids, (local_ids >= 0) & (local_ids < rows.shape[0]) & (ids >= 0)
