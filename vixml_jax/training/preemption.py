"""Requests to stop a run by a signal, and the agreement by which all processes stop at one step."""

import collections
import contextlib
import signal
import threading
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vixml_jax import errors
from vixml_jax.errors import Preempted
from vixml_jax.parallel import sharding
from vixml_jax.runtime import progress, signals

GO_ON, SAVE, STOP = range(3)  # Requests at the end of a step; the largest one is followed.
# What a signal does: the main thread unwinds, the process leaves at once, or it is only recorded.
_UNWIND, _LEAVE, _DEFER = range(3)


class StopSignal:
    """A request to stop this process, made by SIGTERM, SIGINT or SIGHUP (a closed terminal).

    By default a signal raises `Preempted` in the main thread, which cleans up; if that takes too
    long, because a program is being compiled say, the process ends all the same. Inside `leaving`
    the process ends at once. Inside `deferred` a signal is only recorded in `requested_by`. With
    several processes it is always deferred, since the others would wait for the one that left;
    they agree at the end of each step (`Agreement`) and in `interruptible`. A second signal ends
    the process at once with the exit status of the signal.

    Attributes:
      requested_by: Name of the signal that arrived, "SIGTERM" say; None if there was none.
    """

    def __init__(self) -> None:
        self.requested_by: str | None = None
        self._reaction = _UNWIND

    @contextlib.contextmanager
    def installed(self) -> Iterator["StopSignal"]:
        """Installs the signal handlers within the context; only the main thread may do so.

        After the context the signals are ignored: the process is about to end, and its exit
        status is settled.
        """
        with signals.handling(self._handle, self._watch):
            yield self

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        """Ends the process at once on a signal: for work that writes nothing worth keeping.

        With several processes, a signal is recorded.
        """
        with self._reacting(_LEAVE if errors.is_alone() else _DEFER):
            yield

    @contextlib.contextmanager
    def unwinding(self) -> Iterator[None]:
        """Raises `Preempted` where a signal arrives, inside `leaving` too, for work to clean up."""
        with self._reacting(_UNWIND if errors.is_alone() else _DEFER):
            yield

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Records a signal within the context instead of raising `Preempted`."""
        with self._reacting(_DEFER):
            yield

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises `Preempted` soon after a signal arrives, inside `deferred` too.

        For work that may be abandoned because a resumed run repeats it. The exception is raised
        where progress is shown or `progress.check` is called, between two programs, and not in the
        signal handler, which may run in a callback of a library that swallows it. All processes
        enter and leave the context together.
        """
        self.raise_if_requested()
        with progress.checking(self._check):
            yield
        self.raise_if_requested()

    def raise_if_requested(self) -> None:
        """Raises `Preempted` if any process was asked to stop; all processes call it together."""
        requested = self.requested_by is not None
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            requested = bool(np.any(multihost_utils.process_allgather(np.bool_(requested))))
        if requested:
            raise self.preempted()

    def preempted(self, outcome: str = errors.NOTHING_UNSAVED) -> Preempted:
        """The exception to raise; see `errors.stopped_by` for the outcome."""
        return errors.stopped_by(self.requested_by or "a signal to another process", outcome)

    @contextlib.contextmanager
    def _reacting(self, reaction: int) -> Iterator[None]:
        before, self._reaction = self._reaction, reaction
        try:
            yield
        finally:
            self._reaction = before

    def _check(self, together: bool) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and (together or jax.process_count() == 1):
            self.raise_if_requested()

    def _handle(self, number: int) -> None:
        first, self.requested_by = self.requested_by is None, signal.Signals(number).name
        if first and self._reaction == _UNWIND:
            raise self.preempted()

    def _watch(self, number: int, over: threading.Event) -> None:
        if self._reaction == _UNWIND and over.wait(signals.GRACE_S):
            return
        if self._reaction != _DEFER:  # A recorded request is followed where it is looked at.
            self.requested_by = signal.Signals(number).name
            signals.leave(errors.last_line(self.preempted()), errors.PREEMPTED)


class Agreement:
    """What all processes do at the end of a step: the largest of their requests.

    A single process follows its own request. Several processes reduce their requests by a small
    program on the devices and read the result two steps later, so that earlier steps may still be
    running and devices do not wait for hosts. Each epoch makes a new agreement.

    Args:
      mesh: All devices of all processes.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._pending: collections.deque[jax.Array] = collections.deque()
        self._largest = jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))

    def __call__(self, request: int) -> int:
        """What to do now; every process calls it at the end of every step.

        Args:
          request: `GO_ON`, `SAVE` or `STOP`, from this process.

        Returns:
          The largest request that the processes made, two steps ago if there are several.
        """
        if jax.process_count() == 1:
            return request
        one_per_device = NamedSharding(self._mesh, P(self._mesh.axis_names))
        requests = jax.make_array_from_callback(
            (self._mesh.size,), one_per_device, lambda index: np.full(1, request, np.int32)
        )
        self._pending.append(self._largest(requests))
        return int(self._pending.popleft()) if len(self._pending) > 2 else GO_ON
