"""The training run: epochs of batches, then clusters, centroids, evaluation and saving."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Int

from vixml_jax import sharding, trees
from vixml_jax.config import BatchConfig, LabelsConfig, LoopConfig
from vixml_jax.data import packing, pipeline, propensity, sampling
from vixml_jax.data.store import PreparedDataset
from vixml_jax.encoding import Model
from vixml_jax.errors import NotFiniteError, Preempted
from vixml_jax.labels.centroids import exact_centroids
from vixml_jax.structs import LabelState, TrainState
from vixml_jax.training import stopping
from vixml_jax.training.checkpoints import Checkpoints
from vixml_jax.training.clustering import balanced_clusters, numbered_by_first_row
from vixml_jax.training.plan import MemoryPlan, plan_memory
from vixml_jax.training.step import TrainStep
from vixml_jax.training.telemetry import CollapseGuard, Telemetry


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
      trained: Abstract parameters with their logical axes (of `jax.eval_shape`).
      frozen: Those that are not trained, alike.
      optimizer: Whose state it holds.
      num_queries: Training queries.
    """
    mesh = model.mesh
    whole, rows = sharding.replicated(mesh), sharding.rows_sharding(mesh)

    def spread(x: Any, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    places = sharding.shardings_of(trained, mesh)
    params = jax.tree.map(spread, nn.unbox(trained), places)
    opt_state = jax.eval_shape(optimizer.init, params)
    opt_places = optax.tree.map_params(
        optimizer, lambda _, place: place, opt_state, places, transform_non_params=lambda _: whole
    )
    labels = jax.eval_shape(lambda: model.table.init_state(np.zeros(model.table.num_labels)))
    width = model.table.width
    return TrainState(
        step=jax.ShapeDtypeStruct((), np.int32, sharding=whole),
        params=params,
        frozen=jax.tree.map(spread, nn.unbox(frozen), sharding.shardings_of(frozen, mesh)),
        opt_state=jax.tree.map(spread, opt_state, opt_places),
        labels=jax.tree.map(lambda x: spread(x, rows), labels),
        bank=jax.ShapeDtypeStruct(
            (sharding.pad_rows(num_queries, mesh), width), np.float32, sharding=rows
        ),
    )


def place_state(
    like: TrainState,
    params: Any,
    frozen: Any,
    optimizer: optax.GradientTransformation,
    labels: LabelState,
    bank: np.ndarray,
) -> TrainState:
    """The first state, each array where it will stay.

    Args:
      like: From `abstract_state`.
      params: The parameters that are trained, unboxed, on host or device.
      frozen: Those that are not.
      optimizer: Whose state to make.
      labels: The label state.
      bank: Unit embeddings of the training queries, padded to the mesh.
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


def empty_bank(model: Model, num_queries: int) -> np.ndarray:
    """Zero rows for all training queries, padded to the mesh."""
    rows = sharding.pad_rows(num_queries, model.mesh)
    return np.zeros((rows, model.table.width), np.float32)


def initial_labels(
    model: Model,
    params: Any,
    dataset: PreparedDataset,
    *,
    labels: LabelsConfig,
    block: int,
    seed: int,
) -> tuple[Any, LabelState, np.ndarray]:
    """What training starts from: the label -> free vector map, centroids, the bank.

    The map clusters the labels' embeddings under the starting weights (paper, section 3); where
    every label has a free vector of its own there is nothing to cluster.

    Returns:
      The parameters (free vectors set where `labels.free_init` says so), the label state, and the
      bank, padded to the mesh.
    """
    num_labels, num_free = model.table.num_labels, model.table.num_free
    cluster_of = np.arange(num_labels, dtype=np.int32)
    if model.combiner is not None and (num_free < num_labels or labels.free_init == "embedding"):
        vectors = model.encode_queries(
            params, dataset.labels, block=block, title="labels, before training"
        )
        if num_free < num_labels:
            cluster_of = numbered_by_first_row(balanced_clusters(vectors, num_free, seed=seed))
        if labels.free_init == "embedding":
            free = np.zeros(params["free"].shape, np.float32)
            np.add.at(free, cluster_of, vectors)
            counts = np.bincount(cluster_of, minlength=len(free))
            params = {**params, "free": free / np.maximum(counts, 1)[:, None]}
    bank = empty_bank(model, len(dataset.train))
    bank[: len(dataset.train)] = model.encode_queries(
        params, dataset.train, block=block, title="training queries, before training"
    )
    state = model.table.init_state(cluster_of)
    if model.combiner is not None:
        state = model.table.with_centroids(
            state, exact_centroids(dataset.train_relevance, bank[: len(dataset.train)])
        )
    return params, state, bank


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
        checkpoints: Checkpoints,
        guard: CollapseGuard,
        evaluate: Callable[[Any, LabelState], Mapping[str, float]],
        split: str = "test",
        stop: stopping.Stop,
    ):
        self.model, self.dataset, self.train_step = model, dataset, train_step
        self.batch, self.labels, self.loop = batch, labels, loop
        self.block, self.seed = block, seed
        self.checkpoints, self.guard = checkpoints, guard
        self.evaluate, self.split, self.stop = evaluate, split, stop
        self.num_queries = len(dataset.train)
        self.steps_per_epoch = math.ceil(self.num_queries / batch.size)
        self._key = jax.random.key(seed)
        self._weights = None
        if batch.positives == "inverse_propensity":
            counts = np.bincount(dataset.train_relevance.indices, minlength=dataset.num_labels)
            self._weights = propensity.inverse_propensity(
                counts, self.num_queries, dataset.propensity_a, dataset.propensity_b
            )
        shards = sharding.num_row_shards(model.mesh)
        self._packing = {
            "width": model.row_width,
            "layout": model.layout,
            "image_dropout": batch.image_dropout,
            "blocks": shards,
            "rows": packing.RowSizes.expected(
                model.mean_length(dataset.train) + model.mean_length(dataset.labels),
                batch_size=batch.size,
                width=model.row_width,
                blocks=shards,
                chunk=model.encode_chunk,
            ),
        }

    def start(self) -> tuple[Int[np.ndarray, " n"], Position]:
        """Clusters (none yet) and position of a run that has not begun."""
        return (
            np.full(self.num_queries, -1, np.int32),
            Position(0, None, self.batch.cluster_size, False),
        )

    def plan(self, like: TrainState) -> MemoryPlan:
        """What memory the run needs, from the program of its first batch."""
        batch = sharding.to_devices(next(self._batches(*self.start())), self.model.mesh)
        return plan_memory(like, self.train_step.program(batch, self._key))

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
                self._save(state, clusters, position)
                telemetry.pause()
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
        return pipeline.epoch_batches(
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

    def _run_batches(
        self, state: TrainState, clusters: np.ndarray, position: Position, telemetry: Telemetry
    ) -> tuple[TrainState, Position]:
        """The state after the epoch's batches, and the position there."""
        batches = self._batches(clusters, position)
        if position.batches is not None:
            batches.set_state(position.batches)
        step, last = int(state.step), (position.epoch + 1) * self.steps_per_epoch
        unread: list[dict[str, jax.Array]] = []
        agree = stopping.Agreement(self.model.mesh)
        for batch in batches:
            state, scalars = self.train_step(
                state, sharding.to_devices(batch, self.model.mesh), self._key
            )
            step += 1
            unread.append(scalars)
            telemetry.advance(position.epoch)
            if step % self.loop.log_every == 0 or step == last:
                self._report(step, position.epoch, unread, telemetry)
                unread = []
            todo = agree(self._wish(step))
            if todo == stopping.GO_ON or (todo == stopping.SAVE and step == last):
                continue
            # A state is saved only if all that led to it was finite.
            unread = self._read(step, position.epoch, unread)
            there = dataclasses.replace(position, batches=batches.get_state())
            if todo == stopping.STOP:
                if unread:
                    self._report(step, position.epoch, unread, telemetry)
                self._leave(state, clusters, there)
            self._save(state, clusters, there)
        return state, dataclasses.replace(position, batches=batches.get_state())

    def _wish(self, step: int) -> int:
        if self.stop.asked:
            return stopping.STOP
        return stopping.SAVE if self.checkpoints.due(step) else stopping.GO_ON

    def _report(
        self, step: int, epoch: int, unread: list[dict[str, jax.Array]], telemetry: Telemetry
    ) -> None:
        """Writes the mean of the scalars since the last report."""
        read = self._read(step, epoch, unread)
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
            bank = np.asarray(state.bank)[: self.num_queries]
            num_clusters = max(1, math.ceil(self.num_queries / size))
            with self.stop.at_once():
                clusters = numbered_by_first_row(
                    balanced_clusters(bank, num_clusters, seed=self.seed + epoch)
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
            metrics = self.evaluate(trees.merge(state.params, state.frozen), labels)
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
            params = trees.merge(state.params, state.frozen)
            queries = self.model.encode_queries(
                params, self.dataset.train, block=self.block, title="training queries"
            )
        else:
            queries = np.asarray(state.bank)[: self.num_queries]
        return self.model.table.with_centroids(
            state.labels, exact_centroids(self.dataset.train_relevance, queries)
        )
