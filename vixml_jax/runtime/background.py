"""Work of the host that a thread does ahead of its use, in order and bounded."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TypeVar

_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


def ahead(
    function: Callable[[_Item], _Result], items: Iterable[_Item], count: int
) -> Iterator[_Result]:
    """Yields `function(item)` of each item, in order; a thread computes them before they are due.

    An exception of `function` is raised where its result is due. When the iterator is closed, no
    further call begins; use `contextlib.closing` where an exception may end the loop over it.

    Args:
      function: Called in the thread, for one item at a time.
      items: Read in the thread of the caller.
      count: Results that are computed ahead at most.
    """
    waiting: collections.deque[futures.Future[_Result]] = collections.deque()
    with futures.ThreadPoolExecutor(1) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
