"""Memory, build time and relative query cost of an index, estimated from its sizes.

The constants were measured, and rounded up, at 50,000 to 800,000 vectors of width 128 to 384 that
are clustered like those of a trained tower.
"""

import os
from typing import Any

from vixml_jax.errors import InputError
from vixml_jax.runtime import host_memory
from vixml_jax.search.scann import SAMPLE, SUM_SAMPLE

_FLOAT_BYTES = 4


def exact_bytes(
    num_labels: int,
    width: int,
    *,
    query_block: int,
    label_block: int,
    devices: int = 1,
    dtype: str = "float32",
) -> int:
    """Bytes that exact search on CPUs needs in addition to the vectors that it is given.

    They hold a copy of the vectors in the given dtype (with a scale or two and a bias for each of
    8 bits), the scores of a block on each device and the workspace that
    selects from them, and the block's vectors as the matrix product packs them.
    """
    labels = min(devices * label_block, num_labels)
    held = num_labels * width * (_FLOAT_BYTES if dtype == "float32" else 1.1)
    return round(held + _FLOAT_BYTES * (1.3 * query_block * labels + 3 * labels * width))


def build_bytes(num_labels: int, width: int) -> int:
    """Peak bytes of building a ScaNN index, in addition to the vectors.

    They hold a copy of the vectors (to score candidates exactly), codes and, for a while,
    residuals; and twice the sample from which the tree is learnt.
    """
    return round(_FLOAT_BYTES * width * (2.0 * num_labels + 2.3 * min(num_labels, SAMPLE)))


def search_bytes(num_labels: int, width: int) -> int:
    """Bytes of a built or loaded ScaNN index, in addition to the vectors.

    It holds a copy of the vectors, codes, and the sample of vectors for `search_normalised`.
    """
    return round(_FLOAT_BYTES * width * (1.3 * num_labels + min(num_labels, SUM_SAMPLE)))


def build_seconds(num_labels: int, width: int, leaves: int) -> float:
    """Approximate seconds of building a ScaNN index on this machine.

    Building learns the tree from a sample, then assigns all vectors to leaves and encodes them.
    """
    one_core = 1.6e-9 * min(num_labels, SAMPLE) * leaves + 6e-7 * num_labels
    return one_core * width / (os.cpu_count() or 1)


def search_cost(
    settings: dict[str, Any], num_labels: int, width: int, *, leaves_searched: int, reordered: int
) -> float:
    """Approximate microseconds of one core per query, without what every setting costs.

    The cost is that of reading the codes of the labels in the searched leaves and the vectors of
    the candidates (each from another place in memory).
    """
    labels = leaves_searched / settings["leaves"] * num_labels
    codes = labels * width / settings["dimensions_per_block"]
    return 3.2e-5 * codes + (0.13 + 2.8e-4 * width) * min(labels, reordered)


def check_memory(needed: int, what: str, remedy: str, *, limit: int | None = None) -> None:
    """Checks that something fits in memory, before any of it is allocated.

    Args:
      needed: Bytes.
      what: Needs them; the subject of the message, in the plural.
      remedy: What the user can do instead.
      limit: Bytes that may be used; None: what is free on the machine, if the system reports it.

    Raises:
      InputError: If `needed` exceeds the limit.
    """
    available = host_memory.available() if limit is None else limit
    if available is not None and needed > available:
        source = "free on this machine" if limit is None else "allowed by --search.memory_gb"
        raise InputError(
            f"{what} need about {needed / 1e9:.2f} GB of memory, but {available / 1e9:.2f} GB "
            f"are {source}: {remedy}"
        )
