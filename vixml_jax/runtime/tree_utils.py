"""Splitting and merging of nested dicts of parameters."""

from collections.abc import Callable, Mapping
from typing import Any

Path = tuple[str, ...]


def partition(
    tree: Mapping[str, Any], chosen: Callable[[Path], bool], path: Path = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a tree into the leaves whose path is `chosen` and the others, without empty dicts.

    Args:
      tree: Nested dicts.
      chosen: Whether a path belongs to the first result.
      path: Path of `tree`, for the recursion.
    """
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, value in tree.items():
        child = (*path, name)
        if isinstance(value, Mapping):
            for part, subtree in zip(parts, partition(value, chosen, child), strict=True):
                if subtree:
                    part[name] = subtree
        else:
            parts[0 if chosen(child) else 1][name] = value
    return parts


def merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """All leaves of both trees; those of `update` take precedence."""
    merged = dict(base)
    for name, value in update.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = merge(merged[name], value) if nested else value
    return merged


def paths(tree: Mapping[str, Any], path: Path = ()) -> set[Path]:
    """Paths of all leaves."""
    leaves: set[Path] = set()
    for name, value in tree.items():
        child = (*path, name)
        leaves |= paths(value, child) if isinstance(value, Mapping) else {child}
    return leaves
