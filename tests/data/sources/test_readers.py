"""Tests of the readers: dialects, encodings, quotes that do not match, JSON arrays."""

import codecs
import csv
import gzip
import io
import json
import time

import hypothesis
import numpy as np
import pandas as pd
import pyarrow
import pytest
from hypothesis import strategies as st

from vixml_jax.data.sources import json_rows, readers
from vixml_jax.data.sources.delimited import Dialect
from vixml_jax.errors import InputError
from vixml_jax.storage import text_files

TEXTS = ["Grüne Äpfel", 'a 12" TV', "red, blue", "x; y", "Crème brûlée", "a|b", "plain", "-"]


def rows_of(path, warnings=None, **dialect):
    """The rows of a file and the errors of others."""
    rows, errors = [], []
    warn = readers.print_warning if warnings is None else warnings.append
    for _, row in readers.read_rows(str(path), dialect=Dialect(**dialect), warn=warn):
        (errors if isinstance(row, InputError) else rows).append(row)
    return rows, [str(error) for error in errors]


def random_table(rng, count=30):
    return [
        {"id": str(i), "title": str(rng.choice(TEXTS)), "tags": str(rng.choice(TEXTS))}
        for i in range(count)
    ]


def compressed(data, suffix):
    if suffix == ".gz":
        return gzip.compress(data)
    return pyarrow.Codec("zstd").compress(data, asbytes=True) if suffix == ".zst" else data


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "written, given",
    [
        ("utf-8", "utf-8"), ("utf-8-sig", "utf-8"), ("utf-8-sig", "cp1252"), ("utf-16", "utf-8"),
        ("utf-32", "utf-8"), ("utf-16-be", "utf-16-be"), ("cp1252", "cp1252"), ("cp500", "cp500"),
    ],
)  # fmt: skip
def test_what_pandas_writes_is_read(tmp_path, written, given, delimiter, suffix):
    table = random_table(np.random.default_rng())
    text = pd.DataFrame(table).to_csv(sep=delimiter, index=False)
    path = tmp_path / f"q.csv{suffix}"
    path.write_bytes(compressed(text.encode(written), suffix))
    assert rows_of(path, encoding=given) == (table, [])
    assert readers.column_names(str(path), dialect=Dialect(encoding=given)) == list(table[0])


@pytest.mark.parametrize("hint", ["sep=;\r\n", '"sep=;"\r\n', ""])
def test_csv_of_excel(tmp_path, hint):
    (tmp_path / "q.csv").write_bytes(f"{hint}id;title\r\n1;Größe 1,5\r\n".encode("utf-8-sig"))
    assert rows_of(tmp_path / "q.csv") == ([{"id": "1", "title": "Größe 1,5"}], [])
    assert rows_of(tmp_path / "q.csv", delimiter=";") == ([{"id": "1", "title": "Größe 1,5"}], [])


def test_delimiter_that_fits_all_rows_is_taken(tmp_path):
    (tmp_path / "q.csv").write_text("id;title, brand;tags\n1;a, b;x\n2;c;y\n")
    assert rows_of(tmp_path / "q.csv")[0][1] == {"id": "2", "title, brand": "c", "tags": "y"}
    (tmp_path / "q.csv").write_text("id;n,title\n1;2,a;b\n3;4,c;d;e\n")  # Commas fit all rows.
    assert rows_of(tmp_path / "q.csv")[0][0] == {"id;n": "1;2", "title": "a;b"}
    (tmp_path / "q.csv").write_text("text\na,b\nc\n")
    rows, errors = rows_of(tmp_path / "q.csv")
    assert rows == [{"text": "c"}] and "line 2: 2 fields, expected 1" in errors[0]
    (tmp_path / "q.csv").write_text("a^b\n1^$2,5$\n")
    assert rows_of(tmp_path / "q.csv", delimiter="^", quotechar="$")[0] == [{"a": "1", "b": "2,5"}]


@pytest.mark.parametrize(
    "option, value",
    [
        ("delimiter", ";;"), ("delimiter", "\n"), ("quotechar", "''"), ("encoding", "utf-61"),
        ("encoding", "rot13"), ("encoding", "base64"), ("encoding", ""),
    ],
)  # fmt: skip
def test_invalid_dialects_are_refused(option, value):
    with pytest.raises(InputError, match=f"^--{option}="):
        Dialect(**{option: value})


