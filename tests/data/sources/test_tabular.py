"""A user's own tables: what is understood of them, the same in every kind of file."""

import datetime
import gzip
import json
import os
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tests.data.sources import compare_formats, random_tables
from vixml_jax.data import preprocessing, store
from vixml_jax.data.sources import readers, tabular
from vixml_jax.data.sources.columns import Columns
from vixml_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[3]


def read(source, spool, **options):
    names = {key: options.pop(key) for key in list(options) if key in Columns.__dataclass_fields__}
    spool.mkdir(exist_ok=True)
    return tabular.read_tables(str(source), str(spool), names=Columns(**names), **options)


def prepare(source, out, **options):
    raw = preprocessing.read_source(str(source), str(out.parent), **options)
    settings = preprocessing.Settings(max_tokens=8, vocab_size=64)
    return preprocessing.prepare(raw, str(out), settings)


def texts_of(items):
    return [text for chunk in items.read_texts() for text in chunk]


def labels_of(raw, split):
    """The label texts of each query."""
    texts, relevance = texts_of(raw.labels), raw.splits[split].relevance
    return [
        {texts[label] for label in relevance.indices[a:b]}
        for a, b in zip(relevance.indptr, relevance.indptr[1:], strict=False)
    ]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", random_tables.KINDS)
def test_every_kind_of_file_gives_the_same_prepared_data(tmp_path, kind, shards):
    held = random_tables.draw(abs(hash((kind, shards))) % 1000)
    random_tables.write_xml(held, tmp_path / "xml")
    random_tables.write_tables(held, tmp_path / "tables", kind, shards=shards)
    one = prepare(tmp_path / "xml", tmp_path / "a" / "one")
    (tmp_path / "b").mkdir()
    other = prepare(tmp_path / "tables", tmp_path / "b" / "other")
    assert one.content_hash == other.content_hash
    names = sorted(path.name for path in (tmp_path / "a" / "one").glob("*.npy"))
    assert names == sorted(path.name for path in (tmp_path / "b" / "other").glob("*.npy"))
    for name in [*names, store.TOKENIZER]:
        assert (tmp_path / "a" / "one" / name).read_bytes() == (
            tmp_path / "b" / "other" / name
        ).read_bytes()


def test_compare_formats_are_compared_file_by_file(tmp_path):
    random_tables.write_xml(random_tables.draw(4), tmp_path / "set")
    (tmp_path / "to").mkdir()
    found = list(compare_formats.compare(tmp_path / "set", tmp_path / "to", ["csv.gz", "parquet"]))
    assert [(kind, names) for kind, _, names in found] == [
        ("repository", []), ("csv.gz", []), ("parquet", []),
    ]  # fmt: skip
    other = tmp_path / "to" / "csv.gz.prepared"
    (other / "train_tokens.npy").write_bytes(b"")
    (other / "test_ids.npy").unlink()
    left = compare_formats.differing(tmp_path / "to" / "repository.prepared", other)
    assert left == ["test_ids.npy", "train_tokens.npy"]


def test_the_xml_repositorys_json_is_read_as_published(tmp_path):
    held = random_tables.draw(3)
    for name, alone in (("LF-Things", False), ("LF-ThingsTitles", True)):
        directory = tmp_path / name
        directory.mkdir()
        for split, prefix in (("train", "trn"), ("test", "tst"), ("labels", "lbl")):
            part = held[split]
            rows = [
                {"uid": f"{prefix}{row}", "title": text, "content": f"about {row}"}
                for row, text in enumerate(part["text"])
            ]
            if split != "labels":
                for row, labels in zip(rows, part["labels"], strict=True):
                    row |= {"target_ind": labels, "target_rel": [1.0] * len(labels)}
            random_tables.write_rows(rows, directory / f"{prefix}.jsonl.gz")
            (directory / f"{prefix}.jsonl.gz").rename(directory / f"{prefix}.json.gz")
        (directory / "filter_labels_test.txt").write_text("3 1\n0 2\n")
        raw = read(directory, tmp_path / f"spool{alone}")
        every = {"train": raw.train.items, "test": raw.test.items, "labels": raw.labels}
        for split, items in every.items():
            rest = [""] * items.count if alone else [f" about {row}" for row in range(items.count)]
            expected = [a + b for a, b in zip(held[split]["text"], rest, strict=True)]
            assert texts_of(items) == expected
        np.testing.assert_array_equal(raw.test.filter, [[0, 2], [3, 1]])
        assert raw.train.filter is None and raw.train.weights is None
        rows = np.split(raw.train.relevance.indices, raw.train.relevance.indptr[1:-1])
        assert [row.tolist() for row in rows] == held["train"]["labels"]
        assert raw.train.items.name(3) == "trn3"
        one = read(directory, tmp_path / "content", text="{content}")
        assert texts_of(one.labels)[:2] == texts_of(one.test.items)[:2] == ["about 0", "about 1"]


