"""What building and searching an index takes, from its sizes alone: bytes, seconds, relative cost.

Measured, and rounded up, at 50,000 to 800,000 vectors of width 128 to 384, clustered as those of a
trained tower are.
"""

import os
from typing import Any

from vixml_jax.errors import InputError
from vixml_jax.runtime import host_memory
from vixml_jax.search.scann import SAMPLE

_FLOAT = 4


def exact_bytes(
    num_labels: int, width: int, *, query_block: int, label_block: int, devices: int = 1
) -> int:
    """Bytes that exact search takes on CPUs beside the vectors that it is given: a copy of them,
    the scores of a block on each device and what selecting from them takes, and the block's vectors
    as the product packs them."""
    labels = min(devices * label_block, num_labels)
    return round(_FLOAT * (num_labels * width + 1.3 * query_block * labels + 3 * labels * width))


def build_bytes(num_labels: int, width: int) -> int:
    """Bytes that building a ScaNN index takes at its peak beside the vectors.

    It holds a copy of them (to score candidates exactly), codes and, for a while, residuals; and
    the sample that the tree is learnt from twice.
    """
    return round(_FLOAT * width * (2.0 * num_labels + 2.3 * min(num_labels, SAMPLE)))


def search_bytes(num_labels: int, width: int) -> int:
    """Bytes of a ScaNN index that has been built or loaded, beside the vectors."""
    return round(_FLOAT * width * num_labels * 1.3)


def build_seconds(num_labels: int, width: int, leaves: int) -> float:
    """About how long building takes here: learning the tree from a sample, dealing out and encoding
    all vectors."""
    one_core = 1.6e-9 * min(num_labels, SAMPLE) * leaves + 6e-7 * num_labels
    return one_core * width / (os.cpu_count() or 1)


def search_cost(
    settings: dict[str, Any], num_labels: int, width: int, *, leaves_searched: int, reordered: int
) -> float:
    """Microseconds of one core, about, that a query takes beyond those of any setting.

    Codes of the labels of the leaves searched, each label lying in two of them; vectors of the
    candidates, each from another place in memory.
    """
    labels = leaves_searched / settings["leaves"] * num_labels
    codes = 2 * labels * width / settings["dimensions_per_block"]
    return 3.2e-5 * codes + (0.13 + 2.8e-4 * width) * min(labels, reordered)


def check_room(needed: int, what: str, instead: str, *, limit: int | None = None) -> None:
    """Refuses what will not fit, before any of it is allocated.

    Args:
      needed: Bytes.
      what: Needs them.
      instead: What can be done.
      limit: Bytes that may be taken; None: what the machine has left, where it says.

    Raises:
      InputError: If `needed` are more.
    """
    left = host_memory.available() if limit is None else limit
    if left is not None and needed > left:
        there = "left here" if limit is None else "allowed by --search.memory_gb"
        raise InputError(
            f"{what} need about {needed / 2**30:.2f} GB of memory, {left / 2**30:.2f} GB are "
            f"{there}: {instead}"
        )
