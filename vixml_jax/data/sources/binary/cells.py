"""Cells of record batches as Python values, in parts of bounded memory."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from vixml_jax.data.sources.binary import parquet_file

MAX_ROW_BYTES = 1 << 28  # Of the cells of one row.
_FAULTS = (ValueError, OverflowError)  # Not UTF-8, or a date out of range.


def parts(
    columns: dict[str, Any], count: int, *, check: bool
) -> Iterator[tuple[int, int, dict[str, Any], int]]:
    """Slices of columns that take about `CHUNK_BYTES`: first row, number of rows, slice, bytes.

    Args:
      columns: Arrow arrays by name.
      count: Their length.
      check: Whether their offsets and indices come from a file as they are. Where they lead out of
        an array, a slice is a single row, which `read` does not read.
    """
    most = parquet_file.MAX_ROWS
    for start in range(0, count, most):
        block = {name: x.slice(start, most) for name, x in columns.items()}
        rows = min(most, count - start)
        if check and any(map(fault_of, block.values())):
            ends, total = np.arange(1, rows + 1), np.zeros(rows, np.int64)
        else:
            sizes = map(decoded_bytes, block.values())
            total = np.cumsum(sum(sizes, np.full(rows, 8, np.int64)))
            ends = _ends(total)
        first = before = 0
        for end in ends.tolist():
            part = {name: x.slice(first, end - first) for name, x in block.items()}
            yield start + first, end - first, part, int(total[end - 1]) - before
            first, before = end, int(total[end - 1])


def _ends(total: Int[np.ndarray, " n"]) -> Int[np.ndarray, " p"]:
    """Where the parts of rows end, given the bytes up to each row; a large row is one by itself."""
    ends, first = [], 0
    while first < len(total):
        before = total[first - 1] if first else 0
        fitting = np.searchsorted(total, before + parquet_file.CHUNK_BYTES, "right")
        first = max(first + 1, int(fitting))
        ends.append(first)
    return np.array(ends, np.int64)


def fault_of(column: Any) -> str | None:
    """What is wrong with the offsets and indices of an array, in words; None: nothing.

    Texts that are not UTF-8 are no fault of this kind.
    """
    import pyarrow

    try:
        column.validate(full=True)
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())[:200]
        return None if "UTF8" in reason and not column.type.num_fields else reason
    return None


def decoded_bytes(array: Any) -> Int[np.ndarray, " n"]:
    """Bytes that each row of an array takes when it is decoded, about."""
    import pyarrow
    import pyarrow.compute as pc
    from pyarrow import types

    kind, count = array.type, len(array)
    if isinstance(array, pyarrow.ExtensionArray):
        return decoded_bytes(array.storage)
    if types.is_dictionary(kind):
        inner = decoded_bytes(array.dictionary)
        indices = np.asarray(pc.fill_null(array.indices, 0))
        return inner[indices] if len(inner) else np.zeros(count, np.int64)
    if kind in (pyarrow.string_view(), pyarrow.binary_view()):
        views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)
        return views[array.offset : array.offset + count, 0].astype(np.int64) + 8
    if types.is_string(kind) or types.is_binary(kind) or _is_large_text(kind):
        return np.asarray(pc.fill_null(pc.binary_length(array), 0)).astype(np.int64) + 8
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        offsets = np.asarray(array.offsets).astype(np.int64)
        inner = decoded_bytes(array.values.slice(offsets[0], offsets[-1] - offsets[0]))
        total = np.concatenate([[0], np.cumsum(inner)])
        return total[offsets[1:] - offsets[0]] - total[offsets[:-1] - offsets[0]] + 8
    if types.is_fixed_size_list(kind):
        size = kind.list_size
        values = array.values.slice(array.offset * size, count * size)
        return decoded_bytes(values).reshape(count, size).sum(axis=1) + 8
    if types.is_struct(kind):
        fields = [decoded_bytes(array.field(index)) for index in range(kind.num_fields)]
        return sum(fields, np.full(count, 8, np.int64))
    width = kind.bit_width // 8 if not types.is_null(kind) else 0
    return np.full(count, width + 8, np.int64)


def _is_large_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_large_string(kind) or types.is_large_binary(kind)


def is_supported(kind: Any) -> bool:
    """Whether cells of a type can be measured before they are decoded."""
    from pyarrow import types

    if types.is_run_end_encoded(kind) or types.is_union(kind) or "list_view" in str(kind):
        return False
    if types.is_dictionary(kind):
        return is_supported(kind.value_type)
    return all(is_supported(kind.field(index).type) for index in range(kind.num_fields))


def read(column: Any, *, check: bool) -> tuple[Sequence[Any], dict[int, str]]:
    """A part of a column as Python values, and the fault of each cell that has none, by its row.

    Args:
      column: An arrow array, a part of `parts`.
      check: See `parts`.
    """
    fault = fault_of(column) if check else None
    if len(column) == 1:
        if fault is None and (size := int(decoded_bytes(column)[0])) > MAX_ROW_BYTES:
            fault = f"{size:,} bytes, expected at most {MAX_ROW_BYTES:,}"
        if fault is not None:
            return [None], {0: fault}
    try:
        return _values(column), {}
    except _FAULTS as error:
        if len(column) == 1:
            return [None], {0: str(error)}
    cells: list[Any] = []
    wrong: dict[int, str] = {}
    for row in range(len(column)):
        (cell,), fault_of_row = read(column.slice(row, 1), check=check)
        cells.append(cell)
        if fault_of_row:
            wrong[row] = fault_of_row[0]
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


def class_names(schema: Any) -> dict[str, list[str]]:
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


def named(value: Any, names: Sequence[str]) -> Any:
    """The names of the classes of a cell: a number or a list; -1 stands for no class."""
    if isinstance(value, list):
        return [name for item in value if (name := named(item, names)) is not None]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else None