def test_labels_may_be_implied_and_are_sorted(tmp_path):
    (tmp_path / "shop.csv").write_text(
        'sku,title,brand,tags\n7,Shirt,A & B,red| blue |red\n8,"Hat, large",,\n9,Sock,C,green\n'
    )
    raw = read(tmp_path / "shop.csv", tmp_path / "spool", text="{title} by {brand}")
    assert texts_of(raw.labels) == ["blue", "green", "red"]
    assert list(raw.labels.ids) == ["blue", "green", "red"]
    assert texts_of(raw.train.items) == ["Shirt by A & B", "Hat, large by", "Sock by C"]
    assert labels_of(raw, "train") == [{"red", "blue"}, set(), {"green"}]
    assert [raw.train.items.name(row) for row in range(3)] == ["7", "8", "9"]
    assert raw.test is None
    assert raw.warnings == ("train: 1 labels given twice to one query count once",)
    assert "id='sku' (guessed)" in raw.understood[0] and "labels='tags'" in raw.understood[0]


@pytest.mark.parametrize(
    "values,expected,options",
    [
        (["a|b", "b"], [{"a", "b"}, {"b"}], {}),
        (["a;b", "b"], [{"a", "b"}, {"b"}], {}),
        (["a, b", "b"], [{"a", "b"}, {"b"}], {}),
        (["a, b|c", "b"], [{"a, b", "c"}, {"b"}], {}),
        (["a b", "b"], [{"a b"}, {"b"}], {}),
        (["a//b", "b"], [{"a", "b"}, {"b"}], {"label_separator": "//"}),
        (["a, b", "b"], [{"a, b"}, {"b"}], {"label_separator": "|"}),
        (['["a, b", "c"]', "[]"], [{"a, b", "c"}, set()], {}),
    ],
)
def test_separators_of_labels(tmp_path, values, expected, options):
    rows = [{"id": str(n), "text": "x", "labels": value} for n, value in enumerate(values)]
    random_tables.write_rows(rows, tmp_path / "q.csv")
    raw = read(tmp_path / "q.csv", tmp_path / "spool", **options)
    assert labels_of(raw, "train") == expected


@pytest.mark.parametrize(
    "labels,refs,are,expected",
    [
        ([("u", "red"), ("v", "green")], ["u v", "v"], "ids", [[1, 1], [0, 1]]),
        (
            [("u", "light red"), ("v", "green")],
            ["light red, green", "green"],
            "texts",
            [[1, 1], [0, 1]],
        ),
        ([("u", "light red"), ("v", "green")], ["light red", "green"], "texts", [[1, 0], [0, 1]]),
        ([("1", "0"), ("0", "1")], ["1 0", "0"], "ids", [[1, 1], [0, 1]]),
        ([("1", "x"), ("0", "y")], [[0, 1], [1]], "rows", [[1, 1], [0, 1]]),
        ([("u", "x"), ("v", "y")], ["0;1", "1"], "rows", [[1, 1], [0, 1]]),
    ],
)
def test_labels_of_a_table_are_found_by_what_fits(tmp_path, labels, refs, are, expected):
    rows = [{"id": str(n), "text": "x", "labels": ref} for n, ref in enumerate(refs)]
    random_tables.write_rows(rows, tmp_path / "q.jsonl")
    table = [{"label_id": key, "label": text} for key, text in labels]
    random_tables.write_rows(table, tmp_path / "names.csv")
    told = {"labels_are": "rows"} if are == "rows" else {}
    raw = read(
        tmp_path / "q.jsonl", tmp_path / "spool", labels_source=str(tmp_path / "names.csv"), **told
    )
    assert raw.train.relevance.toarray().tolist() == expected
    assert f"named by their {are}" in raw.understood[-1]
    assert [raw.labels.name(row) for row in range(2)] == [key for key, _ in labels]


