"""Finds the files of each part of tabular data by their names."""

import os

import msgspec

from vixml_jax.data.sources import readers, values
from vixml_jax.data.sources.raw import SPLITS
from vixml_jax.data.sources.values import LABELS
from vixml_jax.errors import InputError
from vixml_jax.storage import json_files

HUB = "hf:"  # Begins the name of a data set of the Hugging Face hub.
_SAVED = ("dataset_dict.json", "state.json")  # In directories that `datasets` saves.
# Files that hold tables, but are none of ours.
_UNREADABLE = (
    ".bz2", ".feather.gz", ".h5", ".orc", ".ods", ".parquet.gz", ".pickle", ".pkl", ".txt",
    ".txt.gz", ".xls", ".xlsx", ".xml", ".xz", ".zip",
)  # fmt: skip
_IMAGES = "_images.txt"  # Ends the names of lists of images, which are read elsewhere.
_TABLES = "csv, tsv, jsonl, json, parquet or arrow files"
_EXPECTED = {
    "source": f"{_TABLES}, a directory in the XML repository's layout or of `save_to_disk`, a data "
    f"set that --catalog lists, {HUB}NAME, or 'glyphs'",
    "labels_source": _TABLES,
}


class _SavedSplits(msgspec.Struct):
    """`dataset_dict.json` of the library `datasets`."""

    splits: list[str]


class _SavedState(msgspec.Struct):
    """`state.json` of the library `datasets`."""

    files: list[dict[str, str]] = msgspec.field(name="_data_files")
    indices: list[dict[str, str]] | None = msgspec.field(name="_indices_data_files", default=None)


def find_tables(source: str, labels_source: str = "") -> dict[str, list[str]]:
    """Returns the sorted files of 'train', 'valid', 'test', 'labels', and '' for other names.

    Args:
      source: A file; a directory of files, or of directories of shards, whose names begin with the
        name of a part ('train-00000.parquet', 'test.csv', 'labels/part-0.jsonl'); a directory that
        `save_to_disk` of the library `datasets` wrote; or `hf:NAME[:CONFIGURATION]`, a data set of
        the Hugging Face hub.
      labels_source: File or directory of shards of the labels, if they are elsewhere.

    Raises:
      InputError: If there is no table, or the names are ambiguous.
    """
    files: dict[str, list[str]] = {}
    for path, name in _list_tables("source", source):
        files.setdefault(_part_of(name), []).append(path)
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


def identity(source: str) -> str:
    """What identifies a source: its absolute path, or its name on the hub."""
    return source if source.startswith(HUB) else os.path.abspath(source)


def name_of(source: str) -> str:
    """Name of the data set of a source: that of the file or directory, or on the hub."""
    return os.path.basename(identity(source).removeprefix(HUB)).partition(".")[0]


def _list_tables(flag: str, source: str) -> list[tuple[str, str]]:
    """Paths of the tables, and for each the file or directory name that identifies its part."""
    if os.path.isfile(source):
        return [(source, "")]
    if source.startswith(HUB):
        return _of_hub(flag, source)
    if any(os.path.isfile(os.path.join(source, name)) for name in _SAVED):
        return _of_saved(flag, source)
    tables, others = [], []
    for name in sorted(os.listdir(source)) if os.path.isdir(source) else []:
        path = os.path.join(source, name)
        if not os.path.isdir(path):
            if readers.kind_of(name):
                tables.append((path, name))
            elif name.lower().endswith(_UNREADABLE) and not name.endswith(_IMAGES):
                others.append(name)
            continue
        # The name of the directory tells the part of its shards, or else their own names do.
        shards = [shard for shard in sorted(os.listdir(path)) if readers.kind_of(shard)]
        for shard in shards:
            tables.append((os.path.join(path, shard), name if _part_of(name) else shard))
    parts = {_part_of(name) for _, name in tables}
    for name in others:
        if _part_of(name) and _part_of(name) not in parts:
            raise InputError(
                f"--{flag}={source}: {name} cannot be read; expected {_TABLES}, or another name if "
                f"it is not the table of {_part_of(name)}"
            )
    if not tables:
        raise InputError(
            f"--{flag}={source}: no such file, or a directory without tables; expected "
            f"{_EXPECTED[flag]}"
        )
    return tables


def _of_hub(flag: str, source: str) -> list[tuple[str, str]]:
    """The files of a data set of the Hugging Face hub, downloaded by the library `datasets`."""
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"--{flag}={source}: needs the package datasets; run: pip install 'vixml_jax[datasets]'"
        ) from None
    name, _, configuration = source.removeprefix(HUB).partition(":")
    try:
        splits = datasets.load_dataset(name, configuration or None)
    except Exception as error:  # Of the network, the hub, or the files; of many types.
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"--{flag}={source}: {reason}; expected {HUB}NAME or {HUB}NAME:CONFIGURATION"
        ) from None
    files = {
        split: [file["filename"] for file in data.cache_files] for split, data in splits.items()
    }
    return _of_splits(flag, source, files)


def _of_saved(flag: str, source: str) -> list[tuple[str, str]]:
    """The files of a directory that `save_to_disk` of the library `datasets` wrote."""
    remedy = "expected a directory as `save_to_disk` writes it"
    directories = {"": source}
    if os.path.isfile(path := os.path.join(source, _SAVED[0])):
        names = json_files.read(path, _SavedSplits, remedy).splits
        directories = {split: os.path.join(source, split) for split in names}
    files = {}
    for split, directory in directories.items():
        saved = json_files.read(os.path.join(directory, _SAVED[1]), _SavedState, remedy)
        if saved.indices:
            raise InputError(
                f"{directory}: some of its rows were selected by an old version of datasets; save "
                "it again with flatten_indices()"
            )
        files[split] = [os.path.join(directory, file["filename"]) for file in saved.files]
    return _of_splits(flag, source, files)


def _of_splits(flag: str, source: str, files: dict[str, list[str]]) -> list[tuple[str, str]]:
    """The files of the splits that are read; warns of other splits."""
    if len(files) == 1:
        (split,) = files
        part = _part_of(split) or ("labels" if flag == "labels_source" else "")
        return [(path, part) for path in files[split]]
    left = [split for split in files if _part_of(split) not in SPLITS]
    if len(left) == len(files):
        raise InputError(
            f"--{flag}={source}: its splits are {', '.join(files)}; expected train, and optionally "
            "validation and test (DatasetDict.save_to_disk writes splits under other names)"
        )
    if left:
        readers.print_warning(f"{source}: splits that are not read: {', '.join(left)}")
    return [(path, split) for split, paths in files.items() if split not in left for path in paths]


def _part_of(name: str) -> str:
    """The part whose name a file or directory name begins with, or ''."""
    word = name.lower()
    for mark in "-_. ":
        word = word.partition(mark)[0]
    return next((part for part, words in values.PARTS.items() if word in words), "")
