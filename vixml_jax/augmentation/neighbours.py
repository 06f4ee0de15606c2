"""Retrieval-augmented inference of a run: settings (given, tuned or trained), and the search."""

import os
from collections.abc import Sequence
from typing import Any, TypedDict

import msgspec
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Float, Int

from vixml_jax.augmentation.mixing import PUBLISHED, Mixing
from vixml_jax.config import KnnConfig
from vixml_jax.errors import InputError
from vixml_jax.runtime import console
from vixml_jax.search import index as index_lib
from vixml_jax.search.index import Index
from vixml_jax.storage import json_files
from vixml_jax.structs import SearchResult

TUNED = "evaluation/mixing.json"  # In a run directory: the tuned settings.
_MixingDict = TypedDict("_MixingDict", Mixing.__annotations__)


class _Tuned(msgspec.Struct):
    """The part of `evaluation/mixing.json` that is read back."""

    step: int
    mixing: _MixingDict


def nearest(
    train_index: Index,
    queries: Float[np.ndarray, "q e"],
    k: int,
    itself: Int[np.ndarray, " q"] | None = None,
) -> SearchResult:
    """Returns the k nearest training queries of each query; no query is its own neighbour.

    Args:
      train_index: Over unit vectors of the training queries.
      queries: Unit vectors.
      k: Columns of the result; rows are shorter where there are fewer training queries.
      itself: Row of each query among the training queries; None: they are not training queries.
    """
    if itself is None:
        return train_index.search(queries, k)
    pairs = np.stack([np.arange(len(queries)), itself], axis=1)
    return index_lib.drop_filtered(train_index.search(queries, k + 1), pairs, k)


def define_flags() -> None:
    """Defines `--knn.*`; a given flag overrides the tuned setting, then the trained one."""
    flags.DEFINE_float(
        "knn.weight",
        None,
        "Weight of the labels of training neighbours, 0 to 1. Default: as tuned by evaluate "
        "--tune, else as trained.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_integer("knn.k", None, "Training queries retrieved for each query.", lower_bound=1)
    flags.DEFINE_float(
        "knn.temperature",
        None,
        "Softmax temperature of labels and training neighbours.",
        lower_bound=1e-4,
    )
    flags.DEFINE_boolean(
        "knn.joint", None, "Search labels and training queries as one set. Off: separately."
    )


def as_trained(config: KnnConfig) -> Mixing | None:
    """Returns the mixing that a run was trained with; None: off."""
    trained = Mixing(*(getattr(config, name) for name in Mixing._fields))
    return trained if trained.weight else None


def as_tuned(config: KnnConfig, workdir: str, step: int) -> Mixing | None:
    """Returns the mixing that was tuned for this step, else that of training; None: off."""
    return _tuned(workdir, step) or as_trained(config)


def from_flags(
    config: KnnConfig, values: flags.FlagValues, workdir: str, step: int
) -> Mixing | None:
    """Returns the mixing of the given flags, else as tuned for this step, else as trained.

    Args:
      config: Settings of the run.
      values: Parsed flags of `define_flags`.
      workdir: The run directory.
      step: Of the model.

    Returns:
      The mixing; None: training neighbours are not used.

    Raises:
      InputError: If flags set k, temperature or joint, but the weight is zero by default.
    """
    given = {name: values[f"knn.{name}"].value for name in Mixing._fields}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("weight") == 0:
        return None
    tuned = _tuned(workdir, step)
    default = tuned or as_trained(config)
    if default is None and given and "weight" not in given:
        raise InputError(
            f"--knn.{next(iter(given))}: training neighbours are off; add --knn.weight=0.1"
        )
    default = default or (Mixing(*PUBLISHED) if given else None)
    if tuned:
        overridden = ", overridden by the given flags" if given else ""
        console.status(f"training neighbours as tuned: {describe(tuned)}{overridden}")
    return default and default._replace(**given)


def describe(mixing: Mixing) -> str:
    """Returns the flags that set a mixing, as text."""
    joint = "--knn.joint" if mixing.joint else "--noknn.joint"
    return (
        f"--knn.weight={mixing.weight:g} --knn.k={mixing.k} "
        f"--knn.temperature={mixing.temperature:g} {joint}"
    )


def mixing(row: dict[str, Any]) -> Mixing:
    """Returns the mixing of one row of the tuning table."""
    return Mixing(*(row[name] for name in Mixing._fields))


def save_tuned(workdir: str, step: int, names: Sequence[str], tried: list[dict[str, Any]]) -> str:
    """Writes the best mixing and the tuning table to the run directory; returns the path.

    Args:
      workdir: The run directory.
      step: Of the model.
      names: Metrics that were maximised.
      tried: Rows of the tuning table, best first: the fields of a `Mixing`, and `value`.
    """
    path = os.path.join(workdir, TUNED)
    best = mixing(tried[0])._asdict()
    about = {"step": step, "by": list(names), "mixing": best, "tried": tried}
    json_files.write(path, about)
    return path


def _tuned(workdir: str, step: int) -> Mixing | None:
    """Returns the mixing tuned for the model of this step; None: there is none.

    Raises:
      InputError: If the file is damaged.
    """
    path = epath.Path(workdir) / TUNED
    if not path.exists():
        return None
    about = json_files.read(path, _Tuned, "remove it, or run evaluate --tune again")
    return Mixing(**about.mixing) if about.step == step else None
