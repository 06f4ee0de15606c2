"""Reads queries, filters and labels to be added from files; an invalid query stops no other."""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float16

from vixml_jax.data.images import download
from vixml_jax.data.sources import columns, readers, values
from vixml_jax.data.sources.columns import Columns, Roles
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.errors import InputError

_ROWS_FOR_NAMES = 1000  # First rows, from which column names are collected: JSON rows may differ.


class Query(NamedTuple):
    """A query, or a label to be added, as read from one row of a table."""

    line: int  # In the file, from 1.
    id: str | None  # The line number if the table has no ids; None: the id cannot be read.
    text: str
    images: list[str]  # Paths or URLs.
    embeddings: Float16[np.ndarray, "k v"] | None  # Of the images, if the table has them.
    listed: list[str]  # The row's list: labels to filter out, or example queries of a label.
    error: str = ""  # Why the row cannot be used; empty: it can.


def read_queries(path: str, names: Columns, encoding: str) -> Iterator[Query]:
    """Yields the queries of a table; the list of a row holds labels never to be predicted for it.

    Raises:
      InputError: If the file cannot be read at all, or lacks a column of texts.
    """
    rows = read(path, names, list_column="filter", encoding=encoding)
    return (_with_full_paths(row, path) for row in rows)


def read_labels(path: str, names: Columns, encoding: str) -> list[Query]:
    """Returns the labels of a table; the list of a row holds example queries.

    Raises:
      InputError: If a row is invalid, or an id is missing or occurs twice.
    """
    labels: list[Query] = []
    first_line: dict[str, int] = {}
    rows = read(path, names, list_column="examples", encoding=encoding, require_ids=True)
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
        labels.append(_with_full_paths(row, path))
    return labels


def _with_full_paths(query: Query, table: str) -> Query:
    """Returns the query with its image paths, which are relative to the table, made absolute."""
    directory = os.path.dirname(os.path.abspath(table))
    images = [x if download.is_url(x) else os.path.join(directory, x) for x in query.images]
    return query._replace(images=images)


def read_filters(path: str) -> dict[str, list[str]]:
    """Returns ids of labels that are never predicted, by query id.

    Args:
      path: File with a query id and a label id per line, separated by a tab or a space.

    Raises:
      InputError: If a line is malformed, or the file cannot be read.
    """
    filters: dict[str, list[str]] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                parts = line.rstrip("\n").split("\t") if "\t" in line else line.split()
                if len(parts) != 2:
                    raise InputError(
                        f"{path}, line {number}: found {line.strip()[:40]!r}, expected a query id "
                        "and a label id, separated by a tab or a space"
                    )
                filters.setdefault(parts[0], []).append(parts[1])
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--filters={path}: {error}") from None
    return filters


def read(
    path: str,
    names: Columns,
    *,
    list_column: str,
    encoding: str = "utf-8",
    require_ids: bool = False,
) -> Iterator[Query]:
    """Yields the rows of a csv, tsv, jsonl or parquet file in order; bad ones with an error.

    Args:
      path: Of the file.
      names: Names of columns; those that are empty are inferred.
      list_column: Column of the row's list; the table need not have it.
      encoding: Of texts.
      require_ids: Whether the table must have a column of ids. The id of a row without one is then
        empty, instead of its line number.

    Raises:
      InputError: If the file cannot be read at all, or lacks a required column.
    """
    rows = readers.read_rows(path, encoding=encoding)
    first = list(itertools.islice(rows, _ROWS_FOR_NAMES))
    found = list(dict.fromkeys(name for _, row in first if isinstance(row, dict) for name in row))
    if not found:
        error = next((str(row) for _, row in first), f"{path}: no rows; expected at least one")
        raise InputError(error)
    roles = columns.assign(path, names, encoding, names=found, labelled=False)
    if require_ids and roles.id is None:
        raise InputError(
            f"{path}: no id column found among {', '.join(map(repr, found))}; pass "
            "--id_column=COLUMN"
        )
    for line, row in itertools.chain(first, rows):
        if isinstance(row, InputError):
            yield _invalid(line, str(row), None if roles.id else str(line))
        else:
            yield _parse(path, line, row, roles, list_column, "" if require_ids else str(line))


def _invalid(line: int, error: str, name: str | None) -> Query:
    return Query(line, name, "", [], None, [], error)


def _parse(
    path: str, line: int, row: dict[str, Any], roles: Roles, list_column: str, default_id: str
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
            _strings(cell(roles.image), chunk, roles.image),
            values.vectors(cell(roles.embedding), chunk, 0, roles.embedding),
            _strings(cell(list_column), chunk, list_column),
        )
    except InputError as error:
        return _invalid(line, str(error), name)


def _strings(value: Any, chunk: Chunk, column: str | None) -> list[str]:
    """Returns the strings of a list cell, or of one that separates them with '|'."""
    parts = values.list_items(value, "|", chunk, 0, column) if column else []
    return [values.text(part, chunk, 0, column) for part in parts]


def in_blocks(queries: Iterator[Query], size: int) -> Iterator[Sequence[Query]]:
    """Yields blocks of `size` queries, read when needed; the last block may be shorter."""
    while block := list(itertools.islice(queries, size)):
        yield block
