"""Batches of the rows of a parquet file, of a size that is known before they are read.

The metadata of a file do not tell how much memory its rows take: a page may expand a million times,
and a dictionary stores once what a million rows repeat. So the headers of all pages are read first;
they are few, and say what the decoder will allocate.
"""

import contextlib
import functools
import itertools
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from vixml_jax.errors import InputError
from vixml_jax.storage import expansion, regular_files

MAX_ROWS = 1 << 13  # Of a batch.
CHUNK_BYTES = 1 << 26  # Of a batch, about.
_MAX_PAGE = 1 << 26  # Bytes of a page that may be compressed by any factor.
_MAX_VALUES = 1 << 24  # Values of lists in a row group that may take next to no bytes.
_MAX_REPEATED = 1 << 28  # Bytes of values of lists in a row group, all as long as the longest.
_MAX_FIXED = 1 << 24  # Bytes of a value of fixed size.
_HEADER_BYTES = 1 << 12  # Of a page header, usually; its statistics may be longer.
_MAX_HEADER_BYTES = 1 << 24
# https://parquet.apache.org/docs/file-format/data-pages/encodings/
_DICTIONARY_PAGE, _DELTA_BYTE_ARRAY = 2, 7
_DICTIONARIES = {2, 8}  # Encodings of pages of nothing but indices into a dictionary.
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}
_STRUCT, _LIST, _BINARY = 12, 9, 8  # Types of Thrift's compact protocol.
_REMEDY = "write it again, with smaller row groups and pages"


class _Page(NamedTuple):
    """A page of a column chunk, from its header."""

    kind: int
    expanded: int  # Bytes of the page when it is decompressed.
    stored: int  # Bytes in the file.
    values: int
    encoding: int


class _Chunk(NamedTuple):
    """The values of a leaf in a row group."""

    values: int
    stored: int  # Bytes in the file.
    data_at: int
    dictionary_at: int  # As `data_at` if there is no dictionary.


class _RowGroup(NamedTuple):
    """A row group, with a chunk for each leaf."""

    rows: int
    chunks: list[_Chunk]


def batches(path: str, file: Any, names: Sequence[str]) -> Iterator[Any]:
    """The rows of columns of a parquet file, in record batches of about `CHUNK_BYTES`.

    Args:
      path: Path of the file.
      file: The open `pyarrow.parquet.ParquetFile`.
      names: The columns.

    Raises:
      InputError: If a page, a value or a row group expands beyond measure.
    """
    from pyarrow import parquet

    schema = file.schema_arrow
    for name in names:
        _check_width(path, name, schema.field(name).type)
    plan = _Plan(path, file, names)
    groups = (plan.reading_of(group) for group in range(file.metadata.num_row_groups))
    runs = itertools.groupby(groups, lambda reading: reading[:2])
    for (rows, as_dictionary), run in runs:
        # Without pre-buffering, pages are read as they are needed.
        with parquet.ParquetFile(
            path, read_dictionary=as_dictionary, pre_buffer=False, buffer_size=1 << 20
        ) as reader:
            chosen = [group for *_, group in run]
            # Lists of dictionaries of several row groups cannot be read together.
            for part in [[group] for group in chosen] if as_dictionary else [chosen]:
                yield from reader.iter_batches(rows, row_groups=part, columns=list(names))


