"""The state from which training starts: new, restored, or the best model so far."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Int

from vixml_jax import frozen_weights, saved_model
from vixml_jax.config import Config
from vixml_jax.data.store import PreparedDataset
from vixml_jax.modeling import Model
from vixml_jax.parallel import sharding
from vixml_jax.parallel.distributed import Group
from vixml_jax.storage.vector_store import VectorStore
from vixml_jax.structs import Shard, TrainState
from vixml_jax.training import build
from vixml_jax.training import train_state as state_lib
from vixml_jax.training.checkpoints import Checkpoints
from vixml_jax.training.epoch_loop import Position


def first_state(
    config: Config,
    parts: build.Parts,
    dataset: PreparedDataset,
    checkpoints: Checkpoints,
    in_head: bool,
    group: Group,
) -> tuple[TrainState, Int[np.ndarray, " n"], Position]:
    """Returns the state, the clusters (-1: none yet) and the position to begin with.

    Args:
      config: Flags of the run.
      parts: Its model and abstract state.
      dataset: Its prepared data.
      checkpoints: The newest of them is restored, if there is one.
      in_head: Whether a restored state is one of the head epochs.
      group: The processes of the mesh.
    """
    model, resumes = parts.model, checkpoints.latest_step() is not None
    params = build.initial_params(config, model, dataset)
    labels = bank = None
    if not resumes and not config.head.only:
        params, labels, bank = state_lib.initial_labels(
            model,
            params,
            dataset,
            labels=config.labels,
            block=config.eval.block,
            seed=config.seed,
            group=group,
            with_head=config.head.weight > 0,
        )
    params, frozen = frozen_weights.split(params, model.tower.config, head_only=config.head.only)
    frozen_weights.save(config.workdir, frozen)
    clusters = np.full(len(dataset.train), -1, np.int32)
    if resumes:
        del params
        like = parts.head.like if in_head else parts.like
        state, clusters, position = checkpoints.restore(like._replace(frozen=frozen), clusters)
        return state, clusters, Position(**position)  # Checked when the run was opened.
    position = Position(0, None, config.batch.cluster_size, False)
    if config.head.only:  # What is missing, `HeadTrainer` makes.
        step = jax.device_put(np.int32(0), parts.like.step.sharding)
        labels = model.table.init_state(np.zeros(dataset.num_labels, np.int32))
        return TrainState(step, {}, frozen, None, labels, None), clusters, position
    state = state_lib.place_state(parts.like, params, frozen, parts.optimizer, labels, bank)
    return state, clusters, position


def best_state(
    config: Config,
    model: Model,
    step: Array,
    position: Position,
    store: Callable[[int], VectorStore] | None,
) -> tuple[TrainState, Position]:
    """Returns the state with the best model of a run, from which its head is to be refitted.

    Args:
      config: Flags of the run.
      model: Its model.
      step: Number of steps done so far.
      position: Position of the run.
      store: Returns where the vectors of a step are kept; None: they are not kept.
    """
    params, labels, _ = saved_model.restore(config.workdir, model)
    trained, frozen = frozen_weights.split(params, model.tower.config)
    vectors, bank = store and store(position.best_step).get("train"), None
    if vectors is not None:
        rows = Shard(np.arange(len(vectors)), vectors)
        bank = sharding.spread_rows(rows, len(vectors), model.mesh)
    state = TrainState(step, trained, frozen, None, labels, bank)
    return state, dataclasses.replace(position, encoded=bank is not None)
