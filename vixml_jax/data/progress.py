"""How far long work is: a bar on a terminal, and anywhere one line that says how long it takes."""

import contextlib
import time
from collections.abc import Callable, Iterator

_FIRST = 2.0  # Seconds after which the time that is left can be told.


@contextlib.contextmanager
def watch(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to be called with the number of items just done.

    Work that takes longer than two seconds says so once, as `train texts: 2,248,619 at 91,000 a
    second, about 23 s more`, also where no terminal is attached.

    Args:
      what: Is done, in the plural.
      total: Items there are.
    """
    import tqdm

    start, done, said = time.perf_counter(), 0, False
    with tqdm.tqdm(total=total, desc=what, unit="", delay=_FIRST, disable=None) as bar:

        def update(count: int) -> None:
            nonlocal done, said
            done += count
            seconds = time.perf_counter() - start
            if not said and done and seconds > _FIRST:
                said = True
                speed = done / seconds
                left = (total - done) / speed
                bar.write(f"{what}: {total:,} at {speed:,.0f} a second, about {left:.0f} s more")
            bar.update(count)

        yield update
