"""Reader of tabular data: tables of queries and, optionally, a table of labels."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import numpy as np

from vixml_jax.data import splitting, store
from vixml_jax.data.images import image_embeddings
from vixml_jax.data.sources import columns, readers, tabular_files, values, xml_repository
from vixml_jax.data.sources.columns import IDS, ROWS, Columns, Roles
from vixml_jax.data.sources.label_vocab import LabelVocab
from vixml_jax.data.sources.raw import SPLITS, RawDataset, RawItems, RawQueries, file_stats
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.data.sources.tabular_part import EmbedPaths, TabularPart
from vixml_jax.data.sources.values import LABELS
from vixml_jax.errors import InputError

_FILTER_FILES = {split: f"filter_labels_{split}.txt" for split in SPLITS}


def read_tables(
    source: str,
    spool: str,
    *,
    names: Columns | None = None,
    labels_source: str = "",
    split_by: str = splitting.RANDOM,
    encoding: str = "utf-8",
    embed_paths: EmbedPaths | None = None,
    find_images: xml_repository.FindImages | None = None,
) -> RawDataset:
    """Reads tables in one pass; texts and embeddings are written to files in `spool`.

    A query belongs to the split that its file name or its split column names, else to training.
    Rows keep their order. Without a label table, the labels are the distinct values of the labels
    column, sorted.

    Args:
      source, labels_source: See `tabular_files.find_tables`.
      spool: A directory for temporary files, which must outlive the result.
      names: Explicit column names; others are inferred.
      split_by: For 'group:COLUMN' and 'time:COLUMN', the column is read as the key to split by.
      encoding: Text encoding of csv, tsv and jsonl.
      embed_paths: Embeds the images of the image column; None: the column is not read.
      find_images: Finds images in {trn,val,tst,lbl} files of a directory, for parts without an
        image column.

    Raises:
      InputError: If a file, a row or a flag is not valid.
    """
    names = names or Columns()
    split_kind, key_column = splitting.parse(split_by)
    files = tabular_files.find_tables(source, labels_source)
    with_images = embed_paths is not None
    summary: list[str] = []
    with contextlib.ExitStack() as stack:
        writer = store.Writer(spool)
        vocab = LabelVocab(names.labels_are, names.label_separator)
        label_part = None
        if LABELS in files:
            label_part = TabularPart(LABELS, writer, stack)
            roles = columns.assign(files[LABELS][0], names, encoding, label_table=True)
            for chunk in _read(files[LABELS], roles, encoding):
                label_part.add(chunk, range(len(chunk)), roles, with_images)
            label_part.check_ids()
            vocab.use_table(label_part)
            summary.append(
                columns.describe(LABELS, files[LABELS], roles, names, encoding, label_table=True)
            )
        elif names.labels_are in (IDS, ROWS):
            raise InputError(
                f"--labels_are={names.labels_are}: there is no label table; pass --labels_source"
            )
        parts: dict[str, TabularPart] = {}
        for name in ("", *SPLITS):
            if name not in files:
                continue
            # Queries of the valid and test files are not split, and need no key.
            key = key_column if name in ("", "train") else ""
            roles = columns.assign(files[name][0], names, encoding, key=key)
            for chunk in _read(files[name], roles, encoding):
                if roles.split and not name:
                    splits = values.splits(chunk, roles.split)
                else:
                    splits = [name or "train"] * len(chunk)
                labels, weights = vocab.resolve(chunk, roles)
                for split in dict.fromkeys(splits):
                    rows = [row for row, row_split in enumerate(splits) if row_split == split]
                    if split not in parts:
                        parts[split] = TabularPart(split, writer, stack)
                    parts[split].add(chunk, rows, roles, with_images)
                    parts[split].add_labels(chunk, rows, labels, weights, roles.key, split_kind)
            summary.append(columns.describe(name or "queries", files[name], roles, names, encoding))
    if "train" not in parts:
        raise InputError(f"--source={source}: no training queries")
    for part in parts.values():
        part.check_ids()
    if label_part is None:
        texts = sorted(vocab.row_of)
        labels = RawItems(len(texts), lambda: [texts], None, texts)
        new_rows = np.empty(len(texts), np.int64)
        new_rows[[vocab.row_of[text] for text in texts]] = np.arange(len(texts))
    else:
        labels, new_rows = label_part.items(spool, embed_paths), None
    if not labels.count:
        raise InputError(f"--source={source}: no query has a label")
    queries = {
        split: part.queries(spool, embed_paths, labels.count, new_rows)
        for split, part in parts.items()
    }
    paths = [path for part_paths in files.values() for path in part_paths]
    if os.path.isdir(source):
        paths += [
            os.path.join(source, name)
            for name in os.listdir(source)
            if name in _FILTER_FILES.values() or name.endswith(xml_repository.IMAGE_FILES)
        ]
        if find_images is not None:
            labels, queries = _with_images(labels, queries, source, find_images)
        queries = _with_filters(queries, labels, source, vocab.labels_are == ROWS, encoding)
    part_images = {split: split_queries.items.images for split, split_queries in queries.items()}
    image_embeddings.check_widths({**part_images, LABELS: labels.images}, source)
    summary.append(_describe_labels(vocab, label_part is not None, labels.count))
    return RawDataset(
        name=os.path.basename(os.path.abspath(source)).partition(".")[0],
        fingerprint={
            "path": os.path.abspath(source),
            "files": file_stats(paths, source if os.path.isdir(source) else ""),
            "columns": dataclasses.asdict(names),
            "split_by": split_by,
        },
        labels=labels,
        summary=tuple(summary),
        warnings=tuple(_warnings(parts, label_part)),
        **queries,
    )


def _read(paths: list[str], roles: Roles, encoding: str) -> Iterator[Chunk]:
    """The chunks of all shards; raises an error for a shard without rows or used columns."""
    for path in paths:
        num_rows = 0
        for chunk in readers.read(path, roles.used, encoding=encoding):
            missing = [name for name in roles.used if name not in chunk.columns]
            if missing:
                names = readers.column_names(path, encoding=encoding)
                raise InputError(
                    f"{path}: no column {missing[0]!r}; its columns are {', '.join(names)}"
                )
            num_rows += len(chunk)
            yield chunk
        if not num_rows:
            raise readers.no_rows_error(path)


def _with_images(
    labels: RawItems,
    queries: dict[str, RawQueries],
    directory: str,
    find_images: xml_repository.FindImages,
) -> tuple[RawItems, dict[str, RawQueries]]:
    """Labels and queries with the images of files in the directory, unless a column gave some."""

    def add_images(part: str, items: RawItems) -> RawItems:
        if items.images is not None:
            return items
        images = find_images(directory, xml_repository.PREFIX[part], items.count)
        return items if images is None else dataclasses.replace(items, images=images)

    queries = {
        split: dataclasses.replace(split_queries, items=add_images(split, split_queries.items))
        for split, split_queries in queries.items()
    }
    return add_images(LABELS, labels), queries


def _with_filters(
    queries: dict[str, RawQueries],
    labels: RawItems,
    directory: str,
    by_rows: bool,
    encoding: str,
) -> dict[str, RawQueries]:
    """Queries with the filter pairs of `filter_labels_{train,valid,test}.txt`, where they exist.

    The pairs are row numbers if labels are named by rows or nothing has ids, else ids.
    """
    paths = {split: os.path.join(directory, name) for split, name in _FILTER_FILES.items()}
    paths = {split: path for split, path in paths.items() if os.path.exists(path)}
    if absent := sorted(paths.keys() - queries.keys()):
        raise InputError(
            f"{paths[absent[0]]}: the source has no {absent[0]} split; put its pairs into "
            "filter_labels_train.txt, from where they follow the queries that are held out"
        )
    queries = dict(queries)
    for split, path in paths.items():
        items, shape = queries[split].items, queries[split].relevance.shape
        if by_rows or (items.ids is None and labels.ids is None):
            pairs = xml_repository.read_filter(path, shape)
        else:
            pairs = _read_filter_by_ids(path, items, labels, encoding)
        queries[split] = dataclasses.replace(queries[split], filter=pairs)
    return queries


def _read_filter_by_ids(
    path: str, queries: RawItems, labels: RawItems, encoding: str
) -> np.ndarray:
    """Filter pairs from lines of a query id and a label id, separated by a tab or spaces."""
    query_rows, label_rows = (
        {items.name(row): row for row in range(items.count)} for items in (queries, labels)
    )
    pairs: set[tuple[int, int]] = set()
    for number, line in readers.read_lines(path, encoding):
        line = line.strip()
        ids = line.split("\t") if "\t" in line else line.split()
        if not ids:
            continue
        if len(ids) != 2 or ids[0] not in query_rows or ids[1] not in label_rows:
            raise InputError(
                f"{path}, line {number}: found {line[:60]!r}, expected the id of a query and the "
                "id of a label"
            )
        pair = query_rows[ids[0]], label_rows[ids[1]]
        if pair in pairs:
            raise InputError(
                f"{path}, line {number}: duplicate pair {line[:60]!r}; expected each pair once "
                "(sort -u removes duplicates)"
            )
        pairs.add(pair)
    return np.array(sorted(pairs), np.int64).reshape(-1, 2)


def _describe_labels(vocab: LabelVocab, has_table: bool, count: int) -> str:
    """A line on the number of labels and how queries refer to them."""
    separator = (
        f"separated by {vocab.separator!r}"
        if vocab.separator
        else "no separator (lists, or one label per query)"
    )
    if has_table:
        return f"{count:,} labels in the label table, named by {vocab.labels_are}; {separator}"
    return f"{count:,} distinct labels of the queries; {separator}"


def _warnings(parts: dict[str, TabularPart], label_part: TabularPart | None) -> Iterator[str]:
    """Possible faults of the tables."""
    for part in [*parts.values(), *([] if label_part is None else [label_part])]:
        if part.num_empty:
            yield f"{part.name}: empty texts: {part.num_empty:,}"
        if part.num_duplicates:
            yield (
                f"{part.name}: labels listed more than once for a query, of which each counts "
                f"once: {part.num_duplicates:,}"
            )
