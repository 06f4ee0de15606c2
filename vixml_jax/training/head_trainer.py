"""Epochs that train the label head alone, on the cached vectors of the training queries."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from vixml_jax.config import HeadConfig, LoopConfig
from vixml_jax.data import input_pipeline, sampling
from vixml_jax.data.store import PreparedDataset
from vixml_jax.modeling import Model
from vixml_jax.parallel import distributed, sharding
from vixml_jax.runtime import tree_utils
from vixml_jax.storage.vector_store import VectorStore
from vixml_jax.structs import HeadBatch, TrainState
from vixml_jax.training import optimizer as optimizer_lib
from vixml_jax.training import preemption
from vixml_jax.training import train_state as state_lib
from vixml_jax.training.checkpoints import Checkpoints
from vixml_jax.training.epoch_loop import EpochLoop, Position, shards_to_read
from vixml_jax.training.flops import head_flops
from vixml_jax.training.memory_planner import MemoryPlan, plan_memory
from vixml_jax.training.metric_logger import MetricLogger, Stage
from vixml_jax.training.train_step import TrainStep


def own_state(state: TrainState) -> TrainState:
    """The part of a state that a step of the head reads and writes."""
    return state._replace(params={"head": state.params["head"]}, frozen={}, labels=None)


def learning_rate(head: HeadConfig, total_steps: int) -> optax.Schedule:
    """Returns the learning rate of the head in each step: from its peak linearly to 0."""
    return optimizer_lib.schedule(head.learning_rate, warmup_steps=0, total_steps=total_steps)


class HeadTrainer(EpochLoop):
    """Trains the label head on a tower that stays as it is; `run` is called once.

    Args:
      model: Tower, label table and head.
      dataset: Prepared data; the training split is used.
      train_step: From `make_head_step`.
      optimizer: The optimizer of the step.
      like: Shapes, dtypes and shardings of the whole state.
      head, loop: Groups of flags.
      first_epoch: Number of the first head epoch: that of the epochs of the whole model.
      block: Items encoded at a time.
      seed: Seed of the order and of the initial head.
      shards: Number of shards of a batch; a multiple of the row shards of the mesh.
      checkpoints: Where states are saved.
      stop: Tells whether a signal requested the run to stop.
      vectors: Returns where the vectors of a step are kept; None: they are not kept.
    """

    _REMEDY = "a lower --head.learning_rate"

    def __init__(
        self,
        model: Model,
        dataset: PreparedDataset,
        train_step: TrainStep,
        optimizer: optax.GradientTransformation,
        like: TrainState,
        *,
        head: HeadConfig,
        loop: LoopConfig,
        first_epoch: int,
        block: int,
        seed: int,
        shards: int,
        checkpoints: Checkpoints,
        stop: preemption.StopSignal,
        vectors: Callable[[int], VectorStore] | None = None,
    ):
        self.num_queries = len(dataset.train)
        self.steps_per_epoch = math.ceil(self.num_queries / head.batch_size)
        steps = head.epochs * self.steps_per_epoch
        super().__init__(
            model.mesh,
            train_step,
            Stage("head epoch", first_epoch, head.epochs, 0, steps),
            loop=loop,
            seed=seed,
            checkpoints=checkpoints,
            stop=stop,
        )
        self.model, self.dataset, self.optimizer = model, dataset, optimizer
        self.like, self.head, self.block, self.vectors = like, head, block, vectors
        self._rest = like  # What the steps do not change.
        read = shards_to_read(model.mesh, shards)
        counts = np.diff(dataset.train_relevance.indptr)
        self._sharding = {
            "shards": shards,
            "read": read,
            "positives": sampling.usual_positives(counts, head.batch_size, shards),
        }
        self._shards_per_read = shards / len(read)

    def plan(self) -> MemoryPlan:
        """Returns the memory that the head epochs need, from the step for their first batch."""
        first = next(self._batches(None, Position(self.stage.first_epoch, None, 0, False)))
        batch = sharding.to_devices(first, self.mesh)
        return plan_memory(
            self.like, lambda: self.train_step.program(batch, self._key), own_state(self.like)
        )

    def run(
        self, state: TrainState, position: Position, logger: MetricLogger
    ) -> tuple[TrainState, Position]:
        """Trains the head until its last epoch; states are saved when due and at the end.

        Args:
          state: The state after the epochs of the whole model, or one that this class saved.
          position: The position of the state.
          logger: Shows the progress.

        Returns:
          The last state and position.

        Raises:
          Preempted, NotFiniteError, InputError: As `Trainer.run`.
        """
        clusters = np.full(self.num_queries, -1, np.int32)  # No clusters are needed any more.
        with self.stop.deferred():
            is_new = position.head_from is None
            if is_new:
                with self.stop.interruptible():
                    state = self._first_state(state, position)
                position = dataclasses.replace(
                    position,
                    epoch=self.stage.first_epoch,
                    batches=None,
                    encoded=True,
                    head_from=int(state.step),
                )
            self.stage = self.stage._replace(first_step=position.head_from)
            self._rest = state._replace(
                params={name: x for name, x in state.params.items() if name != "head"},
                opt_state=None,
                bank=None,
            )
            state = own_state(state)
            if is_new:
                self._save(state, clusters, position)
            rate = learning_rate(self.head, self.stage.steps)
            logger.begin(self.stage, {"head": np.asarray(rate(np.arange(self.stage.steps)))})
            end = self.stage.first_epoch + self.head.epochs
            while position.epoch < end:
                state, _ = self._run_batches(state, clusters, position, logger)
                position = dataclasses.replace(
                    position, epoch=position.epoch + 1, batches=None, unreported=[]
                )
                is_last = position.epoch == end
                if not is_last:
                    self._opened = position, self._open(clusters, position)
                due = self.checkpoints.due(int(state.step))
                if is_last or distributed.broadcast_from_first(due):
                    self._save(state, clusters, position)
            self.checkpoints.wait()
        return self._whole(state), position

    def _first_state(self, state: TrainState, position: Position) -> TrainState:
        """Returns the state before the first step: vectors in the bank, a head, no moments."""
        params = tree_utils.merge(state.params, state.frozen)
        store = self.vectors and self.vectors(int(state.step))
        bank = state.bank
        if not position.encoded:
            queries = self.model.encode_queries(
                params, self.dataset.train, block=self.block, title="training queries"
            )
            bank = sharding.spread_rows(queries, self.num_queries, self.mesh)
        if store and store.get("train") is None:
            store.put("train", sharding.shard_of(bank, self.num_queries, self.mesh).values)
        head = state.params.get("head")
        if head is None:
            labels, prototypes = self.model.encode_labels_both_ways(
                params, state.labels, self.dataset.labels, block=self.block, title="labels"
            )
            if store:
                store.put("labels", prototypes.values)
            head = state_lib.initial_head(
                self.model, labels, self.dataset.train_relevance, seed=self.seed
            )
        shardings = jax.tree.map(lambda x: x.sharding, self.like.opt_state)
        return state._replace(
            params={**state.params, "head": head},
            opt_state=jax.jit(self.optimizer.init, out_shardings=shardings)({"head": head}),
            bank=bank,
        )

    def _whole(self, state: TrainState) -> TrainState:
        return self._rest._replace(
            step=state.step,
            params={**self._rest.params, **state.params},
            opt_state=state.opt_state,
            bank=state.bank,
        )

    def _batches(self, clusters: Any, position: Position) -> Any:
        del clusters
        rng = np.random.default_rng((self.seed, position.epoch))
        return input_pipeline.head_batches(
            self.dataset.train_relevance,
            sampling.shuffled_order(self.num_queries, rng),
            batch_size=self.head.batch_size,
            read_words=self.model.reader_of_words(self.dataset.train.tokens),
            **self._sharding,
        )

    def _work(self, batch: HeadBatch) -> dict[str, Any]:
        queries, labels = (
            int(np.count_nonzero(x >= 0) * self._shards_per_read)
            for x in (batch.query_ids, batch.positives.labels)
        )
        flops = head_flops(self.model.head, queries, labels, frozen_queries=True).step
        return {"queries": queries, "labels": labels, "tokens": 0, "flops": flops}
