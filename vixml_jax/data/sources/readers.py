"""Readers of csv, tsv, jsonl (plain, gz or zst), parquet and arrow files, as chunks of columns."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vixml_jax.data.sources import delimited, json_rows
from vixml_jax.data.sources.binary import arrow_file, cells, parquet_file
from vixml_jax.data.sources.delimited import USUAL, DelimitedRows, Dialect
from vixml_jax.errors import InputError
from vixml_jax.storage import expansion, regular_files, text_files

KINDS = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
_BINARY = ("parquet", "arrow")
_CHUNK_ROWS = 1 << 13
_CHUNK_LENGTH = 1 << 24  # Characters of the text of rows; as Python values, up to 20 times as much.


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file, by column.

    Attributes:
      path: Path of the file.
      lines: Line where each row begins, from 1; for parquet and arrow, the number of the row.
      columns: Values by column name, one per row, of the types that the file has (csv: strings);
        None where a row has no value.
      errors: One error for each row among these that cannot be read, which names its line.
    """

    path: str
    lines: Sequence[int]
    columns: dict[str, Sequence[Any]]
    errors: Sequence[InputError] = ()

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        """File and line of a row of this chunk, for error messages."""
        word = "row" if kind_of(self.path) in _BINARY else "line"
        return f"{self.path}, {word} {self.lines[row]}"


def kind_of(path: str) -> str | None:
    """'csv', 'tsv', 'jsonl', 'parquet' or 'arrow', from the file name; None if it is no table."""
    stem, extension = os.path.splitext(path.lower())
    compressed = extension in text_files.COMPRESSED
    kind = KINDS.get(os.path.splitext(stem)[1] if compressed else extension)
    return None if compressed and kind in _BINARY else kind


def stem_of(path: str) -> str:
    """The path without extensions: equal for 'a.csv', 'a.csv.gz' and 'a.parquet'."""
    stem, extension = os.path.splitext(path)
    return os.path.splitext(stem)[0] if extension.lower() in text_files.COMPRESSED else stem


def print_warning(text: str) -> None:
    """Prints a warning: the usual `warn` of the readers."""
    print(f"warning: {text}", flush=True)


def column_names(path: str, *, dialect: Dialect = USUAL) -> list[str]:
    """The column names of a file, in order of their first occurrence in any row.

    Raises:
      InputError: If the file cannot be read, or has no rows.
    """
    with _file_errors(path):
        if kind_of(path) == "parquet":
            with _open_parquet(path) as (file, schema):
                if file.metadata.num_rows:
                    return list(schema.names)
        elif kind_of(path) == "jsonl":
            stat = os.stat(path)
            names = _json_names(path, dialect, stat.st_size, stat.st_mtime_ns)
            if names:
                return list(names)
        else:
            for chunk in read(path, dialect=dialect, strict=False, warn=lambda text: None):
                return list(chunk.columns)
    raise no_rows_error(path)


def describe_format(path: str, dialect: Dialect) -> str:
    """Encoding, delimiter and quotes of a file, as far as they are not the usual ones."""
    kind = _required_kind(path)
    if kind in _BINARY:
        return ""
    with _file_errors(path):
        encoding = text_files.encoding_of(path, dialect.encoding)
        parts = [] if encoding == USUAL.encoding else [f"encoding {encoding}"]
        if kind != "jsonl":
            parts += DelimitedRows(path, kind, dialect, lambda text: None).describe_unusual()
    return ", ".join(parts)


@functools.lru_cache(maxsize=64)
def _json_names(path: str, dialect: Dialect, size: int, mtime: int) -> tuple[str, ...]:
    """All names in the objects of a JSON file, which is read to its end: rows may differ.

    The size and time of the file tell whether it has changed since the names were read.
    """
    del size, mtime
    names: dict[str, None] = {}
    first_error: InputError | None = None
    for _, row, _ in json_rows.read_objects(path, dialect.encoding):
        if isinstance(row, InputError):
            first_error = first_error or row
        else:
            names.update(dict.fromkeys(row))
            if len(names) > delimited.MAX_COLUMNS:
                break
    delimited.check_names(path, list(names))
    if first_error and not names:
        raise first_error
    return tuple(names)


