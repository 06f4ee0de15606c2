"""What the processes of one run do together; alone, nothing is exchanged."""

from typing import Protocol

import numpy as np
from jaxtyping import Float

from vixml_jax.structs import Share


class Group(Protocol):
    """Processes that call each method together, in the same order.

    Attributes:
      index: Of this process, from 0.
      count: Of processes.
    """

    index: int
    count: int

    def gather(self, x: np.ndarray) -> list[np.ndarray]:
        """The array of each process, in order; their first dimensions may differ."""

    def exchange(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        """Sends `parts[p]` to process p; returns what each process sent to this one."""


class _Alone:
    """A group of one."""

    index, count = 0, 1

    def gather(self, x: np.ndarray) -> list[np.ndarray]:
        return [x]

    def exchange(self, parts: list[np.ndarray]) -> list[np.ndarray]:
        return parts


ALONE: Group = _Alone()


def whole(share: Share, num_rows: int, group: Group) -> Float[np.ndarray, "n e"]:
    """All rows, on every process, from what each of them keeps; alone, they are not copied."""
    if group.count == 1:
        return share.values
    rows = np.empty((num_rows, *share.values.shape[1:]), share.values.dtype)
    for ids, values in zip(group.gather(share.ids), group.gather(share.values), strict=True):
        rows[ids] = values
    return rows
