"""Calls of several threads that run together, since one batch takes less time than its parts."""

import collections
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

Call = TypeVar("Call")
Result = TypeVar("Result")


class _Waiting(Generic[Call, Result]):
    """A call that waits for its turn.

    Attributes:
      call: What to run.
      size: How much it takes of a batch.
      kind: Calls of one kind run together.
      turn: Set once the call is done, or leads the next batch.
      outcome: Result, or what was raised; None: not done.
    """

    def __init__(self, call: Call, size: int, kind: Hashable):
        self.call, self.size, self.kind = call, size, kind
        self.turn = threading.Event()
        self.outcome: tuple[Result | None, BaseException | None] | None = None


class Coalescer(Generic[Call, Result]):
    """Runs calls that arrive while others run as one batch.

    A call that finds nothing running runs at once, in its own thread. Those that arrive meanwhile
    wait; then the first of them leads a batch of as many as fit, and so on. There is no thread
    beside those of the callers, and a call alone waits for nobody.
    """

    def __init__(
        self, run: Callable[[Sequence[Call]], Sequence[Result | Exception]], max_size: int
    ):
        """Starts with no calls.

        Args:
          run: Returns the results of calls of one kind, or for each what is to be raised.
          max_size: Sum of the sizes of the calls of a batch; a larger one runs alone.
        """
        self._run, self._max_size = run, max_size
        self._lock = threading.Lock()
        self._is_led = False
        self._queue: collections.deque[_Waiting[Call, Result]] = collections.deque()

    def __call__(
        self, call: Call, *, size: int, kind: Hashable = None, timeout: float | None = None
    ) -> Result:
        """Runs a call, together with others, and returns its result.

        Args:
          call: What to run.
          size: How much it takes of a batch.
          kind: Only calls of one kind run together.
          timeout: Seconds to wait for others; None: any time.

        Raises:
          TimeoutError: If the result is not there in time. A call that has not begun never begins.
          Exception: What `run` returned for the call, or raised.
        """
        own: _Waiting[Call, Result] = _Waiting(call, size, kind)
        with self._lock:
            self._queue.append(own)
            if not self._is_led:
                self._is_led = True
                own.turn.set()
        try:
            if not own.turn.wait(timeout):
                raise TimeoutError(f"no result within {timeout:g} s")
        except BaseException:
            self._give_up(own)
            raise
        if own.outcome is None:
            self._lead(own)
        result, error = own.outcome
        if error is not None:
            raise error
        return result

    def _give_up(self, own: _Waiting[Call, Result]) -> None:
        """Takes a call out of the queue; one that has begun ends without a reader."""
        with self._lock:
            leads = own.turn.is_set() and own.outcome is None
            if own in self._queue:
                self._queue.remove(own)
            if leads:
                self._pass_on()

    def _lead(self, own: _Waiting[Call, Result]) -> None:
        """Runs the batch of a call, the first in the queue, and lets the next one lead."""
        with self._lock:
            batch = self._take()
        outcomes: list[tuple[Result | None, BaseException | None]] = []
        try:
            for outcome in self._run([one.call for one in batch]):
                failed = isinstance(outcome, Exception)
                outcomes.append((None, outcome) if failed else (outcome, None))
            if len(outcomes) != len(batch):
                raise RuntimeError(f"found {len(outcomes)} results of {len(batch)} calls")
        except Exception as error:
            outcomes = [(None, error)] * len(batch)
        except BaseException as error:  # Of this thread, such as an interruption; others go on.
            own.outcome = None, error
            with self._lock:
                self._queue.extendleft(reversed([one for one in batch if one is not own]))
            batch = []
        finally:
            with self._lock:
                for one, outcome in zip(batch, outcomes, strict=True):
                    one.outcome = outcome
                    one.turn.set()
                self._pass_on()

    def _take(self) -> list[_Waiting[Call, Result]]:
        """Takes the first call out of the queue, and those of its kind that fit, in order."""
        first, left, size = self._queue[0], collections.deque(), 0
        batch = []
        for one in self._queue:
            if one is first or (one.kind == first.kind and size + one.size <= self._max_size):
                batch.append(one)
                size += one.size
            else:
                left.append(one)
        self._queue = left
        return batch

    def _pass_on(self) -> None:
        """Lets the first call in the queue lead, while the lock is held."""
        self._is_led = bool(self._queue)
        if self._queue:
            self._queue[0].turn.set()
