"""Readers of csv, tsv, jsonl (plain, gz or zst), parquet and arrow files, as chunks of columns."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vixml_jax.data.sources import delimited, json_rows
from vixml_jax.data.sources.delimited import USUAL, DelimitedRows, Dialect
from vixml_jax.errors import InputError
from vixml_jax.storage import regular_files, text_files

KINDS = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
_BINARY = ("parquet", "arrow")
_CHUNK_ROWS = 1 << 13
_CHUNK_BYTES = 1 << 26  # Of rows with images, of which fewer are read at a time.


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
            with _open_parquet(path) as file:
                if file.metadata.num_rows:
                    return list(file.schema_arrow.names)
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
    for _, row in json_rows.read_objects(path, dialect.encoding):
        if isinstance(row, InputError):
            first_error = first_error or row
        else:
            names.update(dict.fromkeys(row))
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
            rows = DelimitedRows(path, kind, dialect, warn)
            header = rows.header
        for block in _blocks(rows):
            errors = [row for _, row in block if isinstance(row, InputError)]
            if strict and errors:
                raise errors[0]
            good = [(line, row) for line, row in block if not isinstance(row, InputError)]
            if header is None:
                names = dict.fromkeys(name for _, row in good for name in row)
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


def _blocks(rows: Iterator[Any]) -> Iterator[list[Any]]:
    """Rows in lists of `_CHUNK_ROWS`."""
    rows = iter(rows)
    while block := list(itertools.islice(rows, _CHUNK_ROWS)):
        yield block


def read_rows(
    path: str, *, dialect: Dialect = USUAL, warn: Callable[[str], None] = print_warning
) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Line and values of each row in order, or the error of a row that cannot be read.

    Reading continues after a row with an error.

    Args:
      path, dialect, warn: See `read`.

    Raises:
      InputError: If the file, or the rest of it, cannot be read.
    """
    kind = _required_kind(path)
    with _file_errors(path):
        if kind in _BINARY:
            for chunk, faults in _read_binary(path, kind, None):
                rows = faults | {
                    line: {name: values[row] for name, values in chunk.columns.items()}
                    for row, line in enumerate(chunk.lines)
                }
                yield from sorted(rows.items(), key=lambda item: item[0])
        elif kind == "jsonl":
            yield from json_rows.read_objects(path, dialect.encoding)
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
    first = 1
    with _open_parquet(path) if kind == "parquet" else _open_arrow(path) as file:
        schema = file.schema_arrow if kind == "parquet" else file.schema
        names = [name for name in schema.names if wanted is None or name in wanted]
        try:
            class_names = _class_names(schema)
        except (LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path}: its metadata under 'huggingface' is malformed ({error!r}); expected that "
                "of the library datasets"
            ) from None
        batches = (
            file.iter_batches(batch_size=_rows_at_a_time(file.metadata), columns=names)
            if kind == "parquet"
            else _slices(file)
        )
        for batch in batches:
            lines: Sequence[int] = range(first, first + batch.num_rows)
            first += batch.num_rows
            columns: dict[str, Sequence[Any]] = {}
            faults: dict[int, InputError] = {}
            for name in names:
                values, wrong = _cells(batch.column(name))
                for row, reason in wrong.items():
                    what = f"{name!r} cannot be read as {batch.column(name).type} ({reason})"
                    faults.setdefault(lines[row], InputError(f"{path}, row {lines[row]}: {what}"))
                if name in class_names:
                    values = [_named(value, class_names[name]) for value in values]
                columns[name] = values
            if faults:
                kept = [row for row, line in enumerate(lines) if line not in faults]
                columns = {name: [x[row] for row in kept] for name, x in columns.items()}
                lines = [lines[row] for row in kept]
            if lines or faults:
                yield Chunk(path, lines, columns, [faults[line] for line in sorted(faults)]), faults


