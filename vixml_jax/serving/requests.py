"""Reads queries, filters and labels to be added from files; an invalid query stops no other."""

import dataclasses
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float16

from vixml_jax.data.images import named_images
from vixml_jax.data.images.image_reader import ImageSource
from vixml_jax.data.sources import columns, readers, values
from vixml_jax.data.sources.columns import Columns, Roles
from vixml_jax.data.sources.delimited import USUAL, Dialect
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.data.sources.reading import Reading
from vixml_jax.errors import InputError
from vixml_jax.runtime import console
from vixml_jax.storage import regular_files, text_files

_SEPARATOR = "|"  # Of lists in a text cell.
_BLOCK_LENGTH = 1 << 26  # Characters of texts and bytes of images in a block of queries.


class Query(NamedTuple):
    """A query, or a label to be added, as read from one row of a table."""

    line: int  # In the file, from 1.
    id: str | None  # The line number if the table has no ids; None: the id cannot be read.
    text: str
    images: Sequence[ImageSource]
    embeddings: Float16[np.ndarray, "k v"] | None  # Of the images, if the table has them.
    listed: list[str]  # The row's list: labels to filter out, or example queries of a label.
    error: str = ""  # Why the row cannot be used; empty: it can.


@dataclasses.dataclass(frozen=True)
class Options:
    """How tables are read: as flags say, else as the tables of the run's data were read.

    Attributes:
      columns: Explicit names of columns; empty ones are not given.
      dialect: Explicit settings of `Dialect`, by name.
      reading: How the tables of the run's data were read; None: not known, or there were none.
    """

    columns: Columns = dataclasses.field(default_factory=Columns)
    dialect: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reading: Reading | None = None

    def dialect_for(self, path: str) -> Dialect:
        """The dialect of a file."""
        usual = USUAL if self.reading is None else self.reading.dialect_for(path)
        return dataclasses.replace(usual, **self.dialect)

    @property
    def label_separator(self) -> str:
        """What separates the labels in a text cell."""
        found = "" if self.reading is None else self.reading.columns.label_separator
        return _SEPARATOR if found in ("", columns.NONE) else found

    def columns_for(self, path: str, names: Sequence[str], *, is_labels: bool) -> Columns:
        """The columns of a table; those that are empty are inferred.

        A text of several columns is made of the same ones as in training. If it was a single
        column, which the table lacks, it is inferred.

        Args:
          path: Of the table.
          names: Names of its columns.
          is_labels: Whether it has labels rather than queries.

        Raises:
          InputError: If the table lacks columns of the text.
        """
        if self.reading is None:
            return self.columns
        kept = self.reading.columns_for(names, label_table=is_labels)
        given = {name: value for name, value in vars(self.columns).items() if value}
        if "text" not in given:
            given["text"] = _text_column(
                f"{path} ({self.dialect_for(path).describe()})", kept.text, names
            )
        return dataclasses.replace(kept, **given)


def _text_column(path: str, template: str, names: Sequence[str]) -> str:
    """The column or template of the text of later queries; empty: to be inferred.

    Args:
      path: Of their table, with its dialect, for the message.
      template: Of the run's data; empty: there was none.
      names: Columns of the table.
    """
    column = template.removeprefix("{").removesuffix("}")
    if column in names:
        return column
    if "{" not in column:  # A single one, which the table calls otherwise.
        return ""
    wanted = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    absent = next((name for name in wanted if name not in names), None)
    if absent is not None:
        raise InputError(
            f"{path}: no column {absent!r}, of which the texts of the run's data were made "
            f"({template}); its columns are {columns.listed(names)}; pass --text=TEMPLATE to read "
            "other texts"
        )
    return template


def read_queries(path: str, options: Options) -> Iterator[Query]:
    """Returns the queries of a table; the list of a row holds labels never predicted for it.

    Raises:
      InputError: If the file cannot be read at all, or lacks a column of texts.
    """
    return read(path, options, list_column="filter", separator=options.label_separator)


def read_labels(path: str, options: Options) -> list[Query]:
    """Returns the labels of a table; the list of a row holds example queries.

    Raises:
      InputError: If a row is invalid, or an id is missing or occurs twice.
    """
    labels: list[Query] = []
    first_line: dict[str, int] = {}
    rows = read(path, options, list_column="examples", is_labels=True)
    for row in rows:
        if row.error:
            raise InputError(row.error)
        if not row.id:
            raise InputError(f"{path}, line {row.line}: no id; expected one for each label")
        if row.id in first_line:
            raise InputError(
                f"{path}, line {row.line}: duplicate label {row.id!r}, first in line "
                f"{first_line[row.id]}; expected each id once"
            )
        first_line[row.id] = row.line
        labels.append(row)
    return labels


