"""Tables that expand to gigabytes are refused in a line, and take no such memory before."""

import gzip
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import ipc, parquet

from vixml_jax.data.sources import readers
from vixml_jax.data.sources.binary import parquet_file
from vixml_jax.errors import InputError
from vixml_jax.storage import expansion

ROOT = pathlib.Path(__file__).parents[2]
MIB = 1 << 20


def repeated(count, size=MIB):
    """A column of many equal texts, stored once."""
    indices = pyarrow.array(np.zeros(count, np.int32))
    return pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["x" * size]))


def write_parquet(path, columns, **options):
    options = {"compression": "zstd", "store_schema": False, **options}
    parquet.write_table(pyarrow.table(columns), path, dictionary_pagesize_limit=4 * MIB, **options)


def write_arrow(path, columns, make=ipc.new_file, compression=None):
    table = pyarrow.table(columns)
    options = ipc.IpcWriteOptions(compression=compression)
    with pyarrow.OSFile(path, "wb") as file, make(file, table.schema, options=options) as writer:
        writer.write_table(table)


def one_list(values):
    """A column of one row, which has all values."""
    return pyarrow.ListArray.from_arrays(pyarrow.array([0, len(values)], pyarrow.int32()), values)


def text_of(size):
    return {"text": ["x" * size], "labels": ["a"]}


