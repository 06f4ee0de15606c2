"""The state of a run before its first step: shapes, shardings and the initial label state."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from scipy import sparse

from vixml_jax.config import LabelsConfig
from vixml_jax.data.store import PreparedDataset
from vixml_jax.labels.centroids import exact_centroids
from vixml_jax.modeling import Model
from vixml_jax.parallel import sharding
from vixml_jax.parallel.distributed import Group
from vixml_jax.structs import LabelState, Shard, TrainState
from vixml_jax.training.clustering.balanced import balanced_clusters, numbered_by_first_row


def abstract_state(
    model: Model,
    trained: Any,
    frozen: Any,
    optimizer: optax.GradientTransformation,
    num_queries: int,
) -> TrainState:
    """Shape, dtype and sharding of each array of a state.

    Args:
      model: Its mesh and label table are used.
      trained: Abstract trained parameters with logical axes, from `Model.abstract_params`.
      frozen: Abstract parameters that are not trained.
      optimizer: Its state is part of the result.
      num_queries: Number of training queries.
    """
    mesh, replicated = model.mesh, sharding.replicated(model.mesh)
    params = sharding.stored_tree(trained, mesh)
    opt_state = jax.eval_shape(optimizer.init, params)

    def is_masked(x: Any) -> bool:
        """Whether another optimizer updates the parameter; see `optimizer.with_head`."""
        return isinstance(x, optax.MaskedNode)

    opt_shardings = optax.tree.map_params(
        optimizer,
        lambda moment, like: moment if is_masked(moment) else like.sharding,
        opt_state,
        params,
        transform_non_params=lambda _: replicated,
        is_leaf=is_masked,
    )
    return TrainState(
        step=jax.ShapeDtypeStruct((), np.int32, sharding=replicated),
        params=params,
        frozen=sharding.stored_tree(frozen, mesh),
        opt_state=jax.tree.map(
            lambda x, placement: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement),
            opt_state,
            opt_shardings,
        ),
        **sharding.stored_tree(abstract_tables(model, num_queries), mesh),
    )


def abstract_tables(model: Model, num_queries: int) -> dict[str, Any]:
    """Logical shapes and axes of the arrays of a state with one row per label or per query."""
    bank = jax.ShapeDtypeStruct((num_queries, model.table.width), np.float32)
    return {"labels": model.table.abstract_state, "bank": sharding.boxed(bank, "ne")}


def place_state(
    like: TrainState,
    params: Any,
    frozen: Any,
    optimizer: optax.GradientTransformation,
    labels: LabelState,
    bank: jax.Array,
) -> TrainState:
    """The first state, each array on the devices of its sharding.

    Args:
      like: From `abstract_state`.
      params: Trained parameters, unboxed, on host or device.
      frozen: Parameters that are not trained.
      optimizer: Makes the initial optimizer state.
      labels: The label state.
      bank: Unit embeddings of the training queries, rows sharded over the mesh.
    """
    shardings = jax.tree.map(lambda x: x.sharding, like)
    params = jax.device_put(params, shardings.params)
    return TrainState(
        step=jax.device_put(np.int32(0), shardings.step),
        params=params,
        frozen=jax.device_put(frozen, shardings.frozen),
        opt_state=jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params),
        labels=jax.device_put(labels, shardings.labels),
        bank=jax.device_put(bank, shardings.bank),
    )


def empty_bank(model: Model, num_queries: int) -> jax.Array:
    """Zero rows for all training queries, sharded over the mesh."""
    rows = sharding.pad_rows(num_queries, model.mesh)
    zeros = functools.partial(jnp.zeros, (rows, model.table.width), jnp.float32)
    return jax.jit(zeros, out_shardings=sharding.rows_sharding(model.mesh))()


def mean_by_column(relevance: sparse.csr_matrix, shard: Shard, mesh: Mesh, group: Group) -> Shard:
    """The mean vector of the rows of each column (a label, or a free vector).

    Args:
      relevance: [rows, columns]; 1 where a row belongs to a column.
      shard: The unit vectors of the rows that this process holds.
      mesh: Rows and columns are both sharded over it.
      group: The processes of the mesh.

    Returns:
      The means of the columns that this process holds.
    """
    num_rows, num_columns = relevance.shape
    column_ids = [sharding.row_ids(num_columns, mesh, process) for process in range(group.count)]
    rows = without_replicas(shard, num_rows, mesh)
    means = exact_centroids(relevance, rows, column_ids, group=group)
    return Shard(column_ids[group.index], means)


def without_replicas(shard: Shard, num_rows: int, mesh: Mesh) -> Shard:
    """The rows of a shard that belong to this process, so that all processes have each row once.

    Several processes hold the same rows if a tensor axis spans them.
    """
    ids = sharding.row_ids(num_rows, mesh, owned=True)
    if len(ids) == len(shard.ids):
        return shard
    return Shard(ids, shard.values[np.isin(shard.ids, ids, assume_unique=True)])


def initial_head(
    model: Model, labels: Shard, relevance: sparse.csr_matrix, *, seed: int
) -> dict[str, Any]:
    """The parameters that the label head starts from, on the devices.

    Args:
      model: Its head and mesh are used.
      labels: The tower's unit vectors of the labels that this process holds.
      relevance: Relevance matrix of the training queries.
      seed: Seed of the network that the head reads queries through.
    """
    mesh, (num_queries, num_labels) = model.mesh, relevance.shape
    like = sharding.stored_tree(model.abstract_head, mesh)

    def init(key: jax.Array) -> Any:
        return sharding.pad(sharding.unboxed(model.head.init_params(key)), like)

    shardings = jax.tree.map(lambda x: x.sharding, like)
    params = jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
    frequency = np.bincount(relevance.indices, minlength=num_labels) / max(1, num_queries)
    own = Shard(labels.ids, frequency[labels.ids].astype(np.float32))
    vectors, frequency = (sharding.spread_rows(x, num_labels, mesh) for x in (labels, own))
    return jax.device_put(model.head.with_labels(params, vectors, frequency), shardings)


def initial_labels(
    model: Model,
    params: Any,
    dataset: PreparedDataset,
    *,
    labels: LabelsConfig,
    block: int,
    seed: int,
    group: Group,
    with_head: bool = False,
) -> tuple[Any, LabelState, jax.Array]:
    """The initial label -> free vector map, centroids, bank, and label head if there is one.

    The map clusters the embeddings of the labels under the initial weights (paper, section 3). If
    every label has its own free vector, nothing is clustered.

    Args:
      model: Tower, combiner and table.
      params: All initial parameters.
      dataset: Training queries and labels.
      labels: `num_free` and `free_init` are used.
      block: Items encoded at a time.
      seed: Seed of the clusters.
      group: The processes of the mesh.
      with_head: Whether steps train the label head.

    Returns:
      The parameters (with the head, and with new free vectors if `labels.free_init` is
      "embedding"), the label state, and the bank, sharded over the mesh.
    """
    mesh, num_queries = model.mesh, len(dataset.train)
    num_labels, num_free = model.table.num_labels, model.table.num_free
    cluster_of = np.arange(num_labels, dtype=np.int32) if num_free else np.zeros(num_labels, int)
    has_free = model.combiner is not None and num_free
    clusters_labels = has_free and (num_free < num_labels or labels.free_init == "embedding")
    if clusters_labels or with_head:
        vectors = model.encode_queries(
            params, dataset.labels, block=block, title="labels, before training"
        )
    if with_head:
        head = initial_head(model, vectors, dataset.train_relevance, seed=seed)
        params = {**params, "head": head}
    if clusters_labels:
        if num_free < num_labels:
            rows = without_replicas(vectors, num_labels, mesh)
            clusters = balanced_clusters(rows, num_labels, num_free, seed=seed, group=group)
            cluster_of = numbered_by_first_row(clusters)
        if labels.free_init == "embedding":
            membership = sparse.csr_matrix(
                (np.ones(num_labels, np.float32), cluster_of, np.arange(num_labels + 1)),
                shape=(num_labels, num_free),
            )
            free = mean_by_column(membership, vectors, mesh, group)
            params = {**params, "free": sharding.spread_rows(free, num_free, mesh)}
    queries = model.encode_queries(
        params, dataset.train, block=block, title="training queries, before training"
    )
    state = model.table.init_state(cluster_of)
    if model.uses_centroids:
        means = mean_by_column(dataset.train_relevance, queries, mesh, group)
        state = model.table.with_centroids(state, means)
    return params, state, sharding.spread_rows(queries, num_queries, mesh)
