"""The training loop: per epoch its batches, then clustering, centroids, evaluation, saving."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from vixml_jax.config import BatchConfig, LabelsConfig, LoopConfig
from vixml_jax.data import input_pipeline, propensity, sampling
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import Preempted
from vixml_jax.modeling import Model
from vixml_jax.parallel import sharding
from vixml_jax.parallel.distributed import Group
from vixml_jax.runtime import tree_utils
from vixml_jax.storage.vector_store import VectorStore
from vixml_jax.structs import Batch, LabelState, TrainState
from vixml_jax.training import preemption
from vixml_jax.training import train_state as state_lib
from vixml_jax.training.checkpoints import Checkpoints
from vixml_jax.training.clustering.balanced import balanced_clusters, numbered_by_first_row
from vixml_jax.training.epoch_loop import EpochLoop, Position, shards_to_read
from vixml_jax.training.flops import step_flops
from vixml_jax.training.memory_planner import MemoryPlan, plan_memory
from vixml_jax.training.metric_logger import CollapseGuard, MetricLogger, Stage
from vixml_jax.training.train_step import TrainStep


class Trainer(EpochLoop):
    """Runs the epochs of a training run from any position; `run` is called once.

    Args:
      model: Tower, combiner and label table.
      dataset: Prepared data; the training split is used.
      train_step: From `make_train_step`.
      batch, labels, loop: Groups of flags.
      block: Items encoded at a time.
      seed: Seed of the order, the positives, dropout and clustering.
      shards: Number of shards that batches are packed in; a multiple of the row shards of the mesh.
      group: The processes of the mesh.
      checkpoints: Where states are saved.
      guard: Detects collapse.
      evaluate: (params, labels) -> metrics; called after epochs as `loop.eval_every` sets.
      split: The split that `evaluate` uses. Unless it is 'test', names of logged metrics start
        with it.
      stop: Tells whether a signal requested the run to stop.
      joint: Whether steps train the label head; batches then hold all labels of their queries.
      widths: Widths of vectors beside the full one that the loss compares.
      later_steps: Steps of head epochs that follow.
      vectors: Returns where the vectors of a step are kept; None: they are not kept.
    """

    def __init__(
        self,
        model: Model,
        dataset: PreparedDataset,
        train_step: TrainStep,
        *,
        batch: BatchConfig,
        labels: LabelsConfig,
        loop: LoopConfig,
        block: int,
        seed: int,
        shards: int,
        group: Group,
        checkpoints: Checkpoints,
        guard: CollapseGuard,
        evaluate: Callable[[Any, LabelState], Mapping[str, float]],
        split: str = "test",
        stop: preemption.StopSignal,
        joint: bool = False,
        widths: Sequence[int] = (),
        later_steps: int = 0,
        vectors: Callable[[int], VectorStore] | None = None,
    ):
        self.num_queries = len(dataset.train)
        self.steps_per_epoch = math.ceil(self.num_queries / batch.size)
        steps = loop.epochs * self.steps_per_epoch
        super().__init__(
            model.mesh,
            train_step,
            Stage("epoch", 0, loop.epochs, 0, steps, later_steps),
            loop=loop,
            seed=seed,
            checkpoints=checkpoints,
            stop=stop,
        )
        self.model, self.dataset, self.batch, self.labels = model, dataset, batch, labels
        self.block, self.group, self.guard = block, group, guard
        self.evaluate, self.split, self.vectors = evaluate, split, vectors
        self._head, self._widths = model.head if joint else None, widths
        self._weights = None
        if batch.positives == "inverse_propensity":
            counts = np.bincount(dataset.train_relevance.indices, minlength=dataset.num_labels)
            self._weights = propensity.inverse_propensity(
                counts, self.num_queries, dataset.propensity_a, dataset.propensity_b
            )
        self._packing = {
            "width": model.row_width,
            "layout": model.layout,
            "image_dropout": batch.image_dropout,
            "shards": shards,
            "read": shards_to_read(model.mesh, shards),
            "all_positives": joint,
            "read_words": model.reader_of_words(dataset.train.tokens) if joint else None,
            "rows": model.row_sizes(
                model.mean_length(dataset.train) + model.mean_length(dataset.labels),
                batch.size,
                shards,
            ),
        }
        # Shards of a batch per shard that this process reads.
        self._shards_per_read = shards / len(self._packing["read"])

    @property
    def batch_rows(self) -> int:
        """Packed rows of a typical batch, over all devices."""
        return self._packing["shards"] * self._packing["rows"].least

    def start(self) -> tuple[Int[np.ndarray, " n"], Position]:
        """Returns the clusters (-1: none yet) and the position of a new run."""
        return (
            np.full(self.num_queries, -1, np.int32),
            Position(0, None, self.batch.cluster_size, False),
        )

    def plan(self, like: TrainState) -> MemoryPlan:
        """Returns the memory that the run needs, from the compiled step for its first batch."""
        batch = sharding.to_devices(next(self._batches(*self.start())), self.mesh)
        return plan_memory(like, lambda: self.train_step.program(batch, self._key))

    def run(
        self,
        state: TrainState,
        clusters: Int[np.ndarray, " n"],
        position: Position,
        logger: MetricLogger,
    ) -> tuple[TrainState, Position]:
        """Trains until the last epoch or until patience ends; every epoch ends with a checkpoint.

        Returns:
          The last state and position.

        Raises:
          Preempted: If a signal arrived; all finished steps are saved.
          NotFiniteError: If a loss or a state is not finite; saved checkpoints are finite.
          InputError: If the disk is full; earlier checkpoints are kept.
        """
        with self.stop.deferred():
            while position.epoch < self.loop.epochs and not self.out_of_patience(position):
                state, done = self._run_batches(state, clusters, position, logger)
                position = dataclasses.replace(position, unreported=[])
                try:
                    ended = self._end_epoch(state, clusters, position, logger)
                except Preempted:  # A resumed run repeats the end of the epoch.
                    self._save_and_stop(state, clusters, done)
                state, clusters, position = ended
                if position.epoch < self.loop.epochs:
                    # Its first batches are prepared while the checkpoint is saved.
                    self._opened = position, self._open(clusters, position)
                self._save(state, clusters, position)
            self.checkpoints.wait()
            self.checkpoints.drop_best_but(position.best_step)
        return state, position

    def out_of_patience(self, position: Position) -> bool:
        """Returns whether `loop.patience` evaluations in a row were not better than the best."""
        return 0 < self.loop.patience <= position.waited

    def _order(self, clusters: np.ndarray, position: Position) -> np.ndarray:
        rng = np.random.default_rng((self.seed, position.epoch))
        if position.clustered:
            return sampling.clustered_order(clusters, rng)
        return sampling.shuffled_order(self.num_queries, rng)

    def _batches(self, clusters: np.ndarray, position: Position) -> Any:
        """Returns a Grain iterator over the batches of an epoch, at its start."""
        return input_pipeline.epoch_batches(
            self.dataset,
            self._order(clusters, position),
            epoch=position.epoch,
            seed=self.seed,
            batch_size=self.batch.size,
            weights=self._weights,
            num_threads=self.batch.threads,
            **self._packing,
        )

    def _work(self, batch: Batch) -> dict[str, Any]:
        """Returns the amount of work in a batch over all processes, without padding.

        Exact for one process; several processes assume that the others have as much as this one.
        """
        work = {
            "queries": np.count_nonzero(batch.query_ids >= 0),
            "labels": np.count_nonzero(batch.label_ids >= 0),
            "tokens": np.count_nonzero(batch.items.segments >= 0),
            "flops": step_flops(
                self.model.tower.config, self.model.combiner, batch, self._head, self._widths
            ),
        }
        return {name: count * self._shards_per_read for name, count in work.items()}

    def _end_epoch(
        self, state: TrainState, clusters: np.ndarray, position: Position, logger: MetricLogger
    ) -> tuple[TrainState, np.ndarray, Position]:
        """Ends an epoch: curriculum, clustering, centroids and evaluation, in the paper's order.

        Returns:
          The state, the clusters and the position at the start of the next epoch.
        """
        epoch, is_last = position.epoch, position.epoch == self.loop.epochs - 1
        size, clustered = position.cluster_size, position.clustered
        if epoch in self.batch.curriculum:
            size *= 2
        since = epoch - self.batch.cluster_start
        if (
            self.batch.cluster_start >= 0
            and since >= 0
            and not is_last
            and since % self.batch.cluster_every == 0
        ):
            bank = sharding.shard_of(state.bank, self.num_queries, self.mesh, owned=True)
            num_clusters = max(1, math.ceil(self.num_queries / size))
            with self.stop.interruptible():
                clusters = numbered_by_first_row(
                    balanced_clusters(
                        bank,
                        self.num_queries,
                        num_clusters,
                        seed=self.seed + epoch,
                        group=self.group,
                    )
                )
            clustered = True
        with self.stop.interruptible():
            state, encoded = self._with_centroids(state, is_last)
        if is_last and encoded and not self.loop.monitor:
            self._keep_vectors(state)
        due = self.loop.eval_every and (epoch + 1) % self.loop.eval_every == 0
        # The last epoch is evaluated after training anyway; here only if it may be the best one.
        if self.loop.monitor if is_last else due:
            position = self._evaluate(state, position, logger)
        position = dataclasses.replace(
            position,
            epoch=epoch + 1,
            batches=None,
            cluster_size=size,
            clustered=clustered,
            encoded=encoded and is_last,
        )
        return state, clusters, position

    def _evaluate(self, state: TrainState, position: Position, logger: MetricLogger) -> Position:
        """Evaluates the model; with `--loop.monitor`, saves it if it is the best so far.

        The best model is evaluated and saved as if its epoch were the last: with exact centroids in
        place of stale ones. They cost a pass over the training queries and are not part of the
        state that training continues with, so evaluating does not change training.
        """
        monitor, is_last = self.loop.monitor, position.epoch == self.loop.epochs - 1
        evaluated, has_vectors = state, is_last
        if monitor and not is_last and self.labels.centroids == "stale":
            with self.stop.interruptible():
                evaluated, has_vectors = self._with_centroids(state, is_last=True)
        with self.stop.interruptible():
            params = tree_utils.merge(state.params, state.frozen)
            metrics = self.evaluate(params, evaluated.labels)
        prefix = "" if self.split == "test" else f"{self.split}/"
        logger.write(
            int(state.step),
            {prefix + name: value for name, value in metrics.items()},
            epoch=position.epoch,
        )
        names = dict.fromkeys([monitor, "P@1", "P@5", "PSP@5", "R@100"])
        shown = ", ".join(f"{name} {metrics[name]:.2f}" for name in names if name in metrics)
        logger.status(f"{self.stage.name_of(position.epoch)}, {self.split}: {shown}")
        if not monitor:
            return position
        value = float(metrics[monitor])
        if position.best is not None and value <= position.best:
            return dataclasses.replace(position, waited=position.waited + 1)
        self.checkpoints.drop_best_but(position.best_step)
        self.checkpoints.save_best(state, evaluated.labels)
        if has_vectors and self.model.uses_centroids:
            self._keep_vectors(evaluated)
        return dataclasses.replace(position, best=value, best_step=int(state.step), waited=0)

    def _keep_vectors(self, state: TrainState) -> None:
        """Stores the vectors of the training queries, which are in the bank."""
        if self.vectors:
            bank = sharding.shard_of(state.bank, self.num_queries, self.mesh)
            self.vectors(int(state.step)).put("train", bank.values)

    def _with_centroids(self, state: TrainState, is_last: bool) -> tuple[TrainState, bool]:
        """Returns the state with the centroids for the next epoch or for evaluation.

        After the last epoch, the bank holds the vectors of which the centroids are the means, so
        that nothing has to encode the training queries again.

        Returns:
          The state, and whether the training queries were encoded for it.
        """
        if not self.model.uses_centroids or self.labels.centroids == "moving":
            return state, False
        encode = is_last or self.labels.centroids == "exact"
        if encode:
            queries = self.model.encode_queries(
                tree_utils.merge(state.params, state.frozen),
                self.dataset.train,
                block=self.block,
                title="training queries",
            )
        else:
            queries = sharding.shard_of(state.bank, self.num_queries, self.mesh)
        means = state_lib.mean_by_column(
            self.dataset.train_relevance, queries, self.mesh, self.group
        )
        labels = self.model.table.with_centroids(state.labels, means)
        if is_last:
            bank = sharding.spread_rows(queries, self.num_queries, self.mesh)
            state = state._replace(bank=bank)
        return state._replace(labels=labels), encode

    def _watch(self, step: int, scalars: Mapping[str, np.ndarray], logger: MetricLogger) -> None:
        """Warns if training seems to have collapsed."""
        warning = self.guard.warning(scalars, step)
        if warning:
            logger.print(warning)
