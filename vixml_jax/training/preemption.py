"""Handling of SIGTERM and SIGINT, and the agreement by which all processes stop at one step."""

import collections
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vixml_jax.errors import Preempted
from vixml_jax.parallel import sharding

GO_ON, SAVE, STOP = range(3)  # Requests at the end of a step; the largest one is followed.
# Schedulers signal a process and then its process group: within this time it is one signal.
_SAME_SIGNAL_S = 1.0
_NOTHING_UNSAVED = "no unsaved training progress"


class StopSignal:
    """A request to stop this process, made by SIGTERM or SIGINT.

    By default the first signal raises `Preempted` where it arrives. Inside `deferred` it is only
    recorded in `requested_by`. With several processes it is always deferred, since the others
    would wait for the one that left; they agree at the end of each step (`Agreement`) and in
    `interruptible`. A second signal ends the process at once with the exit status of the signal.

    Attributes:
      requested_by: Name of the signal that arrived, "SIGTERM" say; None if there was none.
    """

    def __init__(self) -> None:
        self.requested_by: str | None = None
        self._requested_at = 0.0
        self._is_deferred = False

    @contextlib.contextmanager
    def installed(self) -> Iterator["StopSignal"]:
        """Installs the signal handlers within the context; only the main thread may do so.

        After the context both signals are ignored: the process is about to end, and its exit
        status is settled.
        """
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            signal.signal(number, self._handle)
        try:
            yield self
        finally:
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Records a signal within the context instead of raising `Preempted`."""
        with self._deferring(True):
            yield

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raises `Preempted` as soon as a signal arrives, inside `deferred` too.

        For work that may be abandoned anywhere because a resumed run repeats it. All processes
        enter and leave the context together.
        """
        self.raise_if_requested()
        with self._deferring(False):
            yield
        self.raise_if_requested()

    def raise_if_requested(self) -> None:
        """Raises `Preempted` if any process was asked to stop; all processes call it together."""
        requested = self.requested_by is not None
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            requested = bool(np.any(multihost_utils.process_allgather(np.bool_(requested))))
        if requested:
            raise self.preempted(_NOTHING_UNSAVED)

    def preempted(self, outcome: str) -> Preempted:
        """The exception to raise.

        Args:
          outcome: What became of the run, for the message: "saved at step 12".
        """
        return Preempted(
            f"stopped by {self.requested_by or 'a signal to another process'}: {outcome}"
        )

    @contextlib.contextmanager
    def _deferring(self, deferred: bool) -> Iterator[None]:
        before, self._is_deferred = self._is_deferred, deferred
        try:
            yield
        finally:
            self._is_deferred = before

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.requested_by is None:
            self.requested_by, self._requested_at = signal.Signals(number).name, now
            if not self._is_deferred and jax.process_count() == 1:
                raise self.preempted(_NOTHING_UNSAVED)
        elif now - self._requested_at > _SAME_SIGNAL_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


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
