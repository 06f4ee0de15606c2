"""Tables in files: csv, tsv, jsonl and parquet, plain, gz or zst, as chunks of columns."""

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
_PACKED = (".gz", ".zst")
_ROWS = 1 << 13  # Of a chunk.
MAX_LINE = 4 << 20  # Bytes of a line at most: longer ones are broken files, and would fill memory.


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Rows of one file, column by column.

    Attributes:
      path: Of the file.
      lines: Of each row, where it begins; from 1. In parquet, the row's number.
      columns: Values by name, one a row: what the file holds, strings in csv; None where absent.
    """

    path: str
    lines: Sequence[int]
    columns: dict[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        """For messages: file and line of a row of this chunk."""
        word = "row" if kind_of(self.path) == "parquet" else "line"
        return f"{self.path}, {word} {self.lines[row]}"


def kind_of(path: str) -> str | None:
    """csv, tsv, jsonl or parquet, by the name; None if it is no table's."""
    stem, ending = os.path.splitext(path.lower())
    packed = ending in _PACKED
    kind = KINDS.get(os.path.splitext(stem)[1] if packed else ending)
    return None if packed and kind == "parquet" else kind


def stem_of(path: str) -> str:
    """A table's path without what says its kind: the same of 'a.csv', 'a.csv.gz', 'a.parquet'."""
    stem, ending = os.path.splitext(path)
    return os.path.splitext(stem)[0] if ending.lower() in _PACKED else stem


def column_names(path: str, *, encoding: str = "utf-8") -> list[str]:
    """The columns that the first chunk of a file has, in order.

    Raises:
      InputError: If the file cannot be read, or holds nothing.
    """
    if kind_of(path) == "parquet":
        with _faults_of(path), _open_parquet(path) as file:
            if file.metadata.num_rows:
                return list(file.schema_arrow.names)
    else:
        for chunk in read(path, encoding=encoding):
            return list(chunk.columns)
    raise InputError(f"{path}: no rows; expected some, or no such file")


def read(
    path: str, columns: Sequence[str] | None = None, *, encoding: str = "utf-8"
) -> Iterator[Chunk]:
    """The rows of a file in order, a chunk at a time.

    Args:
      path: Of the file; its ending says what it is.
      columns: Those that are wanted; None: all. In jsonl, rows may lack some.
      encoding: Of texts; parquet has its own.

    Raises:
      InputError: If the file cannot be read, with the line at fault.
    """
    kind = _kind(path)
    with _faults_of(path):
        if kind == "parquet":
            yield from _read_parquet(path, columns)
        elif kind == "jsonl":
            yield from _read_jsonl(path, columns, encoding)
        else:
            yield from _read_csv(path, columns, encoding, "," if kind == "csv" else "\t")


def read_rows(
    path: str, *, encoding: str = "utf-8"
) -> Iterator[tuple[int, dict[str, Any] | InputError]]:
    """Line and values of each row in order, or what is wrong with it: the next may be fine.

    Raises:
      InputError: If the file cannot be read at all, or any further.
    """
    kind = _kind(path)
    with _faults_of(path):
        if kind == "parquet":
            for chunk in _read_parquet(path, None):
                for row, line in enumerate(chunk.lines):
                    yield line, {name: values[row] for name, values in chunk.columns.items()}
        elif kind == "jsonl":
            for number, text in _lines(path, encoding):
                if isinstance(text, InputError):
                    yield number, text
                elif not text.isspace():
                    yield number, _try(_parse_json, path, number, text)
        else:
            rows = _CsvRows(path, encoding, "," if kind == "csv" else "\t")
            for line, row in rows:
                yield (
                    line,
                    row
                    if isinstance(row, InputError)
                    else dict(zip(rows.header, row, strict=True)),
                )


def _try(parse: Callable[..., Any], *arguments: Any) -> Any:
    """What `parse` returns, or the InputError that it raises."""
    try:
        return parse(*arguments)
    except InputError as error:
        return error


def _kind(path: str) -> str:
    """As `kind_of`; a file of no kind is refused."""
    kind = kind_of(path)
    if kind is None:
        raise InputError(
            f"{path}: expected a name that ends in {', '.join(KINDS)}, or one of these in .gz or "
            ".zst (not parquet)"
        )
    return kind


@contextlib.contextmanager
def _faults_of(path: str) -> Iterator[None]:
    """What may be wrong with a file as a whole, in a line."""
    try:
        if not os.path.getsize(path):
            raise InputError(f"{path}: empty, zero bytes; expected a table")
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: truncated or damaged ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


