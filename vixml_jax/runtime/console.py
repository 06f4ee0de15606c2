"""What a command prints beside its results: status lines, and details with --verbose."""

import enum
import sys


class Level(enum.IntEnum):
    """How much a command prints."""

    QUIET = 0  # Results, warnings and errors.
    NORMAL = 1
    VERBOSE = 2


_level = Level.NORMAL


def set_level(level: Level) -> None:
    """Sets the level of this process; commands do so from `--quiet` and `--verbose`."""
    global _level
    _level = level


def status(text: str) -> None:
    """Prints a status line, unless `--quiet` is given."""
    if _level >= Level.NORMAL:
        print(text, flush=True)


def warning(text: str) -> None:
    """Prints a warning, also with `--quiet`."""
    print(f"warning: {text}", flush=True)


def detail(text: str) -> None:
    """Prints a line that only `--verbose` shows."""
    if _level >= Level.VERBOSE:
        print(text, flush=True)


def shows_status() -> bool:
    """Whether status lines and progress are shown at all."""
    return _level >= Level.NORMAL


def shows_bars() -> bool:
    """Whether progress bars are drawn: only on a terminal, never into a log file."""
    return shows_status() and sys.stderr.isatty()
