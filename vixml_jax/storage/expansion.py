"""Refuses files that expand far beyond their size, as none of real data does."""

import os

from vixml_jax.errors import InputError

# Texts that repeat much shrink to a twentieth. A file made of nothing but repetition shrinks to a
# thousandth (gzip) or a millionth (dictionaries of parquet, brotli).
MAX_RATIO = 200
FREE_BYTES = 1 << 30  # So much a file of any size may expand to.


class Expansion:
    """Counts what a compressed file has expanded to.

    Args:
      path: The file.
      remedy: How to read a file that is meant to be so, for the message.
    """

    def __init__(self, path: str, remedy: str):
        self._path, self._remedy, self._size, self._total = path, remedy, os.path.getsize(path), 0

    def add(self, num_bytes: int) -> None:
        """Counts bytes that were made of the file.

        Raises:
          InputError: If they are more than `FREE_BYTES` and `MAX_RATIO` times the file.
        """
        self._total += num_bytes
        if self._total > FREE_BYTES and self._total > MAX_RATIO * self._size:
            raise InputError(
                f"{self._path}: its {self._size:,} bytes expand to more than "
                f"{self._total >> 20:,} MiB; expected at most {MAX_RATIO} times its size, since "
                f"more is a damaged or a hostile file; {self._remedy}"
            )
