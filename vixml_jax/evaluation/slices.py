"""Groups of labels by how often training has them, of queries by pictures and length of text."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vixml_jax.data.card import stats
from vixml_jax.data.store import Items

DECILES = 10


class Groups(NamedTuple):
    """A partition of labels, or of queries.

    Attributes:
      names: Of the groups, in the order shown; a group may be empty.
      of: The group of each label or query; -1 = none.
    """

    names: tuple[str, ...]
    of: Int[np.ndarray, " n"]


def by_frequency(frequency: Int[np.ndarray, " l"]) -> Groups:
    """Head, torso, tail and unseen labels, as the data card has them.

    Args:
      frequency: Training queries of each label.
    """
    of = np.full(len(frequency), -1, np.int8)
    for i, (_, least, most) in enumerate(stats.GROUPS):
        of[(frequency >= least) & (most is None or frequency <= most)] = i
    return Groups(tuple(name for name, *_ in stats.GROUPS), of)


def by_decile(frequency: Int[np.ndarray, " l"], pairs: Int[np.ndarray, " l"]) -> Groups:
    """Ten groups of the labels seen in training, the most frequent first, of about as many pairs.

    A tenth of the labels would not do: of most data the first holds nearly all that is judged, and
    the others next to nothing. With a tenth of the true pairs in each, their values are as certain
    as one another. Labels of equal frequency stand in the order of their ids; a label that alone
    has more than a tenth leaves the groups that it covers empty.

    Args:
      frequency: Training queries of each label.
      pairs: Queries judged that it is true of.
    """
    seen = np.flatnonzero(frequency)
    order = seen[np.argsort(-frequency[seen], kind="stable")]
    before = np.cumsum(pairs[order]) - pairs[order]
    total = max(int(pairs[order].sum()), 1)
    of = np.full(len(frequency), -1, np.int8)
    # Of a label that two groups share, where its middle lies; twice all, to stay with integers.
    middle = (2 * before + pairs[order]) * DECILES // (2 * total)
    of[order] = np.minimum(middle, DECILES - 1)
    return Groups(tuple(map(str, range(1, DECILES + 1))), of)


def by_pictures(items: Items) -> Groups:
    """Queries that have a picture, and those that have none."""
    none = np.ones(len(items), bool)
    if items.images is not None:
        none = np.diff(items.images.offsets) == 0
    return Groups(("with pictures", "without"), none.astype(np.int8))


def by_length(whole: Int[np.ndarray, " q"]) -> Groups:
    """Quarters of the queries by the length of their texts; equal lengths stay together.

    Args:
      whole: Tokens of each text before it is cut.
    """
    last = np.unique(np.quantile(whole, [0.25, 0.5, 0.75, 1.0], method="inverted_cdf"))
    first = np.concatenate([[whole.min()], last[:-1] + 1])
    names = [
        f"{a} tokens" if a == b else f"{a} to {b} tokens" for a, b in zip(first, last, strict=True)
    ]
    return Groups(tuple(names), np.searchsorted(last, whole).astype(np.int8))