BOMBS = {
    "repeated.parquet": lambda path: write_parquet(
        path, {"text": repeated(2000), "labels": ["a"] * 2000}
    ),
    "repeated_typed.parquet": lambda path: write_parquet(
        path, {"text": repeated(2000), "labels": ["a"] * 2000}, store_schema=True
    ),
    "repeated_list.parquet": lambda path: write_parquet(
        path, {"text": ["a"], "labels": one_list(repeated(4000))}
    ),
    "page.parquet": lambda path: write_parquet(
        path, text_of(70 * MIB), compression="brotli", use_dictionary=False
    ),
    "nulls.parquet": lambda path: write_parquet(
        path, {"text": ["a"], "labels": one_list(pyarrow.nulls(1 << 25, pyarrow.int32()))}
    ),
    "wide.parquet": lambda path: write_parquet(
        path,
        {
            "text": ["a", "b"],
            "labels": pyarrow.array([None, None], pyarrow.list_(pyarrow.int8(), 1 << 26)),
        },
        store_schema=True,
    ),
    "prefixes.parquet": lambda path: write_parquet(
        path,
        {"text": ["x" * MIB] * 50, "labels": ["a"] * 50},
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY", "labels": "PLAIN"},
    ),
    "file.arrow": lambda path: write_arrow(path, text_of(70 * MIB), compression="zstd"),
    "stream.arrow": lambda path: write_arrow(
        path, text_of(70 * MIB), ipc.new_stream, compression="lz4"
    ),
    "repeated.feather": lambda path: write_arrow(
        path, {"text": repeated(4_000, MIB // 16), "labels": ["a"] * 4_000}, compression="zstd"
    ),
    "line.jsonl.gz": lambda path: write_gzip(path, b"", b"x" * MIB, 50),
    "rows.csv.gz": lambda path: write_gzip(
        path, b"text,labels\n", b"a,b\n" + b"x" * 9999 + b",b\n", 5_000
    ),
    "line.tsv.zst": lambda path: pathlib.Path(path).write_bytes(
        pyarrow.Codec("zstd").compress(b"x" * MIB * 20, asbytes=True) * 3
    ),
}


def write_gzip(path, start, block, count):
    with gzip.open(path, "wb", 1) as file:
        file.write(start)
        for _ in range(count):
            file.write(block)


WORKER = """
import json, resource, sys
from vixml_jax.data.sources import readers
from vixml_jax.errors import InputError
from vixml_jax.storage import expansion
expansion.FREE_BYTES = 30 << 20
import pyarrow, pyarrow.compute, pyarrow.parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    found = None
    try:
        names = readers.column_names(path)
        for chunk in readers.read(path, ["text", "labels"]):
            pass
    except InputError as error:
        found = str(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([path, found, (peak - before) // 1024]), flush=True)
"""


def test_tables_that_expand_to_gigabytes_are_refused(tmp_path):
    paths = [str(tmp_path / name) for name in BOMBS]
    for path, write in zip(paths, BOMBS.values(), strict=True):
        write(path)
        assert os.path.getsize(path) < 2 * MIB
    done = subprocess.run(
        [sys.executable, "-c", WORKER, *paths],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == paths
    for path, error, peak in rows:
        assert error and error.startswith(f"{path}: ") and "\n" not in error, (path, error)
        assert "expected at most" in error and "; " in error
        assert peak < 300, (path, peak)  # MiB; most of them would be 2,000 and more.


def test_columns_that_are_not_read_do_not_matter(tmp_path):
    text = [f"text {row}" for row in range(50)]
    columns = {"text": text, "labels": ["a"] * 50, "other": repeated(50, 4 * MIB)}
    write_parquet(str(tmp_path / "q.parquet"), columns)
    write_arrow(str(tmp_path / "q.arrow"), columns)
    for name in ("q.parquet", "q.arrow"):
        (chunk,) = readers.read(str(tmp_path / name), ["text"])
        assert chunk.columns == {"text": text}
        rows = list(readers.read_rows(str(tmp_path / name), ["text"]))
        assert rows == [(row + 1, {"text": text[row]}) for row in range(50)]


def random_column(rng, count):
    kind = rng.integers(7)
    words = ["".join(rng.choice([*"abé漢 "], rng.integers(0, 12))) for _ in range(20)]
    if kind == 0:
        return [None if rng.random() < 0.1 else words[rng.integers(20)] for _ in range(count)]
    if kind == 1:
        return [f"{n} {words[n % 20]}" for n in rng.integers(0, 10**6, count).tolist()]
    if kind == 2:
        return rng.integers(-(2**62), 2**62, count).tolist()
    if kind == 3:
        return [
            None if rng.random() < 0.1 else [words[i] for i in rng.integers(0, 20, rng.integers(4))]
            for _ in range(count)
        ]
    if kind == 4:
        return [{"bytes": rng.bytes(rng.integers(20)), "path": words[0]} for _ in range(count)]
    if kind == 5:
        return [[[words[i]]] for i in rng.integers(0, 20, count)]
    return [bool(x) for x in rng.integers(0, 2, count)]


@pytest.mark.parametrize("seed", range(6))
def test_random_tables_are_read_as_they_are(tmp_path, seed, monkeypatch):
    """Whatever the pages, row groups and encodings; also in parts, and as dictionaries."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(parquet_file, "CHUNK_BYTES", int(rng.choice([100, 5000, 1 << 26])))
    monkeypatch.setattr(parquet_file, "_MAX_REPEATED", int(rng.choice([10, 1 << 28])))
    count = int(rng.integers(1, 400))
    columns = {f"c{i}": random_column(rng, count) for i in range(5)}
    table = pyarrow.table(columns)
    parquet.write_table(
        table, tmp_path / "q.parquet",
        compression=str(rng.choice(["none", "snappy", "zstd", "gzip", "brotli", "lz4"])),
        use_dictionary=bool(rng.integers(2)), row_group_size=int(rng.integers(1, 300)),
        data_page_size=int(rng.integers(10, 3000)), write_batch_size=7,
        data_page_version=str(rng.choice(["1.0", "2.0"])),
        dictionary_pagesize_limit=int(rng.integers(10, 3000)),
        store_schema=bool(rng.integers(2)),
    )  # fmt: skip
    compression = [None, "zstd", "lz4"][rng.integers(3)]
    make = [ipc.new_file, ipc.new_stream][rng.integers(2)]
    write_arrow(str(tmp_path / "q.arrow"), columns, make, compression)
    for name in ("q.parquet", "q.arrow"):
        wanted = sorted(rng.choice(list(columns), 3, replace=False).tolist())
        chunks = list(readers.read(str(tmp_path / name), wanted))
        for column in wanted:
            found = [cell for chunk in chunks for cell in chunk.columns[column]]
            assert found == columns[column], (name, column)
        assert [line for chunk in chunks for line in chunk.lines] == list(range(1, count + 1))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damaged_files_are_read_or_refused_in_a_line(tmp_path, kind):
    """Nothing but an InputError of one line, whatever byte is wrong."""
    rng = np.random.default_rng()
    columns = {"text": [f"text {row % 50}" for row in range(300)],
               "labels": [["a", "b"][: row % 3] for row in range(300)]}  # fmt: skip
    good_path = tmp_path / f"good.{kind}"
    outcomes = set()
    for number in range(120):
        if number % 20 == 0:
            if kind == "parquet":
                compression = str(rng.choice(["none", "snappy", "zstd"]))
                parquet.write_table(
                    pyarrow.table(columns), good_path, compression=compression, row_group_size=100
                )
            else:
                compression = [None, "zstd"][rng.integers(2)]
                make = [ipc.new_file, ipc.new_stream][rng.integers(2)]
                write_arrow(str(good_path), columns, make, compression)
            good = good_path.read_bytes()
        data = bytearray(good)
        if number % 10 == 0:
            del data[rng.integers(len(data)) :]
        for at in rng.integers(0, max(1, len(data)), rng.integers(1, 6)):
            if len(data):
                data[at] = rng.integers(256)
        path = tmp_path / f"q{number}.{kind}"
        path.write_bytes(data)
        try:
            for _, row in readers.read_rows(str(path)):
                assert not isinstance(row, InputError) or "\n" not in str(row)
            outcomes.add("read")
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_offsets_that_lead_out_of_a_column_are_the_fault_of_their_row(tmp_path):
    """Arrow itself would read beyond the memory of the file."""
    rng = np.random.default_rng()
    texts = [f"text {row}" for row in range(40)]
    column = pyarrow.array(texts)
    offsets = np.frombuffer(column.buffers()[1], np.int32)[:41].copy()
    row = int(rng.integers(1, 40))
    offsets[row] = rng.choice([1 << 30, -5, -(1 << 31)])
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 40, [None, pyarrow.py_buffer(offsets.tobytes()), column.buffers()[2]]
    )
    path = str(tmp_path / "q.arrow")
    write_arrow(path, {"text": bad, "labels": ["a"] * 40})
    for line, cells in readers.read_rows(path):
        if line in (row, row + 1):  # The offset ends one row and begins the next.
            assert isinstance(cells, InputError) and f"row {line}: 'text' cannot" in str(cells)
        else:
            assert cells == {"text": texts[line - 1], "labels": "a"}


def test_a_row_over_many_lines_is_bounded(tmp_path, monkeypatch):
    from vixml_jax.data.sources import delimited

    monkeypatch.setattr(delimited, "_MAX_ROW", 10_000)
    path = tmp_path / "q.csv"
    path.write_text("text,labels\n" + '"a\n",' * 50_000)
    with pytest.raises(InputError, match=r"line 2: .*longer than") as error:
        list(readers.read(str(path)))
    assert "\n" not in str(error.value)


def test_blocks_of_long_rows_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK_LENGTH", 10_000)
    rows = [{"text": "x" * 3000, "labels": ["a"]} for _ in range(20)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "q.csv").write_text("text,labels\n" + f"{'x' * 3000},a\n" * 20)
    for name in ("q.jsonl", "a.json", "q.csv"):
        chunks = list(readers.read(str(tmp_path / name)))
        assert max(map(len, chunks)) == 4
        assert sum(map(len, chunks)) == 20


def test_too_many_columns_are_refused(tmp_path):
    names = [f"c{n}" for n in range(20_000)]
    (tmp_path / "q.csv").write_text(",".join(names) + "\n")
    (tmp_path / "q.jsonl").write_text("".join(f'{{"{name}": 1}}\n' for name in names))
    (tmp_path / "twice.jsonl").write_text('{"a": 1, ' + '"b": 1, ' * 100_000 + '"c": 1}\n')
    for name, match in (
        ("q.csv", "20,000 columns"), ("q.jsonl", "columns; expected at most"),
        ("twice.jsonl", "'b' occurs twice"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            readers.column_names(str(tmp_path / name))


def test_real_texts_may_expand_much(tmp_path):
    """A hundred times is no bomb."""
    path = tmp_path / "q.csv.gz"
    path.write_bytes(gzip.compress(b"text,labels\n" + b"the same text again,a\n" * 50_000))
    assert os.path.getsize(path) * 100 < 50_000 * 22
    assert sum(map(len, readers.read(str(path)))) == 50_000
    counted = expansion.Expansion(str(path), "-")
    counted.add(expansion.FREE_BYTES)
    with pytest.raises(InputError, match="expand to more than"):
        counted.add(1)
