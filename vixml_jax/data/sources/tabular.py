"""Reader of tabular data: tables of queries and, optionally, a table of labels."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from vixml_jax.data import splitting, store
from vixml_jax.data.images import image_embeddings
from vixml_jax.data.problems import Problems
from vixml_jax.data.sources import (
    columns,
    readers,
    reading,
    tabular_files,
    values,
    xml_repository,
)
from vixml_jax.data.sources.columns import IDS, ROWS, Columns, Roles
from vixml_jax.data.sources.delimited import USUAL, Dialect
from vixml_jax.data.sources.label_vocab import LabelVocab
from vixml_jax.data.sources.raw import SPLITS, RawDataset, RawItems, RawQueries, file_stats
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.data.sources.tabular_part import TabularPart
from vixml_jax.data.sources.values import LABELS
from vixml_jax.errors import InputError
from vixml_jax.runtime import progress
from vixml_jax.storage import text_files

_FILTER_FILES = {split: f"filter_labels_{split}.txt" for split in SPLITS}


def read_tables(
    source: str,
    spool: str,
    *,
    names: Columns | None = None,
    labels_source: str = "",
    split_by: str = splitting.RANDOM,
    dialect: Dialect = USUAL,
    with_images: bool = False,
    find_images: xml_repository.FindImages | None = None,
    problems: Problems | None = None,
) -> RawDataset:
    """Reads tables; texts and embeddings are written to files in `spool`.

    The tables of queries are read twice: what is not explicit is inferred from all rows, and then
    used for all of them. A query belongs to the split that its file name or its split column names,
    else to training. Rows keep their order, and none is left out. Without a label table, the labels
    are the distinct values of the labels column, sorted.

    Args:
      source, labels_source: See `tabular_files.find_tables`.
      spool: A directory for temporary files, which must outlive the result.
      names: Explicit column names; others are inferred.
      split_by: For 'group:COLUMN' and 'time:COLUMN', the column is read as the key to split by.
      dialect: Encoding, delimiter and quotes of the files.
      with_images: Whether the images of the image column will be embedded; if not, they are only
        counted.
      find_images: Finds images in {trn,val,tst,lbl} files of a directory, for parts without an
        image column.
      problems: Collects the errors of all rows, for a dry run; None: the first is raised.

    Raises:
      InputError: If a file, a row or a flag is not valid.
    """
    names = names or Columns()
    problems = problems or Problems()
    splitting.parse(split_by)
    files = tabular_files.find_tables(source, labels_source)
    with contextlib.ExitStack() as stack:
        reader = _Reader(names, split_by, dialect, with_images, problems, spool, stack)
        vocab, label_part = reader.vocab, reader.read_labels(files.get(LABELS, []))
        tables = reader.open_tables(files)
        parts = reader.read_queries(tables)
    for part in parts.values():
        with problems.noting():
            part.check_ids()
    problems.stop()
    if "train" not in parts:
        raise InputError(f"--source={source}: no training queries")
    if label_part is None:
        texts = sorted(vocab.row_of)
        labels = RawItems(len(texts), lambda: [texts], None, texts)
        new_rows = np.empty(len(texts), np.int64)
        new_rows[[vocab.row_of[text] for text in texts]] = np.arange(len(texts))
    else:
        labels, new_rows = label_part.items(spool), None
    if not labels.count:
        raise InputError(f"--source={source}: no query has a label")
    queries = {split: part.queries(spool, labels.count, new_rows) for split, part in parts.items()}
    paths = [path for part_paths in files.values() for path in part_paths]
    if os.path.isdir(source):
        paths += [
            os.path.join(source, name)
            for name in os.listdir(source)
            if name in _FILTER_FILES.values() or name.endswith(xml_repository.IMAGE_FILES)
        ]
        if find_images is not None:
            labels, queries = _with_images(labels, queries, source, find_images, with_images)
        queries = _with_filters(queries, labels, source, vocab.labels_are == ROWS, dialect)
    part_images = {split: split_queries.items.images for split, split_queries in queries.items()}
    image_embeddings.check_widths({**part_images, LABELS: labels.images}, source)
    for part in [*parts.values(), *([] if label_part is None else [label_part])]:
        reader.warnings += part.warnings(vocab.labels_are)
    train_table = tables.get("train") or tables[""]
    return RawDataset(
        name=tabular_files.name_of(source),
        fingerprint={
            "path": tabular_files.identity(source),
            "files": file_stats(paths, source if os.path.isdir(source) else ""),
            "columns": dataclasses.asdict(names),
            "split_by": split_by,
            **{
                name: value
                for name in ("delimiter", "quotechar")
                if (value := getattr(dialect, name))
            },
        },
        labels=labels,
        summary=tuple(reader.summary),
        notes=(vocab.describe(labels.count),),
        warnings=(*reader.warnings, *vocab.warnings()),
        reading=reading.of_roles(
            train_table.paths[0],
            names,
            dialect,
            train_table.roles,
            reader.label_roles,
            vocab.separator or columns.NONE,
            vocab.labels_are,
        ),
        **queries,
    )


class _Reader:
    """Reads the parts of a source.

    Attributes:
      vocab: The labels.
      label_roles: Roles of the columns of the label table; None if there is none.
      summary: How each part was read.
      warnings: Possible faults of its files.
    """

    def __init__(
        self,
        names: Columns,
        split_by: str,
        dialect: Dialect,
        with_images: bool,
        problems: Problems,
        spool: str,
        stack: contextlib.ExitStack,
    ):
        self._names, self._dialect, self._problems = names, dialect, problems
        self._split_kind, self._key_column = splitting.parse(split_by)
        self._with_images = with_images
        self._writer, self._stack = store.Writer(spool), stack
        self.vocab = LabelVocab(names.labels_are, names.label_separator)
        # False if the table of labels is faulty: that a label is unknown is then no fault.
        self._labels_known = True
        self.label_roles: Roles | None = None
        self.summary: list[str] = []
        self.warnings: list[str] = []

    def read_labels(self, paths: list[str]) -> TabularPart | None:
        """The rows of the label table; None if there is none."""
        if not paths:
            if self._names.labels_are in (IDS, ROWS):
                raise InputError(
                    f"--labels_are={self._names.labels_are}: there is no label table; pass "
                    "--labels_source"
                )
            return None
        part, num_problems = self._new_part(LABELS), len(self._problems.found)
        with self._problems.noting():
            table = _Table.open(paths, self._names, self._dialect, label_table=True)

            def add(chunk: Chunk) -> None:
                part.add(chunk, range(len(chunk)), table.roles, with_images=self._with_images)

            for chunk in table.read(self._problems, self.warnings.append):
                _add_rows(chunk, add, self._problems)
            part.check_ids()
            self.label_roles = table.roles
            self.summary.append(table.describe(LABELS, self._names))
        self._labels_known = len(self._problems.found) == num_problems
        self.vocab.use_table(part)
        return part

    def open_tables(self, files: Mapping[str, list[str]]) -> "dict[str, _Table]":
        """The tables of queries by split; infers how they refer to labels from all rows."""
        tables: dict[str, _Table] = {}
        survey = self.vocab.new_survey()
        for name in ("", *SPLITS):
            if name not in files:
                continue
            # Queries of the valid and test files are not split, and need no key.
            key = self._key_column if name in ("", "train") else ""
            with self._problems.noting():
                table = _Table.open(files[name], self._names, self._dialect, key=key)
                for chunk in table.read(self._problems, only=table.roles.labels):
                    survey.add(chunk, table.roles.labels)
                tables[name] = table
        num_problems = len(self._problems.found)
        if tables and self._labels_known:
            with self._problems.noting():
                self.vocab.infer(survey, next(iter(tables.values())).roles.labels)
            self._labels_known = len(self._problems.found) == num_problems
        return tables

    def read_queries(self, tables: "Mapping[str, _Table]") -> dict[str, TabularPart]:
        """The queries of each split."""
        parts: dict[str, TabularPart] = {}
        for name, table in tables.items():

            def add(chunk: Chunk, name: str = name, roles: Roles = table.roles) -> None:
                splits = [name or "train"] * len(chunk)
                if roles.split and not name:
                    splits = values.splits(chunk, roles.split)
                labels, weights = None, None
                if self._labels_known:
                    labels, weights = self.vocab.resolve(chunk, roles)
                for split in dict.fromkeys(splits):
                    if split not in parts:
                        parts[split] = self._new_part(split)
                    parts[split].add(
                        chunk,
                        [row for row, row_split in enumerate(splits) if row_split == split],
                        roles,
                        with_images=self._with_images,
                        labels=labels,
                        weights=weights,
                        split_kind=self._split_kind,
                    )

            with self._problems.noting():
                for chunk in table.read(self._problems, self.warnings.append):
                    _add_rows(chunk, add, self._problems)
            self.summary.append(table.describe(name or "queries", self._names))
        return parts

    def _new_part(self, name: str) -> TabularPart:
        return TabularPart(name, self._writer, self._stack)


class _Table(NamedTuple):
    """The files of one part, and the columns that are used.

    Attributes:
      paths: The files.
      names: All column names; in jsonl, of all rows.
      roles: Roles of the columns.
      dialect: Encoding, delimiter and quotes.
    """

    paths: list[str]
    names: list[str]
    roles: Roles
    dialect: Dialect

    @classmethod
    def open(cls, paths: list[str], given: Columns, dialect: Dialect, **options: Any) -> "_Table":
        """The table in some files; `options` are those of `columns.assign`."""
        found = [name for path in paths for name in readers.column_names(path, dialect=dialect)]
        names = list(dict.fromkeys(found))
        return cls(
            paths, names, columns.assign(paths[0], given, dialect, names=names, **options), dialect
        )

    def read(
        self,
        problems: Problems,
        warn: Callable[[str], None] = lambda text: None,
        *,
        only: str | None = None,
    ) -> Iterator[Chunk]:
        """The used columns of all rows, or only one of them.

        Raises:
          InputError: If a row cannot be read, unless `problems` collects the errors, or if a file
            has no rows, or lacks a column.
        """
        wanted = self.roles.used if only is None else [only]
        for path in self.paths:
            title = f"rows of {os.path.basename(path)}"
            with problems.noting(), progress.track(title, None, unit="rows") as advance:
                num_rows = 0
                chunks = readers.read(
                    path, wanted, dialect=self.dialect, strict=not problems.collect, warn=warn
                )
                for chunk in chunks:
                    missing = [name for name in wanted if name not in chunk.columns]
                    if missing:
                        raise self._missing_column(path, missing[0])
                    for error in chunk.errors:
                        problems.add(error)
                    num_rows += len(chunk) + len(chunk.errors)
                    advance(len(chunk) + len(chunk.errors))
                    yield chunk
                if not num_rows:
                    raise readers.no_rows_error(path)

    def _missing_column(self, path: str, name: str) -> InputError:
        """The error for a file that lacks a column of the other files."""
        names = readers.column_names(path, dialect=self.dialect)
        others = f", as in {self.paths[0]}" if path != self.paths[0] else ""
        return InputError(
            f"{path}: no column {name!r}{others}; its columns are {columns.listed(names)}"
        )

    def describe(self, part: str, given: Columns) -> str:
        """The files, their format if it is unusual, and the column of each role, one per line."""
        text = columns.describe(
            part, self.paths, self.roles, given, self.names, label_table=part == LABELS
        )
        form = readers.describe_format(self.paths[0], self.dialect)
        files, _, roles = text.partition("\n")
        return "\n".join([files, *([f"  {'format':9} {form}"] if form else []), roles])


def _add_rows(chunk: Chunk, add: Callable[[Chunk], None], problems: Problems) -> None:
    """Adds the rows of a chunk; where errors are collected, one row at a time if one is invalid."""
    if not problems.collect:
        add(chunk)
        return
    try:
        add(chunk)
    except InputError:
        for row in range(len(chunk)):
            cells = {name: [cells[row]] for name, cells in chunk.columns.items()}
            with problems.noting():
                add(Chunk(chunk.path, [chunk.lines[row]], cells))


def _with_images(
    labels: RawItems,
    queries: dict[str, RawQueries],
    directory: str,
    find_images: xml_repository.FindImages,
    column_wins: bool,
) -> tuple[RawItems, dict[str, RawQueries]]:
    """Labels and queries with the images of files in the directory, unless a column gave some.

    Without `column_wins`, images that a column only names give way to those of files.
    """

    def add_images(part: str, items: RawItems) -> RawItems:
        if items.images is not None and (column_wins or items.images.width):
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
    dialect: Dialect,
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
            pairs = _read_filter_by_ids(path, items, labels, dialect)
        queries[split] = dataclasses.replace(queries[split], filter=pairs)
    return queries


def _read_filter_by_ids(
    path: str, queries: RawItems, labels: RawItems, dialect: Dialect
) -> np.ndarray:
    """Filter pairs from lines of a query id and a label id, separated by a tab or spaces."""
    query_rows, label_rows = (
        {items.name(row): row for row in range(items.count)} for items in (queries, labels)
    )
    pairs: set[tuple[int, int]] = set()
    for number, line in text_files.read_lines(path, dialect.encoding):
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