def test_weights_say_how_often_a_label_is_drawn(tmp_path):
    rows = [
        {"id": "0", "text": "x", "labels": ["b", "a", "c"], "label_weights": [2.0, 0.5, 0.0]},
        {"id": "1", "text": "y", "labels": ["c", "b"], "label_weights": [1, 3]},
    ]
    random_tables.write_rows(rows, tmp_path / "q.jsonl")
    raw = read(tmp_path / "q.jsonl", tmp_path / "spool")
    assert raw.train.relevance.toarray().tolist() == [[1, 1, 0], [0, 1, 1]]
    np.testing.assert_array_equal(raw.train.weights, np.float32([0.5, 2, 3, 1]))
    settings = preprocessing.Settings(vocab_size=64, test=0.5)
    dataset = preprocessing.prepare(raw, str(tmp_path / "out"), settings)
    assert len(dataset.train_weights) == dataset.train_relevance.nnz == 2


@pytest.mark.parametrize("column", ["split", "fold"])
def test_a_column_may_say_the_split(tmp_path, column):
    said = ["train", "Test", "valid", "TRAINING", "val", "dev", "tst", "train"]
    rows = [{"text": f"t{n}", "labels": f"l{n % 2}", column: s} for n, s in enumerate(said)]
    random_tables.write_rows(rows, tmp_path / "q.csv")
    raw = read(tmp_path / "q.csv", tmp_path / "spool")
    assert texts_of(raw.train.items) == ["t0", "t3", "t7"]
    assert texts_of(raw.valid.items) == ["t2", "t4", "t5"]
    assert texts_of(raw.test.items) == ["t1", "t6"]
    assert labels_of(raw, "valid") == [{"l0"}, {"l0"}, {"l1"}]


def test_queries_are_split_by_group_and_by_time(tmp_path):
    rng = np.random.default_rng(5)
    day = datetime.date(2024, 1, 1)
    rows = [
        {
            "text": f"t{n}",
            "labels": "a|b",
            "brand": f"brand {rng.integers(20)}",
            "day": str(day + datetime.timedelta(int(rng.integers(90)))),
        }
        for n in range(200)
    ]
    random_tables.write_rows(rows, tmp_path / "q.csv")
    for split_by in ("group:brand", "time:day"):
        raw = read(tmp_path / "q.csv", tmp_path / split_by[:4], split_by=split_by)
        settled, _ = preprocessing.settle(
            raw, preprocessing.Settings(split_by=split_by, test=0.3, valid=0.1)
        )
        column = split_by.partition(":")[2]
        values = {
            name: [rows[int(text[1:])][column] for text in texts_of(found.items)]
            for name, found in settled.splits.items()
        }
        assert sum(map(len, values.values())) == 200
        if split_by == "group:brand":
            train, valid, test = map(set, values.values())
            assert not train & test and not train & valid and not valid & test
        else:
            assert max(values["train"]) < min(values["valid"])
            assert max(values["valid"]) < min(values["test"])
        assert 60 <= len(values["test"]) <= 85