@contextlib.contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    """An open parquet file, whose column names are unique."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            delimited.check_names(path, file.schema_arrow.names)
            yield file
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a complete parquet file ({reason})") from None


@contextlib.contextmanager
def _open_arrow(path: str) -> Iterator[Any]:
    """An open arrow file, in the format of streams (as of `datasets`) or of files (as feather)."""
    import pyarrow

    with pyarrow.memory_map(path) as file:
        try:
            try:
                reader = pyarrow.ipc.open_stream(file)
            except pyarrow.ArrowInvalid:
                file.seek(0)
                reader = pyarrow.ipc.open_file(file)
            delimited.check_names(path, reader.schema.names)
            yield reader
        except pyarrow.ArrowException as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: not a complete arrow file ({reason})") from None


def _rows_at_a_time(metadata: Any) -> int:
    """Rows of a parquet file to read at a time, so that they take about `_CHUNK_BYTES`."""
    groups = range(metadata.num_row_groups)
    num_bytes = sum(metadata.row_group(group).total_byte_size for group in groups)
    return max(1, min(_CHUNK_ROWS, _CHUNK_BYTES * metadata.num_rows // max(1, num_bytes)))


def _slices(reader: Any) -> Iterator[Any]:
    """The batches of an arrow file, in parts of about `_CHUNK_BYTES`."""
    if hasattr(reader, "get_batch"):
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    else:
        batches = iter(reader)
    for batch in batches:
        rows = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES * batch.num_rows // max(1, batch.nbytes)))
        for start in range(0, batch.num_rows, rows):
            yield batch.slice(start, rows)


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Names of the classes of columns whose numbers stand for them, as `datasets` stores them.

    The schema of such a file says in its metadata that a column, or the items of its lists, have
    the feature `ClassLabel`: https://huggingface.co/docs/datasets/about_dataset_features.
    """
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info.get("info", {}).get("features", {})
    except ValueError:
        return {}
    found = {}
    for name, feature in features.items():
        while not isinstance(feature, dict) or "feature" in feature:
            inner = feature["feature"] if isinstance(feature, dict) else feature
            feature = inner[0] if isinstance(inner, list) and len(inner) == 1 else inner
            if not isinstance(feature, dict):
                break
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            if not isinstance(feature["names"], list):
                raise TypeError("names")
            found[name] = list(map(str, feature["names"]))
    return found


def _named(value: Any, names: Sequence[str]) -> Any:
    """The names of the classes of a cell: a number or a list; -1 stands for no class."""
    if isinstance(value, list):
        return [name for item in value if (name := _named(item, names)) is not None]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None


def _cells(column: Any) -> tuple[Sequence[Any], dict[int, Exception]]:
    """The column as Python values, and the error of each cell that has none, by its row."""
    faults = (ValueError, OverflowError)  # Not UTF-8, or a date out of range.
    try:
        return _values(column), {}
    except faults:
        pass
    cells: list[Any] = []
    wrong: dict[int, Exception] = {}
    for row in range(len(column)):
        try:
            cells.append(_values(column.slice(row, 1))[0])
        except faults as error:
            cells.append(None)
            wrong[row] = error
    return cells, wrong


def _values(column: Any) -> Sequence[Any]:
    """The column as Python values; lists of floats stay arrays, which are much faster."""
    import pyarrow
    from pyarrow import types

    coarser = {  # Python's time types have no nanoseconds.
        pyarrow.time64("ns"): pyarrow.time64("us"),
        pyarrow.duration("ns"): pyarrow.duration("us"),
    }
    inner = column.type
    if types.is_timestamp(inner) and inner.unit == "ns":
        coarser[inner] = pyarrow.timestamp("us", inner.tz)
    if inner in coarser:
        column = column.cast(coarser[inner], safe=False)
    while types.is_list(inner) or types.is_large_list(inner) or types.is_fixed_size_list(inner):
        inner = inner.value_type
    if inner is not column.type and types.is_floating(inner):
        return column.to_numpy(zero_copy_only=False)
    cells = column.to_pylist()
    if types.is_float32(inner) or types.is_float16(inner):
        # Python's float would not tell from which integer on several are equal.
        as_stored = inner.to_pandas_dtype()
        return [None if cell is None else as_stored(cell) for cell in cells]
    return cells
