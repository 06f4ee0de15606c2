"""Processes as threads: for what they do together on the host alone."""

import threading
from concurrent import futures


class _Group:
    def __init__(self, index, count, table, barrier):
        self.index, self.count = index, count
        self._table, self._barrier = table, barrier

    def _swap(self, given, take):
        self._table[self.index] = given
        self._barrier.wait()
        taken = [take(x) for x in self._table]
        self._barrier.wait()
        return taken

    def gather(self, x, rows=None):
        if rows is not None:
            assert len(x) == rows[self.index]
        return self._swap(x.copy(), lambda given: given)

    def exchange(self, parts):
        assert len(parts) == self.count
        return self._swap([part.copy() for part in parts], lambda given: given[self.index])


def together(count, work):
    """What `work(group)` returns in each of `count` processes."""
    table, barrier = [None] * count, threading.Barrier(count, timeout=120)

    def run(index):
        try:
            return work(_Group(index, count, table, barrier))
        except BaseException:
            barrier.abort()
            raise

    with futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
