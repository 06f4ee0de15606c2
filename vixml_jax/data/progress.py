"""How far long work is: a bar on a terminal, and anywhere one line that says how long it takes."""

import contextlib
import time
from collections.abc import Callable, Iterator

_FIRST, _EVERY = 5.0, 60.0  # Seconds after which the time that is left is told, and told again.


@contextlib.contextmanager
def watch(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to be called with the number of items just done.

    Work that takes longer than five seconds says so, as `train texts: 2,248,619 at 91,000 a second,
    about 23 s more`, and again every minute, also where no terminal is attached. The speed is that
    since the first call or the last line, since work begins slowly.

    Args:
      what: Is done, in the plural.
      total: Items there are.
    """
    import tqdm

    done, say_at = 0, time.perf_counter() + _FIRST
    since: tuple[float, int] | None = None  # Counted from here.
    with tqdm.tqdm(total=total, desc=what, unit="", delay=_FIRST, disable=None) as bar:

        def update(count: int) -> None:
            nonlocal done, say_at, since
            done += count
            now = time.perf_counter()
            if since is None:
                since = now, done
            elif now >= say_at:
                speed = (done - since[1]) / (now - since[0])
                left = (total - done) / speed if speed else float("inf")
                bar.write(f"{what}: {total:,} at {speed:,.0f} a second, about {left:.0f} s more")
                since, say_at = (now, done), now + _EVERY
            bar.update(count)

        yield update
