"""Where the time of training goes, what comes of it, and a window of steps for the profiler."""

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from vixml_jax.errors import InputError
from vixml_jax.runtime import host_memory

# Of a step, and how the closing line calls them. Whatever else takes time stands beside the steps.
PHASES = {"compute": "compute", "host": "host", "data": "waiting for data"}


@dataclasses.dataclass
class _Tally:
    """What was done in some steps, and the seconds of each phase."""

    seconds: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    work: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: "_Tally") -> None:
        self.seconds.update(other.seconds)
        self.work.update(other.work)

    def means(self, peak_flops: float) -> dict[str, float]:
        """Seconds a step, their shares, and what a second brings; empty without a step."""
        steps, seconds = self.work["steps"], sum(self.seconds[phase] for phase in PHASES)
        if not steps or seconds <= 0:
            return {}
        found = {"step_s": seconds / steps}
        for phase in PHASES:
            found[f"{phase}_s"] = self.seconds[phase] / steps
            found[f"{phase}_share"] = self.seconds[phase] / seconds
        for what in ("queries", "labels", "tokens"):
            found[f"{what}_per_s"] = self.work[what] / seconds
        found["flops_per_s"] = self.work["flops"] / seconds
        if peak_flops:
            found["mfu"] = found["flops_per_s"] / peak_flops
        return found


class Watch:
    """Tells the phases of a step apart, without a look at the device that a step would not take.

    Every moment from `start` to the last `lap` belongs to one phase, so phases sum to the wall
    time. Those of a step are of the thread that drives it: "data", blocked on the pipeline; "host",
    placing a batch, dispatching its step, counting, writing; and "compute", blocked on the device:
    on a step some steps back, so that few are under way, and where scalars are read. The device
    works on while the host does, so "compute" is the least share of the time that it was busy, and
    the other two are the most that it may have been idle. Other phases (compiling, saving) are
    no part of a step and counted beside.

    Args:
      peak_flops: Operations a second of all devices together; 0: not known.
      now: Seconds, from any start.
    """

    def __init__(self, *, peak_flops: float, now: Callable[[], float] = time.perf_counter):
        self._peak_flops, self._now = peak_flops, now
        self._last = now()
        self._recent, self._all = _Tally(), _Tally()

    def start(self) -> None:
        """What was since the last lap belongs to no phase."""
        self._last = self._now()

    def lap(self, phase: str) -> None:
        """What was since the last lap, or start, belongs to this phase."""
        now = self._now()
        self._recent.seconds[phase] += now - self._last
        self._last = now

    def count(self, *, queries: int, labels: int, tokens: int, flops: float) -> None:
        """One step is done or under way.

        Args:
          queries: Of its batch, padding left out; so with `labels`.
          labels: Candidates.
          tokens: Positions of both, pictures and prompt among them.
          flops: Operations that it needs.
        """
        self._recent.work.update(
            steps=1, queries=queries, labels=labels, tokens=tokens, flops=flops
        )

    def report(self) -> dict[str, float]:
        """Means over the steps since the last report: `step_s`, `data_share`, `mfu`, ..."""
        recent, self._recent = self._recent, _Tally()
        self._all.add(recent)
        found = recent.means(self._peak_flops)
        return found and found | {"peak_memory_gib": host_memory.peak_of_a_device() / 2**30}

    def closing(self) -> str:
        """A line on all reported steps; empty if there was none."""
        found = self._all.means(self._peak_flops)
        if not found:
            return ""
        step_ms = 1e3 * found["step_s"]
        shares = ", ".join(f"{said} {found[f'{x}_share']:.1%}" for x, said in PHASES.items())
        speed = f"{found['flops_per_s'] / 1e9:,.0f} GFLOP/s"
        if "mfu" in found:
            speed = f"MFU {found['mfu']:.1%}"
        whose = "of the process" if jax.default_backend() == "cpu" else "a device"
        parts = [
            f"step {step_ms:,.{0 if step_ms >= 100 else 1}f} ms: {shares.replace('%', ' %')}",
            f"{found['queries_per_s']:,.0f} queries/s, {found['tokens_per_s']:,.0f} tokens/s",
            speed.replace("%", " %"),
            f"peak memory {whose} {host_memory.peak_of_a_device() / 2**30:.2f} GiB",
        ]
        beside = [
            f"{phase} {seconds:.1f} s"
            for phase, seconds in self._all.seconds.items()
            if phase not in PHASES and seconds >= 0.05
        ]
        return "; ".join(parts + ([f"beside the steps: {', '.join(beside)}"] if beside else []))


def parse_window(text: str) -> tuple[int, int] | None:
    """START:END of `--profile_steps`; None if it is empty.

    Raises:
      InputError: If it is something else.
    """
    if not text:
        return None
    start, colon, end = text.partition(":")
    if colon and start.isdecimal() and end.isdecimal() and int(start) < int(end):
        return int(start), int(end)
    raise InputError(
        f"--profile_steps={text}: expected START:END, as 100:110 for the ten steps after step 100"
    )


class Profiler:
    """Writes what host and devices do in a window of steps, by JAX's profiler.

    Args:
      window: (start, end): the steps after `start` up to and including `end`, or to the end of
        their epoch; None: none.
      directory: Where to.
      say: Shows a line to the user.
      shown: Where the user will find it, if not there.
    """

    def __init__(
        self,
        window: tuple[int, int] | None,
        directory: str,
        say: Callable[[str], None],
        shown: str = "",
    ):
        self._window = window if jax.process_index() == 0 else None
        self._directory, self._say, self._shown = directory, say, shown or directory
        self._first: int | None = None  # Of the trace under way.
        self._step = 0

    def at(self, step: int, under_way: Any) -> None:
        """To be called between steps.

        Args:
          step: Steps dispatched so far.
          under_way: Results of steps that may not be done; awaited at either end of the window.
        """
        self._step = step
        if self._window is None:
            return
        start, end = self._window
        if self._first is None and start <= step < end:
            jax.block_until_ready(under_way)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # It would slow down the host that is to be seen.
            # The second form of the trace is for those who do not want to install a viewer.
            jax.profiler.start_trace(
                self._directory, create_perfetto_trace=True, profiler_options=options
            )
            self._first = step + 1
        elif self._first is not None and step >= end:
            jax.block_until_ready(under_way)
            self.stop()

    def stop(self) -> None:
        """Ends the trace, if there is one, and says where it lies."""
        if self._first is None:
            return
        jax.profiler.stop_trace()
        self._say(
            f"profile of steps {self._first} to {self._step}: {self._shown}; to look at it: "
            f"pip install xprof && xprof --logdir={self._shown}; or open its "
            "perfetto_trace.json.gz at https://ui.perfetto.dev"
        )
        self._first = self._window = None

    def close(self) -> None:
        """Ends what is under way; says so if a profile was asked for and there is none."""
        self.stop()
        if self._window is not None:
            start, end = self._window
            self._say(f"--profile_steps={start}:{end}: none of these steps was run, no profile")
            self._window = None