def read_filters(path: str) -> dict[str, list[str]]:
    """Returns ids of labels that are never predicted, by query id.

    Args:
      path: File with a query id and a label id per line, separated by a tab or a space.

    Raises:
      InputError: If a line is malformed, or the file cannot be read.
    """
    filters: dict[str, list[str]] = {}
    regular_files.check(path)
    with text_files.errors_of(path):
        for number, line in text_files.read_lines(path, "utf-8"):
            parts = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
            if len(parts) != 2:
                raise InputError(
                    f"{path}, line {number}: found {line.strip()[:40]!r}, expected a query id and "
                    "a label id, separated by a tab or a space"
                )
            filters.setdefault(parts[0], []).append(parts[1])
    return filters


def read(
    path: str,
    options: Options,
    *,
    list_column: str,
    separator: str = _SEPARATOR,
    is_labels: bool = False,
) -> Iterator[Query]:
    """Returns the rows of a csv, tsv, jsonl or parquet file in order; bad ones have an error.

    Prints which columns are read. Further rows are read when they are needed.

    Args:
      path: Of the file.
      options: How it is read.
      list_column: Column of the row's list; the table need not have it.
      separator: Of this list in a text cell.
      is_labels: Whether the table has labels, which must have ids. The id of a row without one is
        then empty, instead of its line number.

    Raises:
      InputError: If the file cannot be read at all, or lacks a required column.
    """
    dialect = options.dialect_for(path)
    found = readers.column_names(path, dialect=dialect)
    names = options.columns_for(path, found, is_labels=is_labels)
    roles = columns.assign(path, names, dialect, names=found, labelled=False)
    rows = readers.read_rows(path, [*roles.used, list_column], dialect=dialect)
    if is_labels and roles.id is None:
        raise InputError(
            f"{path}: no id column found among {columns.listed(found)}; pass --id_column=COLUMN"
        )
    console.status(f"{path}: {_describe(roles, dialect)}")

    def queries() -> Iterator[Query]:
        for line, row in rows:
            if isinstance(row, InputError):
                yield _invalid(line, str(row), None if roles.id else str(line))
            else:
                default_id = "" if is_labels else str(line)
                yield _parse(path, line, row, roles, list_column, separator, default_id)

    return queries()


def _describe(roles: Roles, dialect: Dialect) -> str:
    """What is read: the columns of the roles, and the dialect."""
    used = {"text": columns.template(roles.text), "id": roles.id}
    used |= {"image": roles.image, "embedding": roles.embedding}
    parts = [f"{role} {column!r}" for role, column in used.items() if column]
    return ", ".join([*parts, dialect.describe()])


def _invalid(line: int, error: str, name: str | None) -> Query:
    return Query(line, name, "", [], None, [], error)


def _parse(
    path: str,
    line: int,
    row: dict[str, Any],
    roles: Roles,
    list_column: str,
    separator: str,
    default_id: str,
) -> Query:
    chunk = Chunk(path, [line], {name: [row.get(name)] for name in (*roles.used, list_column)})

    def cell(column: str | None) -> Any:
        return chunk.columns[column][0] if column else None

    name = None
    try:
        name = (values.text(cell(roles.id), chunk, 0, roles.id) if roles.id else "") or default_id
        return Query(
            line,
            name,
            columns.texts(chunk, roles.text, [0])[0],
            named_images.read_cell(chunk, 0, roles.image) if roles.image else [],
            values.vectors(cell(roles.embedding), chunk, 0, roles.embedding),
            _strings(cell(list_column), separator, chunk, list_column),
        )
    except InputError as error:
        return _invalid(line, str(error), name)


def _strings(value: Any, separator: str, chunk: Chunk, column: str) -> list[str]:
    """Returns the strings of a list cell, or of one with separators."""
    parts = values.list_items(value, separator, chunk, 0, column)
    return [values.text(part, chunk, 0, column) for part in parts]


def in_blocks(queries: Iterator[Query], size: int) -> Iterator[Sequence[Query]]:
    """Yields blocks of `size` queries, read when needed; the last block may be shorter.

    So may blocks of long texts and of images within the table.
    """
    block: list[Query] = []
    length = 0
    for query in queries:
        block.append(query)
        length += len(query.text) + sum(map(len, query.images))
        if len(block) == size or length > _BLOCK_LENGTH:
            yield block
            block, length = [], 0
    if block:
        yield block