class _Plan:
    """How to read each row group."""

    def __init__(self, path: str, file: Any, names: Sequence[str]):
        self._path, self._file, self._names = path, file, names
        self._leaves = [file.schema.column(i) for i in range(len(file.schema.names))]
        self._groups = _row_groups(path, len(self._leaves))
        self._size = os.path.getsize(path)
        if len(self._groups) != file.metadata.num_row_groups:
            raise InputError(f"{path}: not a complete parquet file (its metadata are damaged)")

    def reading_of(self, group: int) -> tuple[int, list[str], int]:
        """How to read a row group: rows at a time, leaves to read as dictionaries, and the group.

        The leaves are lists of values that are repeated so often that a row group of them would not
        fit into memory.
        """
        as_dictionary: list[str] = []
        meta = self._groups[group]
        rows = MAX_ROWS
        longest: dict[str, int] | None = None
        for leaf, chunk in zip(self._leaves, meta.chunks, strict=True):
            name = self._name_of(leaf.path)
            if name is None or not chunk.values:
                continue
            pages = self._pages(chunk, name)
            data_pages = [page for page in pages if page.kind != _DICTIONARY_PAGE]
            values = max(chunk.values, sum(page.values for page in data_pages))
            value_bytes = _WIDTHS.get(leaf.physical_type, leaf.length or 0)
            is_delta = any(page.encoding == _DELTA_BYTE_ARRAY for page in pages)
            if leaf.physical_type == "BYTE_ARRAY":
                dictionary = [page for page in pages if page.kind == _DICTIONARY_PAGE]
                value_bytes = max((page.expanded for page in dictionary), default=0)
                if value_bytes * MAX_ROWS > CHUNK_BYTES:
                    longest = self._longest_values(group) if longest is None else longest
                    value_bytes = min(value_bytes, longest.get(name, value_bytes))
                if is_delta:  # A value is a part of the one before, and a rest.
                    value_bytes = max([value_bytes, *(page.expanded for page in pages)])
            per_value = [page.expanded / max(1, page.values) for page in data_pages]
            mean_values = values / max(1, meta.rows)
            widest = max([value_bytes, *per_value]) * max(1.0, mean_values)
            rows = min(rows, int(CHUNK_BYTES / max(1.0, widest)))
            if leaf.max_repetition_level:
                stored = sum(page.stored for page in pages)
                encodings = {page.encoding for page in data_pages}
                is_repeated = leaf.physical_type == "BYTE_ARRAY" and encodings <= _DICTIONARIES
                self._check_lists(chunk, name, values - meta.rows, stored)
                if values * value_bytes > _MAX_REPEATED and is_repeated:
                    as_dictionary.append(leaf.path)
                elif values * value_bytes > max(expansion.FREE_BYTES, expansion.MAX_RATIO * stored):
                    raise self._error(
                        name, f"{values:,} values of up to {value_bytes:,} bytes in a row group"
                    )
        return max(1, rows), as_dictionary, group

    def _check_lists(self, chunk: _Chunk, name: str, additional: int, stored: int) -> None:
        """Refuses lists of more values than could have been stored."""
        if additional > max(_MAX_VALUES, expansion.MAX_RATIO * stored):
            raise self._error(name, f"{chunk.values:,} values in {stored:,} bytes")

    def _name_of(self, leaf: str) -> str | None:
        """The column that a leaf of the schema belongs to; None: it is not read."""
        return next((x for x in self._names if leaf == x or leaf.startswith(f"{x}.")), None)

    def _error(self, name: str, what: str) -> InputError:
        return InputError(
            f"{self._path}: column {name!r} has {what}; expected at most {expansion.MAX_RATIO} "
            f"times what is stored, since more is a damaged or a hostile file; {_REMEDY}"
        )

    def _pages(self, chunk: _Chunk, name: str) -> list[_Page]:
        """The pages of a column chunk, none of which expands beyond measure."""
        try:
            with regular_files.open_binary(self._path) as file:
                pages = list(_read_pages(file, chunk, self._size))
        except (ValueError, IndexError, RecursionError) as error:
            raise InputError(
                f"{self._path}: not a complete parquet file (a page of column {name!r}: {error})"
            ) from None
        for page in pages:
            if page.expanded > max(_MAX_PAGE, expansion.MAX_RATIO * page.stored):
                raise self._error(
                    name, f"a page of {page.stored:,} bytes that expands to {page.expanded:,}"
                )
        return pages

    def _longest_values(self, group: int) -> dict[str, int]:
        """Bytes of the longest value in the dictionaries of each column of a row group.

        The first row of a column that is read as a dictionary comes with all of it.
        """
        import pyarrow
        from pyarrow import parquet

        found: dict[str, int] = {}
        for leaf in self._leaves:
            name = self._name_of(leaf.path)
            if name is None or leaf.physical_type != "BYTE_ARRAY":
                continue
            # An encoding that cannot be read so: the size of the dictionary has to do.
            with contextlib.suppress(pyarrow.ArrowException, OSError, NotImplementedError):
                with parquet.ParquetFile(
                    self._path, read_dictionary=[leaf.path], pre_buffer=False, buffer_size=1 << 20
                ) as file:
                    batch = next(file.iter_batches(1, row_groups=[group], columns=[name]))
                lengths = [_longest(x) for x in _dictionaries(batch.column(0))]
                if lengths:
                    found[name] = max([found.get(name, 0), *lengths])
        return found


def _row_groups(path: str, leaves: int) -> list[_RowGroup]:
    """The row groups of a file, from its metadata.

    Arrow reads them as well, but ends the process where it is asked for one that is damaged.

    Args:
      path: Path of the file.
      leaves: Number of leaves of the schema.

    Raises:
      InputError: If they are damaged.
    """
    status = os.stat(path)
    try:
        return _read_row_groups(path, leaves, status.st_size, status.st_mtime_ns)
    except (ValueError, IndexError, KeyError, TypeError, RecursionError, MemoryError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: not a complete parquet file (its metadata are damaged: {error})"
        ) from None