def test_embeddings_one_or_several(tmp_path):
    rows = [
        {"text": "a", "labels": "x", "embedding": [[1, 2], [3, 4]]},
        {"text": "b", "labels": "x", "embedding": None},
        {"text": "c", "labels": "x", "embedding": [5, 6.5]},
        {"text": "d", "labels": "x", "embedding": []},
    ]
    for kind in ("jsonl", "csv"):
        told = rows
        if kind == "csv":
            told = [{**row, "embedding": json.dumps(row["embedding"])} for row in rows]
            told[1]["embedding"], told[2]["embedding"] = "", "5 6.5"
        random_tables.write_rows(told, tmp_path / f"q.{kind}")
        raw = read(tmp_path / f"q.{kind}", tmp_path / kind)
        found = raw.train.items.images
        at = found.offsets(np.arange(4))
        assert at.tolist() == [0, 2, 2, 3, 3]
        vectors = np.concatenate(list(found.read(np.arange(4))))
        assert vectors.dtype == np.float16 and vectors.tolist() == [[1, 2], [3, 4], [5, 6.5]]
        held = raw.train.select(np.array([2, 3])).items.images
        assert np.concatenate(list(held.read(np.arange(2)))).tolist() == [[5, 6.5]]
        assert held.offsets(np.arange(2)).tolist() == [0, 1, 1]


def test_filters_are_given_by_id(tmp_path):
    directory = tmp_path / "d"
    directory.mkdir()
    rows = [{"id": f"q{n}", "text": f"t{n}", "labels": ["u", "v"]} for n in range(4)]
    random_tables.write_rows(rows, directory / "train.jsonl")
    random_tables.write_rows(rows[:2], directory / "test.jsonl")
    random_tables.write_rows([{"id": k, "text": k} for k in "uv"], directory / "labels.jsonl")
    (directory / "filter_labels_test.txt").write_text("q1\tv\nq0 v\n\nq1 u\n")
    raw = read(directory, tmp_path / "spool")
    np.testing.assert_array_equal(raw.test.filter, [[0, 1], [1, 0], [1, 1]])
    assert raw.train.filter is None
    (directory / "filter_labels_test.txt").write_text("q1 v\nq9 v\n")
    with pytest.raises(InputError, match=r"filter_labels_test.txt, line 2: found 'q9 v'"):
        read(directory, tmp_path / "again")
    (directory / "filter_labels_test.txt").write_text("q1 v\nq1\tv\n")
    with pytest.raises(InputError, match=r"filter_labels_test.txt, line 2: pair .* given twice"):
        read(directory, tmp_path / "twice")
    (directory / "filter_labels_test.txt").rename(directory / "filter_labels_valid.txt")
    with pytest.raises(InputError, match=r"filter_labels_valid.txt: the source has no valid split"):
        read(directory, tmp_path / "absent")


def test_shards_may_lie_in_directories_of_their_part(tmp_path):
    rows = [{"id": str(n), "text": f"t{n}", "labels": ["u"]} for n in range(9)]
    for part, at in (("train", range(0, 5)), ("test", range(5, 9))):
        (tmp_path / "d" / part).mkdir(parents=True)
        for n in at:
            random_tables.write_rows([rows[n]], tmp_path / "d" / part / f"part-{n}.jsonl.gz")
    raw = read(tmp_path / "d", tmp_path / "spool")
    assert texts_of(raw.train.items) == [f"t{n}" for n in range(5)]
    assert texts_of(raw.test.items) == [f"t{n}" for n in range(5, 9)]


def test_a_preview_shows_rows_and_counts(tmp_path):
    held = random_tables.draw(1)
    random_tables.write_tables(held, tmp_path / "d", "csv")
    raw, notes = preprocessing.settle(
        read(tmp_path / "d", tmp_path / "s"), preprocessing.Settings()
    )
    lines = preprocessing.preview(raw, notes).split("\n")
    for split in ("train", "test"):
        texts = held[split]["text"]
        if split == "train":
            texts = [t for t, row in zip(texts, held[split]["labels"], strict=True) if row]
        assert any(line.startswith(split) and f"{len(texts)} queries" in line for line in lines)
        at = next(n for n, line in enumerate(lines) if line.startswith(f"{split}, the first rows"))
        for line, text in zip(lines[at + 1 :], texts[:10], strict=False):
            assert line.startswith("  ") and f" | {' '.join(text.split())[:20].strip()}" in line


