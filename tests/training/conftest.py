"""Runs that heed signals leave the handlers of the test's process as they were."""

import signal

import pytest


@pytest.fixture(autouse=True)
def _own_handlers():
    numbers = signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