def test_wrong_encodings_are_refused_with_the_flag_that_reads_the_file(tmp_path):
    path, text = tmp_path / "q.csv", "id,title\n1,Größe 5 €\n"
    for written, given, flag in (
        ("cp1252", "utf-8", "--encoding=cp1252"),
        ("utf-8", "cp1252", "--encoding=utf-8"),
        ("utf-8", "latin-1", "--encoding=utf-8"),
        ("utf-16-le", "utf-8", "--encoding=utf-16-le"),
        ("utf-16-be", "utf-8", "--encoding=utf-16-be"),
        ("utf-16-le", "cp1252", "--encoding=utf-16-le"),
    ):
        path.write_bytes(text.encode(written))
        with pytest.raises(InputError) as refused:
            list(readers.read(str(path), dialect=Dialect(encoding=given)))
        message = str(refused.value)
        assert flag in message and str(path) in message and "\n" not in message
        found = rows_of(path, encoding=flag.partition("=")[2])
        assert found == ([{"id": "1", "title": "Größe 5 €"}], [])
    path.write_bytes(text.encode("utf-16")[:-1])
    with pytest.raises(InputError, match=r"near line [23]: not utf-16-le"):
        rows_of(path)
    path.write_bytes(b"id,title\r1,a\r")
    with pytest.raises(InputError, match="carriage return alone"):
        rows_of(path)


def test_bad_lines_of_the_encoding_are_single_errors(tmp_path):
    lines = [f"{i},Größe" for i in range(40)]
    data = "\n".join(["id,title", *lines]).encode()
    bad = {7, 23}
    parts = [
        line.replace(b"\xc3\xb6", b"\xff") if number in bad else line
        for number, line in enumerate(data.split(b"\n"), 1)
    ]
    (tmp_path / "q.csv").write_bytes(b"\n".join(parts))
    rows, errors = rows_of(tmp_path / "q.csv")
    assert len(rows) == 38 and len(errors) == 2
    assert ", line 7: byte 0xff" in errors[0] and ", line 23: " in errors[1]


def with_open_quote(delimiter, first=5, last=20, count=30):
    """A table with a quote before one title and one behind another, and its rows."""
    titles = [f"title {i}" for i in range(1, count + 1)]
    titles[first - 1], titles[last - 1] = '"Best of jazz', 'tv stand 42"'
    lines = [f"{i}{delimiter}{title}{delimiter}x" for i, title in enumerate(titles, 1)]
    return "\n".join([delimiter.join(("id", "title", "tags")), *lines]) + "\n", titles


@pytest.mark.parametrize("first, last", [(5, 20), (1, 2), (29, 30), (1, 30)])
def test_a_quote_in_tsv_is_a_character(tmp_path, first, last):
    text, titles = with_open_quote("\t", first, last)
    (tmp_path / "q.tsv").write_text(text)
    warnings = []
    rows, errors = rows_of(tmp_path / "q.tsv", warnings)
    assert [row["title"] for row in rows] == titles and not errors and not warnings
    (tmp_path / "q.csv").write_text(with_open_quote(",", first, last)[0])
    rows, errors = rows_of(tmp_path / "q.csv", warnings, quotechar="none")
    assert [row["title"] for row in rows] == titles and not errors and not warnings


@pytest.mark.parametrize("first, last", [(5, 20), (1, 2), (29, 30), (1, 30)])
def test_rows_within_quotes_are_told_with_their_lines(tmp_path, first, last):
    for kind, delimiter, dialect in (("csv", ",", {}), ("tsv", "\t", {"quotechar": '"'})):
        path = tmp_path / f"q.{kind}"
        path.write_text(with_open_quote(delimiter, first, last)[0])
        warnings = []
        rows, errors = rows_of(path, warnings, **dialect)
        assert len(rows) == 30 - (last - first) and not errors
        assert len(warnings) == 1
        assert f"{last - first} lines that look like rows" in warnings[0]
        assert f"(lines {first + 1} to {last + 1})" in warnings[0]


def test_texts_over_several_lines_are_no_warning(tmp_path):
    table = [{"id": str(i), "title": f"soft\nand\r\nwarm {i}", "tags": "x"} for i in range(5)]
    pd.DataFrame(table).to_csv(tmp_path / "q.csv", index=False)
    warnings = []
    assert rows_of(tmp_path / "q.csv", warnings) == (table, []) and not warnings


