"""Writes metrics to `metrics.jsonl` and TensorBoard, and shows the progress of training."""

import io
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Float

from vixml_jax.runtime import console
from vixml_jax.storage import atomic, object_store
from vixml_jax.training.step_timer import Profiler, StepTimer

METRICS = "metrics.jsonl"
_EVERY_S, _AT_MOST_S = 30.0, 60.0  # Seconds between plain lines: with new scalars, in any case.


class Stage(NamedTuple):
    """A part of a run whose epochs and steps are alike.

    Attributes:
      name: What one of its epochs is called: "epoch" or "head epoch".
      first_epoch: Number of its first epoch.
      epochs: Number of its epochs.
      first_step: Number of steps before it.
      steps: Number of its steps.
      later_steps: Number of steps after it.
    """

    name: str
    first_epoch: int
    epochs: int
    first_step: int
    steps: int
    later_steps: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of an epoch."""
        return max(1, self.steps // self.epochs) if self.epochs else 1

    @property
    def last(self) -> int:
        """Number of the last step."""
        return self.first_step + self.steps

    def last_step(self, epoch: int) -> int:
        """Number of the last step of an epoch."""
        return self.first_step + (epoch - self.first_epoch + 1) * self.steps_per_epoch

    def name_of(self, epoch: int) -> str:
        """Name of an epoch as users see it, counted from 1."""
        return f"{self.name} {epoch - self.first_epoch + 1}/{self.epochs}"


class MetricLogger:
    """Writes scalars, flags and profiles of a training run, and shows its progress.

    Only process 0 writes. Lines of `metrics.jsonl` beyond `step` are dropped when it is opened, so
    a resumed run has one line per logged step.

    Attributes:
      path: Path of `metrics.jsonl`.
      timer: Step-time breakdown; its means are written with the scalars as `step_time/...`.
      profiler: Traces a window of steps to `profile` in the run directory.

    Args:
      workdir: The run directory.
      step: Number of steps already done.
      total_steps: Number of steps of the first stage.
      num_epochs: Number of epochs of the first stage, all of the same number of steps.
      later_steps: Number of steps of the stages after it; see `begin`.
      learning_rates: Learning rate of each parameter group in each step, arrays on the host;
        written with the scalars as `learning_rate/...`.
      flags: Flags of the run, one per line; written to TensorBoard as text.
      peak_flops: See `StepTimer`.
      profile: Window of the profiler; see `Profiler`.
      started_at: Value of `time.monotonic` when this start of the run began; None: now. Each line
        of `metrics.jsonl` has the `seconds` since then, after those of earlier starts.
    """

    def __init__(
        self,
        workdir: str,
        *,
        step: int,
        total_steps: int,
        num_epochs: int,
        later_steps: int = 0,
        learning_rates: Mapping[str, Float[np.ndarray, " steps"]] | None = None,
        flags: Sequence[str] = (),
        peak_flops: float = 0.0,
        profile: tuple[int, int] | None = None,
        started_at: float | None = None,
    ):
        self._mirror = object_store.Mirror(workdir, [METRICS])
        shown, workdir = os.path.join(workdir, "profile"), self._mirror.local
        self.path = os.path.join(workdir, METRICS)
        self.timer = StepTimer(peak_flops=peak_flops)
        self.profiler = Profiler(profile, os.path.join(workdir, "profile"), self.print, shown)
        self._stage = Stage("epoch", 0, num_epochs, 0, total_steps, later_steps)
        self._learning_rates = learning_rates or {}
        self._started_at = time.monotonic() if started_at is None else started_at
        self._file = self._board = None
        if jax.process_index() == 0:
            self._started_at -= _keep_until(self.path, step)
            self._file = open(self.path, "ab", buffering=0)
            self._board = _Board(os.path.join(workdir, "tensorboard"), purge_step=step + 1)
            if flags:  # An indented block is code in Markdown, which TensorBoard renders.
                self._board.add_text("flags", "".join(f"    {line}\n" for line in flags), step)
        self._progress: _Progress = (
            _Bar(step, self._stage)
            if console.shows_bars()
            else _Lines(step, self._stage, lambda: self.timer.seconds("compiling"))
        )

    def begin(
        self, stage: Stage, learning_rates: Mapping[str, Float[np.ndarray, " steps"]]
    ) -> None:
        """Begins another stage of the run, with the learning rates of its steps."""
        self._stage, self._learning_rates = stage, learning_rates
        self._progress.begin(stage)

    def advance(self, epoch: int) -> None:
        """Counts one step of an epoch (from 0)."""
        self._progress.advance(epoch)

    def scalars(self, step: int, values: Mapping[str, float], *, epoch: int) -> None:
        """Writes the scalars of training at a step, and shows loss, violators and speed.

        Args:
          step: Number of steps done.
          values: Means since the last call, `loss` among them.
          epoch: Number of the epoch, from 0.
        """
        times = self.timer.report()
        at = step - 1 - self._stage.first_step
        rates = {name: rate[at] for name, rate in self._learning_rates.items()}
        self.write(
            step,
            {
                **values,
                **{f"learning_rate/{name}": float(rate) for name, rate in rates.items()},
                **{f"step_time/{name}": value for name, value in times.items()},
            },
            epoch=epoch,
        )
        shown = f"loss {values['loss']:.4f}"
        if "violators" in values:
            shown += f", violators {values['violators']:.2f}"
        if times:
            shown += f", {times['queries_per_s']:,.0f} queries/s"
            if times["data_share"] > 0.02:
                shown += f", {100 * times['data_share']:.0f} % waiting for data"
        self._progress.scalars(step, epoch, shown)
        self._mirror.copy()

    def write(self, step: int, values: Mapping[str, float], *, epoch: int) -> None:
        """Writes values of a step without showing them."""
        if not self._file:
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        line = {
            "step": step,
            "epoch": epoch,
            "seconds": round(time.monotonic() - self._started_at, 2),
            **{name: float(value) for name, value in values.items()},
        }
        _append(self._file, (json.dumps(line) + "\n").encode())

    def status(self, text: str) -> None:
        """Prints a status line, unless `--quiet` is given."""
        if console.shows_status():
            self._progress.print(text)

    def print(self, text: str) -> None:
        """Prints a warning or a result."""
        self._progress.print(text)

    def close(self) -> None:
        """Ends the profile and the progress bar, and closes the files."""
        self.profiler.close()
        self._progress.close()
        if self._file:
            self._board.close()
            self._file.close()
        self._mirror.close()


class _Progress(Protocol):
    """Shows the progress of training."""

    def begin(self, stage: Stage) -> None:
        """Begins another stage."""

    def advance(self, epoch: int) -> None:
        """Counts one step."""

    def scalars(self, step: int, epoch: int, text: str) -> None:
        """Shows the scalars of a step."""

    def print(self, text: str) -> None:
        """Prints a line of its own."""

    def close(self) -> None:
        """Ends the display."""


class _Bar:
    """A progress bar, for terminals."""

    def __init__(self, step: int, stage: Stage):
        import tqdm

        self._stage = stage
        self._bar = tqdm.tqdm(
            total=stage.last + stage.later_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
            mininterval=1.0,
        )

    def begin(self, stage: Stage) -> None:
        self._stage, self._bar.total = stage, stage.last + stage.later_steps

    def advance(self, epoch: int) -> None:
        self._bar.set_description(self._stage.name_of(epoch), refresh=False)
        self._bar.update()

    def scalars(self, step: int, epoch: int, text: str) -> None:
        del step, epoch  # The bar counts by itself.
        self._bar.set_postfix_str(text, refresh=False)

    def print(self, text: str) -> None:
        self._bar.write(text, file=sys.stdout)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    """Plain lines, for logs: at least one a minute, and one at the end of each epoch.

    Args:
      step: Step that training starts from.
      stage: The first stage. The time left is that of the current stage.
      compiling: Returns the seconds spent on compiling so far, which the time left leaves out.
    """

    def __init__(self, step: int, stage: Stage, compiling: Callable[[], float]):
        self._step, self._stage = step, stage
        self._printed_at = time.monotonic()
        self._text = ""  # The newest scalars.
        self._compiling = compiling
        # Time and step of the first `advance`, which is slower than later ones.
        self._start: tuple[float, int] | None = None

    def begin(self, stage: Stage) -> None:
        self._stage, self._start, self._text = stage, None, ""

    def advance(self, epoch: int) -> None:
        now = time.monotonic()
        self._step += 1
        if self._start is None:
            self._start = now - self._compiling(), self._step
        if now - self._printed_at >= _AT_MOST_S:
            self._show(epoch, now)

    def scalars(self, step: int, epoch: int, text: str) -> None:
        self._text = text
        now = time.monotonic()
        if step == self._stage.last_step(epoch) or now - self._printed_at >= _EVERY_S:
            self._show(epoch, now)

    def _show(self, epoch: int, now: float) -> None:
        parts = [part for part in (self._text, self._time_left(now)) if part]
        console.status(
            f"{self._stage.name_of(epoch)}, step {self._step:,} of "
            f"{self._stage.last + self._stage.later_steps:,}"
            + (f": {', '.join(parts)}" if parts else "")
        )
        self._printed_at = now

    def _time_left(self, now: float) -> str:
        now -= self._compiling()
        started_at, first_step = self._start or (now, self._step)
        left, done = self._stage.last - self._step, self._step - first_step
        if left <= 0 or done <= 0:
            return ""
        what = "left before the head epochs" if self._stage.later_steps else "left"
        return f"about {_duration((now - started_at) / done * left)} {what}"

    def print(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


def _duration(seconds: float) -> str:
    """Returns a duration in a unit that suits it, such as "40 s", "4 min" or "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


