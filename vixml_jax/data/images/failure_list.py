"""The list of URLs that could not be downloaded, which several processes keep together."""

import contextlib
import math
import os
from collections.abc import Sequence

from vixml_jax.storage import atomic, locks

NAME = "failures.tsv"
_LOCK = ".failures.lock"


class FailureList:
    """`failures.tsv`: URL and reason of each failure, of a download and of others to the directory.

    Args:
      directory: Of the file; must exist when the file is written.
      urls: Of this download.
      others: See `download`.
    """

    def __init__(self, directory: str, urls: Sequence[str], others: Sequence[str]):
        self._directory, self._urls, self._others = directory, urls, others
        self._path = os.path.join(directory, NAME)

    def write(self, faults: dict[str, str], *, in_order: bool) -> None:
        """Replaces the lines of the URLs of this download, and keeps those of all others.

        Args:
          faults: Reason for each of `urls` that has failed, in their order.
          in_order: Whether to put the lines of `others` in their order, which looks at all of them.
            Lines of URLs that belong to neither `urls` nor `others` come first.

        Raises:
          InputError: If the directory cannot be written to, or its file system has no locks.
        """
        # Other processes may have added lines since the last time.
        doing = "listing failed downloads"
        with locks.exclusive(self._directory, doing=doing, wait_s=math.inf, name=_LOCK):
            lines = self._read()
            for url in self._urls:
                lines.pop(printable(url), None)
            for url, reason in faults.items():
                name = printable(url)
                lines[name] = lines.get(name, "") + f"{name}\t{reason}\n"
            for url in self._others if in_order else ():
                name = printable(url)
                if name in lines:
                    lines[name] = lines.pop(name)  # To the end.
            atomic.write_text(self._path, "".join(lines.values()))

    def _read(self) -> dict[str, str]:
        """The lines of each URL, as it is written in the file, in the order of the file."""
        lines: dict[str, str] = {}
        with contextlib.suppress(FileNotFoundError):
            with open(self._path, encoding="utf-8", errors="replace", newline="\n") as file:
                for line in file:
                    name = line.partition("\t")[0]
                    lines[name] = lines.get(name, "") + line
        return lines


def printable(text: str) -> str:
    """A text on one line, with control characters escaped."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )
