"""Nested dicts of parameters, taken apart and put together; imports nothing."""

from collections.abc import Callable, Mapping
from typing import Any

Path = tuple[str, ...]


def partition(
    tree: Mapping[str, Any], chosen: Callable[[Path], bool], path: Path = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves whose path is chosen, and the others; branches without a leaf are left out."""
    found: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, value in tree.items():
        here = (*path, name)
        if isinstance(value, Mapping):
            for side, part in zip(found, partition(value, chosen, here), strict=True):
                if part:
                    side[name] = part
        else:
            found[0 if chosen(here) else 1][name] = value
    return found


def merge(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """All leaves of both; where both have one, that of `other`."""
    merged = dict(one)
    for name, value in other.items():
        below = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if below else value
    return merged


def paths(tree: Mapping[str, Any], path: Path = ()) -> set[Path]:
    """The paths of all leaves."""
    found: set[Path] = set()
    for name, value in tree.items():
        here = (*path, name)
        found |= paths(value, here) if isinstance(value, Mapping) else {here}
    return found
