"""Tests of tabular data: invalid files and flags are refused in one line."""

import gzip

import pyarrow
import pytest
from pyarrow import parquet

from tests.data.sources.tables import read
from vixml_jax.errors import InputError

INVALID_FILES = {
    "ragged": (
        "q.csv", b"id,text,labels\n1,a,x\n2,b\n", "q.csv, line 3: 2 fields, expected 3",
    ),
    "latin": (
        "q.csv", "id,text,labels\n1,Größe,x\n".encode("latin-1"), "line 2: byte 0xf6 at",
    ),
    "quote": (
        "q.csv", b'id,text,labels\n1,"a,x\n2,b,x\n', "check the quotes",
    ),
    "no header": (
        "q.csv", b"\n1,a,x\n", "line 1: no column names",
    ),
    "same column": (
        "q.csv", b"id,text,text\n1,a,x\n", "column 'text' occurs twice",
    ),
    "only a header": (
        "q.csv", b"id,text,labels\n", "q.csv: no rows",
    ),
    "zero bytes": (
        "q.csv", b"", "q.csv: the file is empty (0 bytes)",
    ),
    "long line": (
        "q.csv", b"id,text,labels\n1," + b"a" * 10_000_000 + b",x\n", "line 2: longer than",
    ),
    "long json": (
        "q.jsonl", b'{"text": "' + b"a" * 10_000_000 + b'"}\n', "line 1: longer than 4 MiB",
    ),
    "no text": (
        "q.csv", b"id,body_html,labels\n1,a,x\n", "no text column found among 'id'",
    ),
    "no labels": (
        "q.csv", b"id,text,y\n1,a,x\n", "no labels column found among 'id'",
    ),
    "same id": (
        "q.csv", b"id,text,labels\n1,a,x\n2,b,x\n1,c,x\n",
        "q.csv, line 4: id '1' is already used in",
    ),
    "no id": (
        "q.csv", b"id,text,labels\n1,a,x\n,b,x\n", "line 3: 'id' is empty, expected an id",
    ),
    "not json": (
        "q.jsonl", b'{"text": "a", "labels": ["x"]}\n{"text"\n', "q.jsonl, line 2: not JSON",
    ),
    "nan": (
        "q.jsonl", b'{"text": "a", "labels": ["x"], "embedding": [NaN]}\n', "NaN is not allowed",
    ),
    "nan in csv": (
        "q.csv", b"text,labels,embedding\na,x,1 nan\n", "line 2: 'embedding' is not finite",
    ),
    "huge": (
        "q.csv", b"text,labels,embedding\na,x,1 70000\n", "'embedding' is not finite in float16",
    ),
    "no numbers": (
        "q.csv", b"text,labels,embedding\na,x,1 b\n", "'embedding' is not an embedding",
    ),
    "widths": (
        "q.csv", b"text,labels,embedding\na,x,1 2\nb,x,1\n", "line 3: 1 numbers per embedding",
    ),
    "a list": (
        "q.jsonl", b"[1, 2]\n", "line 1: found '1, 2]', expected JSON objects",
    ),
    "a surrogate": (
        "q.jsonl", b'{"text": "\\ud800", "labels": ["x"]}\n', "contains a lone surrogate",
    ),
    "a dict": (
        "q.jsonl", b'{"text": {"a": 1}, "labels": ["x"]}\n', "'a': 1}\", expected text",
    ),
    "weights": (
        "q.jsonl", b'{"text": "a", "labels": ["x"], "label_weights": [1, 2]}\n', "2 weights in",
    ),
    "minus": (
        "q.jsonl", b'{"text": "a", "labels": ["x"], "label_weights": [-1]}\n', "at least 0",
    ),
    "weights beyond float32": (
        "q.csv", b"text,labels,label_weights\na,x,1e39\n", "'1e39' in 'label_weights', expected",
    ),
    "weights beyond float": (
        "q.jsonl", b'{"text": "a", "labels": ["x"], "label_weights": [1%s]}\n' % (b"0" * 400),
        "in 'label_weights', expected a number",
    ),
    "numbers beyond float": (
        "q.jsonl", b'{"text": "a", "labels": ["x"], "embedding": [1%s]}\n' % (b"0" * 400),
        "line 1: 'embedding' is not an embedding",
    ),
    "deeply nested lists": (
        "q.jsonl", b'{"text": "a", "labels": "%s"}\n' % (b"[" * 100_000),
        "line 1: the labels '[[[",
    ),
    "bad gzip": (
        "q.csv.gz", b"id,text,labels\n1,a,x\n", "truncated or damaged",
    ),
    "truncated gzip": (
        "q.csv.gz", gzip.compress(b"text,labels\na,x\n" * 99)[:-9], "truncated",
    ),
    "bad zst": (
        "q.csv.zst", b"id,text,labels\n1,a,x\n", "q.csv.zst: cannot be read",
    ),
    "bad parquet": (
        "q.parquet", b"id,text,labels\n1,a,x\n", "q.parquet: not a complete parquet file",
    ),
    "no table": (
        "q.txt", b"a", "expected a file name that ends in .csv",
    ),
    "no label": (
        "q.csv", b"text,labels\na,\nb,\n", "no query has a label",
    ),
    "a split": (
        "q.csv", b"text,labels,split\na,x,train\nb,x,tset\n", "line 3: 'split' is 'tset'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID_FILES)
def test_invalid_files_are_refused_in_one_line(tmp_path, name):
    file, data, message = INVALID_FILES[name]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError) as caught:
        read(tmp_path / file, tmp_path / "spool")
    assert message in str(caught.value) and "\n" not in str(caught.value)


INVALID_PARQUET = {
    "two columns with the same name": (
        ["text", "text", "labels"], [["a"], ["b"], ["x"]], "column 'text' occurs twice",
    ),
    "not UTF-8": (
        ["text", "labels"],
        [pyarrow.array([b"\xff"]).view(pyarrow.string()), ["x"]],
        "row 1: 'text' cannot be read as string",
    ),
    "not a date": (
        ["text", "labels", "when"],
        [["a"], ["x"], pyarrow.array([2**62], pyarrow.timestamp("us"))],
        "row 1: 'when' cannot be read as timestamp[us]",
    ),
    "too many dimensions": (
        ["text", "labels", "embedding"],
        [["a"], ["x"], pyarrow.array([[[[1.0], [2.0]]]])],
        "row 1: 'embedding' ",
    ),
    "a dict": (
        ["text", "labels"], [[{"a": 1}], ["x"]], "row 1: 'text' is \"{'a': 1}\", expected text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID_PARQUET)
def test_invalid_parquet_is_refused_in_one_line(tmp_path, name):
    names, columns, message = INVALID_PARQUET[name]
    table = pyarrow.Table.from_arrays([pyarrow.array(column) for column in columns], names=names)
    parquet.write_table(table, tmp_path / "q.parquet")
    split_by = "time:when" if "when" in names else "random"
    with pytest.raises(InputError) as caught:
        read(tmp_path / "q.parquet", tmp_path / "spool", split_by=split_by)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"text": "{title}"}, "--text={title}: "),
        ({"text": "{text"}, "--text={text: not a valid template"),
        ({"id": "sku"}, "--id_column=sku: "),
        ({"labels": "tags"}, "--labels_column=tags: "),
        ({"split_by": "group:brand"}, "--split_by=brand: "),
        ({"split_by": "brand"}, "--split_by=brand: expected random, text, group:COLUMN"),
        ({"labels_are": "ids"}, "--labels_are=ids: there is no label table"),
        ({"labels_source": "/nowhere.csv"}, "--labels_source=/nowhere.csv: no such file"),
    ],
)
def test_invalid_flags_are_refused(tmp_path, options, message):
    (tmp_path / "q.csv").write_text("id,text,labels\n1,a,x\n")
    with pytest.raises(InputError) as caught:
        read(tmp_path / "q.csv", tmp_path / "spool", **options)
    assert message in str(caught.value)


def test_unknown_labels_are_refused(tmp_path):
    (tmp_path / "q.csv").write_text("text,labels\na,u\nb,w|u\n")
    (tmp_path / "names.csv").write_text("id,text\nu,U\nv,V\n")
    with pytest.raises(InputError, match=r"line 3: label 'w' in 'labels' is not among the ids"):
        read(tmp_path / "q.csv", tmp_path / "spool", labels_source=str(tmp_path / "names.csv"))
    (tmp_path / "q.jsonl").write_text('{"text": "a", "target_ind": [1, 2]}\n')
    with pytest.raises(InputError, match=r"line 1: label '2' in 'target_ind', expected a row"):
        read(tmp_path / "q.jsonl", tmp_path / "more", labels_source=str(tmp_path / "names.csv"))


@pytest.mark.parametrize("other", ["train.csv.gz", "train.jsonl", "train.PARQUET"])
def test_the_same_table_in_two_formats_is_refused(tmp_path, other):
    (tmp_path / "d").mkdir()
    for name in ("train.csv", "test.csv", other):
        (tmp_path / "d" / name).write_text("text,labels\na,x\n")
    with pytest.raises(InputError, match=r"train.*and train.*differ only in their extension"):
        read(tmp_path / "d", tmp_path / "spool")