class _Board:
    """Event files of TensorBoard, written at once in the calling thread.

    The `SummaryWriter` of tensorboardX hands events to a thread of its own. A full disk ends that
    thread, and from then on the run waits for it forever.

    Args:
      directory: Where event files are written.
      purge_step: TensorBoard ignores events of earlier files from this step on.
    """

    def __init__(self, directory: str, *, purge_step: int):
        from tensorboardX import record_writer, summary
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary, self._text = event_pb2.Event, summary_pb2.Summary, summary.text
        self._checksum = record_writer.masked_crc32c
        os.makedirs(directory, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._file = open(os.path.join(directory, name), "ab", buffering=0)
        self._write(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=purge_step, session_log=start)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Writes one point of a curve."""
        # tensorboardX would turn a tag such as P@1 into P_1.
        point = self._summary.Value(tag=name, simple_value=float(value))
        self._write(step=step, summary=self._summary(value=[point]))

    def add_text(self, name: str, text: str, step: int) -> None:
        """Writes a text in Markdown."""
        self._write(step=step, summary=self._text(name, text))

    def close(self) -> None:
        """Closes the event file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        data = self._event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = (struct.pack("<I", self._checksum(part)) for part in (length, data))
        _append(self._file, length + next(checksums) + data + next(checksums))


def _append(file: io.RawIOBase, data: bytes) -> None:
    """Writes all of the data or raises; a disk that fills up takes only part of a write first."""
    while data:
        data = data[file.write(data) :]


def _keep_until(path: str, step: int) -> float:
    """Drops lines of `metrics.jsonl` beyond a step; returns the seconds of the last one kept."""
    if not os.path.exists(path):
        return 0.0
    kept, seconds = [], 0.0
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                values = json.loads(line)
                if values["step"] <= step:
                    kept.append(line)
                    seconds = values.get("seconds", 0.0)  # Missing in version 0.2.
            except json.JSONDecodeError:
                break  # The run was killed while it wrote the last line.
    atomic.write_text(path, "".join(kept))
    return seconds


class CollapseGuard:
    """Detects collapse: all vectors are nearly the same, although the loss looks converged.

    A step looks collapsed if the vectors of its queries are nearly parallel, or under a triplet
    loss if the loss is at its margin while nearly every negative violates it.

    Args:
      margin: Margin of the triplet loss; None: another loss.
      num_negatives: Negatives per row of the triplet loss.
      patience: Consecutive steps that must look collapsed.
      warmup_steps: First steps of training, which are left out: an untrained tower may begin with
        nearly parallel vectors.
    """

    SIMILARITY = 0.95  # Mean cosine of two queries of a batch from which on they are parallel.

    def __init__(
        self,
        *,
        margin: float | None = None,
        num_negatives: int = 0,
        patience: int = 100,
        warmup_steps: int = 0,
    ):
        self._margin, self._num_negatives = margin, num_negatives
        self._patience, self._warmup_steps = patience, warmup_steps
        self._collapsed = 0  # Consecutive steps so far.

    def warning(self, scalars: Mapping[str, float], step: int | None = None) -> str | None:
        """Returns a warning once each of the last `patience` steps looked collapsed, else None.

        Args:
          scalars: Of a step.
          step: Its number; None: it is after the warm-up.
        """
        if step is not None and step <= self._warmup_steps:
            return None
        similarity = scalars.get("query_similarity", 0.0)
        what = f"two queries of a batch had a mean cosine of {similarity:.2f}"
        collapsed = similarity > self.SIMILARITY
        if self._margin is not None and not collapsed:
            at_margin = abs(scalars["loss_text"] - self._margin) < 0.1 * self._margin
            collapsed = at_margin and scalars["violators"] > 0.95 * self._num_negatives
            what = (
                f"the loss stayed at the margin ({self._margin}) while "
                f"{scalars['violators']:.1f} of {self._num_negatives} negatives violated it"
            )
        self._collapsed = self._collapsed + 1 if collapsed else 0
        if self._collapsed < self._patience:
            return None
        self._collapsed = 0
        return (
            f"warning: training seems to have collapsed: for {self._patience} steps {what}; try a "
            "lower --optimizer.learning_rate or more --optimizer.warmup_steps"
        )
