"""Collects all errors of a source, for a dry run, instead of stopping at the first."""

import contextlib
import itertools
from collections.abc import Iterator

from vixml_jax.errors import InputError

_SHOWN = 20
_MOST = 100_000  # Then reading stops: a table of a billion bad rows would fill the memory.


class TooManyProblems(InputError):
    """Ends a dry run where it is, its problems being printed."""


class Problems:
    """The errors that were found so far.

    Args:
      collect: Whether to collect errors. If not, the first one is raised at once.

    Attributes:
      found: The messages, each once.
    """

    def __init__(self, *, collect: bool = False):
        self.collect = collect
        self.found: dict[str, None] = {}

    def add(self, error: InputError) -> None:
        """Notes an error, or raises it.

        Raises:
          InputError: The error, unless errors are collected; or that there are too many.
        """
        if not self.collect:
            raise error
        self.found.setdefault(str(error))
        if len(self.found) == _MOST:
            self._print()
            raise TooManyProblems(
                f"{_MOST:,} problems, listed above; expected none, and the rest is not read"
            )

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Notes the error that ends the block, or lets it pass."""
        try:
            yield
        except TooManyProblems:
            raise
        except InputError as error:
            self.add(error)

    def stop(self) -> None:
        """Raises the last error again, if there is any, where going on makes no sense."""
        if self.found:
            raise InputError(next(reversed(self.found)))

    def report(self) -> None:
        """Prints the errors, if there are several, and ends the command if there are any."""
        if len(self.found) > 1:
            self._print()
            raise InputError(f"{len(self.found):,} problems, listed above; expected none")
        self.stop()

    def _print(self) -> None:
        """Prints the first problems, and how many others there are."""
        for error in itertools.islice(self.found, _SHOWN):
            print(f"problem: {error}")
        if len(self.found) > _SHOWN:
            print(f"and {len(self.found) - _SHOWN:,} more problems")
