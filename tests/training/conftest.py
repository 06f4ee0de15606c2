"""Restores the signal handlers after tests of runs that install their own."""

import signal

import pytest


@pytest.fixture(autouse=True)
def _restore_signal_handlers():
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
