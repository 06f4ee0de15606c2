"""Exceptions that end a command early, and the exit statuses of commands.

0: done. 1: a bug, or a loss that is not finite. 2: bad input, which the user can fix. 75
(`EX_TEMPFAIL`): stopped by a signal with everything saved; the same command resumes, so launchers
start it again. 129, 130 and 143: ended by SIGHUP (a closed terminal), Ctrl-C or SIGTERM where there
is nothing to resume. 141: the reader of standard output has ended.
"""

import contextlib
import errno
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator

PREEMPTED = 75
NOTHING_UNSAVED = "no unsaved training progress"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_PATH_ERRORS = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


class InputError(ValueError):
    """Bad input; the message names the file, line or flag, what was expected and what was found."""


class NotFiniteError(FloatingPointError):
    """A loss or state that is not finite; the message says the step and how to go on."""


class Preempted(BaseException):
    """A signal asked the run to stop, and its state is saved for resuming.

    Not an `Exception`, like `KeyboardInterrupt`: libraries that catch `Exception` must not swallow
    it.
    """


class Terminated(KeyboardInterrupt):
    """A signal asked a command to end; libraries treat it as they treat Ctrl-C.

    Attributes:
      number: Of the signal.
    """

    def __init__(self, number: int):
        super().__init__()
        self.number = number


class OutputError(InputError):
    """Standard output cannot be written to.

    Attributes:
      status: Exit status of the command.
    """

    def __init__(self, error: OSError):
        closed = error.errno == errno.EPIPE
        self.status = 141 if closed else 2  # 141: as a program that SIGPIPE ends.
        reason = "its reader has ended" if closed else error.strerror
        super().__init__(f"standard output: {reason}; redirect it to a file on a disk with space")


def stopped_by(signal_name: str, outcome: str = NOTHING_UNSAVED) -> Preempted:
    """Returns the exception that ends a run.

    Args:
      signal_name: "SIGTERM" say.
      outcome: What became of the run, for the message: "saved at step 12".
    """
    return Preempted(f"stopped by {signal_name}: {outcome}")


def last_line(stop: Preempted) -> str:
    """What a run that was stopped says last: the reason, and the command that resumes it."""
    return " ".join(f"{stop}; to resume: {shlex.join(sys.orig_argv)}".split())


def is_alone() -> bool:
    """Whether this process is the only one of its run."""
    return report_failure is _no_report


@contextlib.contextmanager
def writing(where: str) -> Iterator[None]:
    """Turns a full disk or an unwritable path into an InputError.

    Args:
      where: What is written to, as the user named it: "--out=DIR".
    """
    try:
        yield
    except Exception as error:
        fault = disk_fault(error)
        if isinstance(error, OSError) and error.errno in _PATH_ERRORS:
            fault = error.strerror
        if fault is None:
            raise
        raise InputError(
            f"{where}: {fault} while writing; nothing was kept: {disk_remedy(fault)}"
        ) from None


def disk_remedy(fault: str) -> str:
    """What to do about a fault of a disk, in words.

    Args:
      fault: Of `disk_fault`.
    """
    if fault in (os.strerror(errno.EROFS), os.strerror(errno.EACCES), os.strerror(errno.EPERM)):
        return "choose a path that can be written to"
    return "free disk space, or choose another path"


def disk_fault(error: BaseException) -> str | None:
    """The system's message if an error is about the disk (full, read-only); None otherwise.

    Array stores and safetensors raise errors of their own, which carry the system's error number
    in their text.
    """
    numbers = [error.errno] if isinstance(error, OSError) else []
    numbers += map(int, re.findall(r"(?:os_error_code='|\(os error )(\d+)", str(error)))
    disk_errors = [number for number in numbers if number in _DISK_ERRORS]
    return os.strerror(disk_errors[0]) if disk_errors else None


def _no_report(line: str, status: int) -> None:
    """A single process has no others to report its failure to."""


# Reports the failure of this process, a line and an exit status, to the other processes of the run.
# `distributed.start` replaces it.
report_failure: Callable[[str, int], None] = _no_report
