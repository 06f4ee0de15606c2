"""The training steps: of the whole model on a batch, and of the label head on cached vectors."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vixml_jax.labels import head_update, table
from vixml_jax.labels.head import LabelHead, Selection, is_row
from vixml_jax.modeling import Model
from vixml_jax.models.layers import unit
from vixml_jax.parallel import sharding
from vixml_jax.runtime import tree_utils
from vixml_jax.structs import Batch, HeadBatch, LabelState, TrainState

# (queries, labels, prototypes, positives, label_ids, row_mask, column_mask, key, mesh=) -> loss,
# scalars
LossFn = Callable[..., tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


class TrainStep:
    """A training step, compiled once per batch shape: (state, batch, key) -> (state, scalars).

    The state is donated and keeps its shardings; scalars are float32.

    Args:
      jitted: The jitted step.
      like: The state's shapes, dtypes and shardings.
    """

    def __init__(self, jitted: Any, like: TrainState):
        self._jitted, self._like = jitted, like
        self._programs: dict[tuple[Any, ...], jax.stages.Compiled] = {}

    def program(self, batch: Batch | HeadBatch, key: Array) -> jax.stages.Compiled:
        """The program for batches of this shape, compiled at the first call with that shape."""
        shapes = tuple(x.shape for x in jax.tree.leaves(batch))
        if shapes not in self._programs:
            self._programs[shapes] = self.traced(batch, key).lower().compile()
        return self._programs[shapes]

    def traced(self, batch: Batch | HeadBatch, key: Array) -> jax.stages.Traced:
        """The program for batches of this shape, traced but neither lowered nor compiled."""
        return self._jitted.trace(self._like, batch, key)

    def __call__(
        self, state: TrainState, batch: Batch | HeadBatch, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        return self.program(batch, key)(state, batch, key)


def make_train_step(
    model: Model,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    like: TrainState,
    *,
    centroid_momentum: float | None = None,
    sparse_free: bool = False,
    head_weight: float = 0.0,
) -> TrainStep:
    """Makes the training step of a model with a loss and an optimizer.

    Args:
      model: Tower, combiner and table.
      loss_fn: `losses.total_loss` with its settings bound.
      optimizer: Updates all of `state.params`; `state.frozen` is never changed.
      like: Shapes, dtypes and shardings of the state. The output shardings are pinned to them, so
        that the next call needs no new compilation.
      centroid_momentum: Weight of the old centroid in each update of a moving centroid (0.95);
        None: the step does not change centroids.
      sparse_free: True: the optimizer updates only those free vectors and moments that labels of
        the batch use, as `torch.optim.SparseAdam` does. False: all of them move by their momentum,
        as published.
      head_weight: Weight of the loss of the label head on the queries of the batch, all of whose
        labels are in `batch.positives`; 0: the step does not train the head.
    """
    sparse_free &= "free" in like.params
    head = model.head if head_weight else None

    def step(state: TrainState, batch: Batch, key: Array) -> tuple[TrainState, dict[str, Array]]:
        tower_key, combiner_key, loss_key = jax.random.split(jax.random.fold_in(key, state.step), 3)
        params, opt_state = state.params, state.opt_state
        if sparse_free:
            free_ids, free_index = model.table.distinct_free(state.labels, batch.label_ids)
            gather = functools.partial(table.gather_rows, model.mesh, ids=free_ids)
            params, opt_state = (_map_rows(_is_free, gather, x) for x in (params, opt_state))
        selection = head and head.select(batch.positives, _head_key(key, state.step))
        if selection is not None:
            params, opt_state = (_take(head, selection, x) for x in (params, opt_state))

        def objective(trained: Any) -> tuple[Array, tuple[dict[str, Array], Array]]:
            params = tree_utils.merge(trained, state.frozen)
            num_queries, num_labels = batch.query_ids.shape[0], batch.label_ids.shape[0]
            vectors = model.tower_vectors(
                params, batch.items, num_queries + num_labels, sides=2, dropout=tower_key
            )
            queries = unit(vectors[:num_queries])
            labels = vectors[num_queries:]
            prototypes = None
            if model.combiner is not None:
                prototypes = model.prototypes(
                    params,
                    state.labels,
                    labels,
                    batch.label_ids,
                    free=params["free"][free_index] if sparse_free else None,
                    dropout=combiner_key,
                )
            loss, scalars = loss_fn(
                queries,
                unit(labels),
                prototypes,
                batch.positives,
                batch.label_ids,
                batch.query_ids >= 0,
                batch.label_ids >= 0,
                loss_key,
                mesh=model.mesh,
            )
            if head is not None:
                scalars["loss_head"] = head.loss_of(
                    params["head"],
                    queries,
                    batch.positives,
                    batch.query_ids >= 0,
                    selection,
                    batch.tokens,
                )
                loss += head_weight * scalars["loss_head"]
            return loss, (scalars, queries)

        (loss, (scalars, queries)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        if sparse_free:
            scatter = functools.partial(table.scatter_rows, model.mesh, ids=free_ids)
            params = _map_rows(_is_free, scatter, state.params, params)
            opt_state = _map_rows(_is_free, scatter, state.opt_state, opt_state)
        if selection is not None:
            params = _put(head, selection, state.params, params)
            opt_state = _put(head, selection, state.opt_state, opt_state)
        labels = state.labels
        if centroid_momentum is not None:
            labels = move_centroids(
                model.table, labels, batch.label_ids, queries, centroid_momentum
            )
        scalars |= {
            "loss": loss,
            "gradient_norm": optax.tree.norm(gradient),
            "query_similarity": mean_similarity(queries, batch.query_ids >= 0),
        }
        return (
            TrainState(
                step=state.step + 1,
                params=params,
                frozen=state.frozen,
                opt_state=opt_state,
                labels=labels,
                bank=table.scatter_rows(model.mesh, state.bank, batch.query_ids, queries),
            ),
            scalars,
        )

    return _compiled_on_demand(step, like, model)


def make_head_step(
    model: Model, optimizer: optax.GradientTransformation, like: TrainState
) -> TrainStep:
    """Makes the step of the head epochs: the loss of the head on queries whose vectors are cached.

    Args:
      model: A model with a label head.
      optimizer: Updates {"head": parameters}.
      like: Shapes, dtypes and shardings of the state, whose only parameters are those of the head.
        `bank` holds the vectors of the training queries and is not changed.
    """
    head = model.head

    def step(
        state: TrainState, batch: HeadBatch, key: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        queries = table.gather_rows(head.mesh, state.bank, batch.query_ids)
        params, opt_state = state.params, state.opt_state
        selection = head.select(batch.positives, _head_key(key, state.step))
        if selection is not None:
            params, opt_state = (_take(head, selection, x) for x in (params, opt_state))

        params, opt_state, scalars = head_update.update(
            head,
            params,
            opt_state,
            queries,
            batch.positives,
            batch.query_ids >= 0,
            optimizer,
            selection,
            batch.tokens,
        )
        if selection is not None:
            params = _put(head, selection, state.params, params)
            opt_state = _put(head, selection, state.opt_state, opt_state)
        state = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
        return state, scalars

    return _compiled_on_demand(step, like, model)


def _compiled_on_demand(step: Callable[..., Any], like: TrainState, model: Model) -> TrainStep:
    def with_precision(state: TrainState, batch: Any, key: Array) -> Any:
        with model.precision():  # Also for gradients with rules of their own, traced at the end.
            return step(state, batch, key)

    shardings = jax.tree.map(lambda x: x.sharding, like)
    scalars = sharding.replicated(like.step.sharding.mesh)
    return TrainStep(
        jax.jit(with_precision, donate_argnums=0, out_shardings=(shardings, scalars)), like
    )


def _head_key(key: Array, step: Array) -> Array:
    """Key of the labels that a step draws for the head, apart from the other keys of the step."""
    return jax.random.fold_in(jax.random.fold_in(key, step), 1)


def mean_similarity(vectors: Float[Array, "b e"], mask: Array) -> Float[Array, ""]:
    """Mean cosine of two different vectors, near 1 if the tower has collapsed.

    It follows from the length of the sum: |sum of x|^2 is the sum of all inner products, of which
    each vector has one with itself.

    Args:
      vectors: Unit vectors.
      mask: True for those that count.
    """
    count = jnp.sum(mask).astype(jnp.float32)
    total = jnp.sum(jnp.where(mask[:, None], vectors, 0.0), axis=0)
    return (jnp.sum(total**2) - count) / jnp.maximum(count * (count - 1.0), 1.0)


def _is_free(path: tuple[Any, ...]) -> bool:
    return any(getattr(key, "key", None) == "free" for key in path)


def _take(head: LabelHead, selection: Selection, tree: Any) -> Any:
    """A tree with the selected rows of the head alone."""
    return _map_rows(is_row, lambda rows: head.take(rows, selection), tree)


def _put(head: LabelHead, selection: Selection, tree: Any, updated: Any) -> Any:
    """The whole tree, with all that `updated` has: the selected rows, and other leaves."""
    return _map_rows(is_row, lambda rows, values: head.put(rows, selection, values), tree, updated)


def _map_rows(
    chosen: Callable[[tuple[Any, ...]], bool],
    fn: Callable[..., Array],
    tree: Any,
    updated: Any = None,
) -> Any:
    """Applies a function to the chosen leaves of a tree: rows of parameters, and their moments.

    Args:
      chosen: Whether the leaf with this path is chosen.
      fn: (rows=leaf of `tree`) -> leaf; with `updated`, (rows=leaf of `tree`, values=leaf of
        `updated`) -> leaf.
      tree: Parameters or optimizer state, with all rows.
      updated: A tree of the same structure, from which all other leaves are taken; None: they are
        taken from `tree`.
    """

    def map_leaf(path: tuple[Any, ...], leaf: Array, other: Array) -> Array:
        if not chosen(path):
            return other
        return fn(rows=leaf) if updated is None else fn(rows=leaf, values=other)

    return jax.tree_util.tree_map_with_path(map_leaf, tree, tree if updated is None else updated)


def move_centroids(
    label_table: table.LabelTable,
    labels: LabelState,
    label_ids: Int[Array, " c"],
    queries: Float[Array, "b e"],
    momentum: float,
) -> LabelState:
    """Moves the centroid of each label of the batch towards the mean of its queries in the batch.

    Candidate j was drawn for query j (paper, section 3, moving average). A label drawn for several
    queries moves once, towards their mean, so the order in the batch does not matter.

    Args:
      label_table: The table that the centroids belong to.
      labels: The label state.
      label_ids: Label j was drawn for query j; -1 is padding.
      queries: Unit vectors of the queries.
      momentum: Weight of the old centroid.
    """
    same = (label_ids[:, None] == label_ids[None, :]).astype(jnp.float32)
    mean = jnp.einsum("cb,be->ce", same, queries) / jnp.sum(same, axis=1, keepdims=True)
    old = table.gather_rows(label_table.mesh, labels.centroids, label_ids)
    moved = momentum * old + (1.0 - momentum) * mean
    return labels._replace(
        centroids=table.scatter_rows(label_table.mesh, labels.centroids, label_ids, moved)
    )