def no_rows_error(path: str) -> InputError:
    """The error for a table without rows."""
    return InputError(f"{path}: no rows; expected at least one, or remove the file")


def read(
    path: str,
    columns: Sequence[str] | None = None,
    *,
    dialect: Dialect = USUAL,
    strict: bool = True,
    warn: Callable[[str], None] = print_warning,
) -> Iterator[Chunk]:
    """The rows of a file in order, in chunks.

    Args:
      path: The file; its extension determines the format.
      columns: The columns to read; None reads all. In jsonl, rows may lack some of them.
      dialect: Encoding of csv, tsv and jsonl; delimiter and quotes of csv and tsv.
      strict: Whether a row that cannot be read is raised. If not, its error is in the chunk, and
        reading continues; a chunk then may have no rows.
      warn: Is called with a sentence on lines that may have been misunderstood.

    Raises:
      InputError: If the file, or with `strict` a row, cannot be read; names the line.
    """
    kind = _required_kind(path)
    with _file_errors(path):
        if kind in _BINARY:
            for chunk, faults in _read_binary(path, kind, columns):
                if strict and faults:
                    raise faults[min(faults)]
                yield chunk
            return
        if kind == "jsonl":
            header, rows = None, json_rows.read_objects(path, dialect.encoding)
        else:
            table = DelimitedRows(path, kind, dialect, warn)
            header, rows = table.header, ((line, row, _length(row)) for line, row in table)
        for block in _blocks(rows):
            errors = [row for _, row, _ in block if isinstance(row, InputError)]
            if strict and errors:
                raise errors[0]
            good = [(line, row) for line, row, _ in block if not isinstance(row, InputError)]
            if header is None:
                names = dict.fromkeys(name for _, row in good for name in row)
                if columns is None:
                    delimited.check_names(path, list(names))
                wanted = names if columns is None else columns
                values = {name: [row.get(name) for _, row in good] for name in wanted}
            else:
                index_of = {
                    name: index
                    for index, name in enumerate(header)
                    if columns is None or name in columns
                }
                values = {name: [row[index] for _, row in good] for name, index in index_of.items()}
            yield Chunk(path, [line for line, _ in good], values, errors)


def _blocks(rows: Iterator[tuple[int, Any, int]]) -> Iterator[list[tuple[int, Any, int]]]:
    """Rows in lists of `_CHUNK_ROWS`, or fewer if they are long."""
    block: list[tuple[int, Any, int]] = []
    length = 0
    for row in rows:
        block.append(row)
        length += row[2]
        if len(block) == _CHUNK_ROWS or length > _CHUNK_LENGTH:
            yield block
            block, length = [], 0
    if block:
        yield block


def _length(row: list[str] | InputError) -> int:
    """Characters of the cells of a row."""
    return 0 if isinstance(row, InputError) else sum(map(len, row)) + len(row)


