"""The state of a run before its first step: shapes, places, and what labels start from."""

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
from vixml_jax.structs import LabelState, Share, TrainState
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
      model: Where to.
      trained: Abstract parameters with their logical axes (of `Model.abstract_params`).
      frozen: Those that are not trained, alike.
      optimizer: Whose state it holds.
      num_queries: Training queries.
    """
    mesh, whole = model.mesh, sharding.replicated(model.mesh)
    params = sharding.stored_tree(trained, mesh)
    opt_state = jax.eval_shape(optimizer.init, params)
    opt_places = optax.tree.map_params(
        optimizer,
        lambda _, like: like.sharding,
        opt_state,
        params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(
        step=jax.ShapeDtypeStruct((), np.int32, sharding=whole),
        params=params,
        frozen=sharding.stored_tree(frozen, mesh),
        opt_state=jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            opt_state,
            opt_places,
        ),
        **sharding.stored_tree(abstract_tables(model, num_queries), mesh),
    )


def abstract_tables(model: Model, num_queries: int) -> dict[str, Any]:
    """Logical shapes and axes of what a state holds a row a label, or a row a query, of."""
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
    """The first state, each array where it will stay.

    Args:
      like: From `abstract_state`.
      params: The parameters that are trained, unboxed, on host or device.
      frozen: Those that are not.
      optimizer: Whose state to make.
      labels: The label state.
      bank: Unit embeddings of the training queries, spread over the mesh.
    """
    places = jax.tree.map(lambda x: x.sharding, like)
    params = jax.device_put(params, places.params)
    return TrainState(
        step=jax.device_put(np.int32(0), places.step),
        params=params,
        frozen=jax.device_put(frozen, places.frozen),
        opt_state=jax.jit(optimizer.init, out_shardings=places.opt_state)(params),
        labels=jax.device_put(labels, places.labels),
        bank=jax.device_put(bank, places.bank),
    )


def empty_bank(model: Model, num_queries: int) -> jax.Array:
    """Zero rows for all training queries, spread over the mesh."""
    rows = sharding.pad_rows(num_queries, model.mesh)
    zeros = functools.partial(jnp.zeros, (rows, model.table.width), jnp.float32)
    return jax.jit(zeros, out_shardings=sharding.rows_sharding(model.mesh))()


def mean_by_column(relevance: sparse.csr_matrix, share: Share, mesh: Mesh, group: Group) -> Share:
    """Of each column (a label, or a free vector) the mean of the unit vectors of its rows: those
    that this process holds of an array spread over the mesh.

    Args:
      relevance: [rows, columns] of ones.
      share: The vectors that this process holds.
      mesh: Over which both are spread.
      group: The processes of the mesh.
    """
    num_rows, num_columns = relevance.shape
    wanted = [sharding.row_ids(num_columns, mesh, process) for process in range(group.count)]
    means = exact_centroids(relevance, keep(share, num_rows, mesh), wanted, group=group)
    return Share(wanted[group.index], means)


def keep(share: Share, num_rows: int, mesh: Mesh) -> Share:
    """Of the rows that this process holds, those that it keeps: together each row once."""
    kept = sharding.row_ids(num_rows, mesh, kept=True)
    if len(kept) == len(share.ids):
        return share
    return Share(kept, share.values[np.isin(share.ids, kept, assume_unique=True)])


def initial_labels(
    model: Model,
    params: Any,
    dataset: PreparedDataset,
    *,
    labels: LabelsConfig,
    block: int,
    seed: int,
    group: Group,
) -> tuple[Any, LabelState, jax.Array]:
    """What training starts from: the label -> free vector map, centroids, the bank.

    The map clusters the labels' embeddings under the starting weights (paper, section 3); where
    every label has a free vector of its own there is nothing to cluster.

    Returns:
      The parameters (free vectors set where `labels.free_init` says so), the label state, and the
      bank, spread over the mesh.
    """
    mesh, num_queries = model.mesh, len(dataset.train)
    num_labels, num_free = model.table.num_labels, model.table.num_free
    cluster_of = np.arange(num_labels, dtype=np.int32)
    if model.combiner is not None and (num_free < num_labels or labels.free_init == "embedding"):
        vectors = model.encode_queries(
            params, dataset.labels, block=block, title="labels, before training"
        )
        if num_free < num_labels:
            kept = keep(vectors, num_labels, mesh)
            found = balanced_clusters(kept, num_labels, num_free, seed=seed, group=group)
            cluster_of = numbered_by_first_row(found)
        if labels.free_init == "embedding":
            shared = (np.ones(num_labels, np.float32), cluster_of, np.arange(num_labels + 1))
            shared = sparse.csr_matrix(shared, shape=(num_labels, num_free))
            free = mean_by_column(shared, vectors, mesh, group)
            params = {**params, "free": sharding.spread_rows(free, num_free, mesh)}
    queries = model.encode_queries(
        params, dataset.train, block=block, title="training queries, before training"
    )
    state = model.table.init_state(cluster_of)
    if model.combiner is not None:
        means = mean_by_column(dataset.train_relevance, queries, mesh, group)
        state = model.table.with_centroids(state, means)
    return params, state, sharding.spread_rows(queries, num_queries, mesh)
