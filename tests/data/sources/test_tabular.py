"""Tests of tabular data: roles of columns and every file format."""

import datetime
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tests.data.sources import compare_formats, random_tables
from tests.data.sources.tables import labels_of, prepare, read, texts_of
from vixml_jax.data import preprocessing, store, summary
from vixml_jax.data.sources import readers
from vixml_jax.data.sources.delimited import USUAL
from vixml_jax.errors import InputError
from vixml_jax.runtime import console, progress

ROOT = pathlib.Path(__file__).parents[3]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", random_tables.KINDS)
def test_every_file_format_yields_the_same_prepared_data(tmp_path, kind, shards):
    held = random_tables.draw(abs(hash((kind, shards))) % 1000)
    random_tables.write_xml(held, tmp_path / "xml")
    random_tables.write_tables(held, tmp_path / "tables", kind, shards=shards)
    from_xml, from_tables = tmp_path / "a" / "one", tmp_path / "b" / "other"
    (tmp_path / "b").mkdir()
    content_hash = prepare(tmp_path / "xml", from_xml).content_hash
    dialect = random_tables.DIALECTS.get(kind, USUAL)
    tables = prepare(tmp_path / "tables", from_tables, dialect=dialect)
    assert tables.content_hash == content_hash
    names = sorted(path.name for path in from_xml.glob("*.npy"))
    assert names == sorted(path.name for path in from_tables.glob("*.npy"))
    for name in [*names, store.TOKENIZER]:
        assert (from_xml / name).read_bytes() == (from_tables / name).read_bytes()


def test_compare_formats_lists_the_files_that_differ(tmp_path):
    random_tables.write_xml(random_tables.draw(4), tmp_path / "set")
    (tmp_path / "to").mkdir()
    results = list(
        compare_formats.compare(tmp_path / "set", tmp_path / "to", ["csv.gz", "parquet"])
    )
    assert [(kind, names) for kind, _, names in results] == [
        ("repository", []), ("csv.gz", []), ("parquet", []),
    ]  # fmt: skip
    other = tmp_path / "to" / "csv.gz.prepared"
    (other / "train_tokens.npy").write_bytes(b"")
    (other / "test_ids.npy").unlink()
    names = compare_formats.differing(tmp_path / "to" / "repository.prepared", other)
    assert names == ["test_ids.npy", "train_tokens.npy"]


def test_json_files_of_the_xml_repository(tmp_path):
    held = random_tables.draw(3)
    for name, titles_only in (("LF-Items", False), ("LF-ItemsTitles", True)):
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
        raw = read(directory, tmp_path / f"spool{titles_only}")
        parts = {"train": raw.train.items, "test": raw.test.items, "labels": raw.labels}
        for part, items in parts.items():
            assert texts_of(items) == [
                title if titles_only else f"{title} about {row}"
                for row, title in enumerate(held[part]["text"])
            ]
        np.testing.assert_array_equal(raw.test.filter, [[0, 2], [3, 1]])
        assert raw.train.filter is None and raw.train.weights is None
        rows = np.split(raw.train.relevance.indices, raw.train.relevance.indptr[1:-1])
        assert [row.tolist() for row in rows] == held["train"]["labels"]
        assert raw.train.items.name(3) == "trn3"
        raw = read(directory, tmp_path / "content", text="{content}")
        assert texts_of(raw.labels)[:2] == texts_of(raw.test.items)[:2] == ["about 0", "about 1"]


def test_labels_without_a_table_are_sorted(tmp_path):
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
    assert raw.warnings == (
        "train: labels listed more than once for a query, of which each counts once: 1",
    )
    assert raw.summary == (
        f"queries: {tmp_path / 'shop.csv'}\n"
        "  id        'sku' (inferred)\n"
        "  text      '{title} by {brand}'\n"
        "  labels    'tags' (inferred)",
    )
    assert raw.notes == ("3 distinct labels of the queries; separated by '|' (in 1 of 2 rows)",)


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
def test_label_separators(tmp_path, values, expected, options):
    rows = [{"id": str(n), "text": "x", "labels": value} for n, value in enumerate(values)]
    random_tables.write_rows(rows, tmp_path / "q.csv")
    raw = read(tmp_path / "q.csv", tmp_path / "spool", **options)
    assert labels_of(raw, "train") == expected


