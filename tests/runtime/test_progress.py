"""Progress: a bar on a terminal, plain lines elsewhere, and nothing with --quiet."""

import io
import sys
import types

import pytest
import tqdm.std

from vixml_jax.runtime import console, progress


class Terminal(io.StringIO):
    """A text stream that claims to be a terminal."""

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def normal_level(monkeypatch):
    monkeypatch.setattr(console, "_level", console.Level.NORMAL)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, for plain lines and for bars."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(tqdm.std, "time", lambda: clock.now)
    return clock


def run(clock, seconds, *, total=1000, count=100, **options):
    """Reports `count` items at each of the times."""
    with progress.track("texts", total, **options) as update:
        for clock.now in seconds:
            update(count)


@pytest.mark.parametrize("seconds,total,expected", [
    ([0.5, 1.9, 4.9], 1000, ""),
    ([3.0, 4.0, 7.0, 60.0], 1000, "texts: 30 % of 1,000, 50 per second, about 14 s left\n"),
    ([3.0, 7.0, 60.0, 66.9, 67.0], 1000,
     "texts: 20 % of 1,000, 25 per second, about 32 s left\n"
     "texts: 50 % of 1,000, 5 per second, about 100 s left\n"),
    ([9.0], 1000, ""),  # The speed is not known before the second call.
    ([3.0, 7.0], None, "texts: 200, 25 per second\n"),
])  # fmt: skip
def test_plain_lines_after_5_seconds_and_every_minute(clock, capsys, seconds, total, expected):
    run(clock, seconds, total=total)
    captured = capsys.readouterr()
    assert captured.out == expected
    assert captured.err == ""
    assert not set("\r\x1b\b") & set(captured.out)


def test_plain_line_without_progress_gives_no_remaining_time(clock, capsys):
    run(clock, [1.0, 6.0], count=0)
    assert capsys.readouterr().out == "texts: 0 % of 1,000, 0 per second\n"


def test_bar_on_a_terminal(clock, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.track("texts", 1000, unit="rows") as update:
        clock.now = 0.5
        update(100)
        assert terminal.getvalue() == ""  # The first second shows nothing.
        clock.now = 70.0
        update(400)
        bar = terminal.getvalue()
        assert bar.startswith("\rtexts:  50%|") and "500/1000" in bar and " rows/s" in bar
    assert terminal.getvalue().endswith("\r")  # The bar is removed at the end.
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_shows_nothing(clock, capsys, monkeypatch, stream):
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    console.set_level(console.Level.QUIET)
    run(clock, [1.0, 7.0, 70.0])
    assert stderr.getvalue() == capsys.readouterr().out == ""


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_not_shown_where_the_caller_turns_it_off(clock, capsys, monkeypatch, stream):
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    run(clock, [1.0, 7.0, 70.0], shown=False)
    assert stderr.getvalue() == capsys.readouterr().out == ""
