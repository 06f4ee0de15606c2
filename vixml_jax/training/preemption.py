"""Signals that stop a run where it can be resumed, and how all processes stop at the same step."""

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

GO_ON, SAVE, STOP = range(3)  # What a process wishes at the end of a step; the largest counts.
_SAME_S = 1.0  # Schedulers signal a process and then its group: within this it is one signal.


class Stop:
    """What SIGTERM and SIGINT ask of this process.

    The first one raises `Preempted` where it comes, but where that is held: there it is found
    by `asked`. Where there are several processes it is always held, since the others would wait
    for the one that left; they agree at the ends of steps and in `at_once`. A second signal ends
    the process on the spot, with the status that the signal has by itself.

    Attributes:
      asked: Name of the signal that came; None: none.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._since = 0.0
        self._is_held = False

    @contextlib.contextmanager
    def caught(self) -> Iterator["Stop"]:
        """Inside, signals come here; only the main thread of a program can ask for that.

        After it they count for nothing: what is left is to end the process, and how is settled.
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
    def held(self) -> Iterator[None]:
        """Inside, nothing is raised."""
        with self._holding(True):
            yield

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside what is held: work that may be left anywhere, since a resumed run does it again.

        All processes come here together.
        """
        self.check()
        with self._holding(False):
            yield
        self.check()

    def check(self) -> None:
        """Raises `Preempted` if any process was asked; all processes come here together."""
        asked = self.asked is not None
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            asked = bool(np.any(multihost_utils.process_allgather(np.bool_(asked))))
        if asked:
            raise self.preempted("nothing was under way that is not saved")

    def preempted(self, what: str) -> Preempted:
        """The exception to raise, which says what became of the run."""
        return Preempted(f"stopped by {self.asked or 'a signal to another process'}: {what}")

    @contextlib.contextmanager
    def _holding(self, held: bool) -> Iterator[None]:
        before, self._is_held = self._is_held, held
        try:
            yield
        finally:
            self._is_held = before

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked, self._since = signal.Signals(number).name, now
            if not self._is_held and jax.process_count() == 1:
                raise self.preempted("nothing was under way that is not saved")
        elif now - self._since > _SAME_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Agreement:
    """What all processes do at the end of a step: the largest of their wishes.

    A process alone does what it wishes. Several ask each other by a tiny program on the devices,
    step by step, and read the answer two steps later: so the steps before it need not be over,
    and devices do not wait for hosts. A new one belongs to each epoch.

    Args:
      mesh: All devices of all processes.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._asked: collections.deque[jax.Array] = collections.deque()
        self._largest = jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))

    def __call__(self, wish: int) -> int:
        """What to do now; every process calls it at the end of every step."""
        if jax.process_count() == 1:
            return wish
        spread = NamedSharding(self._mesh, P(self._mesh.axis_names))
        wishes = jax.make_array_from_callback(
            (self._mesh.size,), spread, lambda index: np.full(1, wish, np.int32)
        )
        self._asked.append(self._largest(wishes))
        return int(self._asked.popleft()) if len(self._asked) > 2 else GO_ON
