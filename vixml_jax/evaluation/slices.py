"""Groups for sliced metrics: labels by training frequency, queries by images and text length."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from vixml_jax.data.card import stats
from vixml_jax.data.store import Items

DECILES = 10


class Groups(NamedTuple):
    """A partition of labels or of queries.

    Attributes:
      names: Names of the groups, in display order; a group may be empty.
      group_ids: Index of each label's or query's group in `names`; -1 = no group.
    """

    names: tuple[str, ...]
    group_ids: Int[np.ndarray, " n"]


def by_frequency(frequency: Int[np.ndarray, " l"]) -> Groups:
    """Returns head, torso, tail and unseen labels, with the same bounds as the data card.

    Args:
      frequency: Number of training queries of each label.
    """
    group_ids = np.full(len(frequency), -1, np.int8)
    for i, (_, least, most) in enumerate(stats.GROUPS):
        group_ids[(frequency >= least) & (most is None or frequency <= most)] = i
    return Groups(tuple(name for name, *_ in stats.GROUPS), group_ids)


def by_decile(frequency: Int[np.ndarray, " l"], pairs: Int[np.ndarray, " l"]) -> Groups:
    """Returns ten groups of the labels seen in training, the most frequent labels first.

    Each group has about a tenth of the true (query, label) pairs, so that its metrics are about as
    certain as those of the others. Ten groups with equally many labels would not do: in most data
    sets the first of them has nearly all pairs. Labels of equal frequency are ordered by id. If one
    label has more than a tenth of all pairs, the other groups that it spans are empty.

    Args:
      frequency: Number of training queries of each label.
      pairs: Number of evaluated queries for which each label is true.
    """
    seen = np.flatnonzero(frequency)
    order = seen[np.argsort(-frequency[seen], kind="stable")]
    before = np.cumsum(pairs[order]) - pairs[order]
    total = max(int(pairs[order].sum()), 1)
    group_ids = np.full(len(frequency), -1, np.int8)
    # A label that spans two groups belongs to the one with its middle pair. Both sides are doubled
    # to stay with integers.
    middle = (2 * before + pairs[order]) * DECILES // (2 * total)
    group_ids[order] = np.minimum(middle, DECILES - 1)
    return Groups(tuple(map(str, range(1, DECILES + 1))), group_ids)


def by_images(items: Items) -> Groups:
    """Returns the queries with at least one image, and those without."""
    without = np.ones(len(items), bool)
    if items.images is not None:
        without = np.diff(items.images.offsets) == 0
    return Groups(("with images", "without"), without.astype(np.int8))


def by_length(lengths: Int[np.ndarray, " q"]) -> Groups:
    """Returns the quarters of the queries by text length; equal lengths share a group.

    Args:
      lengths: Number of tokens of each text before truncation.
    """
    last = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75, 1.0], method="inverted_cdf"))
    first = np.concatenate([[lengths.min()], last[:-1] + 1])
    names = [
        f"{a} tokens" if a == b else f"{a} to {b} tokens" for a, b in zip(first, last, strict=True)
    ]
    return Groups(tuple(names), np.searchsorted(last, lengths).astype(np.int8))
