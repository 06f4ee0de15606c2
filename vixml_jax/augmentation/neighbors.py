"""Retrieval-augmented inference of a run: which training queries are near, how much they count."""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Float, Int

from vixml_jax.augmentation.mixing import PUBLISHED, Mixing
from vixml_jax.config import EvalConfig
from vixml_jax.errors import InputError
from vixml_jax.report import tables
from vixml_jax.search import index as index_lib
from vixml_jax.search.index import Index
from vixml_jax.structs import SearchResult

TUNED = "evaluation/mixing.json"  # In a run directory: what was tuned for it.


def nearest(
    memory: Index,
    queries: Float[np.ndarray, "q e"],
    k: int,
    itself: Int[np.ndarray, " q"] | None = None,
) -> SearchResult:
    """The k training queries nearest to each query, but itself.

    Args:
      memory: Over unit vectors of the training queries.
      queries: Unit vectors.
      k: Columns; rows are short where there are fewer.
      itself: Which training query each one is; None: none is.
    """
    if itself is None:
        return memory.search(queries, k)
    pairs = np.stack([np.arange(len(queries)), itself], axis=1)
    return index_lib.drop_filtered(memory.search(queries, k + 1), pairs, k)


def define_flags() -> None:
    """Flags of the doors that answer: each, if told, stands before what was tuned and trained."""
    flags.DEFINE_float(
        "memory_weight",
        None,
        "What the labels of near training queries count beside those found by their own vectors, "
        "0 to 1; not told: as tuned (evaluate --tune_memory), else as trained.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_integer(
        "memory_k", None, "Training queries that each query remembers.", lower_bound=1
    )
    flags.DEFINE_float(
        "memory_temperature",
        None,
        "What scores are divided by before labels and memory share.",
        lower_bound=1e-4,
    )
    flags.DEFINE_boolean(
        "memory_joint", None, "Search labels and training queries as one set; off: each by itself."
    )


def as_trained(config: EvalConfig) -> Mixing | None:
    """How memory counts by a run's own flags; None: it does not."""
    found = Mixing(*(getattr(config, f"memory_{name}") for name in Mixing._fields))
    return found if found.weight else None


def as_tuned(config: EvalConfig, workdir: str, step: int) -> Mixing | None:
    """How memory counts as tuned for this step, else as trained; None: it does not."""
    return _tuned(workdir, step) or as_trained(config)


def as_told(config: EvalConfig, values: flags.FlagValues, workdir: str, step: int) -> Mixing | None:
    """How memory counts by this door's flags, else as tuned for this step, else as trained.

    Raises:
      InputError: If flags say how, and nothing says that it counts.
    """
    told = {name: values[f"memory_{name}"].value for name in Mixing._fields}
    told = {name: value for name, value in told.items() if value is not None}
    if told.get("weight") == 0:
        return None
    tuned = _tuned(workdir, step)
    found = tuned or as_trained(config)
    if found is None and told and "weight" not in told:
        raise InputError(
            f"--memory_{next(iter(told))}: nothing says that memory counts; add --memory_weight=0.1"
        )
    found = found or (Mixing(*PUBLISHED) if told else None)
    if tuned:
        print(f"memory as tuned: {describe(tuned)}" + (", but for the flags told" if told else ""))
    return found and found._replace(**told)


def describe(mixing: Mixing) -> str:
    """The flags that say the same."""
    switch = "--memory_joint" if mixing.joint else "--nomemory_joint"
    return (
        f"--memory_weight={mixing.weight:g} --memory_k={mixing.k} "
        f"--memory_temperature={mixing.temperature:g} {switch}"
    )


def mixing(row: dict[str, Any]) -> Mixing:
    """The mixing of something that was tried."""
    return Mixing(*(row[name] for name in Mixing._fields))


def keep_tuned(workdir: str, step: int, names: Sequence[str], tried: list[dict[str, Any]]) -> str:
    """Writes the best of what was tried where `mixing_of` finds it; returns its path."""
    path = os.path.join(workdir, TUNED)
    best = mixing(tried[0])._asdict()
    tables.write_json(path, {"step": step, "by": list(names), "mixing": best, "tried": tried})
    return path


def _tuned(workdir: str, step: int) -> Mixing | None:
    """What was tuned for the model of this step."""
    path = epath.Path(workdir) / TUNED
    if not path.exists():
        return None
    try:
        about = json.loads(path.read_text())
        return mixing(about["mixing"]) if about["step"] == step else None
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: {error!r}; remove it, or tune again") from None
