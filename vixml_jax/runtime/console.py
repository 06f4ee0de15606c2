"""What a command prints beside its results: status lines, and details with --verbose."""

import enum
import errno
import io
import os
import re
import stat
import sys

from vixml_jax.errors import OutputError


class Level(enum.IntEnum):
    """How much a command prints."""

    QUIET = 0  # Results, warnings and errors.
    NORMAL = 1
    VERBOSE = 2


_level = Level.NORMAL
_CONTROL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)"
)


class _Output(io.TextIOWrapper):
    """Standard output whose errors are told from those of other files.

    A terminal that was closed is no error: a run that is not stopped by it goes on without one.
    """

    def write(self, text: str) -> int:
        try:
            return super().write(printable(text))
        except OSError as error:
            self._discard_or_raise(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._discard_or_raise(error)

    def _discard_or_raise(self, error: OSError) -> None:
        if error.errno != errno.EIO or not stat.S_ISCHR(os.fstat(self.fileno()).st_mode):
            raise OutputError(error) from None
        discard_output()


def printable(text: str) -> str:
    r"""The text with control characters written as in Python, such as \x1b.

    They could come from data: a terminal would obey them, and bidirectional ones would reorder what
    a reader sees. Line ends and tabs stay; a carriage return alone, which would overwrite the line,
    does not.
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def guard_output() -> None:
    """From here on, a standard output that cannot be written to raises `OutputError`.

    Closed streams are opened on /dev/null, so that no other file gets their descriptors.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
    out = sys.stdout
    if type(out) is io.TextIOWrapper:
        sys.stdout = _Output(
            out.detach(), out.encoding, out.errors, line_buffering=out.line_buffering
        )


def discard_output() -> None:
    """Sends the rest of standard output nowhere, so that the interpreter's last flush succeeds."""
    _discard(1)


def discard_error() -> None:
    """The same for standard error."""
    _discard(2)


def _discard(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


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
