"""How a run scores labels: weights of prototypes, label head and training neighbours.

Each setting is the one given by a flag, else the one that `evaluate --tune` found for this model,
else the one of training.
"""

import os
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, NotRequired, TypedDict

import msgspec
from absl import flags

from vixml_jax.augmentation.mixing import PUBLISHED, Mixing
from vixml_jax.config import Config
from vixml_jax.errors import InputError
from vixml_jax.runtime import console
from vixml_jax.search.fusion import Fusion
from vixml_jax.storage import json_files, sealed

TUNED = "evaluation/mixing.json"  # In a run directory: the tuned settings.
LEAST_TEMPERATURE = 1e-4
_Weight = Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]


class _MixingDict(TypedDict):
    """`Mixing` in a file, with the ranges of its fields."""

    weight: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
    k: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    temperature: Annotated[float, msgspec.Meta(ge=LEAST_TEMPERATURE, le=1e6)]
    joint: bool


class _FusionDict(TypedDict):
    """`Fusion` in a file, with the ranges of its fields."""

    prototypes: _Weight
    head: _Weight
    frequency: NotRequired[Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]]


class Scoring(NamedTuple):
    """How labels are scored.

    Attributes:
      fusion: Weights of prototypes and label head; None: the run has no head, and the score of a
        label is its cosine.
      mixing: Settings of training neighbours; None: they are not used.
      fusion_alone: Weights to use without training neighbours; None: `fusion`.
    """

    fusion: Fusion | None = None
    mixing: Mixing | None = None
    fusion_alone: Fusion | None = None

    def without_neighbours(self) -> "Scoring":
        """The same without training neighbours."""
        return Scoring(self.fusion_alone or self.fusion)


COSINES = Scoring()  # The model has no label head, and training neighbours are not used.


class _Tuned(msgspec.Struct):
    """The part of `evaluation/mixing.json` that is read back."""

    step: int
    mixing: _MixingDict
    fusion: _FusionDict | None = None
    fusion_alone: _FusionDict | None = None


def define_flags() -> None:
    """Defines `--fusion.*` and `--knn.*`; a given flag overrides what is tuned or trained."""
    flags.DEFINE_float(
        "fusion.prototypes",
        None,
        "Weight of the similarity of query and prototype, for runs with a label head; 0: head "
        "alone. Default: as tuned by evaluate --tune, else as trained.",
        lower_bound=0.0,
        upper_bound=1e6,
    )
    flags.DEFINE_float(
        "fusion.head",
        None,
        "Weight of the logit of the label head; 0: prototypes alone.",
        lower_bound=0.0,
        upper_bound=1e6,
    )
    flags.DEFINE_float(
        "fusion.frequency",
        None,
        "Weight of log(1 + training queries of a label) in its score; below 0 rare labels gain.",
        lower_bound=-1e6,
        upper_bound=1e6,
    )
    flags.DEFINE_float(
        "knn.weight",
        None,
        "Weight of the labels of training neighbours, 0 to 1. Default: as tuned by evaluate "
        "--tune, else as trained.",
        lower_bound=0.0,
        upper_bound=1.0,
    )
    flags.DEFINE_integer(
        "knn.k",
        None,
        "Training queries retrieved for each query.",
        lower_bound=1,
        upper_bound=1 << 16,
    )
    flags.DEFINE_float(
        "knn.temperature",
        None,
        "Softmax temperature of labels and training neighbours.",
        lower_bound=LEAST_TEMPERATURE,
        upper_bound=1e6,
    )
    flags.DEFINE_boolean(
        "knn.joint", None, "Search labels and training queries as one set. Off: separately."
    )


def as_trained(config: Config) -> Scoring:
    """Returns the scoring that a run was trained with."""
    mixing = _mixing_of(config)
    weights = (getattr(config.fusion, name) for name in Fusion._fields)
    fusion = Fusion(*weights) if config.head.enabled else None
    return Scoring(fusion, mixing if mixing.weight else None)


def _mixing_of(config: Config) -> Mixing:
    """Returns the settings of training neighbours in the flags of a run, also if they are off."""
    return Mixing(*(getattr(config.knn, name) for name in Mixing._fields))


def is_tuned(workdir: str, step: int) -> bool:
    """Whether a scoring was tuned for the model of this step.

    Raises:
      InputError: If the file is damaged.
    """
    return _read_tuned(workdir, step) is not None


def as_tuned(config: Config, workdir: str, step: int) -> Scoring:
    """Returns the scoring that was tuned for the model of this step, else that of training."""
    return _tuned(config, workdir, step) or as_trained(config)


