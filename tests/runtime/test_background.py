"""Results that a thread computes ahead: in order, bounded, and ended with the loop over them."""

import contextlib
import threading
import time

import pytest

from vixml_jax.runtime import background


def test_results_are_in_order_and_at_most_some_are_ahead():
    begun, caller = [], threading.get_ident()

    def square(item):
        assert threading.get_ident() != caller
        begun.append(item)
        return item**2

    for count in (0, 1, 3):
        begun.clear()
        for item, result in enumerate(background.ahead(square, range(9), count)):
            allowed, deadline = min(9, item + count + 1), time.monotonic() + 10
            while len(begun) < allowed and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.005)  # For a call that must not begin.
            assert result == item**2 and len(begun) == allowed
    assert list(background.ahead(square, [], 2)) == []


def test_an_error_is_raised_where_its_result_is_due():
    results = background.ahead(lambda item: 6 // item, [3, 2, 0, 1], 3)
    assert next(results) == 2 and next(results) == 3
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_no_call_begins_after_the_loop_has_ended():
    begun, free = [], threading.Event()

    def wait(item):
        begun.append(item)
        assert item == 0 or free.wait(10)

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        with contextlib.closing(background.ahead(wait, range(9), 4)) as results:
            for _ in results:
                threading.Timer(0.05, free.set).start()
                raise KeyboardInterrupt
    assert begun in ([0], [0, 1])
    assert threading.active_count() <= threads + 1  # The timer's may be ending.
