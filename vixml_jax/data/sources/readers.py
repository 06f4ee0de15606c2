"""Readers of csv, tsv, jsonl (plain, gz or zst) and parquet files, as chunks of columns."""

import codecs
import contextlib
import csv
import dataclasses
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from vixml_jax.errors import InputError

KINDS = {
    ".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
_COMPRESSED = (".gz", ".zst")
_CHUNK_ROWS = 1 << 13
# Longest line in bytes. Longer lines occur in broken files only, and would exhaust memory.
MAX_LINE = 4 << 20


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file, by column.

    Attributes:
      path: Path of the file.
      lines: Line where each row begins, from 1; for parquet, the number of the row.
      columns: Values by column name, one per row, of the types that the file has (csv: strings);
        None where a row has no value.
    """

    path: str
    lines: Sequence[int]
    columns: dict[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        """File and line of a row of this chunk, for error messages."""
        word = "row" if kind_of(self.path) == "parquet" else "line"
        return f"{self.path}, {word} {self.lines[row]}"


def kind_of(path: str) -> str | None:
    """'csv', 'tsv', 'jsonl' or 'parquet', from the file name; None if it is not a table."""
    stem, extension = os.path.splitext(path.lower())
    compressed = extension in _COMPRESSED
    kind = KINDS.get(os.path.splitext(stem)[1] if compressed else extension)
    return None if compressed and kind == "parquet" else kind


def stem_of(path: str) -> str:
    """The path without extensions: equal for 'a.csv', 'a.csv.gz' and 'a.parquet'."""
    stem, extension = os.path.splitext(path)
    return os.path.splitext(stem)[0] if extension.lower() in _COMPRESSED else stem


def column_names(path: str, *, encoding: str = "utf-8") -> list[str]:
    """The column names in the first chunk of a file, in order.

    Raises:
      InputError: If the file cannot be read, or has no rows.
    """
    if kind_of(path) == "parquet":
        with _file_errors(path), _open_parquet(path) as file:
            if file.metadata.num_rows:
                return list(file.schema_arrow.names)
    else:
        for chunk in read(path, encoding=encoding):
            return list(chunk.columns)
    raise no_rows_error(path)


def no_rows_error(path: str) -> InputError:
    """The error for a table without rows."""
    return InputError(f"{path}: no rows; expected at least one, or remove the file")


def read(
    path: str, columns: Sequence[str] | None = None, *, encoding: str = "utf-8"
) -> Iterator[Chunk]:
    """The rows of a file in order, in chunks.

    Args:
      path: The file; its extension determines the format.
      columns: The columns to read; None reads all. In jsonl, rows may lack some of them.
      encoding: Text encoding of csv, tsv and jsonl.

    Raises:
      InputError: If the file cannot be read; names the line.
    """
    kind = _required_kind(path)
    with _file_errors(path):
        if kind == "parquet":
            yield from _read_parquet(path, columns)
        elif kind == "jsonl":
            yield from _read_jsonl(path, columns, encoding)
        else:
            yield from _read_csv(path, columns, encoding, "," if kind == "csv" else "\t")


def read_rows(
    path: str, *, encoding: str = "utf-8"
) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Line and values of each row in order, or the error of a row that cannot be read.

    Reading continues after a row with an error.

    Raises:
      InputError: If the file, or the rest of it, cannot be read.
    """
    kind = _required_kind(path)
    with _file_errors(path):
        if kind == "parquet":
            for chunk in _read_parquet(path, None):
                for row, line in enumerate(chunk.lines):
                    yield line, {name: values[row] for name, values in chunk.columns.items()}
        elif kind == "jsonl":
            for number, text in _lines(path, encoding):
                if isinstance(text, InputError):
                    yield number, text
                elif not text.isspace():
                    yield number, _result_or_error(_parse_json, path, number, text)
        else:
            rows = _CsvRows(path, encoding, "," if kind == "csv" else "\t")
            for line, row in rows:
                if not isinstance(row, InputError):
                    row = dict(zip(rows.header, row, strict=True))
                yield line, row


def _result_or_error(parse: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `parse`, or the InputError that it raises."""
    try:
        return parse(*arguments)
    except InputError as error:
        return error


def _required_kind(path: str) -> str:
    """The same as `kind_of`, but raises an error for a file that is not a table."""
    kind = kind_of(path)
    if kind is None:
        raise InputError(
            f"{path}: expected a file name that ends in {', '.join(KINDS)}, optionally followed by "
            ".gz or .zst (not for parquet)"
        )
    return kind


@contextlib.contextmanager
def _file_errors(path: str) -> Iterator[None]:
    """Turns errors of reading a file into an InputError that names the file."""
    try:
        if not os.path.getsize(path):
            raise InputError(f"{path}: the file is empty (0 bytes); expected a table")
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: truncated or damaged ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """The uncompressed bytes of a file."""
    if path.lower().endswith(".gz"):
        with gzip.open(path, "rb") as file:
            yield file
    elif path.lower().endswith(".zst"):
        import pyarrow

        with pyarrow.OSFile(path) as compressed:
            yield io.BufferedReader(pyarrow.CompressedInputStream(compressed, "zstd"))
    else:
        with open(path, "rb") as file:
            yield file


def read_lines(path: str, encoding: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line, including its line end.

    Raises:
      InputError: If a line is too long, or is not in the encoding.
    """
    for number, text in _lines(path, encoding):
        if isinstance(text, InputError):
            raise text
        yield number, text


def _lines(path: str, encoding: str) -> Iterator[tuple[int, str | InputError]]:
    """Number and text of each line, including its line end, or the error of a bad line."""
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                yield number, long_line_error(path, number)
                while not line.endswith(b"\n") and (line := file.readline(MAX_LINE + 1)):
                    pass
                continue
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode(encoding)
            except UnicodeDecodeError as error:
                yield number, encoding_error(path, number, error, encoding)
                continue
            yield number, text


def long_line_error(path: str, line: int) -> InputError:
    """The error for a line of more than `MAX_LINE` bytes."""
    return InputError(
        f"{path}, line {line}: longer than {MAX_LINE >> 20} MiB; expected one item per line"
    )


def encoding_error(path: str, line: int, error: UnicodeDecodeError, encoding: str) -> InputError:
    """The error for a line that is not in the encoding."""
    hint = "" if encoding == "latin-1" else "; if the file is Latin-1, pass --encoding=latin-1"
    return InputError(
        f"{path}, line {line}: byte 0x{error.object[error.start]:02x} at column "
        f"{error.start + 1} is not {encoding}{hint}"
    )


class _CsvRows:
    """Iterator over the rows of a csv or tsv file and the lines where they begin.

    A row with a wrong number of fields, wrong quotes or a bad line yields an InputError instead.
    """

    def __init__(self, path: str, encoding: str, delimiter: str):
        csv.field_size_limit(MAX_LINE)
        self._path, self._delimiter = path, delimiter
        self._line_error: InputError | None = None  # Of the row that is being parsed.
        self._rows = csv.reader(self._texts(encoding), delimiter=delimiter, strict=True)
        header = self._next()
        if isinstance(header, InputError):
            raise header
        if not header or not any(header):
            raise InputError(f"{path}, line 1: no column names; expected a header line")
        _check_names(f"{path}, line 1", header)
        self.header = header

    def _texts(self, encoding: str) -> Iterator[str]:
        for _, text in _lines(self._path, encoding):
            if isinstance(text, InputError):
                self._line_error, text = text, "\n"
            yield text

    def _next(self) -> list[str] | InputError | None:
        """The next row or its error; None at the end."""
        try:
            row = next(self._rows, None)
        except csv.Error as error:
            row = InputError(
                f"{self._path}, line {self._rows.line_num}: not {self._delimiter!r}-separated text "
                f"({error}); check the quotes"
            )
        line_error, self._line_error = self._line_error, None
        return line_error or row

    def __iter__(self) -> Iterator[tuple[int, list[str] | InputError]]:
        while True:
            line = self._rows.line_num + 1
            row = self._next()
            if row is None:
                return
            if not isinstance(row, InputError) and row and len(row) != len(self.header):
                row = InputError(
                    f"{self._path}, line {line}: {len(row)} fields, expected {len(self.header)} as "
                    "in the header"
                )
            if isinstance(row, InputError) or row:  # Blank lines are skipped.
                yield line, row


def _read_csv(
    path: str, wanted: Sequence[str] | None, encoding: str, delimiter: str
) -> Iterator[Chunk]:
    rows = _CsvRows(path, encoding, delimiter)
    index_of = {
        name: index for index, name in enumerate(rows.header) if wanted is None or name in wanted
    }
    numbered = iter(rows)
    while block := list(itertools.islice(numbered, _CHUNK_ROWS)):
        for _, row in block:
            if isinstance(row, InputError):
                raise row
        lines = [line for line, _ in block]
        yield Chunk(
            path,
            lines,
            {name: [row[index] for _, row in block] for name, index in index_of.items()},
        )


def _read_jsonl(path: str, wanted: Sequence[str] | None, encoding: str) -> Iterator[Chunk]:
    rows, lines = [], []

    def chunk() -> Chunk:
        names = dict.fromkeys(name for row in rows for name in row) if wanted is None else wanted
        return Chunk(path, list(lines), {name: [row.get(name) for row in rows] for name in names})

    for number, text in read_lines(path, encoding):
        if text.isspace():
            continue
        rows.append(_parse_json(path, number, text))
        lines.append(number)
        if len(rows) == _CHUNK_ROWS:
            yield chunk()
            rows, lines = [], []
    if rows:
        yield chunk()


def _parse_json(path: str, number: int, text: str) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        row = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(
            f"{path}, line {number}: found {text.strip()[:40]!r}, expected one JSON object per line"
        )
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not allowed")


@contextlib.contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    """An open parquet file, whose column names are unique."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow.names)
            yield file
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a complete parquet file ({reason})") from None


def _check_names(where: str, names: Sequence[str]) -> None:
    """Raises an error if two columns have the same name."""
    if len(set(names)) < len(names):
        duplicate = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{where}: column {duplicate!r} occurs twice; expected unique names")


def _read_parquet(path: str, wanted: Sequence[str] | None) -> Iterator[Chunk]:
    with _open_parquet(path) as file:
        names = [name for name in file.schema_arrow.names if wanted is None or name in wanted]
        first = 1
        for batch in file.iter_batches(batch_size=_CHUNK_ROWS, columns=names):
            lines = range(first, first + batch.num_rows)
            columns = {}
            for name in names:
                try:
                    columns[name] = _values(batch.column(name))
                except (ValueError, OverflowError) as error:  # Not UTF-8, or a date out of range.
                    raise InputError(
                        f"{path}, rows {lines.start} to {lines.stop - 1}: {name!r} cannot be read "
                        f"as {batch.column(name).type} ({error})"
                    ) from None
            first = lines.stop
            if lines:
                yield Chunk(path, lines, columns)


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
    return column.to_pylist()
