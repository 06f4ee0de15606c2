"""Which queries are held out: drawn at random, whole groups together, or the newest."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int, Num

from vixml_jax.data import filters
from vixml_jax.data.sources.raw import RawDataset
from vixml_jax.errors import InputError

RANDOM, TEXT, GROUP, TIME = "random", "text", "group", "time"


def parse(split_by: str) -> tuple[str, str]:
    """The manner and the column that `--split_by` names.

    Raises:
      InputError: If it is none of random, text, group:COLUMN, time:COLUMN.
    """
    manner, _, column = split_by.partition(":")
    if (manner in (RANDOM, TEXT) and not column) or (manner in (GROUP, TIME) and column):
        return manner, column
    raise InputError(f"--split_by={split_by}: expected random, text, group:COLUMN or time:COLUMN")


def hold_out(raw: RawDataset, split: str, share: float, *, split_by: str, seed: int) -> RawDataset:
    """The data set with a share of its training queries as another split.

    Args:
      raw: Whose `train` is divided; queries that come by columns carry the `key` to divide by.
      split: 'valid' or 'test'.
      share: Of the training queries, above 0 and below 1.
      split_by: 'random', 'text' (equal normalised texts stay together), 'group:COLUMN' (equal
        values stay together) or 'time:COLUMN' (the newest are held out).
      seed: Of the draw.

    Raises:
      InputError: If the source has no such column, or nothing would be left on one side.
    """
    manner, column = parse(split_by)
    key = raw.train.key
    if manner == TEXT:
        key = filters.text_keys(raw.train.items)
    elif column and key is None:
        raise InputError(
            f"--split_by={split_by}: a source without columns, expected random or text"
        )
    if manner == TIME:
        held = newest(key, share)
    elif manner == RANDOM:
        held = random_groups(np.arange(raw.train.items.count), share, seed=seed)
    else:
        held = random_groups(key, share, seed=seed)
    if held.all() or not held.any():
        raise InputError(
            f"--{split}={share}: {np.count_nonzero(held)} of {len(held)} training queries would be "
            f"held out (--split_by={split_by}); expected some on both sides"
        )
    how = {
        RANDOM: "at random",
        TEXT: "equal texts together",
        GROUP: f"equal values of {column!r} together",
        TIME: f"the newest by {column!r}",
    }
    return dataclasses.replace(
        raw,
        understood=(
            *raw.understood,
            f"{split}: {100 * share:g}% of the queries held out, {how[manner]}",
        ),
        **{
            split: raw.train.select(np.flatnonzero(held)),
            "train": raw.train.select(np.flatnonzero(~held)),
        },
    )


def random_groups(key: Int[np.ndarray, " n"], share: float, *, seed: int) -> Bool[np.ndarray, " n"]:
    """Whether each row is among the groups drawn, which together are `share` of the rows, one at
    least, or the first to reach it; rows of one group have equal keys."""
    _, group, sizes = np.unique(key, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(sizes))
    before = np.cumsum(sizes[order]) - sizes[order]
    drawn = np.zeros(len(sizes), bool)
    drawn[order[before < max(1, round(share * len(key)))]] = True
    return drawn[group]


def newest(time: Num[np.ndarray, " n"], share: float) -> Bool[np.ndarray, " n"]:
    """Whether each row is among the newest `share`; what is as new as one of them is, too."""
    held = max(1, round(share * len(time)))
    return time >= np.partition(time, len(time) - held)[len(time) - held]
