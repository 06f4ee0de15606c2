"""A group of threads that stands for processes, to test exchange of host arrays."""

import threading
from concurrent import futures


class _Group:
    def __init__(self, index, count, table, barrier):
        self.index, self.count = index, count
        self._table, self._barrier = table, barrier

    def _swap(self, value, select):
        self._table[self.index] = value
        self._barrier.wait()
        selected = [select(x) for x in self._table]
        self._barrier.wait()
        return selected

    def gather(self, x, rows=None):
        if rows is not None:
            assert len(x) == rows[self.index]
        return self._swap(x.copy(), lambda value: value)

    def exchange(self, parts):
        assert len(parts) == self.count
        return self._swap([part.copy() for part in parts], lambda parts: parts[self.index])


def together(count, work):
    """Results of `work(group)` in each of `count` threads."""
    table, barrier = [None] * count, threading.Barrier(count, timeout=120)

    def run(index):
        try:
            return work(_Group(index, count, table, barrier))
        except BaseException:
            barrier.abort()
            raise

    with futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
