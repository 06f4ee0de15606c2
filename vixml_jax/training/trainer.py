"""The training loop: per epoch its batches, then clustering, centroids, evaluation, saving."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from vixml_jax.config import BatchConfig, LabelsConfig, LoopConfig
from vixml_jax.data import input_pipeline, propensity, sampling
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import NotFiniteError, Preempted
from vixml_jax.modeling import Model
from vixml_jax.parallel import sharding
from vixml_jax.parallel.distributed import Group
from vixml_jax.runtime import tree_utils
from vixml_jax.structs import Batch, LabelState, TrainState
from vixml_jax.training import preemption
from vixml_jax.training import train_state as state_lib
from vixml_jax.training.checkpoints import Checkpoints
from vixml_jax.training.clustering.balanced import balanced_clusters, numbered_by_first_row
from vixml_jax.training.flops import step_flops
from vixml_jax.training.memory_planner import MemoryPlan, plan_memory
from vixml_jax.training.metric_logger import CollapseGuard, MetricLogger
from vixml_jax.training.train_step import TrainStep

# One step that the devices run and one that is queued. More would hold more batches on the devices.
STEPS_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class Position:
    """The position of a run in its data and in the selection of its best model.

    Attributes:
      epoch: The current epoch, from 0.
      batches: State of the batch iterator within the epoch; None at its start.
      cluster_size: Queries per cluster at the next clustering.
      clustered: Whether batches consist of clusters.
      best: Best value so far of `--loop.monitor`; None before the first evaluation.
      best_step: First step that had the best value.
      waited: Evaluations since then.
    """

    epoch: int
    batches: dict[str, Any] | None
    cluster_size: int
    clustered: bool
    best: float | None = None
    best_step: int | None = None
    waited: int = 0


@jax.jit
def _all_finite(state: Any) -> Bool[Array, ""]:
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in floats]))


class Trainer:
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
    ):
        self.model, self.dataset, self.train_step = model, dataset, train_step
        self.batch, self.labels, self.loop = batch, labels, loop
        self.block, self.seed, self.group = block, seed, group
        self.checkpoints, self.guard = checkpoints, guard
        self.evaluate, self.split, self.stop = evaluate, split, stop
        self.num_queries = len(dataset.train)
        self.steps_per_epoch = math.ceil(self.num_queries / batch.size)
        # Replicated once; otherwise every step would copy the key to the devices.
        self._key = sharding.replicate(jax.random.key(seed), model.mesh)
        # Batches of the next epoch, opened while the last checkpoint is saved.
        self._opened: tuple[Position | None, Any] = None, None
        self._weights = None
        if batch.positives == "inverse_propensity":
            counts = np.bincount(dataset.train_relevance.indices, minlength=dataset.num_labels)
            self._weights = propensity.inverse_propensity(
                counts, self.num_queries, dataset.propensity_a, dataset.propensity_b
            )
        shards_per_device = shards // sharding.num_row_shards(model.mesh)
        self._packing = {
            "width": model.row_width,
            "layout": model.layout,
            "image_dropout": batch.image_dropout,
            "shards": shards,
            "read": [
                device * shards_per_device + offset
                for device in sharding.row_shards(model.mesh)
                for offset in range(shards_per_device)
            ],
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
        batch = sharding.to_devices(next(self._batches(*self.start())), self.model.mesh)
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

    def _save_and_stop(
        self, state: TrainState, clusters: np.ndarray, position: Position
    ) -> NoReturn:
        self._save(state, clusters, position)
        self.checkpoints.wait()
        raise self.stop.preempted(f"saved at step {int(state.step)}")

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
            prefetch=self.batch.prefetch,
            **self._packing,
        )

    def _open(self, clusters: np.ndarray, position: Position) -> Any:
        """Returns an iterator over the rest of an epoch, which prefetches batches at once."""
        batches = self._batches(clusters, position)
        if position.batches is not None:
            batches.set_state(position.batches)
        batches.start_prefetch()
        return batches

    def _run_batches(
        self, state: TrainState, clusters: np.ndarray, position: Position, logger: MetricLogger
    ) -> tuple[TrainState, Position]:
        """Runs the batches of an epoch; returns the state and the position after them."""
        timer, profiler = logger.timer, logger.profiler
        timer.start()
        opened_at, batches = self._opened
        if opened_at != position:
            batches = self._open(clusters, position)
        self._opened = None, None
        step, last = int(state.step), (position.epoch + 1) * self.steps_per_epoch
        unread: list[dict[str, jax.Array]] = []
        agree = preemption.Agreement(self.model.mesh)
        timer.lap("host")
        for batch in batches:
            timer.lap("data")
            profiler.at(step, unread)
            timer.lap("profiling")
            on_devices = sharding.to_devices(batch, self.model.mesh)
            timer.lap("host")
            program = self.train_step.program(on_devices, self._key)
            timer.lap("compiling")
            with jax.profiler.StepTraceAnnotation("step", step_num=step + 1):
                state, scalars = program(state, on_devices, self._key)
            step += 1
            unread.append(scalars)
            timer.count(**self._work(batch))
            logger.advance(position.epoch)
            timer.lap("host")
            jax.block_until_ready(unread[: 1 - STEPS_IN_FLIGHT][-1:])
            timer.lap("compute")
            if step % self.loop.log_every == 0 or step == last:
                self._report(step, position.epoch, unread, logger)
                unread = []
            action = agree(self._request(step))
            if action == preemption.GO_ON or (action == preemption.SAVE and step == last):
                continue
            # A state is saved only if all losses before it were finite.
            timer.lap("host")
            unread = self._read(step, position.epoch, unread)
            timer.lap("compute")
            reached = dataclasses.replace(position, batches=batches.get_state())
            if action == preemption.STOP:
                if unread:
                    self._report(step, position.epoch, unread, logger)
                self._save_and_stop(state, clusters, reached)
            timer.lap("host")
            self._save(state, clusters, reached)
            timer.lap("saving")
        profiler.at(step, unread)
        profiler.stop()  # The end of an epoch is not part of a step.
        return state, dataclasses.replace(position, batches=batches.get_state())

    def _request(self, step: int) -> int:
        """Returns what this process requests to do after a step."""
        if self.stop.requested_by:
            return preemption.STOP
        return preemption.SAVE if self.checkpoints.due(step) else preemption.GO_ON

    def _work(self, batch: Batch) -> dict[str, Any]:
        """Returns the amount of work in a batch over all processes, without padding.

        Exact for one process; several processes assume that the others have as much as this one.
        """
        work = {
            "queries": np.count_nonzero(batch.query_ids >= 0),
            "labels": np.count_nonzero(batch.label_ids >= 0),
            "tokens": np.count_nonzero(batch.items.segments >= 0),
            "flops": step_flops(self.model.tower.config, self.model.combiner, batch),
        }
        return {name: count * self._shards_per_read for name, count in work.items()}

    def _report(
        self, step: int, epoch: int, unread: list[dict[str, jax.Array]], logger: MetricLogger
    ) -> None:
        """Logs the mean of the scalars since the last report."""
        read = self._read(step, epoch, unread)
        logger.timer.lap("compute")
        for scalars in read:
            warning = self.guard.warning(scalars)
            if warning:
                logger.print(warning)
        mean = {name: float(np.mean([scalars[name] for scalars in read])) for name in read[0]}
        logger.scalars(step, mean, epoch=epoch)

    def _read(
        self, step: int, epoch: int, unread: list[dict[str, jax.Array]]
    ) -> list[dict[str, np.ndarray]]:
        """Returns the scalars of the last steps, on the host.

        Raises:
          NotFiniteError: If a loss or a gradient is not finite.
        """
        read = jax.device_get(unread)
        first = step - len(read) + 1
        for offset, scalars in enumerate(read):
            # With NaN embeddings every hinge is 0, so the loss may be finite while its gradient is
            # not.
            if not np.isfinite(scalars["loss"] + scalars["gradient_norm"]):
                raise self._not_finite(
                    f"the loss ({scalars['loss']}) or its gradient norm "
                    f"({scalars['gradient_norm']}) is not finite at step {first + offset} "
                    f"({self._name(epoch)})"
                )
        return read

    def _name(self, epoch: int) -> str:
        """Returns the name of an epoch as users see it, counted from 1."""
        return f"epoch {epoch + 1}/{self.loop.epochs}"

    def _not_finite(self, what: str) -> NotFiniteError:
        self.checkpoints.wait()
        latest = self.checkpoints.latest_step()
        kept = "no checkpoint is saved yet"
        if latest is not None:
            kept = f"the checkpoint of step {latest} is kept"
        return NotFiniteError(
            f"{what}; {kept}; the same flags would lead to the same result: start again in another "
            "--workdir with a lower --optimizer.learning_rate, or with --optimizer.clip_norm=1"
        )

    def _save(self, state: TrainState, clusters: np.ndarray, position: Position) -> None:
        """Saves a checkpoint if the state is finite.

        The loss of a step is computed before its update, so a finite loss does not imply it.

        Raises:
          NotFiniteError: If the state is not finite.
        """
        if not bool(_all_finite(state._replace(frozen={}))):
            raise self._not_finite(
                f"the state after step {int(state.step)} ({self._name(position.epoch)}) is not "
                "finite, although the loss before it was"
            )
        self.checkpoints.save(state, clusters, dataclasses.asdict(position))

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
            bank = sharding.shard_of(state.bank, self.num_queries, self.model.mesh, owned=True)
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
            state = state._replace(labels=self._centroids(state, is_last))
        due = self.loop.eval_every and (epoch + 1) % self.loop.eval_every == 0
        # The last epoch is evaluated after training anyway; here only if it may be the best one.
        if self.loop.monitor if is_last else due:
            position = self._evaluate(state, position, logger)
        position = dataclasses.replace(
            position, epoch=epoch + 1, batches=None, cluster_size=size, clustered=clustered
        )
        return state, clusters, position

    def _evaluate(self, state: TrainState, position: Position, logger: MetricLogger) -> Position:
        """Evaluates the model; with `--loop.monitor`, saves it if it is the best so far.

        The best model is evaluated and saved as if its epoch were the last: with exact centroids in
        place of stale ones. They cost a pass over the training queries and are not part of the
        state that training continues with, so evaluating does not change training.
        """
        monitor, labels = self.loop.monitor, state.labels
        if monitor and position.epoch < self.loop.epochs - 1 and self.labels.centroids == "stale":
            with self.stop.interruptible():
                labels = self._centroids(state, is_last=True)
        with self.stop.interruptible():
            metrics = self.evaluate(tree_utils.merge(state.params, state.frozen), labels)
        prefix = "" if self.split == "test" else f"{self.split}/"
        logger.write(
            int(state.step),
            {prefix + name: value for name, value in metrics.items()},
            epoch=position.epoch,
        )
        names = dict.fromkeys([monitor, "P@1", "P@5", "PSP@5", "R@100"])
        shown = ", ".join(f"{name} {metrics[name]:.2f}" for name in names if name in metrics)
        logger.status(f"{self._name(position.epoch)}, {self.split}: {shown}")
        if not monitor:
            return position
        value = float(metrics[monitor])
        if position.best is not None and value <= position.best:
            return dataclasses.replace(position, waited=position.waited + 1)
        self.checkpoints.drop_best_but(position.best_step)
        self.checkpoints.save_best(state, labels)
        return dataclasses.replace(position, best=value, best_step=int(state.step), waited=0)

    def _centroids(self, state: TrainState, is_last: bool) -> LabelState:
        """Returns the labels with the centroids for the next epoch or for evaluation."""
        if self.model.combiner is None or self.labels.centroids == "moving":
            return state.labels
        if is_last or self.labels.centroids == "exact":
            params = tree_utils.merge(state.params, state.frozen)
            queries = self.model.encode_queries(
                params, self.dataset.train, block=self.block, title="training queries"
            )
        else:
            queries = sharding.shard_of(state.bank, self.num_queries, self.model.mesh)
        means = state_lib.mean_by_column(
            self.dataset.train_relevance, queries, self.model.mesh, self.group
        )
        return self.model.table.with_centroids(state.labels, means)
