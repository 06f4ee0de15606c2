"""Held-out splits: random queries, random groups of queries, or the newest queries."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int, Num

from vixml_jax.data import filters
from vixml_jax.data.sources.raw import RawDataset
from vixml_jax.errors import InputError

RANDOM, TEXT, GROUP, TIME = "random", "text", "group", "time"


def parse(split_by: str) -> tuple[str, str]:
    """The kind of split and the column in a value of `--split_by`.

    Raises:
      InputError: If it is none of random, text, group:COLUMN, time:COLUMN.
    """
    kind, _, column = split_by.partition(":")
    if (kind in (RANDOM, TEXT) and not column) or (kind in (GROUP, TIME) and column):
        return kind, column
    raise InputError(f"--split_by={split_by}: expected random, text, group:COLUMN or time:COLUMN")


def hold_out(
    raw: RawDataset, split: str, fraction: float, *, split_by: str, seed: int
) -> RawDataset:
    """The data set with a fraction of its training queries as another split.

    Args:
      raw: The data set; to split by a column, its training queries must have a `key`.
      split: 'valid' or 'test'.
      fraction: Fraction of the training queries to hold out, above 0 and below 1.
      split_by: 'random', 'text' (equal normalised texts stay together), 'group:COLUMN' (equal
        values stay together) or 'time:COLUMN' (the newest queries are held out).
      seed: Random seed.

    Raises:
      InputError: If the source has no such column, or one of the two splits would be empty.
    """
    kind, column = parse(split_by)
    key = raw.train.key
    if kind == TEXT:
        key = filters.text_keys(raw.train.items)
    elif column and key is None:
        raise InputError(
            f"--split_by={split_by}: the source has no columns; expected random or text"
        )
    if kind == TIME:
        held_out = newest(key, fraction)
    elif kind == RANDOM:
        held_out = random_groups(np.arange(raw.train.items.count), fraction, seed=seed)
    else:
        held_out = random_groups(key, fraction, seed=seed)
    if held_out.all() or not held_out.any():
        raise InputError(
            f"--{split}={fraction}: {np.count_nonzero(held_out)} of {len(held_out)} training "
            f"queries would be held out (--split_by={split_by}); expected queries in both splits"
        )
    description = {
        RANDOM: "at random",
        TEXT: "equal texts together",
        GROUP: f"equal values of {column!r} together",
        TIME: f"the newest by {column!r}",
    }[kind]
    return dataclasses.replace(
        raw,
        summary=(
            *raw.summary,
            f"{split}: {100 * fraction:g}% of the queries held out, {description}",
        ),
        **{
            split: raw.train.select(np.flatnonzero(held_out)),
            "train": raw.train.select(np.flatnonzero(~held_out)),
        },
    )


def random_groups(
    key: Int[np.ndarray, " n"], fraction: float, *, seed: int
) -> Bool[np.ndarray, " n"]:
    """Mask of the rows of randomly drawn groups, which have equal keys.

    Groups are drawn until they have `fraction` of the rows, and at least one row.
    """
    _, group, sizes = np.unique(key, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    rows_before = np.cumsum(sizes[order]) - sizes[order]
    drawn = np.zeros(len(sizes), bool)
    drawn[order[rows_before < max(1, round(fraction * len(key)))]] = True
    return drawn[group]


def newest(time: Num[np.ndarray, " n"], fraction: float) -> Bool[np.ndarray, " n"]:
    """Mask of the newest `fraction` of the rows, at least one, and of all rows as new as these."""
    count = max(1, round(fraction * len(time)))
    return time >= np.partition(time, len(time) - count)[len(time) - count]
