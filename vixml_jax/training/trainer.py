"""The training run: epochs of batches, then clusters, centroids, evaluation and saving."""

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
from vixml_jax.training.metric_logger import CollapseGuard, Telemetry
from vixml_jax.training.train_step import TrainStep

# One that the devices work on, and one that waits for them. More would hold more batches there.
STEPS_UNDER_WAY = 2


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run stands in its data.

    Attributes:
      epoch: The epoch under way.
      batches: The iterator's state within it; None at its start.
      cluster_size: Queries of a cluster when next clustered.
      clustered: Whether batches follow the clusters.
      best: The best value so far of the metric that a model is chosen by; None: no value yet.
      best_step: The step that had it, the first of equals.
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
    """Runs epochs from wherever the state stands; one call to `run` does it all.

    Args:
      model: Tower, combiner, table.
      dataset: What to train on.
      train_step: From `make_train_step`.
      batch, labels, loop: The groups of flags.
      block: Items encoded at a time.
      seed: Of order, positives, dropout and clusters.
      shares: That batches are packed in; a multiple of the row shards of the mesh.
      group: The processes of the mesh.
      checkpoints: Where states go.
      guard: Watches for collapse.
      evaluate: (params, labels) -> metrics, called as `loop.eval_every` says.
      split: What it judges on; goes into the names of what is logged, but for 'test'.
      stop: Whether a signal asks the run to end.
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
        shares: int,
        group: Group,
        checkpoints: Checkpoints,
        guard: CollapseGuard,
        evaluate: Callable[[Any, LabelState], Mapping[str, float]],
        split: str = "test",
        stop: preemption.Stop,
    ):
        self.model, self.dataset, self.train_step = model, dataset, train_step
        self.batch, self.labels, self.loop = batch, labels, loop
        self.block, self.seed, self.group = block, seed, group
        self.checkpoints, self.guard = checkpoints, guard
        self.evaluate, self.split, self.stop = evaluate, split, stop
        self.num_queries = len(dataset.train)
        self.steps_per_epoch = math.ceil(self.num_queries / batch.size)
        # Where all devices have it: else every step would copy it to them.
        self._key = sharding.everywhere(jax.random.key(seed), model.mesh)
        self._ahead: tuple[Position | None, Any] = None, None  # An iterator opened in advance.
        self._weights = None
        if batch.positives == "inverse_propensity":
            counts = np.bincount(dataset.train_relevance.indices, minlength=dataset.num_labels)
            self._weights = propensity.inverse_propensity(
                counts, self.num_queries, dataset.propensity_a, dataset.propensity_b
            )
        here = sharding.row_shards(model.mesh)
        each = shares // sharding.num_row_shards(model.mesh)
        self._packing = {
            "width": model.row_width,
            "layout": model.layout,
            "image_dropout": batch.image_dropout,
            "shares": shares,
            "read": [shard * each + at for shard in here for at in range(each)],
            "rows": model.row_sizes(
                model.mean_length(dataset.train) + model.mean_length(dataset.labels),
                batch.size,
                shares,
            ),
        }
        self._parts = shares / len(self._packing["read"])  # Processes, where all have as much.

    def start(self) -> tuple[Int[np.ndarray, " n"], Position]:
        """Clusters (none yet) and position of a run that has not begun."""
        return (
            np.full(self.num_queries, -1, np.int32),
            Position(0, None, self.batch.cluster_size, False),
        )

    def plan(self, like: TrainState) -> MemoryPlan:
        """What memory the run needs, from the program of its first batch."""
        batch = sharding.to_devices(next(self._batches(*self.start())), self.model.mesh)
        return plan_memory(like, lambda: self.train_step.program(batch, self._key))

    def run(
        self,
        state: TrainState,
        clusters: Int[np.ndarray, " n"],
        position: Position,
        telemetry: Telemetry,
    ) -> tuple[TrainState, Position]:
        """Trains until the epochs are over, or patience is, and returns the last state and
        position; every epoch ends in a checkpoint.

        Raises:
          Preempted: If a signal came; all steps that were done are saved.
          NotFiniteError: If a loss or a state is not finite; what is saved is.
          InputError: If the disk is full; what was saved before stands.
        """
        with self.stop.held():
            while position.epoch < self.loop.epochs and not self.out_of_patience(position):
                state, done = self._run_batches(state, clusters, position, telemetry)
                try:
                    ended = self._end_epoch(state, clusters, position, telemetry)
                except Preempted:  # What was left is done again, from the end of the batches.
                    self._leave(state, clusters, done)
                state, clusters, position = ended
                if position.epoch < self.loop.epochs:
                    # Its first batches are made while it is saved.
                    self._ahead = position, self._open(clusters, position)
                self._save(state, clusters, position)
            self.checkpoints.wait()
            self.checkpoints.drop_best_but(position.best_step)
        return state, position

    def _leave(self, state: TrainState, clusters: np.ndarray, position: Position) -> NoReturn:
        self._save(state, clusters, position)
        self.checkpoints.wait()
        raise self.stop.preempted(f"saved at step {int(state.step)}")

    def out_of_patience(self, position: Position) -> bool:
        """Whether `loop.patience` evaluations brought nothing better."""
        return 0 < self.loop.patience <= position.waited

    def _order(self, clusters: np.ndarray, position: Position) -> np.ndarray:
        rng = np.random.default_rng((self.seed, position.epoch))
        if position.clustered:
            return sampling.clustered_order(clusters, rng)
        return sampling.shuffled_order(self.num_queries, rng)

    def _batches(self, clusters: np.ndarray, position: Position) -> Any:
        """A grain iterator over an epoch's batches, at its start."""
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
        """The iterator over what is left of an epoch; it begins to make batches at once."""
        batches = self._batches(clusters, position)
        if position.batches is not None:
            batches.set_state(position.batches)
        batches.start_prefetch()
        return batches

    def _run_batches(
        self, state: TrainState, clusters: np.ndarray, position: Position, telemetry: Telemetry
    ) -> tuple[TrainState, Position]:
        """The state after the epoch's batches, and the position there."""
        watch, profiler = telemetry.watch, telemetry.profiler
        watch.start()
        at, batches = self._ahead
        if at != position:
            batches = self._open(clusters, position)
        self._ahead = None, None
        step, last = int(state.step), (position.epoch + 1) * self.steps_per_epoch
        unread: list[dict[str, jax.Array]] = []
        agree = preemption.Agreement(self.model.mesh)
        watch.lap("host")
        for batch in batches:
            watch.lap("data")
            profiler.at(step, unread)
            watch.lap("profiling")
            placed = sharding.to_devices(batch, self.model.mesh)
            watch.lap("host")
            program = self.train_step.program(placed, self._key)
            watch.lap("compiling")
            with jax.profiler.StepTraceAnnotation("step", step_num=step + 1):
                state, scalars = program(state, placed, self._key)
            step += 1
            unread.append(scalars)
            watch.count(**self._work(batch))
            telemetry.advance(position.epoch)
            watch.lap("host")
            jax.block_until_ready(unread[: 1 - STEPS_UNDER_WAY][-1:])
            watch.lap("compute")
            if step % self.loop.log_every == 0 or step == last:
                self._report(step, position.epoch, unread, telemetry)
                unread = []
            todo = agree(self._wish(step))
            if todo == preemption.GO_ON or (todo == preemption.SAVE and step == last):
                continue
            # A state is saved only if all that led to it was finite.
            watch.lap("host")
            unread = self._read(step, position.epoch, unread)
            watch.lap("compute")
            there = dataclasses.replace(position, batches=batches.get_state())
            if todo == preemption.STOP:
                if unread:
                    self._report(step, position.epoch, unread, telemetry)
                self._leave(state, clusters, there)
            watch.lap("host")
            self._save(state, clusters, there)
            watch.lap("saving")
        profiler.at(step, unread)
        profiler.stop()  # What ends an epoch is no step.
        return state, dataclasses.replace(position, batches=batches.get_state())

    def _wish(self, step: int) -> int:
        if self.stop.asked:
            return preemption.STOP
        return preemption.SAVE if self.checkpoints.due(step) else preemption.GO_ON

    def _work(self, batch: Batch) -> dict[str, Any]:
        """What there is to do in a batch of the host, padding left out."""
        own = {
            "queries": np.count_nonzero(batch.query_ids >= 0),
            "labels": np.count_nonzero(batch.label_ids >= 0),
            "tokens": np.count_nonzero(batch.items.segments >= 0),
            "flops": step_flops(self.model.tower.config, self.model.combiner, batch),
        }
        return {name: count * self._parts for name, count in own.items()}

    def _report(
        self, step: int, epoch: int, unread: list[dict[str, jax.Array]], telemetry: Telemetry
    ) -> None:
        """Writes the mean of the scalars since the last report."""
        read = self._read(step, epoch, unread)
        telemetry.watch.lap("compute")
        for scalars in read:
            warning = self.guard.warning(scalars)
            if warning:
                telemetry.say(warning)
        mean = {name: float(np.mean([scalars[name] for scalars in read])) for name in read[0]}
        telemetry.scalars(step, mean, epoch=epoch)

    def _read(
        self, step: int, epoch: int, unread: list[dict[str, jax.Array]]
    ) -> list[dict[str, np.ndarray]]:
        """The scalars of the last steps, on the host; stops where they are not finite."""
        read = jax.device_get(unread)
        first = step - len(read) + 1
        for offset, scalars in enumerate(read):
            # Of vectors that are not numbers every hinge is 0: the gradient tells where the loss
            # does not.
            if not np.isfinite(scalars["loss"] + scalars["gradient_norm"]):
                raise self._not_finite(
                    f"the loss is {scalars['loss']} and its gradient's norm "
                    f"{scalars['gradient_norm']} at step {first + offset} (epoch {epoch}), the "
                    "first that is not finite"
                )
        return read

    def _not_finite(self, what: str) -> NotFiniteError:
        self.checkpoints.wait()
        kept = self.checkpoints.latest_step()
        stands = "no checkpoint is saved yet" if kept is None else f"that of step {kept} is kept"
        return NotFiniteError(
            f"{what}; {stands}; the same flags lead there again: start in another --workdir with "
            "a lower --optimizer.learning_rate, or with --optimizer.clip_norm=1"
        )

    def _save(self, state: TrainState, clusters: np.ndarray, position: Position) -> None:
        """Saves a state that is finite: the loss of a step says nothing of the update after it."""
        if not bool(_all_finite(state._replace(frozen={}))):
            raise self._not_finite(
                f"the state after step {int(state.step)} (epoch {position.epoch}) is not finite, "
                "though the loss before it was"
            )
        self.checkpoints.save(state, clusters, dataclasses.asdict(position))

    def _end_epoch(
        self, state: TrainState, clusters: np.ndarray, position: Position, telemetry: Telemetry
    ) -> tuple[TrainState, np.ndarray, Position]:
        """Curriculum, clusters, centroids, evaluation: in the order of the paper's program."""
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
            bank = sharding.share_of(state.bank, self.num_queries, self.model.mesh, kept=True)
            num_clusters = max(1, math.ceil(self.num_queries / size))
            with self.stop.at_once():
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
        with self.stop.at_once():
            state = state._replace(labels=self._centroids(state, is_last))
        due = self.loop.eval_every and (epoch + 1) % self.loop.eval_every == 0
        # The last epoch is judged once more after training; here only if it may be chosen.
        if self.loop.choose_by if is_last else due:
            position = self._judge(state, position, telemetry)
        position = dataclasses.replace(
            position, epoch=epoch + 1, batches=None, cluster_size=size, clustered=clustered
        )
        return state, clusters, position

    def _judge(self, state: TrainState, position: Position, telemetry: Telemetry) -> Position:
        """Evaluates; where a model is to be chosen, keeps this one if it is the best so far.

        What may become the run's model is judged, and kept, as if its epoch were the last: with
        exact centroids in place of stale ones. They cost a pass over the training queries and are
        no part of the state that trains on, so training is the same whether it is evaluated or not.
        """
        chosen, labels = self.loop.choose_by, state.labels
        if chosen and position.epoch < self.loop.epochs - 1 and self.labels.centroids == "stale":
            with self.stop.at_once():
                labels = self._centroids(state, is_last=True)
        with self.stop.at_once():
            metrics = self.evaluate(tree_utils.merge(state.params, state.frozen), labels)
        prefix = "" if self.split == "test" else f"{self.split}/"
        telemetry.write(
            int(state.step),
            {prefix + name: value for name, value in metrics.items()},
            epoch=position.epoch,
        )
        shown = dict.fromkeys([chosen, "P@1", "P@5", "PSP@5", "R@100"])
        said = ", ".join(f"{name} {metrics[name]:.2f}" for name in shown if name in metrics)
        telemetry.say(f"epoch {position.epoch}, {self.split}: {said}")
        if not chosen:
            return position
        value = float(metrics[chosen])
        if position.best is not None and value <= position.best:
            return dataclasses.replace(position, waited=position.waited + 1)
        self.checkpoints.drop_best_but(position.best_step)
        self.checkpoints.save_best(state, labels)
        return dataclasses.replace(position, best=value, best_step=int(state.step), waited=0)

    def _centroids(self, state: TrainState, is_last: bool) -> LabelState:
        """The centroids that the next epoch, or evaluation, reads."""
        if self.model.combiner is None or (self.labels.centroids == "moving"):
            return state.labels
        if is_last or self.labels.centroids == "exact":
            params = tree_utils.merge(state.params, state.frozen)
            queries = self.model.encode_queries(
                params, self.dataset.train, block=self.block, title="training queries"
            )
        else:
            queries = sharding.share_of(state.bank, self.num_queries, self.model.mesh)
        means = state_lib.mean_by_column(
            self.dataset.train_relevance, queries, self.model.mesh, self.group
        )
        return self.model.table.with_centroids(state.labels, means)
