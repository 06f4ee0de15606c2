"""Scalars to TensorBoard and jsonl, a progress bar, and warnings worth reading."""

import io
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vixml_jax.storage import object_store
from vixml_jax.training.step_timer import Profiler, Watch

METRICS = "metrics.jsonl"


class Telemetry:
    """What a run says while it trains; only process 0 speaks.

    Lines of `metrics.jsonl` beyond `step` are dropped on opening, so that a resumed run's curve
    has no echoes.

    Attributes:
      path: Of `metrics.jsonl`.
      watch: Where the time goes; its means are written with the scalars, as `watch/...`.
      profiler: Writes a window of steps to `profile` of the run directory.

    Args:
      workdir: The run directory.
      step: Where the run stands,
      total_steps: and where it ends.
      peak_flops: See `Watch`.
      profile: The window of the profiler.
    """

    def __init__(
        self,
        workdir: str,
        *,
        step: int,
        total_steps: int,
        peak_flops: float = 0.0,
        profile: tuple[int, int] | None = None,
    ):
        import tqdm

        self._mirror = object_store.Mirror(workdir, [METRICS])
        shown, workdir = os.path.join(workdir, "profile"), self._mirror.here
        self.path = os.path.join(workdir, METRICS)
        self.watch = Watch(peak_flops=peak_flops)
        self.profiler = Profiler(profile, os.path.join(workdir, "profile"), self.say, shown)
        self._file = self._board = None
        if jax.process_index() == 0:
            _keep_until(self.path, step)
            self._file = open(self.path, "ab", buffering=0)
            self._board = _Board(os.path.join(workdir, "tensorboard"), purge_step=step + 1)
        self._bar = tqdm.tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
            mininterval=1.0 if sys.stderr.isatty() else 30.0,
        )

    def advance(self, epoch: int) -> None:
        """One step done."""
        self._bar.set_description(f"epoch {epoch}", refresh=False)
        self._bar.update()

    def scalars(self, step: int, values: Mapping[str, float], **more: Any) -> None:
        """Writes the values of a step, and shows loss, violators and speed on the bar."""
        watched = self.watch.report()
        named = {f"watch/{name}": value for name, value in watched.items()}
        self.write(step, {**values, **named}, **more)
        shown = f"loss {values['loss']:.4f}, violators {values['violators']:.2f}"
        if watched:
            shown += f", {watched['queries_per_s']:.0f} queries/s"
            if watched["data_share"] > 0.02:
                shown += f", {100 * watched['data_share']:.0f} % waiting for data"
        self._bar.set_postfix_str(shown, refresh=False)
        self._mirror.copy()

    def write(self, step: int, values: Mapping[str, float], **more: Any) -> None:
        """Writes values without touching the bar."""
        if not self._file:
            return
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        line = {"step": step, **more, **{name: float(value) for name, value in values.items()}}
        _append(self._file, (json.dumps(line) + "\n").encode())

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Ends profile, bar and files."""
        self.profiler.close()
        self._bar.close()
        if self._file:
            self._board.close()
            self._file.close()
        self._mirror.close()


class _Board:
    """Curves for TensorBoard, written when they are made.

    tensorboardX's own `SummaryWriter` hands them to a thread. A full disk ends that thread, and
    the run waits for it from then on.

    Args:
      directory: Of the event files.
      purge_step: TensorBoard forgets what files before this one say from this step on.
    """

    def __init__(self, directory: str, *, purge_step: int):
        from tensorboardX import record_writer, summary
        from tensorboardX.proto import event_pb2

        self._event, self._scalar = event_pb2.Event, summary.scalar
        self._checksum = record_writer.masked_crc32c
        os.makedirs(directory, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
        self._file = open(os.path.join(directory, name), "ab", buffering=0)
        self._write(file_version="brain.Event:2")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=purge_step, session_log=start)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """One point of a curve."""
        self._write(step=step, summary=self._scalar(name, value))

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        data = self._event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        checks = (struct.pack("<I", self._checksum(part)) for part in (length, data))
        _append(self._file, length + next(checks) + data + next(checks))


def _append(file: io.RawIOBase, data: bytes) -> None:
    """Writes all of it, or raises: a disk that fills takes a part first."""
    while data:
        data = data[file.write(data) :]


def _keep_until(path: str, step: int) -> None:
    if not os.path.exists(path):
        return
    kept = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except json.JSONDecodeError:
                break  # A kill cut the last line.
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.writelines(kept)
    os.replace(path + ".tmp", path)


class CollapseGuard:
    """Tells when a run has collapsed: the loss at the margin while nearly every negative violates.

    All embeddings then point one way; the loss alone looks as if it had converged.
    """

    def __init__(self, *, margin: float, num_negatives: int, patience: int = 100):
        self._margin = margin
        self._num_negatives = num_negatives
        self._patience = patience
        self._seen: list[bool] = []

    def warning(self, scalars: Mapping[str, float]) -> str | None:
        """A line to show once, when every one of the last `patience` steps looked collapsed."""
        at_margin = abs(scalars["loss_text"] - self._margin) < 0.1 * self._margin
        violated = scalars["violators"] > 0.95 * self._num_negatives
        self._seen = [*self._seen, bool(at_margin and violated)][-self._patience :]
        if len(self._seen) == self._patience and np.all(self._seen):
            self._seen = []
            return (
                f"warning: collapsed? for {self._patience} steps the loss has stood at the margin "
                f"({self._margin}) while {scalars['violators']:.1f} of {self._num_negatives} "
                "negatives violate; try a lower --optimizer.learning_rate or more "
                "--optimizer.warmup_steps"
            )
        return None
