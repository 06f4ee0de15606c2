"""Exceptions that end a command early, and the exit statuses of commands.

0: done. 1: a bug, or a loss that is not finite. 2: bad input, which the user can fix. 75
(`EX_TEMPFAIL`): stopped by a signal with everything saved; the same command resumes, so launchers
start it again. 130: interrupted from the keyboard where there is nothing to resume.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterator

PREEMPTED = 75
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


@contextlib.contextmanager
def writing(where: str) -> Iterator[None]:
    """Turns a full disk or an unwritable path into an InputError.

    Args:
      where: What is written to, as the user named it: "--out=DIR".
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (*_DISK_ERRORS, *_PATH_ERRORS):
            raise
        raise InputError(
            f"{where}: {error.strerror} while writing; nothing was kept: free disk space, or "
            "choose another path"
        ) from None


def disk_fault(error: BaseException) -> str | None:
    """The system's message if an error is about the disk (full, read-only); None otherwise.

    Array stores raise errors of their own, which carry the system's error number in their text.
    """
    numbers = [error.errno] if isinstance(error, OSError) else []
    numbers += map(int, re.findall(r"os_error_code='(\d+)'", str(error)))
    disk_errors = [number for number in numbers if number in _DISK_ERRORS]
    return os.strerror(disk_errors[0]) if disk_errors else None


def _no_report(line: str, status: int) -> None:
    """A single process has no others to report its failure to."""


# Reports the failure of this process, a line and an exit status, to the other processes of the run.
# `distributed.start` replaces it.
report_failure: Callable[[str, int], None] = _no_report