def read_rows(
    path: str,
    columns: Sequence[str] | None = None,
    *,
    dialect: Dialect = USUAL,
    warn: Callable[[str], None] = print_warning,
) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Line and values of each row in order, or the error of a row that cannot be read.

    Reading continues after a row with an error.

    Args:
      path, dialect, warn: See `read`.
      columns: The columns to read of parquet and arrow, where others cost time and memory; None
        reads all.

    Raises:
      InputError: If the file, or the rest of it, cannot be read.
    """
    kind = _required_kind(path)
    with _file_errors(path):
        if kind in _BINARY:
            for chunk, faults in _read_binary(path, kind, columns):
                rows = faults | {
                    line: {name: values[row] for name, values in chunk.columns.items()}
                    for row, line in enumerate(chunk.lines)
                }
                yield from sorted(rows.items(), key=lambda item: item[0])
        elif kind == "jsonl":
            for line, row, _ in json_rows.read_objects(path, dialect.encoding):
                yield line, row
        else:
            rows = DelimitedRows(path, kind, dialect, warn)
            for line, row in rows:
                if not isinstance(row, InputError):
                    row = dict(zip(rows.header, row, strict=True))
                yield line, row


def _required_kind(path: str) -> str:
    """The same as `kind_of`, but raises an error for a file that is not a table."""
    kind = kind_of(path)
    if kind is None:
        raise InputError(
            f"{path}: expected a file name that ends in {', '.join(KINDS)}, optionally followed by "
            f".gz or .zst (not for {' and '.join(_BINARY)})"
        )
    return kind


@contextlib.contextmanager
def _file_errors(path: str) -> Iterator[None]:
    """Turns errors of reading a file into an InputError that names the file."""
    with text_files.errors_of(path):
        size = os.path.getsize(path)
        regular_files.check(path)
        if not size:
            raise InputError(f"{path}: the file is empty (0 bytes); expected a table")
        yield


def _read_binary(
    path: str, kind: str, wanted: Sequence[str] | None
) -> Iterator[tuple[Chunk, dict[int, InputError]]]:
    """The rows of a parquet or arrow file, and what is wrong with those that cannot be read."""
    first, is_parquet = 1, kind == "parquet"
    expanded = expansion.Expansion(path, "write it again as jsonl if it is meant to be so")
    with _open_parquet(path) if is_parquet else _open_arrow(path) as (file, schema):
        names = [name for name in schema.names if wanted is None or name in wanted]
        try:
            class_names = cells.class_names(schema)
        except (LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path}: its metadata under 'huggingface' is malformed ({error!r}); expected that "
                "of the library datasets"
            ) from None
        for name in names:
            if not cells.is_supported(schema.field(name).type):
                raise InputError(
                    f"{path}: column {name!r} is of type {schema.field(name).type}, which is not "
                    "read; cast it to text, numbers or lists of them"
                )
        if is_parquet:
            batches = parquet_file.batches(path, file, names)
        else:
            batches = arrow_file.batches(path, names, file)
        for batch in batches:
            columns = {name: batch.column(name) for name in names}
            for start, count, part, size in cells.parts(
                columns, batch.num_rows, check=not is_parquet
            ):
                expanded.add(size)
                lines = range(first + start, first + start + count)
                chunk, faults = _chunk_of(path, schema, part, lines, class_names)
                if chunk or faults:
                    yield chunk, faults
            first += batch.num_rows


def _chunk_of(
    path: str,
    schema: Any,
    part: dict[str, Any],
    lines: Sequence[int],
    class_names: dict[str, list[str]],
) -> tuple[Chunk, dict[int, InputError]]:
    """Some rows of a batch, and what is wrong with others among them.

    Args:
      path: Path of the file.
      schema: Its schema.
      part: Arrow arrays by column name.
      lines: Numbers of their rows.
      class_names: See `cells.class_names`.
    """
    columns: dict[str, Sequence[Any]] = {}
    faults: dict[int, InputError] = {}
    check = kind_of(path) != "parquet"
    for name, column in part.items():
        kind = schema.field(name).type
        if column.type != kind:  # Was read as a dictionary.
            column = column.cast(kind)
        values, wrong = cells.read(column, check=check)
        for row, reason in wrong.items():
            what = f"{name!r} cannot be read as {kind} ({reason})"
            faults.setdefault(lines[row], InputError(f"{path}, row {lines[row]}: {what}"))
        if name in class_names:
            values = [cells.named(value, class_names[name]) for value in values]
        columns[name] = values
    if faults:
        kept = [row for row, line in enumerate(lines) if line not in faults]
        columns = {name: [x[row] for row in kept] for name, x in columns.items()}
        lines = [lines[row] for row in kept]
    errors = [faults[line] for line in sorted(faults)]
    return Chunk(path, lines, columns, errors), faults


@contextlib.contextmanager
def _open_parquet(path: str) -> Iterator[tuple[Any, Any]]:
    """An open parquet file, whose column names are unique, and its schema."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            delimited.check_names(path, file.schema_arrow.names)
            yield file, file.schema_arrow
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a complete parquet file ({reason})") from None


@contextlib.contextmanager
def _open_arrow(path: str) -> Iterator[tuple[Any, Any]]:
    """A mapped arrow file, whose column names are unique, and its schema."""
    import pyarrow

    with pyarrow.memory_map(path) as file:
        try:
            schema = arrow_file.open_reader(file)[0].schema
            delimited.check_names(path, schema.names)
            yield file, schema
        except pyarrow.ArrowException as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: not a complete arrow file ({reason})") from None