@pytest.mark.parametrize(
    "labels,references,labels_are,expected",
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
def test_naming_of_labels_is_inferred(tmp_path, labels, references, labels_are, expected):
    rows = [
        {"id": str(n), "text": "x", "labels": reference} for n, reference in enumerate(references)
    ]
    random_tables.write_rows(rows, tmp_path / "q.jsonl")
    table = [{"label_id": label_id, "label": text} for label_id, text in labels]
    random_tables.write_rows(table, tmp_path / "names.csv")
    options = {"labels_are": "rows"} if labels_are == "rows" else {}
    options["labels_source"] = str(tmp_path / "names.csv")
    raw = read(tmp_path / "q.jsonl", tmp_path / "spool", **options)
    assert raw.train.relevance.toarray().tolist() == expected
    assert f"named by {labels_are}" in raw.notes[-1]
    assert [raw.labels.name(row) for row in range(2)] == [label_id for label_id, _ in labels]


def test_weights_of_labels(tmp_path):
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
def test_split_column(tmp_path, column):
    splits = ["train", "Test", "valid", "TRAINING", "val", "dev", "tst", "train"]
    rows = [{"text": f"t{n}", "labels": f"l{n % 2}", column: s} for n, s in enumerate(splits)]
    random_tables.write_rows(rows, tmp_path / "q.csv")
    raw = read(tmp_path / "q.csv", tmp_path / "spool")
    assert texts_of(raw.train.items) == ["t0", "t3", "t7"]
    assert texts_of(raw.valid.items) == ["t2", "t4", "t5"]
    assert texts_of(raw.test.items) == ["t1", "t6"]
    assert labels_of(raw, "valid") == [{"l0"}, {"l0"}, {"l1"}]


def test_split_by_group_and_by_time(tmp_path):
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
        divided, _ = preprocessing.split_and_filter(
            raw, preprocessing.Settings(split_by=split_by, test=0.3, valid=0.1)
        )
        column = split_by.partition(":")[2]
        values = {
            split: [rows[int(text[1:])][column] for text in texts_of(queries.items)]
            for split, queries in divided.splits.items()
        }
        assert sum(map(len, values.values())) == 200
        if split_by == "group:brand":
            train, valid, test = map(set, values.values())
            assert not train & test and not train & valid and not valid & test
        else:
            assert max(values["train"]) < min(values["valid"])
            assert max(values["valid"]) < min(values["test"])
        assert 60 <= len(values["test"]) <= 85


def test_one_or_several_embeddings_per_item(tmp_path):
    rows = [
        {"text": "a", "labels": "x", "embedding": [[1, 2], [3, 4]]},
        {"text": "b", "labels": "x", "embedding": None},
        {"text": "c", "labels": "x", "embedding": [5, 6.5]},
        {"text": "d", "labels": "x", "embedding": []},
    ]
    for kind in ("jsonl", "csv"):
        written = rows
        if kind == "csv":
            written = [{**row, "embedding": json.dumps(row["embedding"])} for row in rows]
            written[1]["embedding"], written[2]["embedding"] = "", "5 6.5"
        random_tables.write_rows(written, tmp_path / f"q.{kind}")
        raw = read(tmp_path / f"q.{kind}", tmp_path / kind)
        images = raw.train.items.images
        assert images.offsets(np.arange(4)).tolist() == [0, 2, 2, 3, 3]
        vectors = np.concatenate(list(images.read(np.arange(4))))
        assert vectors.dtype == np.float16 and vectors.tolist() == [[1, 2], [3, 4], [5, 6.5]]
        selected = raw.train.select(np.array([2, 3])).items.images
        assert np.concatenate(list(selected.read(np.arange(2)))).tolist() == [[5, 6.5]]
        assert selected.offsets(np.arange(2)).tolist() == [0, 1, 1]


def test_filter_pairs_by_ids(tmp_path):
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
    with pytest.raises(InputError, match=r"filter_labels_test.txt, line 2: duplicate pair 'q1"):
        read(directory, tmp_path / "duplicate")
    (directory / "filter_labels_test.txt").rename(directory / "filter_labels_valid.txt")
    with pytest.raises(InputError, match=r"filter_labels_valid.txt: the source has no valid split"):
        read(directory, tmp_path / "absent")


def test_directories_of_shards(tmp_path):
    rows = [{"id": str(n), "text": f"t{n}", "labels": ["u"]} for n in range(9)]
    for part, numbers in (("train", range(0, 5)), ("test", range(5, 9))):
        (tmp_path / "d" / part).mkdir(parents=True)
        for n in numbers:
            random_tables.write_rows([rows[n]], tmp_path / "d" / part / f"part-{n}.jsonl.gz")
    raw = read(tmp_path / "d", tmp_path / "spool")
    assert texts_of(raw.train.items) == [f"t{n}" for n in range(5)]
    assert texts_of(raw.test.items) == [f"t{n}" for n in range(5, 9)]


def test_preview_shows_rows_and_counts(tmp_path):
    held = random_tables.draw(1)
    random_tables.write_tables(held, tmp_path / "d", "csv")
    raw, notes = preprocessing.split_and_filter(
        read(tmp_path / "d", tmp_path / "s"), preprocessing.Settings()
    )
    lines = summary.preview(raw, notes).split("\n")
    for split in ("train", "test"):
        texts = held[split]["text"]
        if split == "train":
            texts = [t for t, row in zip(texts, held[split]["labels"], strict=True) if row]
        num_labels = sum(map(len, held[split]["labels"]))
        assert any(line.split()[:3] == [split, f"{len(texts)}", f"{num_labels}"] for line in lines)
        start = lines.index(f"First rows of {split}:")
        assert lines[start + 1].split() == ["id", "text", "labels"]
        for line, text in zip(lines[start + 2 :], texts[:10], strict=False):
            assert line.startswith("  ") and f"  {' '.join(text.split())[:20].strip()}" in line


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_that_are_read_are_progress(tmp_path, monkeypatch, capsys, kind):
    held = random_tables.draw(1)
    random_tables.write_tables(held, tmp_path / "d", kind)
    monkeypatch.setattr(readers, "_CHUNK_ROWS", 2)
    monkeypatch.setattr(console, "_level", console.Level.NORMAL)
    monkeypatch.setattr(progress, "_FIRST_S", 0.0)
    monkeypatch.setattr(progress, "_EVERY_S", 0.0)
    read(tmp_path / "d", tmp_path / "s")
    said = re.findall(r"rows of (\S+): ([\d,]+), [\d,]+ per second", capsys.readouterr().out)
    for split in ("train", "test"):
        counts = [int(n) for name, n in said if name == f"{split}.{kind}"]
        assert max(counts) == len(held[split]["text"])


def test_preview_by_hand(tmp_path):
    (tmp_path / "shop.csv").write_text(
        "id,title,tags,price\n10,Shirt,red|blue,1\n9,A very long sock,a|b|c|d|e|f|g|h,2\n8,Hat,,3\n"
    )
    raw = read(tmp_path / "shop.csv", tmp_path / "spool")
    raw, notes = preprocessing.split_and_filter(raw, preprocessing.Settings(test=0.34, seed=1))
    assert summary.preview(raw, notes).split("\n") == [
        f"queries: {tmp_path / 'shop.csv'}",
        "  id        'id' (inferred)",
        "  text      '{title}' (inferred)",
        "  labels    'tags' (inferred)",
        "  unused    'price'",
        "test: 34% of the queries held out, at random",
        "10 distinct labels of the queries; separated by '|' (in 2 of 2 rows)",
        "",
        "       queries  labels  per query  images",
        "train        1       8       8.00       0",
        "test         1       2       2.00       0",
        "10 labels, 2 of them without a training query",
        "3 queries read: 1 train, 1 test, 1 left out",
        "train: dropped 1 query without labels",
        "",
        "First rows of train:",
        "  id  text              labels",
        "  9   A very long sock  a; b; c; d; e; f; 2 more",
        "",
        "First rows of test:",
        "  id  text   labels",
        "  10  Shirt  blue; red",
        "",
    ]


NANOSECOND = 1_700_000_000_123_456_789


def test_parquet_times_in_nanoseconds_and_unused_columns(tmp_path):
    times = [NANOSECOND + 10**9 * second for second in (3, 1, 2, 0)]
    columns = {
        "text": list("abcd"),
        "labels": list("xxxx"),
        "when": pyarrow.array(times, pyarrow.timestamp("ns")),
        "took": pyarrow.array(times, pyarrow.duration("ns")),
        "far": pyarrow.array([2**62] * 4, pyarrow.timestamp("us")),  # Not readable, and not used.
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "q.parquet")
    raw = read(tmp_path / "q.parquet", tmp_path / "spool", split_by="time:when")
    settings = preprocessing.Settings(split_by="time:when", test=0.5)
    divided, _ = preprocessing.split_and_filter(raw, settings)
    assert texts_of(divided.test.items) == ["a", "c"]
    np.testing.assert_allclose(raw.train.key, np.array(times) / 1e9, rtol=0, atol=1e-5)
    took = next(readers.read(str(tmp_path / "q.parquet"), ["took"])).columns["took"]
    assert [round(duration.total_seconds()) for duration in took] == [
        round(time / 1e9) for time in times
    ]


def test_columns_can_be_set_to_none(tmp_path):
    (tmp_path / "q.csv").write_text("id,text,labels,split\n1,a,x,left\n1,b,x,right\n")
    raw = read(tmp_path / "q.csv", tmp_path / "spool", id="none", split="none")
    assert raw.train.items.ids is None and raw.train.items.count == 2


def test_column_without_a_name_is_not_used(tmp_path):
    # pandas writes the index as a column without a name.
    (tmp_path / "q.csv").write_text(",text,labels,id\n0,a,x,k\n1,b,y,l\n")
    raw = read(tmp_path / "q.csv", tmp_path / "spool")
    assert texts_of(raw.train.items) == ["a", "b"] and list(raw.train.items.ids) == ["k", "l"]
    assert labels_of(raw, "train") == [{"x"}, {"y"}]


def test_extensions_in_upper_case(tmp_path):
    random_tables.write_rows([{"text": "a", "labels": "x"}], tmp_path / "q.csv.gz")
    (tmp_path / "q.csv.gz").rename(tmp_path / "Q.CSV.GZ")
    assert texts_of(read(tmp_path / "Q.CSV.GZ", tmp_path / "spool").train.items) == ["a"]


def test_fingerprint_distinguishes_shards_with_the_same_name(tmp_path):
    for part in ("train", "test"):
        (tmp_path / "d" / part).mkdir(parents=True)
        random_tables.write_rows([{"text": part, "labels": "x"}], tmp_path / "d" / part / "0.csv")
    first = read(tmp_path / "d", tmp_path / "a").fingerprint
    assert set(first["files"]) == {os.path.join("train", "0.csv"), os.path.join("test", "0.csv")}
    for part in ("train", "test"):
        os.utime(tmp_path / "d" / part / "0.csv", ns=(1, 1))
        assert read(tmp_path / "d", tmp_path / part).fingerprint != first


def test_only_the_training_table_needs_the_column_to_split_by(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.csv").write_text("text,labels,day\na,x,2\nb,x,3\nc,x,1\n")
    (tmp_path / "d" / "test.csv").write_text("text,labels\nd,x\n")
    raw = read(tmp_path / "d", tmp_path / "spool", split_by="time:day")
    divided, _ = preprocessing.split_and_filter(
        raw, preprocessing.Settings(split_by="time:day", valid=0.3)
    )
    assert texts_of(divided.valid.items) == ["b"] and texts_of(divided.test.items) == ["d"]


def test_csv_with_quoted_newlines_and_a_byte_order_mark(tmp_path):
    data = '\ufefftext,labels\r\n"two\nlines",x\r\n\r\nb,x,y\r\n'
    (tmp_path / "q.csv").write_bytes(data.encode())
    with pytest.raises(InputError, match=r"q.csv, line 5: 3 fields, expected 2"):
        read(tmp_path / "q.csv", tmp_path / "spool")
    (tmp_path / "q.csv").write_bytes(data.replace(",x,y", ",x").encode())
    raw = read(tmp_path / "q.csv", tmp_path / "again")
    assert texts_of(raw.train.items) == ["two\nlines", "b"]


def test_example_of_the_user_guide(tmp_path):
    blocks = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("```")
    table = next(block for block in blocks if block.startswith("text\nid,title,brand,tags,image"))
    output = next(block for block in blocks if "\nqueries: shop.csv" in block)
    command = next(
        line for block in blocks for line in block.split("\n") if line.endswith("--dry_run")
    )
    (tmp_path / "shop.csv").write_text(table.removeprefix("text\n"), encoding="utf-8")
    words = shlex.split(command)
    assert words[:2] == ["vixml_jax", "prepare"]
    done = subprocess.run(
        [sys.executable, "-m", "vixml_jax.prepare", *words[2:]],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    start, end = output.removeprefix("text\n").split("...\n")
    assert done.stdout.startswith(start) and done.stdout.endswith(end)
    rows = [" ".join(line.split()) for line in done.stdout.split("\n")]
    assert "1 Blue cotton shirt by Acme blue; cotton; shirts" in rows
    assert "2 Red shirt, large by Acme red; shirts" in rows
    assert sorted(os.listdir(tmp_path)) == ["shop.csv"]