@functools.lru_cache(maxsize=64)
def _read_row_groups(path: str, leaves: int, size: int, mtime: int) -> list[_RowGroup]:
    """The same, remembered: `size` and `mtime` tell whether the file has changed."""
    del mtime
    with regular_files.open_binary(path) as file:
        file.seek(max(0, size - 8))
        (length,) = struct.unpack("<I", file.read(4).ljust(4, b"\0"))
        file.seek(max(0, size - 8 - length))
        fields, _ = _Compact(file.read(length)).struct()
    groups = []
    for group in fields.get(4, []):
        about = [chunk[3] for chunk in group[1]]
        if len(about) != leaves:
            raise ValueError(f"{len(about)} columns in a row group, expected {leaves}")
        chunks = [_Chunk(x[5], x[7], x[9], x.get(11) or x[9]) for x in about]
        if not all(isinstance(number, int) and number >= 0 for x in chunks for number in x):
            raise ValueError("a size is negative")
        groups.append(_RowGroup(max(0, group[3]), chunks))
    return groups


def _check_width(path: str, name: str, kind: Any) -> None:
    """Refuses types whose every value takes much memory, also where there is none."""
    from pyarrow import types

    width, inner = 1, kind
    while types.is_nested(inner) and inner.num_fields == 1:
        if types.is_fixed_size_list(inner):
            width *= inner.list_size
        inner = inner.field(0).type
    if types.is_fixed_size_binary(inner):
        width *= inner.byte_width
    if width > _MAX_FIXED:
        raise InputError(
            f"{path}: column {name!r} is of type {str(kind)[:60]}, of {width:,} numbers or bytes "
            f"a row; expected at most {_MAX_FIXED:,}; {_REMEDY}"
        )


def _dictionaries(array: Any) -> Iterator[Any]:
    """All dictionaries within an array."""
    import pyarrow

    if isinstance(array, pyarrow.DictionaryArray):
        yield array.dictionary
    elif isinstance(array, pyarrow.StructArray):
        for index in range(array.type.num_fields):
            yield from _dictionaries(array.field(index))
    elif hasattr(array, "values"):
        yield from _dictionaries(array.values)


def _longest(texts: Any) -> int:
    """Bytes of the longest of some texts."""
    import pyarrow.compute as pc

    return pc.max(pc.binary_length(texts)).as_py() or 0


def _read_pages(file: BinaryIO, chunk: _Chunk, size: int) -> Iterator[_Page]:
    """The headers of the pages of a column chunk.

    Raises:
      ValueError, IndexError: If they are damaged.
    """
    at = min(chunk.data_at, chunk.dictionary_at)
    end = at + chunk.stored
    if not 0 < at <= end <= size:
        raise ValueError("it is outside of the file")
    values = 0
    while at < end and values < chunk.values:
        page, length = _read_header(file, at)
        if min(page.expanded, page.stored, page.values) < 0:
            raise ValueError("a size is negative")
        at += length + page.stored
        if at > end:
            raise ValueError("it is longer than its column chunk")
        values += page.values if page.kind != _DICTIONARY_PAGE else 0
        yield page


def _read_header(file: BinaryIO, at: int) -> tuple[_Page, int]:
    """The header of the page at an offset, and its length."""
    for size in (_HEADER_BYTES, _MAX_HEADER_BYTES):
        file.seek(at)
        data = file.read(size)
        try:
            fields, length = _Compact(data).struct()
            break
        except IndexError:
            if len(data) < size or size == _MAX_HEADER_BYTES:
                raise ValueError("its header is truncated") from None
    # Number of values and encoding in the headers of data pages of version 1 and 2, dictionaries.
    inner = next((fields[key] for key in (5, 8, 7) if isinstance(fields.get(key), dict)), {})
    numbers = (
        fields.get(1), fields.get(2), fields.get(3), inner.get(1, 0),
        inner.get(4 if 8 in fields else 2, 0),
    )  # fmt: skip
    if not all(isinstance(number, int) for number in numbers):
        raise ValueError("its header lacks a size")
    return _Page(*numbers), length


class _Compact:
    """A reader of Thrift's compact protocol, in which metadata and headers of pages are written.

    Texts are left out.

    https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
    """

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def struct(self, depth: int = 0) -> tuple[dict[int, Any], int]:
        """The fields of a struct by their number, and where it ends."""
        if depth > 8:
            raise ValueError("a struct is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            delta, kind = head >> 4, head & 15
            number = number + delta if delta else self._zigzag()
            fields[number] = self._value(kind, depth)
        return fields, self._at

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number is too long")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._zigzag()
        if kind == _STRUCT:
            return self.struct(depth + 1)[0]
        if kind in (7, _BINARY):
            self._skip(8 if kind == 7 else self._varint())
            return None
        if kind in (_LIST, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 != 15 else self._varint()
            if depth > 8:
                raise ValueError("a list is nested too deeply")
            inner = head & 15
            return [
                self._value(inner, depth + 1) if inner > 2 else self._byte() for _ in range(count)
            ]
        raise ValueError(f"a field is of type {kind}")

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > len(self._data):
            raise IndexError
