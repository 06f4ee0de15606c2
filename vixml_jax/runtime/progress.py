"""Progress of long work: a bar on a terminal, plain lines in a log, nothing with --quiet."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TypeVar

from vixml_jax.runtime import console

_FIRST_S, _EVERY_S = 5.0, 60.0  # Seconds to the first plain line, and between later ones.
_check: Callable[[bool], None] | None = None
_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


@contextlib.contextmanager
def checking(check: Callable[[bool], None]) -> Iterator[None]:
    """Calls `check` at each step of progress within the context; it may raise to end the work.

    Args:
      check: Called with whether all processes of the run are at the same point of their work.
    """
    global _check
    before, _check = _check, check
    try:
        yield
    finally:
        _check = before


def check(*, together: bool = False) -> None:
    """A point where work that shows no progress may be ended; see `checking`.

    Args:
      together: Whether all processes of the run come to this point.
    """
    if _check is not None:
        _check(together)


def checked_map(
    pool: futures.Executor, function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Iterator[_Result]:
    """Yields what `pool.map` does; if the work is ended, calls that have not begun are dropped."""
    with contextlib.closing(pool.map(function, items)) as results:
        for result in results:
            check()
            yield result


@contextlib.contextmanager
def track(
    title: str, total: int | None, *, unit: str = "", shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of items just done.

    On a terminal a bar is drawn once the work takes longer than a second. Elsewhere work that takes
    longer than five seconds prints a line such as `training texts: 40 % of 2,248,619, 91,000 per
    second, about 15 s left`, and again every minute.

    Args:
      title: Name of the items, in the plural.
      total: Number of items; None: unknown.
      unit: Unit of the number of items, for the bar.
      shown: Whether to show anything.
    """

    def checked(update: Callable[[int], object]) -> Callable[[int], None]:
        def advance(count: int) -> None:
            update(count)
            check()

        return advance

    if not (shown and console.shows_status()):
        yield checked(lambda count: None)
    elif console.shows_bars():
        import tqdm

        unit = f" {unit}" if unit else ""
        with tqdm.tqdm(total=total, desc=title, unit=unit, delay=1, leave=False) as bar:
            yield checked(bar.update)
    else:
        yield checked(_Lines(title, total).update)


class _Lines:
    """Prints plain lines; the speed is measured since the first call or the last line."""

    def __init__(self, title: str, total: int | None):
        self._title, self._total, self._done = title, total, 0
        self._next = time.perf_counter() + _FIRST_S
        self._since: tuple[float, int] | None = None

    def update(self, count: int) -> None:
        self._done += count
        now = time.perf_counter()
        if self._since is None:
            self._since = now, self._done
        elif now >= self._next:
            speed = (self._done - self._since[1]) / max(now - self._since[0], 1e-9)
            console.status(f"{self._title}: {self._describe(speed)}")
            self._since, self._next = (now, self._done), now + _EVERY_S

    def _describe(self, speed: float) -> str:
        if not self._total:
            return f"{self._done:,}, {speed:,.0f} per second"
        left = f", about {(self._total - self._done) / speed:.0f} s left" if speed else ""
        done = f"{100 * self._done / self._total:.0f} % of {self._total:,}"
        return f"{done}, {speed:,.0f} per second{left}"
