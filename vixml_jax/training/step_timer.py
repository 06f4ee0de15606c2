"""Measures the phases of a training step and its throughput, and profiles a window of steps."""

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from vixml_jax.errors import InputError
from vixml_jax.runtime import host_memory

# The phases of a step, with their names in the summary. Time of any other phase (compiling, saving)
# is counted separately.
PHASES = {"compute": "compute", "host": "host", "data": "waiting for data"}


@dataclasses.dataclass
class _Tally:
    """Seconds of each phase, and the work done, over some steps."""

    seconds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    work: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "_Tally") -> None:
        self.seconds.update(other.seconds)
        self.work.update(other.work)

    def means(self, peak_flops: float) -> dict[str, float]:
        """Returns seconds per step, the share of each phase, and rates; empty without steps."""
        steps, seconds = self.work["steps"], sum(self.seconds[phase] for phase in PHASES)
        if not steps or seconds <= 0:
            return {}
        means = {"step_s": seconds / steps}
        for phase in PHASES:
            means[f"{phase}_s"] = self.seconds[phase] / steps
            means[f"{phase}_share"] = self.seconds[phase] / seconds
        for unit in ("queries", "labels", "tokens"):
            means[f"{unit}_per_s"] = self.work[unit] / seconds
        means["flops_per_s"] = self.work["flops"] / seconds
        if peak_flops:
            means["mfu"] = means["flops_per_s"] / peak_flops
        return means


class StepTimer:
    """Step-time breakdown: how long each phase of a training step takes.

    It never waits for a device where the step itself would not. Every moment from `start` to the
    last `lap` belongs to exactly one phase, so the phases add up to the wall time. The phases of a
    step are those of the thread that drives it:

    - "data": waiting for the input pipeline,
    - "host": placing a batch, dispatching its step, counting, writing metrics,
    - "compute": waiting for the device, either for an earlier step (so that only a few are
      queued) or for scalars.

    The device runs while the host works, so the share of "compute" is a lower bound of the time
    that the device was busy, and the other two are upper bounds of the time that it was idle.
    Other phases (compiling, saving) are not part of a step and are counted separately.

    Args:
      peak_flops: Operations per second of all devices together; 0 if unknown.
      now: Clock, in seconds from any start.
    """

    def __init__(self, *, peak_flops: float, now: Callable[[], float] = time.perf_counter):
        self._peak_flops, self._now = peak_flops, now
        self._last = now()
        self._recent, self._all = _Tally(), _Tally()

    def start(self) -> None:
        """Starts the clock; the time since the last lap belongs to no phase."""
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """Adds the time since the last lap, or start, to a phase."""
        now = self._now()
        self._recent.seconds[phase] += now - self._last
        self._last = now

    def seconds(self, phase: str) -> float:
        """Total seconds of a phase so far."""
        return self._all.seconds[phase] + self._recent.seconds[phase]

    def count(self, *, queries: int, labels: int, tokens: int, flops: float) -> None:
        """Counts one step, finished or dispatched.

        Args:
          queries: Queries of its batch, without padding.
          labels: Candidate labels of its batch, without padding.
          tokens: Positions of both, including images and the prompt.
          flops: Operations that the step needs.
        """
        self._recent.work.update(
            steps=1, queries=queries, labels=labels, tokens=tokens, flops=flops
        )

    def report(self) -> dict[str, float]:
        """Returns means over the steps since the last report: `step_s`, `data_share`, `mfu`, ..."""
        recent, self._recent = self._recent, _Tally()
        self._all.add(recent)
        means = recent.means(self._peak_flops)
        return means and means | {"peak_memory_gib": host_memory.peak_device_memory() / 2**30}

    def summary(self) -> str:
        """Returns one line about all reported steps; empty if there were none."""
        means = self._all.means(self._peak_flops)
        if not means:
            return ""
        step_ms = 1e3 * means["step_s"]
        shares = ", ".join(f"{name} {means[f'{x}_share']:.1%}" for x, name in PHASES.items())
        speed = f"{means['flops_per_s'] / 1e9:,.0f} GFLOP/s"
        if "mfu" in means:
            speed = f"MFU {means['mfu']:.1%}"
        tokens = f", {means['tokens_per_s']:,.0f} tokens/s" if means["tokens_per_s"] else ""
        owner = "process" if jax.default_backend() == "cpu" else "device"
        parts = [
            f"training step {step_ms:,.{0 if step_ms >= 100 else 1}f} ms: "
            f"{shares.replace('%', ' %')}",
            f"{means['queries_per_s']:,.0f} queries/s{tokens}",
            speed.replace("%", " %"),
            f"peak memory per {owner} {host_memory.peak_device_memory() / 2**30:.2f} GiB",
        ]
        other_phases = [
            f"{phase} {seconds:.1f} s"
            for phase, seconds in self._all.seconds.items()
            if phase not in PHASES and seconds >= 0.05
        ]
        if other_phases:
            parts.append(f"outside of steps: {', '.join(other_phases)}")
        return "; ".join(parts)


def parse_window(text: str) -> tuple[int, int] | None:
    """Returns START and END of `--profile_steps`; None if it is empty.

    Raises:
      InputError: If it is not such a window.
    """
    if not text:
        return None
    start, colon, end = text.partition(":")
    if colon and start.isdecimal() and end.isdecimal() and int(start) < int(end):
        return int(start), int(end)
    raise InputError(
        f"--profile_steps={text}: expected START:END, such as 100:110 for the ten steps after step "
        "100"
    )


class Profiler:
    """Traces host and devices during a window of steps with the JAX profiler.

    Args:
      window: (start, end): the steps after `start` up to and including `end`, cut off at the end of
        their epoch; None for no profile.
      directory: Where the trace is written.
      report: Called with a line for the user.
      shown: Path of the trace as the user will find it, if it is not `directory`.
    """

    def __init__(
        self,
        window: tuple[int, int] | None,
        directory: str,
        report: Callable[[str], None],
        shown: str = "",
    ):
        self._window = window if jax.process_index() == 0 else None
        self._directory, self._report, self._shown = directory, report, shown or directory
        self._first: int | None = None  # First step of the trace being written.
        self._step = 0

    def at(self, step: int, unread: Any) -> None:
        """Starts or ends the trace where it is due; to be called between steps.

        Args:
          step: Number of steps dispatched so far.
          unread: Results of steps that may still be running; awaited at either end of the window.
        """
        self._step = step
        if self._window is None:
            return
        start, end = self._window
        if self._first is None and start <= step < end:
            jax.block_until_ready(unread)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # Tracing Python calls would slow the host down.
            # The Perfetto trace can be opened without installing anything.
            jax.profiler.start_trace(
                self._directory, create_perfetto_trace=True, profiler_options=options
            )
            self._first = step + 1
        elif self._first is not None and step >= end:
            jax.block_until_ready(unread)
            self.stop()

    def stop(self) -> None:
        """Ends the trace, if one is being written, and reports its path."""
        if self._first is None:
            return
        jax.profiler.stop_trace()
        self._report(
            f"profile of steps {self._first} to {self._step} written to {self._shown}; to view it, "
            f"run `pip install xprof && xprof --logdir={self._shown}`, or open its "
            "perfetto_trace.json.gz at https://ui.perfetto.dev"
        )
        self._first = self._window = None

    def close(self) -> None:
        """Ends the trace; reports if a profile was requested and none was written."""
        self.stop()
        if self._window is not None:
            start, end = self._window
            self._report(f"--profile_steps={start}:{end}: none of these steps was run; no profile")
            self._window = None