@contextlib.contextmanager
def _open(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked."""
    if path.lower().endswith(".gz"):
        with gzip.open(path, "rb") as file:
            yield file
    elif path.lower().endswith(".zst"):
        import pyarrow

        with pyarrow.OSFile(path) as packed:
            yield io.BufferedReader(pyarrow.CompressedInputStream(packed, "zstd"))
    else:
        with open(path, "rb") as file:
            yield file


def read_lines(path: str, encoding: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line, its end included."""
    for number, text in _lines(path, encoding):
        if isinstance(text, InputError):
            raise text
        yield number, text


def _lines(path: str, encoding: str) -> Iterator[tuple[int, str | InputError]]:
    """Number and text of each line, its end included, or what is wrong with it."""
    with _open(path) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                yield (
                    number,
                    InputError(
                        f"{path}, line {number}: longer than {MAX_LINE >> 20} MiB; expected one "
                        "row a line"
                    ),
                )
                while not line.endswith(b"\n") and (line := file.readline(MAX_LINE + 1)):
                    pass
                continue
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                text = line.decode(encoding)
            except UnicodeDecodeError as error:
                hint = "" if encoding == "latin-1" else "; if it is latin-1, say --encoding=latin-1"
                yield (
                    number,
                    InputError(
                        f"{path}, line {number}: byte 0x{line[error.start]:02x} at column "
                        f"{error.start + 1} is not {encoding}{hint}"
                    ),
                )
                continue
            yield number, text


class _CsvRows:
    """Rows of a file of separated text, each with the line where it begins.

    A row that has a wrong number of fields, wrong quotes or a bad line among its own is given as
    what is wrong with it.
    """

    def __init__(self, path: str, encoding: str, delimiter: str):
        csv.field_size_limit(MAX_LINE)
        self._path, self._delimiter = path, delimiter
        self._fault: InputError | None = None  # Of a line, which takes no part in any row.
        self._rows = csv.reader(self._texts(encoding), delimiter=delimiter, strict=True)
        header = self._next()
        if isinstance(header, InputError):
            raise header
        if not header or not any(header):
            raise InputError(f"{path}, line 1: no column names; expected a header")
        _check_names(f"{path}, line 1", header)
        self.header = header

    def _texts(self, encoding: str) -> Iterator[str]:
        for _, text in _lines(self._path, encoding):
            if isinstance(text, InputError):
                self._fault, text = text, "\n"
            yield text

    def _next(self) -> list[str] | InputError | None:
        """The next row; None at the end."""
        try:
            row = next(self._rows, None)
        except csv.Error as error:
            row = InputError(
                f"{self._path}, line {self._rows.line_num}: not {self._delimiter!r}-separated text "
                f"({error}); check the quotes"
            )
        fault, self._fault = self._fault, None
        return fault or row

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
            if isinstance(row, InputError) or row:  # Else a blank line.
                yield line, row


def _read_csv(
    path: str, wanted: Sequence[str] | None, encoding: str, delimiter: str
) -> Iterator[Chunk]:
    rows = _CsvRows(path, encoding, delimiter)
    at = {name: place for place, name in enumerate(rows.header) if wanted is None or name in wanted}
    numbered = iter(rows)
    while found := list(itertools.islice(numbered, _ROWS)):
        for _, row in found:
            if isinstance(row, InputError):
                raise row
        lines = [line for line, _ in found]
        yield Chunk(
            path, lines, {name: [row[place] for _, row in found] for name, place in at.items()}
        )


def _read_jsonl(path: str, wanted: Sequence[str] | None, encoding: str) -> Iterator[Chunk]:
    found, lines = [], []

    def chunk() -> Chunk:
        names = dict.fromkeys(name for row in found for name in row) if wanted is None else wanted
        return Chunk(path, list(lines), {name: [row.get(name) for row in found] for name in names})

    for number, text in read_lines(path, encoding):
        if text.isspace():
            continue
        found.append(_parse_json(path, number, text))
        lines.append(number)
        if len(found) == _ROWS:
            yield chunk()
            found, lines = [], []
    if found:
        yield chunk()


def _parse_json(path: str, number: int, text: str) -> dict[str, Any]:
    """The object that a line holds."""
    try:
        row = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise InputError(
            f"{path}, line {number}: {text.strip()[:40]!r}, expected an object {{...}} a line"
        )
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


@contextlib.contextmanager
def _open_parquet(path: str) -> Iterator[Any]:
    """A parquet file whose columns have different names."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow.names)
            yield file
    except pyarrow.ArrowException as error:
        said = " ".join(str(error).split())
        raise InputError(f"{path}: not a whole parquet file ({said})") from None


def _check_names(where: str, names: Sequence[str]) -> None:
    """Refuses two columns of one name."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{where}: column {twice!r} is there twice; expected each name once")


def _read_parquet(path: str, wanted: Sequence[str] | None) -> Iterator[Chunk]:
    with _open_parquet(path) as file:
        names = [name for name in file.schema_arrow.names if wanted is None or name in wanted]
        first = 1
        for batch in file.iter_batches(batch_size=_ROWS, columns=names):
            lines = range(first, first + batch.num_rows)
            columns = {}
            for name in names:
                try:
                    columns[name] = _values(batch.column(name))
                except (ValueError, OverflowError) as error:  # No UTF-8, or a date out of range.
                    raise InputError(
                        f"{path}, rows {lines.start} to {lines.stop - 1}: {name!r} cannot be read "
                        f"as {batch.column(name).type} ({error})"
                    ) from None
            first = lines.stop
            if lines:
                yield Chunk(path, lines, columns)


def _values(column: Any) -> Sequence[Any]:
    """Python's values; lists of floats stay arrays, since a list of numbers is slow."""
    import pyarrow
    from pyarrow import types

    coarser = {  # Python's times have no nanoseconds.
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
