"""What all epochs share: running batches, logging, saving, stopping on a signal."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool

from vixml_jax.config import LoopConfig
from vixml_jax.errors import NotFiniteError
from vixml_jax.parallel import sharding
from vixml_jax.structs import TrainState
from vixml_jax.training import preemption
from vixml_jax.training.checkpoints import Checkpoints
from vixml_jax.training.metric_logger import MetricLogger, Stage
from vixml_jax.training.train_step import TrainStep

# One step that the devices run and one that is queued. More would hold more batches on the devices.
STEPS_IN_FLIGHT = 2


@dataclasses.dataclass(frozen=True)
class Position:
    """The position of a run in its data and in the selection of its best model.

    Attributes:
      epoch: The current epoch, from 0. The head epochs follow the last of `--loop.epochs`.
      batches: State of the batch iterator within the epoch; None at its start.
      cluster_size: Queries per cluster at the next clustering.
      clustered: Whether batches consist of clusters.
      best: Best value so far of `--loop.monitor`; None before the first evaluation.
      best_step: First step that had the best value.
      waited: Evaluations since then.
      encoded: Whether the bank holds the vectors of all training queries under the current model.
      head_from: Step at which the head epochs began; None before them.
      unreported: Scalars of the steps since the last line of `metrics.jsonl`, which the next line
        is the mean of.
    """

    epoch: int
    batches: dict[str, Any] | None
    cluster_size: int
    clustered: bool
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    encoded: bool = False
    head_from: int | None = None
    unreported: list[dict[str, float]] = dataclasses.field(default_factory=list)


@jax.jit
def all_finite(state: Any) -> Bool[Array, ""]:
    """Whether all floating-point numbers of a tree are finite."""
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in floats]))


def shards_to_read(mesh: Mesh, shards: int) -> list[int]:
    """Returns the shards of a batch that this process reads: those of its own devices.

    Args:
      mesh: Mesh that batches are placed on.
      shards: Number of shards of a batch, a multiple of the row shards of the mesh.
    """
    per_device = shards // sharding.num_row_shards(mesh)
    return [
        device * per_device + offset
        for device in sharding.row_shards(mesh)
        for offset in range(per_device)
    ]


class EpochLoop:
    """Runs the batches of epochs; what is in them and around them, subclasses say.

    Attributes:
      stage: Numbers of the epochs and steps of this part of the run.

    Args:
      mesh: Mesh that batches are placed on.
      train_step: The step; its state may be a part of the state of the run, see `_whole`.
      stage: See above.
      loop: Group of flags.
      seed: Seed of the run.
      checkpoints: Where states are saved.
      stop: Tells whether a signal requested the run to stop.
    """

    # What to change after a loss or state that is not finite.
    _REMEDY = "a lower --optimizer.learning_rate, or with --optimizer.clip_norm=1"

    def __init__(
        self,
        mesh: Mesh,
        train_step: TrainStep,
        stage: Stage,
        *,
        loop: LoopConfig,
        seed: int,
        checkpoints: Checkpoints,
        stop: preemption.StopSignal,
    ):
        self.mesh, self.train_step, self.loop, self.seed = mesh, train_step, loop, seed
        self.stage, self.checkpoints, self.stop = stage, checkpoints, stop
        # Replicated once; otherwise every step would copy the key to the devices.
        self._key = sharding.replicate(jax.random.key(seed), mesh)
        # Batches of the next epoch, opened while the last checkpoint is saved.
        self._opened: tuple[Position | None, Any] = None, None

    def _batches(self, clusters: np.ndarray, position: Position) -> Any:
        """Returns a Grain iterator over the batches of an epoch, at its start."""
        raise NotImplementedError

    def _work(self, batch: Any) -> dict[str, Any]:
        """Returns the arguments of `StepTimer.count` for a batch."""
        raise NotImplementedError

    def _whole(self, state: TrainState) -> TrainState:
        """Returns the state of the run from that of the step."""
        return state

    def _watch(self, step: int, scalars: Mapping[str, np.ndarray], logger: MetricLogger) -> None:
        """Looks at the scalars of a step for what should be reported."""

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
        step, last = int(state.step), self.stage.last_step(position.epoch)
        unread: list[Mapping[str, Any]] = [
            {name: np.float32(value) for name, value in scalars.items()}
            for scalars in position.unreported
        ]
        agree = preemption.Agreement(self.mesh)
        timer.lap("host")
        for batch in batches:
            timer.lap("data")
            profiler.at(step, unread)
            timer.lap("profiling")
            on_devices = sharding.to_devices(batch, self.mesh)
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
            reached = dataclasses.replace(
                position,
                batches=batches.get_state(),
                unreported=[
                    {name: float(value) for name, value in scalars.items()} for scalars in unread
                ],
            )
            if action == preemption.STOP:
                self._save_and_stop(state, clusters, reached)
            timer.lap("host")
            self._save(state, clusters, reached)
            timer.lap("saving")
        profiler.at(step, unread)
        profiler.stop()  # The end of an epoch is not part of a step.
        return state, dataclasses.replace(position, batches=batches.get_state(), unreported=[])

    def _request(self, step: int) -> int:
        """Returns what this process requests to do after a step."""
        if self.stop.requested_by:
            return preemption.STOP
        return preemption.SAVE if self.checkpoints.due(step) else preemption.GO_ON

    def _report(
        self, step: int, epoch: int, unread: list[Mapping[str, Any]], logger: MetricLogger
    ) -> None:
        """Logs the mean of the scalars since the last report."""
        read = self._read(step, epoch, unread)
        logger.timer.lap("compute")
        for offset, scalars in enumerate(read):
            self._watch(step - len(read) + 1 + offset, scalars, logger)
        mean = {name: float(np.mean([scalars[name] for scalars in read])) for name in read[0]}
        logger.scalars(step, mean, epoch=epoch)

    def _read(
        self, step: int, epoch: int, unread: list[Mapping[str, Any]]
    ) -> list[Mapping[str, np.ndarray]]:
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
                    f"({self.stage.name_of(epoch)})"
                )
        return read

    def _not_finite(self, what: str) -> NotFiniteError:
        self.checkpoints.wait()
        latest = self.checkpoints.latest_step()
        kept = "no checkpoint is saved yet"
        if latest is not None:
            kept = f"the checkpoint of step {latest} is kept"
        return NotFiniteError(
            f"{what}; {kept}; the same flags would lead to the same result: start again in another "
            f"--workdir with {self._REMEDY}"
        )

    def _save_and_stop(
        self, state: TrainState, clusters: np.ndarray, position: Position
    ) -> NoReturn:
        self._save(state, clusters, position)
        self.checkpoints.wait()
        raise self.stop.preempted(f"saved at step {int(state.step)}")

    def _save(self, state: TrainState, clusters: np.ndarray, position: Position) -> None:
        """Saves a checkpoint if the state is finite.

        The loss of a step is computed before its update, so a finite loss does not imply it.

        Raises:
          NotFiniteError: If the state is not finite.
        """
        state = self._whole(state)
        if not bool(all_finite(state._replace(frozen={}))):
            raise self._not_finite(
                f"the state after step {int(state.step)} ({self.stage.name_of(position.epoch)}) is "
                "not finite, although the loss before it was"
            )
        self.checkpoints.save(state, clusters, dataclasses.asdict(position))
