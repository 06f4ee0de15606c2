"""Finds the files of each part of tabular data by their names."""

import os

from vixml_jax.data.sources import readers, values
from vixml_jax.data.sources.raw import SPLITS
from vixml_jax.data.sources.values import LABELS
from vixml_jax.errors import InputError

_TABLES = "csv, tsv, jsonl or parquet files"
_EXPECTED = {
    "source": f"{_TABLES}, a directory in the XML repository's layout, a data set that --catalog "
    "lists, or 'glyphs'",
    "labels_source": _TABLES,
}


def find_tables(source: str, labels_source: str = "") -> dict[str, list[str]]:
    """Returns the sorted files of 'train', 'valid', 'test', 'labels', and '' for other names.

    Args:
      source: A file; or a directory of files, or of directories of shards, whose names begin with
        the name of a part ('train-00000.parquet', 'test.csv', 'labels/part-0.jsonl').
      labels_source: File or directory of shards of the labels, if they are elsewhere.

    Raises:
      InputError: If there is no table, or the names are ambiguous.
    """
    files: dict[str, list[str]] = {}
    for path, name in _list_tables("source", source):
        files.setdefault(_part_of(name) if os.path.isdir(source) else "", []).append(path)
    if labels_source:
        files[LABELS] = [path for path, _ in _list_tables("labels_source", labels_source)]
    path_of: dict[str, str] = {}
    for path in (path for paths in files.values() for path in paths):
        other = path_of.setdefault(readers.stem_of(path), path)
        if other != path:
            raise InputError(
                f"--source={source}: {os.path.basename(other)} and {os.path.basename(path)} differ "
                "only in their extension, and would be read twice; remove one of them"
            )
    if "" in files and set(files) & set(SPLITS):
        raise InputError(
            f"--source={source}: found {os.path.basename(files[''][0])} beside the files of a "
            "split; expected all names to begin with train, valid, test or labels, or none"
        )
    if not set(files) & {"", "train"}:
        raise InputError(
            f"--source={source}: no table of training queries; expected a file such as train.csv"
        )
    return files


def _list_tables(flag: str, source: str) -> list[tuple[str, str]]:
    """Paths of the tables, and for each the file or directory name that identifies its part."""
    if os.path.isfile(source):
        return [(source, "")]
    tables = []
    for name in sorted(os.listdir(source)) if os.path.isdir(source) else []:
        path = os.path.join(source, name)
        shard_names = sorted(os.listdir(path)) if os.path.isdir(path) else [""]
        shards = [os.path.join(path, shard) if shard else path for shard in shard_names]
        tables += [(shard, name) for shard in shards if readers.kind_of(shard)]
    if not tables:
        raise InputError(
            f"--{flag}={source}: no such file, or a directory without tables; expected "
            f"{_EXPECTED[flag]}"
        )
    return tables


def _part_of(name: str) -> str:
    """The part whose name a file or directory name begins with, or ''."""
    word = name.lower()
    for mark in "-_. ":
        word = word.partition(mark)[0]
    return next((part for part, words in values.PARTS.items() if word in words), "")