def from_flags(config: Config, values: flags.FlagValues, workdir: str, step: int) -> Scoring:
    """Returns the scoring of the given flags, else as tuned for this step, else as trained.

    Args:
      config: Flags of the run.
      values: Parsed flags of `define_flags`.
      workdir: The run directory.
      step: Of the model.

    Raises:
      InputError: If flags set the label head of a run without one, or k, temperature or joint of
        training neighbours whose weight is zero by default.
    """
    given_fusion, given_mixing = _given(values, "fusion", Fusion), _given(values, "knn", Mixing)
    if given_fusion and not config.head.enabled:
        raise InputError(
            f"--fusion.{next(iter(given_fusion))}: {workdir} has no label head; leave it out"
        )
    tuned = _tuned(config, workdir, step)
    scoring = tuned or as_trained(config)
    if given_mixing.get("weight") == 0:
        scoring = scoring.without_neighbours()
    elif given_mixing:
        if scoring.mixing is None and "weight" not in given_mixing:
            raise InputError(
                f"--knn.{next(iter(given_mixing))}: training neighbours are off; add "
                "--knn.weight=0.1"
            )
        default = scoring.mixing or _mixing_of(config)
        scoring = scoring._replace(mixing=default._replace(**given_mixing))
    if config.head.enabled:
        scoring = Scoring(
            scoring.fusion._replace(**given_fusion),
            scoring.mixing,
            scoring.fusion_alone and scoring.fusion_alone._replace(**given_fusion),
        )
        for fusion in scoring.fusion, scoring.fusion_alone:
            if fusion is not None and not fusion.depends_on_query:
                raise InputError(
                    "--fusion.prototypes=0 and --fusion.head=0: all scores would be equal; give "
                    "one of them a weight"
                )
        if scoring.mixing is not None and scoring.mixing.joint:
            raise InputError(
                "--knn.joint: labels and training queries cannot be searched as one set in a run "
                "with a label head; give --noknn.joint"
            )
    if tuned and (described := describe(tuned)) and given_mixing.get("weight") != 0:
        overridden = ", overridden by the given flags" if given_mixing or given_fusion else ""
        what = "scores" if tuned.fusion else "training neighbours"
        console.status(f"{what} as tuned: {described}{overridden}")
    elif tuned and not given_mixing and (trained := as_trained(config).mixing):
        console.status(
            "training neighbours are off: they did not help on the validation split; "
            f"--knn.weight={trained.weight:g} turns them on"
        )
    return scoring


def _given(values: flags.FlagValues, group: str, kind: Any) -> dict[str, Any]:
    """Returns the fields of a named tuple that flags set."""
    given = {name: values[f"{group}.{name}"].value for name in kind._fields}
    return {name: value for name, value in given.items() if value is not None}


def describe(scoring: Scoring) -> str:
    """Returns the flags that set a scoring, as text; empty without head and neighbours."""
    parts = []
    if scoring.fusion is not None:
        parts += [f"--fusion.{name}={value:g}" for name, value in scoring.fusion._asdict().items()]
    if scoring.mixing is not None:
        mixing = scoring.mixing
        parts += [
            f"--knn.weight={mixing.weight:g} --knn.k={mixing.k} "
            f"--knn.temperature={mixing.temperature:g}"
        ]
        if scoring.fusion is None:
            parts.append("--knn.joint" if mixing.joint else "--noknn.joint")
    elif scoring.fusion is not None:
        parts.append("--knn.weight=0")
    return " ".join(parts)


def to_row(scoring: Scoring, value: float) -> dict[str, Any]:
    """Returns a row of the tuning table: fields of fusion and mixing, and the value reached.

    A row without training neighbours has weight 0.
    """
    fusion = {} if scoring.fusion is None else scoring.fusion._asdict()
    mixing = scoring.mixing or Mixing(*PUBLISHED)._replace(weight=0.0)
    return {**fusion, **mixing._asdict(), "value": value}


def from_row(row: dict[str, Any]) -> Scoring:
    """Returns the scoring of a row of the tuning table."""
    mixing = Mixing(*(row[name] for name in Mixing._fields))
    weights = {name: row[name] for name in Fusion._fields if name in row}
    fusion = Fusion(**weights) if weights else None
    return Scoring(fusion, mixing if mixing.weight else None)


def best_of(tried: Sequence[dict[str, Any]]) -> Scoring:
    """Returns the best scoring of a tuning table, and the best fusion without neighbours.

    Args:
      tried: Rows of `to_row`, best first.
    """
    alone = next((row for row in tried if not row["weight"]), None)
    return from_row(tried[0])._replace(fusion_alone=alone and from_row(alone).fusion)


def save_tuned(workdir: str, step: int, names: Sequence[str], tried: list[dict[str, Any]]) -> str:
    """Writes the best scoring and the tuning table to the run directory; returns the path.

    Args:
      workdir: The run directory.
      step: Of the model.
      names: Metrics that were maximised.
      tried: Rows of `to_row`, best first.
    """
    path = os.path.join(workdir, TUNED)
    best = best_of(tried)
    about = {"step": step, "by": list(names)}
    about["mixing"] = {name: tried[0][name] for name in Mixing._fields}
    for name in ("fusion", "fusion_alone"):
        if getattr(best, name) is not None:
            about[name] = getattr(best, name)._asdict()
    sealed.write(path, {**about, "tried": tried})
    return path


def _read_tuned(workdir: str, step: int) -> _Tuned | None:
    path = os.path.join(workdir, TUNED)
    if not json_files.is_there(path):
        return None
    remedy = "remove it, or run evaluate --tune again"
    about = sealed.read(path, _Tuned, remedy)
    for fusion in about.fusion, about.fusion_alone:
        if fusion is not None and not Fusion(**fusion).depends_on_query:
            raise InputError(f"{path}: both weights of a fusion are 0; {remedy}")
    return about if about.step == step else None


def _tuned(config: Config, workdir: str, step: int) -> Scoring | None:
    """Returns the scoring tuned for the model of this step; None: there is none.

    Raises:
      InputError: If the file is damaged.
    """
    about = _read_tuned(workdir, step)
    if about is None:
        return None
    mixing = Mixing(**about.mixing)
    fusion, alone = (x and Fusion(**x) for x in (about.fusion, about.fusion_alone))
    trained = as_trained(config)
    if trained.fusion is None:
        fusion = alone = None
    return Scoring(fusion or trained.fusion, mixing if mixing.weight else None, alone)
