"""Concurrent calls run together, each gets its own result, and none is lost."""

import threading
import time
from concurrent import futures

import numpy as np
import pytest

from vixml_jax.serving.coalescing import Coalescer


class Recorder:
    """Squares numbers; keeps the batches, and lets the first one wait for `go_on`."""

    def __init__(self):
        self.batches, self.go_on, self.begun = [], threading.Event(), threading.Event()

    def __call__(self, calls):
        self.batches.append(list(calls))
        self.begun.set()
        assert self.go_on.wait(60)
        return [ValueError(f"bad {x}") if x < 0 else x * x for x in calls]


def waiting(coalescer):
    return len(coalescer._queue)


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_calls_that_arrive_meanwhile_run_together_in_order():
    run = Recorder()
    coalescer = Coalescer(run, max_size=6)
    with futures.ThreadPoolExecutor(8) as pool:
        first = pool.submit(coalescer, 7, size=1)
        assert run.begun.wait(60)
        others = []
        for number, (size, kind) in enumerate([(3, 0), (1, 1), (2, 0), (2, 0), (9, 1), (1, 0)]):
            others.append(pool.submit(coalescer, number, size=size, kind=kind))
            wait_until(lambda number=number: waiting(coalescer) == number + 1)
        run.go_on.set()
        assert first.result() == 49
        assert [other.result() for other in others] == [number**2 for number in range(6)]
    # One of another kind lets none of the first kind wait, nor does one that does not fit.
    assert run.batches == [[7], [0, 2, 5], [1], [3], [4]]


def test_errors_go_to_their_calls():
    run = Recorder()
    coalescer = Coalescer(run, max_size=100)
    with futures.ThreadPoolExecutor(8) as pool:
        first = pool.submit(coalescer, 1, size=1)
        assert run.begun.wait(60)
        bad, good = pool.submit(coalescer, -5, size=1), pool.submit(coalescer, 5, size=1)
        wait_until(lambda: waiting(coalescer) == 2)
        run.go_on.set()
        assert (first.result(), good.result()) == (1, 25)
        with pytest.raises(ValueError, match="bad -5"):
            bad.result()


@pytest.mark.parametrize("raised", [KeyError("all"), KeyboardInterrupt()])
def test_what_a_batch_raises(raised):
    """An error ends all its calls; an interruption that of its thread alone."""
    begun, go_on, batches = threading.Event(), threading.Event(), []

    def run(calls):
        batches.append(list(calls))
        if len(batches) == 1:
            begun.set()
            assert go_on.wait(60)
        if len(batches) == 2:
            raise raised
        return calls

    coalescer = Coalescer(run, max_size=100)
    with futures.ThreadPoolExecutor(8) as pool:
        first = pool.submit(coalescer, 0, size=1)
        assert begun.wait(60)
        others = []
        for number in (1, 2, 3):
            others.append(pool.submit(coalescer, number, size=1))
            wait_until(lambda number=number: waiting(coalescer) == number)
        go_on.set()
        assert first.result() == 0
        with pytest.raises(type(raised)):
            others[0].result()
        if isinstance(raised, Exception):
            for other in others[1:]:
                with pytest.raises(KeyError):
                    other.result()
        else:
            assert [other.result() for other in others[1:]] == [2, 3]
        assert coalescer(9, size=1) == 9


def test_a_wrong_number_of_results_is_an_error():
    coalescer = Coalescer(lambda calls: [], max_size=1)
    with pytest.raises(RuntimeError, match="found 0 results of 1 calls"):
        coalescer(1, size=1)


def test_a_call_that_waits_too_long_never_begins():
    run = Recorder()
    coalescer = Coalescer(run, max_size=100)
    with futures.ThreadPoolExecutor(8) as pool:
        first = pool.submit(coalescer, 1, size=1)
        assert run.begun.wait(60)
        with pytest.raises(TimeoutError, match=r"no result within 0\.01 s"):
            coalescer(2, size=1, timeout=0.01)
        late = pool.submit(coalescer, 3, size=1, timeout=60)
        wait_until(lambda: waiting(coalescer) == 1)
        run.go_on.set()
        assert (first.result(), late.result()) == (1, 9)
    assert run.batches == [[1], [3]]


def test_many_threads_with_timeouts_and_errors():
    """Every call gets its own result, its own error, or ends in time; nothing waits for ever."""
    sizes, lock = [], threading.Lock()

    def run(calls):
        assert lock.acquire(blocking=False)  # One batch at a time.
        try:
            time.sleep(0.002)
            sizes.append(len(calls))
            return [KeyError(x) if x % 7 == 0 else -x for x in calls]
        finally:
            lock.release()

    coalescer = Coalescer(run, max_size=20)

    def ask(seed):
        rng, timeouts = np.random.default_rng(seed), 0
        for number in rng.integers(1, 10**6, 60).tolist():
            timeout = float(rng.choice([0.0005, 0.003, 60.0]))
            try:
                result = coalescer(number, size=1, kind=number % 2, timeout=timeout)
                assert result == -number and number % 7
            except KeyError as error:
                assert error.args == (number,) and number % 7 == 0
            except TimeoutError:
                assert timeout < 1
                timeouts += 1
        return timeouts

    with futures.ThreadPoolExecutor(32) as pool:
        timeouts = sum(pool.map(ask, np.random.default_rng().integers(0, 2**32, 32).tolist()))
    assert timeouts and max(sizes) > 4
    assert sum(sizes) >= 32 * 60 - timeouts
    assert not coalescer._queue and not coalescer._is_led
