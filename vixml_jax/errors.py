"""The one exception for what the user can mend, and how a door ends on it."""

import contextlib
import errno
import sys
from collections.abc import Callable, Iterator, Sequence

from absl import app, flags, logging

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class InputError(ValueError):
    """Bad input: one line that names the file, line or flag, what was found and expected."""


@contextlib.contextmanager
def writing(where: str) -> Iterator[None]:
    """Turns a full disk, and a place that may not be written to, into an InputError.

    Args:
      where: Is written to, as the user named it: "--out=DIR".
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        raise InputError(
            f"{where}: {error.strerror} while writing; nothing of it was kept: make room, or "
            "choose another place"
        ) from None


def launch(main: Callable[[Sequence[str]], None]) -> None:
    """Parses the flags and runs `main`; bad flags or input: one line, exit status 2."""

    def guarded(argv: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Libraries tell much that is not for users.
        try:
            if len(argv) > 1:
                raise InputError(f"unexpected argument {argv[1]!r}: flags start with --")
            main(argv)
        except InputError as error:
            _leave(error)

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return app.parse_flags_with_usage(argv) if _asks_help(argv) else flags.FLAGS(argv)
        except flags.Error as error:
            _leave(error)

    app.run(guarded, flags_parser=parse)


def _asks_help(argv: Sequence[str]) -> bool:
    return any(word.lstrip("-").startswith("help") or word == "-?" for word in argv[1:])


def _leave(error: Exception) -> None:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