def test_quoted_fields_of_tsv_are_told(tmp_path):
    (tmp_path / "q.tsv").write_text('id\ttitle\n1\t"a ""b"""\n2\tc\n3\t"d"\n')
    warnings = []
    rows, _ = rows_of(tmp_path / "q.tsv", warnings)
    assert [row["title"] for row in rows] == ['"a ""b"""', "c", '"d"']
    assert "2 fields are in quotes (first in line 2)" in warnings[0]
    assert "--quotechar='\"'" in warnings[0]
    rows, _ = rows_of(tmp_path / "q.tsv", warnings, quotechar='"')
    assert [row["title"] for row in rows] == ['a "b"', "c", "d"] and len(warnings) == 1
    rows_of(tmp_path / "q.tsv", warnings, quotechar="none")
    assert len(warnings) == 1
    (tmp_path / "q.tsv").write_text('id\ttitle\n1\t"a\tb"\n2\tc\n')
    rows, errors = rows_of(tmp_path / "q.tsv")
    assert len(rows) == 1 and "3 fields, expected 2" in errors[0] and "--quotechar" in errors[0]


def test_an_open_quote_is_the_error_of_one_row(tmp_path):
    text = with_open_quote(",")[0].replace('42"', "42")
    for damaged in (text, text.replace("title 25", '"title, 25"')):
        (tmp_path / "q.csv").write_text(damaged)
        rows, errors = rows_of(tmp_path / "q.csv")
        assert len(rows) == 29 and len(errors) == 1 and ", line 6: " in errors[0]
        with pytest.raises(InputError, match=r"q.csv, line 6: .*check the quotes"):
            list(readers.read(str(tmp_path / "q.csv")))
        chunks = list(readers.read(str(tmp_path / "q.csv"), ["title"], strict=False))
        assert sum(map(len, chunks)) == 29 and [len(chunk.errors) for chunk in chunks] == [1]


@hypothesis.settings(max_examples=300, deadline=None, database=None)
@hypothesis.given(
    kind=st.sampled_from(["csv", "tsv"]),
    count=st.integers(1, 30),
    marks=st.lists(st.tuples(st.floats(0, 0.999), st.sampled_from('",\t\n')), max_size=4),
    removed=st.booleans(),
)
def test_no_line_is_lost_without_a_word(tmp_path_factory, kind, count, marks, removed):
    rng = np.random.default_rng(abs(hash((kind, count, tuple(marks)))))
    text = io.StringIO()
    writer = csv.writer(text, delimiter="," if kind == "csv" else "\t", lineterminator="\n")
    writer.writerow(["id", "title", "tags"])
    writer.writerows(row.values() for row in random_table(rng, count))
    header, body = text.getvalue().split("\n", 1)
    for place, mark in marks:
        start = int(place * len(body))
        body = body[:start] + mark + body[start + removed :]
    path = tmp_path_factory.mktemp("lines") / f"q.{kind}"
    path.write_text(f"{header}\n{body}")
    warnings, found = [], []
    for line, row in readers.read_rows(str(path), warn=warnings.append):
        found.append((line, row))
    # Each line with something in it begins a row or an error, or is told to be within quotes, or
    # is not like a row.
    begun = {line for line, _ in found}
    others = [
        line
        for line, text in enumerate(path.read_text().split("\n")[1:], 2)
        if text and line not in begun and text.count("," if kind == "csv" else "\t") == 2
    ]
    told = [int(w.split(": ")[1].split()[0]) for w in warnings if "look like rows" in w]
    assert sum(told) == len(others)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_json_array_is_read_as_its_objects(tmp_path, monkeypatch, suffix, indent, encoding):
    monkeypatch.setattr(json_rows, "_READ_CHARACTERS", 37)
    monkeypatch.setattr(readers, "_CHUNK_ROWS", 7)
    rng = np.random.default_rng()
    table = [{**row, "tags": [row["tags"], "[{]},"]} for row in random_table(rng)]
    text = "\n " + json.dumps(table, indent=indent, ensure_ascii=False) + "\n\n"
    path = tmp_path / f"q.json{suffix}"
    path.write_bytes(compressed(text.encode(encoding), suffix))
    chunks = list(readers.read(str(path)))
    assert [row for chunk in chunks for row in chunk.columns["tags"]] == [r["tags"] for r in table]
    lines = [line for chunk in chunks for line in chunk.lines]
    expected = [n for n, line in enumerate(text.split("\n"), 1) if line == " {"] or [2] * 30
    assert lines == expected
    assert rows_of(path) == (table, [])


