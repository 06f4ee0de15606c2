"""How a run ends early, and the statuses that a door leaves with.

0: done. 1: a fault of the program, and a loss that is not finite. 2: what the user can mend. 75
(`EX_TEMPFAIL`): stopped by a signal, all that was done saved; the same command goes on, so that is
what launchers start again on. 130: stopped from the keyboard, where nothing is to be gone on with.
"""

import contextlib
import errno
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import app, flags, logging

PREEMPTED = 75
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_OF_THE_NAME = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


class InputError(ValueError):
    """Bad input: one line that names the file, line or flag, what was found and expected."""


class NotFiniteError(FloatingPointError):
    """Training that left the numbers: one line with the step, what is kept, and how to go on."""


class Preempted(BaseException):
    """A signal asked the run to stop, and it stands where it can be resumed.

    No `Exception`, as `KeyboardInterrupt` is none: it may be raised anywhere, and libraries catch
    those.
    """


@contextlib.contextmanager
def writing(where: str) -> Iterator[None]:
    """Turns a full disk, and a place that cannot be written to, into an InputError.

    Args:
      where: Is written to, as the user named it: "--out=DIR".
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (*OF_THE_DISK, *_OF_THE_NAME):
            raise
        raise InputError(
            f"{where}: {error.strerror} while writing; nothing of it was kept: make room, or "
            "choose another place"
        ) from None


def disk_fault(error: BaseException) -> str | None:
    """What the system says of a disk that takes no more; None: the error is of another kind.

    Array stores raise errors of their own, which carry the system's number in their text.
    """
    numbers = [error.errno] if isinstance(error, OSError) else []
    numbers += map(int, re.findall(r"os_error_code='(\d+)'", str(error)))
    found = [number for number in numbers if number in OF_THE_DISK]
    return os.strerror(found[0]) if found else None


def _nobody(line: str, status: int) -> None:
    """There are no other processes to tell why this one fails."""


tell_others: Callable[[str, int], None] = _nobody


def launch(main: Callable[[Sequence[str]], None]) -> None:
    """Parses the flags and runs `main`; whatever ends it early but a fault of ours is one line."""

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            # Libraries tell much that is not for users, and log what they raise as well.
            logging.set_verbosity(logging.FATAL)
        try:
            if len(argv) > 1:
                raise InputError(f"unexpected argument {argv[1]!r}: flags start with --")
            main(argv)
        except (InputError, NotFiniteError) as error:
            _leave(f"error: {error}", 2 if isinstance(error, InputError) else 1)
        except Preempted as stop:
            _leave(f"{stop}; to resume: {shlex.join(sys.orig_argv)}", PREEMPTED)
        except KeyboardInterrupt:
            _leave("interrupted", 128 + signal.SIGINT)
        except Exception as error:
            traceback.print_exc()
            tell_others(f"{type(error).__name__}: {error}", 1)
            sys.exit(1)

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return app.parse_flags_with_usage(argv) if _asks_help(argv) else flags.FLAGS(argv)
        except flags.Error as error:
            _leave(f"error: {error}", 2)

    sys.unraisablehook = _all_but_echoes
    app.run(guarded, flags_parser=parse)


def _all_but_echoes(unraisable: Any) -> None:
    """Prints what was raised where nobody can catch it.

    Where one of many arrays cannot be written, Orbax leaves its loop of events with the first
    error, which is raised; each of the others then fails to tell its own there.
    """
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _asks_help(argv: Sequence[str]) -> bool:
    return any(word.lstrip("-").startswith("help") or word == "-?" for word in argv[1:])


def _leave(line: str, status: int) -> None:
    line = " ".join(line.split())
    print(line, file=sys.stderr)
    if status != PREEMPTED:  # At which all arrive by themselves.
        tell_others(line, status)
    sys.exit(status)