BAD = {
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
        "q.csv", b"id,text,text\n1,a,x\n", "column 'text' is there twice",
    ),
    "only a header": (
        "q.csv", b"id,text,labels\n", "q.csv: no rows",
    ),
    "zero bytes": (
        "q.csv", b"", "q.csv: empty, zero bytes",
    ),
    "long line": (
        "q.csv", b"id,text,labels\n1," + b"a" * 10_000_000 + b",x\n", "line 2: longer than",
    ),
    "long json": (
        "q.jsonl", b'{"text": "' + b"a" * 10_000_000 + b'"}\n', "line 1: longer than 4 MiB",
    ),
    "no text": (
        "q.csv", b"id,body_html,labels\n1,a,x\n", "which column is the text? found 'id'",
    ),
    "no labels": (
        "q.csv", b"id,text,y\n1,a,x\n", "which column has the labels? found 'id'",
    ),
    "same id": (
        "q.csv", b"id,text,labels\n1,a,x\n2,b,x\n1,c,x\n", "q.csv, line 4: id '1' is that of",
    ),
    "no id": (
        "q.csv", b"id,text,labels\n1,a,x\n,b,x\n", "line 3: 'id' is empty, expected an id",
    ),
    "not json": (
        "q.jsonl", b'{"text": "a", "labels": ["x"]}\n{"text"\n', "q.jsonl, line 2: not JSON",
    ),
    "nan": (
        "q.jsonl", b'{"text": "a", "labels": ["x"], "embedding": [NaN]}\n', "NaN is no number",
    ),
    "nan in csv": (
        "q.csv", b"text,labels,embedding\na,x,1 nan\n", "line 2: 'embedding' is not finite",
    ),
    "huge": (
        "q.csv", b"text,labels,embedding\na,x,1 70000\n", "'embedding' is not finite in float16",
    ),
    "no numbers": (
        "q.csv", b"text,labels,embedding\na,x,1 b\n", "'embedding' is no embedding",
    ),
    "widths": (
        "q.csv", b"text,labels,embedding\na,x,1 2\nb,x,1\n", "line 3: an embedding of 1 numbers",
    ),
    "a list": (
        "q.jsonl", b"[1, 2]\n", "line 1: '[1, 2]', expected an object",
    ),
    "a surrogate": (
        "q.jsonl", b'{"text": "\\ud800", "labels": ["x"]}\n', "half a character",
    ),
    "a dict": (
        "q.jsonl", b'{"text": {"a": 1}, "labels": ["x"]}\n', "'a': 1}\", expected text",
    ),
    "weights": (
        "q.jsonl", b'{"text": "a", "labels": ["x"], "label_weights": [1, 2]}\n', "2 values in",
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
        "line 1: 'embedding' is no embedding",
    ),
    "lists without end": (
        "q.jsonl", b'{"text": "a", "labels": "%s"}\n' % (b"[" * 100_000),
        "line 1: 'labels' begins as a JSON list but is none",
    ),
    "bad gzip": (
        "q.csv.gz", b"id,text,labels\n1,a,x\n", "truncated or damaged",
    ),
    "cut gzip": (
        "q.csv.gz", gzip.compress(b"text,labels\na,x\n" * 99)[:-9], "truncated",
    ),
    "bad zst": (
        "q.csv.zst", b"id,text,labels\n1,a,x\n", "q.csv.zst: cannot be read",
    ),
    "bad parquet": (
        "q.parquet", b"id,text,labels\n1,a,x\n", "q.parquet: not a whole parquet file",
    ),
    "no table": (
        "q.txt", b"a", "expected a name that ends in .csv",
    ),
    "no label": (
        "q.csv", b"text,labels\na,\nb,\n", "no query has a label",
    ),
    "a split": (
        "q.csv", b"text,labels,split\na,x,train\nb,x,tset\n", "line 3: 'split' is 'tset'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line(tmp_path, name):
    file, data, fault = BAD[name]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(InputError) as caught:
        read(tmp_path / file, tmp_path / "spool")
    assert fault in str(caught.value) and "\n" not in str(caught.value)


NANOSECOND = 1_700_000_000_123_456_789
PARQUET = {
    "two columns of a name": (
        ["text", "text", "labels"], [["a"], ["b"], ["x"]], "column 'text' is there twice",
    ),
    "no UTF-8": (
        ["text", "labels"],
        [pyarrow.array([b"\xff"]).view(pyarrow.string()), ["x"]],
        "rows 1 to 1: 'text' cannot be read as string",
    ),
    "no date": (
        ["text", "labels", "when"],
        [["a"], ["x"], pyarrow.array([2**62], pyarrow.timestamp("us"))],
        "rows 1 to 1: 'when' cannot be read as timestamp[us]",
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


@pytest.mark.parametrize("name", PARQUET)
def test_bad_parquet_is_refused_in_one_line(tmp_path, name):
    names, values, fault = PARQUET[name]
    table = pyarrow.Table.from_arrays([pyarrow.array(one) for one in values], names=names)
    parquet.write_table(table, tmp_path / "q.parquet")
    split_by = "time:when" if "when" in names else "random"
    with pytest.raises(InputError) as caught:
        read(tmp_path / "q.parquet", tmp_path / "spool", split_by=split_by)
    assert fault in str(caught.value) and "\n" not in str(caught.value)


def test_times_of_nanoseconds_are_read_and_what_is_not_used_is_not(tmp_path):
    times = [NANOSECOND + 10**9 * second for second in (3, 1, 2, 0)]
    columns = {
        "text": list("abcd"),
        "labels": list("xxxx"),
        "when": pyarrow.array(times, pyarrow.timestamp("ns")),
        "took": pyarrow.array(times, pyarrow.duration("ns")),
        "far": pyarrow.array([2**62] * 4, pyarrow.timestamp("us")),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "q.parquet")
    raw = read(tmp_path / "q.parquet", tmp_path / "spool", split_by="time:when")
    settings = preprocessing.Settings(split_by="time:when", test=0.5)
    settled, _ = preprocessing.settle(raw, settings)
    assert texts_of(settled.test.items) == ["a", "c"]
    np.testing.assert_allclose(raw.train.key, np.array(times) / 1e9, rtol=0, atol=1e-5)
    took = next(readers.read(str(tmp_path / "q.parquet"), ["took"])).columns["took"]
    assert [round(one.total_seconds()) for one in took] == [round(one / 1e9) for one in times]


@pytest.mark.parametrize(
    "options,fault",
    [
        ({"text": "{title}"}, "--text={title}: "),
        ({"text": "{text"}, "--text={text: not a template"),
        ({"id": "sku"}, "--id_column=sku: "),
        ({"labels": "tags"}, "--labels_column=tags: "),
        ({"split_by": "group:brand"}, "--split_by=brand: "),
        ({"split_by": "brand"}, "--split_by=brand: expected random, text, group:COLUMN"),
        ({"labels_are": "ids"}, "--labels_are=ids: there is no label table"),
        ({"labels_source": "/nowhere.csv"}, "--labels_source=/nowhere.csv: no such file"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, options, fault):
    (tmp_path / "q.csv").write_text("id,text,labels\n1,a,x\n")
    with pytest.raises(InputError) as caught:
        read(tmp_path / "q.csv", tmp_path / "spool", **options)
    assert fault in str(caught.value)


def test_an_unknown_label_is_named(tmp_path):
    (tmp_path / "q.csv").write_text("text,labels\na,u\nb,w|u\n")
    (tmp_path / "names.csv").write_text("id,text\nu,U\nv,V\n")
    with pytest.raises(InputError, match=r"line 3: label 'w' in 'labels' is not among the ids"):
        read(tmp_path / "q.csv", tmp_path / "spool", labels_source=str(tmp_path / "names.csv"))
    (tmp_path / "q.jsonl").write_text('{"text": "a", "target_ind": [1, 2]}\n')
    with pytest.raises(InputError, match=r"line 1: label '2' in 'target_ind', expected a row"):
        read(tmp_path / "q.jsonl", tmp_path / "more", labels_source=str(tmp_path / "names.csv"))


def test_columns_may_be_told_to_be_none(tmp_path):
    (tmp_path / "q.csv").write_text("id,text,labels,split\n1,a,x,left\n1,b,x,right\n")
    raw = read(tmp_path / "q.csv", tmp_path / "spool", id="none", split="none")
    assert raw.train.items.ids is None and raw.train.items.count == 2


def test_a_column_without_a_name_is_none_of_ours(tmp_path):
    (tmp_path / "q.csv").write_text(",text,labels,id\n0,a,x,k\n1,b,y,l\n")  # As pandas writes.
    raw = read(tmp_path / "q.csv", tmp_path / "spool")
    assert texts_of(raw.train.items) == ["a", "b"] and list(raw.train.items.ids) == ["k", "l"]
    assert labels_of(raw, "train") == [{"x"}, {"y"}]


@pytest.mark.parametrize("other", ["train.csv.gz", "train.jsonl", "train.PARQUET"])
def test_a_table_that_is_there_twice_is_refused(tmp_path, other):
    (tmp_path / "d").mkdir()
    for name in ("train.csv", "test.csv", other):
        (tmp_path / "d" / name).write_text("text,labels\na,x\n")
    with pytest.raises(InputError, match=r"train.*and train.*have one name but for its ending"):
        read(tmp_path / "d", tmp_path / "spool")


def test_endings_may_be_written_large(tmp_path):
    random_tables.write_rows([{"text": "a", "labels": "x"}], tmp_path / "q.csv.gz")
    (tmp_path / "q.csv.gz").rename(tmp_path / "Q.CSV.GZ")
    assert texts_of(read(tmp_path / "Q.CSV.GZ", tmp_path / "spool").train.items) == ["a"]


def test_shards_of_one_name_are_told_apart(tmp_path):
    for part in ("train", "test"):
        (tmp_path / "d" / part).mkdir(parents=True)
        random_tables.write_rows([{"text": part, "labels": "x"}], tmp_path / "d" / part / "0.csv")
    first = read(tmp_path / "d", tmp_path / "a").fingerprint
    assert set(first["files"]) == {os.path.join("train", "0.csv"), os.path.join("test", "0.csv")}
    for part in ("train", "test"):
        os.utime(tmp_path / "d" / part / "0.csv", ns=(1, 1))
        assert read(tmp_path / "d", tmp_path / part).fingerprint != first


def test_only_what_is_divided_needs_the_column_that_it_is_divided_by(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.csv").write_text("text,labels,day\na,x,2\nb,x,3\nc,x,1\n")
    (tmp_path / "d" / "test.csv").write_text("text,labels\nd,x\n")
    raw = read(tmp_path / "d", tmp_path / "spool", split_by="time:day")
    settled, _ = preprocessing.settle(raw, preprocessing.Settings(split_by="time:day", valid=0.3))
    assert texts_of(settled.valid.items) == ["b"] and texts_of(settled.test.items) == ["d"]


def test_lines_between_quotes_and_marks_of_order(tmp_path):
    data = '\ufefftext,labels\r\n"two\nlines",x\r\n\r\nb,x,y\r\n'
    (tmp_path / "q.csv").write_bytes(data.encode())
    with pytest.raises(InputError, match=r"q.csv, line 5: 3 fields, expected 2"):
        read(tmp_path / "q.csv", tmp_path / "spool")
    (tmp_path / "q.csv").write_bytes(data.replace(",x,y", ",x").encode())
    raw = read(tmp_path / "q.csv", tmp_path / "again")
    assert texts_of(raw.train.items) == ["two\nlines", "b"]


def test_the_readme_shows_a_file_that_is_read(tmp_path):
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").split("```\n")
    table = next(block for block in blocks if block.startswith("id,title,brand,tags,image"))
    command = next(
        line for block in blocks for line in block.split("\n") if line.endswith("--dry_run")
    )
    (tmp_path / "shop.csv").write_text(table, encoding="utf-8")
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "vixml_jax.prepare"]
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "1 | Blue cotton shirt by Acme | blue; cotton; shirts" in done.stdout
    assert "2 | Red shirt, large by Acme | red; shirts" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["shop.csv"]
