"""Queries to be answered, read a row at a time: each is checked by itself and stops no other."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float16

from vixml_jax.data.sources import columns, readers, values
from vixml_jax.data.sources.columns import Columns, Roles
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.errors import InputError

_LOOKED_AT = 1000  # Rows whose names of columns are known before the first is read.


class Query(NamedTuple):
    """A query, or a label to be added, as its row has it."""

    line: int  # In the file, from 1.
    id: str | None  # The line, where the row has none; None: it is there, but cannot be read.
    text: str
    pictures: list[str]  # Paths or urls.
    embeddings: Float16[np.ndarray, "k v"] | None  # Of its pictures, where the row has them.
    listed: list[str]  # Of the row's list: labels never to be predicted, or examples of a label.
    fault: str = ""  # Why it cannot be answered; empty: it can.


def read(
    path: str, names: Columns, *, listed: str, encoding: str = "utf-8", named: bool = False
) -> Iterator[Query]:
    """The rows of a csv, tsv, jsonl or parquet file, in order; a bad one says what is wrong.

    Args:
      path: Of the file.
      names: What columns are called; what is empty is guessed.
      listed: Column of the row's list, if it is there.
      encoding: Of texts.
      named: Whether there must be a column of ids; a row without one has none then, not its line.

    Raises:
      InputError: If the file cannot be read at all, or lacks a column of the text, or of the ids
        that must be there.
    """
    rows = readers.read_rows(path, encoding=encoding)
    first = list(itertools.islice(rows, _LOOKED_AT))
    found = list(dict.fromkeys(name for _, row in first if isinstance(row, dict) for name in row))
    if not found:
        said = next((str(row) for _, row in first), f"{path}: no rows; expected some")
        raise InputError(said)
    roles = columns.assign(path, names, encoding, names=found, labelled=False)
    if named and roles.id is None:
        raise InputError(
            f"{path}: which column is the id? found {', '.join(found)}; say --id_column=NAME"
        )
    for line, row in itertools.chain(first, rows):
        if isinstance(row, InputError):
            yield _faulty(line, str(row), None if roles.id else str(line))
        else:
            yield _understand(path, line, row, roles, listed, "" if named else str(line))


def _faulty(line: int, fault: str, name: str | None) -> Query:
    return Query(line, name, "", [], None, [], fault)


def _understand(
    path: str, line: int, row: dict[str, Any], roles: Roles, listed: str, unnamed: str
) -> Query:
    chunk = Chunk(path, [line], {name: [row.get(name)] for name in (*roles.used, listed)})

    def cell(column: str | None) -> Any:
        return chunk.columns[column][0] if column else None

    name = None
    try:
        name = (values.text(cell(roles.id), chunk, 0, roles.id) if roles.id else "") or unnamed
        return Query(
            line,
            name,
            columns.texts(chunk, roles.text, [0])[0],
            _strings(cell(roles.image), chunk, roles.image),
            values.vectors(cell(roles.embedding), chunk, 0, roles.embedding),
            _strings(cell(listed), chunk, listed),
        )
    except InputError as error:
        return _faulty(line, str(error), name)


def _strings(value: Any, chunk: Chunk, column: str | None) -> list[str]:
    parts = values.pieces(value, "|", chunk, 0, column) if column else []
    return [values.text(part, chunk, 0, column) for part in parts]


def in_blocks(queries: Iterator[Query], size: int) -> Iterator[Sequence[Query]]:
    """So many at a time."""
    while block := list(itertools.islice(queries, size)):
        yield block
