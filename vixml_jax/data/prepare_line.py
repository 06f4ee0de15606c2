"""The `prepare` command that made a data set, or will make it, for messages that ask to run it."""

import shlex
from collections.abc import Mapping
from typing import Any

from absl import flags

COMMAND = "python -m vixml_jax.prepare"
# Flags of `prepare` that say where to write, which process does it, or only how much to print.
_NOT_KEPT = (
    "out", "overwrite", "dry_run", "catalog", "quiet", "verbose", "verbosity", "num_processes",
    "process_index",
)  # fmt: skip
# Settings of `dataset.json` that are flags under the same names.
_SETTINGS = (
    "tokenizer", "max_tokens", "encoding", "valid", "test", "split_by", "filters", "propensity_a",
    "propensity_b", "seed",
)  # fmt: skip
# Columns of `dataset.json` whose flags end in `_column`.
_COLUMNS = ("id", "labels", "weights", "image", "embedding", "split", "label_id")


def arguments(values: flags.FlagValues) -> list[str]:
    """The flags of `prepare` that were given, as arguments; `dataset.json` keeps them."""
    given = (values[name] for name in values if values[name].present and name not in _NOT_KEPT)
    return [flag.serialize() for flag in given]


def again(info: Mapping[str, Any], path: str, **changes: Any) -> str:
    """The command that prepares a data set again in the same place.

    Args:
      info: Contents of its `dataset.json`. Data sets of version 0.3 and before do not keep the
        flags that were given; they keep the settings that these led to.
      path: Its directory.
      changes: Flags with other values.
    """
    kept = info.get("arguments")
    if kept is None:
        kept = _flags(_settings_0_3(info.get("settings", {})))
    kept = [one for one in kept if one.lstrip("-").partition("=")[0] not in changes]
    return _joined([*kept, f"--out={path}", *_flags(changes), "--overwrite"])


def first(source: str, path: str, **settings: Any) -> str:
    """The command that prepares a source; settings are flags."""
    return _joined([f"--source={source}", f"--out={path}", *_flags(settings)])


def _settings_0_3(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that led to the settings in the `dataset.json` of version 0.3 and before."""
    source = settings.get("source", {})
    given = {"source": source.get("path")} | {name: settings.get(name) for name in _SETTINGS}
    for name, value in source.get("columns", {}).items():
        given[f"{name}_column" if name in _COLUMNS else name] = value
    given["images"], _, aspect = (settings.get("images") or "").rpartition(", ")
    given["keep_aspect"] = "true" if aspect == "aspect kept" else ""
    return {name: value for name, value in given.items() if value not in (None, "", "auto")}


def _flags(settings: Mapping[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def _joined(given: list[str]) -> str:
    return " ".join([COMMAND, *map(shlex.quote, given)])
