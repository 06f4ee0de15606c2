"""A training step on a tower with random weights, as `train` builds it, without a run directory."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh

from vixml_jax import frozen_weights, workdir
from vixml_jax.config import Config
from vixml_jax.data.packing import Layout
from vixml_jax.modeling import Model
from vixml_jax.models.tower import TowerConfig
from vixml_jax.parallel import sharding
from vixml_jax.structs import TrainState
from vixml_jax.training import losses, optimizer
from vixml_jax.training import train_state as state_lib
from vixml_jax.training import train_step as train_step_lib


class Parts(NamedTuple):
    """What a step consists of, before any array is allocated.

    Attributes:
      model: Tower, combiner and label table.
      optimizer: Updates all trained parameters.
      like: Shapes, dtypes and shardings of the state.
      step: The step, not yet compiled.
    """

    model: Model
    optimizer: optax.GradientTransformation
    like: TrainState
    step: train_step_lib.TrainStep


def build(
    config: Config,
    tower: TowerConfig,
    layout: Layout,
    *,
    num_queries: int,
    num_labels: int,
    mesh: Mesh,
    tx: optax.GradientTransformation | None = None,
) -> Parts:
    """The parts of a training step.

    Args:
      config: Flags of the labels, the batch, the loss and the optimizer.
      tower: Sizes of the tower; its frozen weights are stored in its dtype.
      layout: Layout of items.
      num_queries: Training queries.
      num_labels: Labels.
      mesh: Devices of the step.
      tx: The optimizer; None: the one of `config`.
    """
    model = workdir.build_model(config, tower, layout, num_labels, mesh)
    if tx is None:
        tx = optimizer.make_optimizer(total_steps=10**6, **dataclasses.asdict(config.optimizer))
    trained, frozen = frozen_weights.split(model.abstract_params, tower)
    frozen = frozen_weights.as_stored(frozen, tower.dtype)
    like = state_lib.abstract_state(model, trained, frozen, tx, num_queries)
    loss_fn = functools.partial(losses.total_loss, **dataclasses.asdict(config.loss))
    return Parts(model, tx, like, train_step_lib.make_train_step(model, loss_fn, tx, like))


def fresh_state(parts: Parts, key: jax.Array) -> TrainState:
    """A state of random parameters and zero centroids; labels take the free vectors in turn."""
    model, tower = parts.model, parts.model.tower.config

    def fresh(key: jax.Array) -> Any:
        params, frozen = frozen_weights.split(nn.unbox(model.init_params(key)), tower)
        frozen = jax.tree.map(lambda x: x.astype(jnp.dtype(tower.dtype)), frozen)
        return sharding.pad((params, frozen), (parts.like.params, parts.like.frozen))

    clusters = np.arange(model.table.num_labels, dtype=np.int32) % max(1, model.table.num_free)
    return state_lib.place_state(
        parts.like,
        *jax.jit(fresh)(key),
        parts.optimizer,
        model.table.init_state(clusters),
        state_lib.empty_bank(model, parts.like.bank.shape[0]),
    )