@pytest.mark.parametrize(
    "text, message",
    [
        ('[{"a": 1},\n {"a": 2}', "line 2: found the end, expected ']' or ','"),
        ('[{"a": 1}\n {"a": 2}]', "line 2: found '{', expected ']' or ','"),
        ('[{"a": 1},\n]', "line 2: found ']', expected JSON objects"),
        ('[{"a": 1},\n{"a": 1, "a": 2}]', "line 2: the object .*'a' occurs twice"),
        ('[{"a": 1},\n{"a": NaN}]', "line 2: the object .*NaN is not allowed"),
        ('[{"a": 1},\n{"a": ]', "line 2: the object"),
        ('[{"a": 1}]\n[{"a": 1}]', "line 2: found '\\[', expected the end"),
        ("[1, 2]", "line 1: found '1, 2\\]', expected JSON objects"),
        ('{"a": 1}\n{"a": 1, "a": 2}', "line 2: not JSON .*'a' occurs twice"),
    ],
)
def test_invalid_json_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "q.json").write_text(text)
    with pytest.raises(InputError, match=f"q.json, {message}"):
        list(readers.read(str(tmp_path / "q.json")))


def test_an_object_longer_than_a_line_may_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_LINE", 1000)
    (tmp_path / "q.json").write_text('[{"a": "' + "x" * 500_000 + '"')
    with pytest.raises(InputError, match="line 1: the object that begins here is not JSON"):
        list(readers.read(str(tmp_path / "q.json")))


def test_names_of_json_columns_are_of_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_CHUNK_ROWS", 10)
    path = tmp_path / "q.jsonl"
    path.write_text('{"text": "a"}\n' * 84 + '{"text": "a", "embedding": [1]}\n')
    assert readers.column_names(str(path)) == ["text", "embedding"]
    path.write_text('{"text": "a", "last": 1}\n')  # The file has changed.
    assert readers.column_names(str(path)) == ["text", "last"]


def test_byte_order_marks_are_those_of_codecs():
    written = {"utf-8": codecs.BOM_UTF8, "utf-16-le": codecs.BOM_UTF16_LE}
    assert all((mark, name) in text_files._MARKS for name, mark in written.items())


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("name", ["q.csv", "q.tsv", "q.jsonl", "q.csv.gz", "q.jsonl.gz"])
def test_blank_lines_between_rows_change_no_row_and_no_line_number(tmp_path, name, encoding, end):
    rng = np.random.default_rng()
    kind = readers.kind_of(name)
    mark = "\t" if kind == "tsv" else ","
    lines = [] if kind == "jsonl" else [f"text{mark}labels"]
    expected = []
    for row in range(30):
        lines += [""] * int(rng.choice([0, 1, 2, 500, 40_000], p=[0.3, 0.3, 0.2, 0.15, 0.05]))
        text = f"ü {row}"
        if kind == "csv" and row % 3 == 0:
            text += end * int(rng.integers(1, 300)) + "b"  # Lines within quotes are not left out.
        expected.append((len(lines) + 1, text))
        fields = [f'"{text}"' if kind == "csv" else text, "a"]
        line = json.dumps({"text": text}) if kind == "jsonl" else mark.join(fields)
        if row % 7 == 5:
            line, expected[-1] = ("{" if kind == "jsonl" else "alone"), (len(lines) + 1, None)
        lines += line.split(end)
    content = end.join([*lines, *[""] * int(rng.integers(300))]).encode(encoding)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = [
        (line, None if isinstance(row, InputError) else row["text"])
        for line, row in readers.read_rows(str(path))
    ]
    assert found == expected


@pytest.mark.parametrize("name", ["q.csv", "q.tsv", "q.jsonl", "q.json"])
def test_blank_lines_cost_nothing(tmp_path, name):
    start = {"q.csv": "text,labels\na,b\n", "q.tsv": "text\tlabels\na\tb\n", "q.jsonl": "",
             "q.json": '[{"text": "a"},'}[name]  # fmt: skip
    end = {"q.jsonl": '{"text": "a"}\n', "q.json": '{"text": "b"}]'}.get(name, "")
    path = tmp_path / name
    path.write_text(start + "\n" * 10_000_000 + end)
    begin = time.process_time()
    rows = list(readers.read_rows(str(path)))
    assert time.process_time() - begin < 2  # Line by line it takes 10 seconds.
    if name == "q.json":
        assert [line for line, _ in rows] == [1, 10_000_001]
    else:
        assert [line for line, _ in rows] == [10_000_001 if name == "q.jsonl" else 2]
