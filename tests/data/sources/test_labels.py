"""Labels of tables: separators from all rows, lists written as text, numbers as names."""

import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tests.data.sources import random_tables
from tests.data.sources.tables import labels_of, read, texts_of
from vixml_jax.data import preprocessing, summary
from vixml_jax.data.sources.delimited import USUAL
from vixml_jax.errors import InputError

DIALECTS = random_tables.DIALECTS
KINDS = ("csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.zst")


def write(cells, path, **columns):
    """Writes a table with a text and a cell of labels per row."""
    rows = [
        {"text": f"text {n}", "labels": cell}
        | {name: values[n] for name, values in columns.items()}
        for n, cell in enumerate(cells)
    ]
    random_tables.write_rows(rows, path)
    return path


@pytest.mark.parametrize(
    "kind,num_single",
    [*((kind, 1200) for kind in KINDS), ("csv", 8192), ("csv", 9000), ("jsonl", 9000)],
)
def test_a_separator_that_only_the_last_rows_have_is_found(tmp_path, kind, num_single):
    cells = [f"tag {n % 7}" for n in range(num_single)] + ["tag 0|tag 5", "tag 6|tag 1|tag 2"]
    path = write(cells, tmp_path / f"q.{kind}")
    raw = read(path, tmp_path / "spool", dialect=DIALECTS.get(kind, USUAL))
    assert texts_of(raw.labels) == [f"tag {n}" for n in range(7)]
    assert labels_of(raw, "train")[-2:] == [{"tag 0", "tag 5"}, {"tag 6", "tag 1", "tag 2"}]
    assert f"separated by '|' (in 2 of {num_single + 2:,} rows)" in raw.notes[0]


def test_a_separator_that_only_the_last_shard_has_is_found(tmp_path):
    for shard, cells in enumerate((["a", "b"], ["b", "a"], ["a;b", "b"])):
        (tmp_path / "d").mkdir(exist_ok=True)
        write(cells, tmp_path / "d" / f"train-{shard}.csv")
    raw = read(tmp_path / "d", tmp_path / "spool")
    assert texts_of(raw.labels) == ["a", "b"] and raw.train.relevance.nnz == 7


@pytest.mark.parametrize("odd", ["R&amp;B, pop", "R&#38;B, pop", "soul; funk, pop"])
def test_one_semicolon_is_not_the_separator_of_labels_with_commas(tmp_path, odd):
    cells = [odd, *["rock, jazz", "jazz, pop", "rock, pop", "rock"] * 12]
    raw = read(write(cells, tmp_path / "q.csv"), tmp_path / "spool")
    assert texts_of(raw.labels) == sorted([odd.partition(",")[0], "jazz", "pop", "rock"])
    assert "separated by ','" in raw.notes[0] and "(in 37 of 49 rows)" in raw.notes[0]


def test_html_entities_are_not_divided_at_their_semicolon(tmp_path):
    cells = ["R&amp;B;pop", "pop;AT&T;rock", "&lt;3;pop"]
    raw = read(write(cells, tmp_path / "q.csv"), tmp_path / "spool")
    assert labels_of(raw, "train") == [
        {"R&amp;B", "pop"},
        {"pop", "AT&T", "rock"},
        {"&lt;3", "pop"},
    ]


def test_a_comma_in_one_label_of_many_does_not_divide_it(tmp_path):
    cells = ["shoes", "hats", "bags"] * 20 + ["Dolce, Gabbana"]
    raw = read(write(cells, tmp_path / "q.csv"), tmp_path / "spool")
    assert texts_of(raw.labels) == ["Dolce, Gabbana", "bags", "hats", "shoes"]
    assert "labels have ',' in 1 row, which stay part of the labels" in raw.warnings[0]


def test_two_separators_with_equal_right_are_refused(tmp_path):
    cells = ["shoes, men", "hats, men", "shoes, women", "hats, women"] * 30
    path = write([*cells, "shoes, men|hats, men"], tmp_path / "q.csv")
    with pytest.raises(
        InputError, match=r"121 rows have ',' in their labels and 1 have '\|'; .*sep"
    ):
        read(path, tmp_path / "spool")
    for separator, number in ((",", 5), ("|", 4)):
        raw = read(path, tmp_path / f"spool{number}", label_separator=separator)
        assert raw.labels.count == number


@pytest.mark.parametrize("separator", ["none", "|"])
def test_an_explicit_separator_is_all_that_divides(tmp_path, separator):
    cells = ["nonempty set", "[Deluxe Edition]|x", "a, b; c", '["j", "k"]', "[1]"]
    raw = read(write(cells, tmp_path / "q.csv"), tmp_path / "spool", label_separator=separator)
    expected = [{cell} if separator == "none" else set(cell.split("|")) for cell in cells]
    assert labels_of(raw, "train") == expected
    assert "2 rows with labels that look like lists, but were read as text" in raw.warnings[0]
    assert 'line 5: \'["j", "k"]\'' in raw.warnings[0]


def test_an_explicit_separator_that_no_row_has_is_told(tmp_path):
    path = write(["a,b", "b,c"], tmp_path / "q.csv")
    raw = read(path, tmp_path / "spool", label_separator=";")
    assert raw.labels.count == 2 and raw.warnings == ("--label_separator=;: no row has it",)


@pytest.mark.parametrize("text", ["[Deluxe Edition]", "[Deluxe Edition]|x", "[red, blue]", "{a,b}"])
@pytest.mark.parametrize("row", [0, 3])
def test_brackets_that_are_no_list_are_refused_with_the_remedy(tmp_path, text, row):
    cells = ["a|b", "b|c", "c", "a"]
    cells.insert(row, text)
    path = write(cells, tmp_path / "q.csv")
    with pytest.raises(
        InputError, match=rf"line {row + 2}: .* pass --label_separator=none"
    ) as caught:
        read(path, tmp_path / "spool")
    assert "\n" not in str(caught.value)
    assert {text} in labels_of(read(path, tmp_path / "s", label_separator="none"), "train")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("write_list", [str, json.dumps, lambda x: str(np.array(x)), tuple.__str__])
def test_lists_written_as_text(tmp_path, kind, write_list):
    held = [("light red", "it's"), ("b",), ("light red", "b, c", "d|e")]
    cells = [write_list(labels if write_list is tuple.__str__ else list(labels)) for labels in held]
    path = write(cells, tmp_path / f"q.{kind}")
    raw = read(path, tmp_path / "spool", dialect=DIALECTS.get(kind, USUAL))
    assert labels_of(raw, "train") == [set(labels) for labels in held]


def test_an_array_that_numpy_shortened_is_refused(tmp_path):
    cells = [str(np.array([f"tag {n}" for n in range(1500)])), "['a']"]
    write(cells, tmp_path / "q.csv")
    with pytest.raises(InputError, match=r"q.csv, line 2: 'labels' .*shortened with '...'"):
        read(tmp_path / "q.csv", tmp_path / "spool")


def test_embeddings_as_numpy_writes_them(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(3, 2, 40)).astype(np.float16)
    cells = [str(vectors[0, 0]), str(vectors[1]), vectors[2, 0].tolist()]
    write(["x"] * 3, tmp_path / "q.csv", embedding=[*cells[:2], json.dumps(cells[2])])
    images = read(tmp_path / "q.csv", tmp_path / "spool").train.items.images
    found = np.concatenate(list(images.read(np.arange(3))))
    np.testing.assert_allclose(found, [*vectors[0, :1], *vectors[1], *vectors[2, :1]], rtol=2e-3)
    write(["x"], tmp_path / "r.csv", embedding=[str(np.zeros(2000))])
    with pytest.raises(
        InputError, match=r"line 2: 'embedding' is not an embedding .the list was sh"
    ):
        read(tmp_path / "r.csv", tmp_path / "spool2")


@pytest.mark.parametrize("rows_before", [1, 8400])
def test_columns_that_only_late_rows_of_jsonl_have_are_read(tmp_path, rows_before):
    rows = [{"text": f"t{n}", "labels": ["a", "b"][: 1 + n % 2]} for n in range(rows_before)]
    rows += [{"text": "z", "labels": ["a"], "image_embedding": [n, 1.0]} for n in range(6)]
    random_tables.write_rows(rows, tmp_path / "q.jsonl")
    images = read(tmp_path / "q.jsonl", tmp_path / "spool").train.items.images
    offsets = images.offsets(np.arange(len(rows)))
    assert offsets[-1] == 6 and offsets[rows_before] == 0


def test_a_column_that_only_one_shard_has(tmp_path):
    for kind in ("jsonl", "csv"):
        directory = tmp_path / kind
        directory.mkdir()
        write(["a", "b"], directory / f"train-0.{kind}")
        write(["a", "b"], directory / f"train-1.{kind}", embedding=["1 2", "3 4"])
    assert read(tmp_path / "jsonl", tmp_path / "s").train.items.images.width == 2
    with pytest.raises(InputError, match=r"train-0.csv: no column 'embedding'"):
        read(tmp_path / "csv", tmp_path / "s2")
    raw = read(tmp_path / "csv", tmp_path / "s3", embedding="none")
    assert raw.train.items.count == 4


def big_numbers(kind, path):
    """A table whose labels are doubles from 2^53 on."""
    numbers = [float(2**53 + 2 * n) for n in range(4)]
    if kind == "parquet":
        table = pyarrow.table({"text": list("abcd"), "labels": numbers})
        parquet.write_table(table, path)
    elif kind == "parquet of lists":
        table = pyarrow.table({"text": list("abcd"), "labels": [[number] for number in numbers]})
        parquet.write_table(table, path)
    elif kind == "parquet of float32":
        labels = pyarrow.array(
            [[float(2**24 + n)] for n in range(4)], pyarrow.list_(pyarrow.float32())
        )
        parquet.write_table(pyarrow.table({"text": list("abcd"), "labels": labels}), path)
    elif kind == "parquet of single float32":
        labels = pyarrow.array([float(2**24 + n) for n in range(4)], pyarrow.float32())
        parquet.write_table(pyarrow.table({"text": list("abcd"), "labels": labels}), path)
    elif kind == "jsonl":
        write([[number] for number in numbers], path)
    else:
        write(list(map(str, numbers)), path)  # As pandas writes them.


@pytest.mark.parametrize(
    "kind",
    [
        "csv",
        "jsonl",
        "parquet",
        "parquet of lists",
        "parquet of float32",
        "parquet of single float32",
    ],
)
def test_floats_that_merge_labels_are_refused(tmp_path, kind):
    path = tmp_path / f"q.{kind.split()[0]}"
    big_numbers(kind, path)
    with pytest.raises(InputError, match=r"(line|row) \d: 'labels' is .* equal; write"):
        read(path, tmp_path / "spool")


@pytest.mark.parametrize("role", ["id", "labels"])
@pytest.mark.parametrize("word", ["1.23457E+11", "9e+15", "1.2345678901234567e+16"])
def test_rounded_numbers_of_spreadsheets_are_refused_as_names(tmp_path, role, word):
    columns = {"id": ["1", "2"]} | ({"id": ["1", word]} if role == "id" else {})
    write(["a", word if role == "labels" else "b"], tmp_path / "q.csv", **columns)
    with pytest.raises(InputError, match=rf"line 3: '{role}' is .*, a rounded number"):
        read(tmp_path / "q.csv", tmp_path / "spool")


@pytest.mark.parametrize("integer", [0, 7, 2**53 - 1, 2**53 + 1, 2**63 - 1, -3])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_integers_are_exact(tmp_path, integer, kind):
    write([integer, integer - 1], tmp_path / f"q.{kind}", id=[integer, integer - 1])
    raw = read(tmp_path / f"q.{kind}", tmp_path / "spool")
    assert set(raw.labels.ids) == {str(integer), str(integer - 1)}
    assert list(raw.train.items.ids) == [str(integer), str(integer - 1)]


@pytest.mark.parametrize(
    "ids", [["0", "1", "2"], ["0.0", "1.0", "2.0"], [0, 1, 2], [0.0, 1.0, 2.0]]
)
@pytest.mark.parametrize("labels", [["0.0", "2.0"], ["0", "2"], [0, 2], [0.0, 2.0]])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_labels_with_and_without_decimals_are_the_same(tmp_path, ids, labels, kind):
    write(labels, tmp_path / f"q.{kind}")
    table = [{"id": name, "text": f"label {n}"} for n, name in enumerate(ids)]
    random_tables.write_rows(table, tmp_path / f"names.{kind}")
    source = str(tmp_path / f"names.{kind}")
    for labels_are in ("auto", "ids", "rows"):
        raw = read(
            tmp_path / f"q.{kind}",
            tmp_path / labels_are,
            labels_source=source,
            labels_are=labels_are,
        )
        assert raw.train.relevance.indices.tolist() == [0, 2]


def test_labels_that_differ_in_decimals_only_are_told(tmp_path):
    (tmp_path / "d").mkdir()
    write(["0.0", "1.0", ""], tmp_path / "d" / "train.csv")  # As pandas writes 0, 1 and nothing.
    write(["0", "1"], tmp_path / "d" / "test.csv")
    warnings = read(tmp_path / "d", tmp_path / "spool").warnings
    assert any("count as different: 2 ('0' and '0.0', '1' and '1.0')" in line for line in warnings)


def test_words_for_a_missing_value_are_told(tmp_path):
    raw = read(write(["a", "nan", "b", "NULL"], tmp_path / "q.csv"), tmp_path / "spool")
    assert any("'nan', 'NULL' among the labels looks like a missing" in w for w in raw.warnings)


def test_weights_of_zero_and_equal_texts_of_labels_are_told(tmp_path):
    rows = [{"text": "a", "labels": ["x", "y"], "label_weights": [0, 1]}] * 3
    random_tables.write_rows(rows, tmp_path / "q.jsonl")
    names = [{"text": "x"}, {"text": "y"}, {"text": "x"}]
    random_tables.write_rows(names, tmp_path / "names.jsonl")
    source = str(tmp_path / "names.jsonl")
    raw = read(tmp_path / "q.jsonl", tmp_path / "spool", labels_source=source)
    assert any("labels of weight 0, which are left out: 3" in line for line in raw.warnings)
    assert any("labels: 1 have the text of an earlier label" in line for line in raw.warnings)


@pytest.mark.parametrize("kind", KINDS)
def test_all_duplicate_ids_are_told_at_once(tmp_path, kind):
    ids = ["u", "v", "w", "u", "x", "v", "u"]
    path = write(["a"] * 7, tmp_path / f"q.{kind}", id=ids)
    first = {"parquet": (4, 1), "jsonl": (4, 1), "jsonl.zst": (4, 1)}.get(kind, (5, 2))
    message = (
        rf"{path}, line {first[0]}: id 'u' is already used in {path}, line {first[1]}; 3 rows in "
        r"all have an id of an earlier row: 'u', 'v'; .* pass --id_column=none"
    )
    with pytest.raises(InputError, match=message):
        read(path, tmp_path / "spool")
    assert read(path, tmp_path / "again", id="none").train.items.count == 7


def test_dates_and_numbers_in_one_column_to_split_by_are_refused(tmp_path):
    path = write(["a"] * 3, tmp_path / "q.csv", when=["2024-01-01", "2023-05-05", "2022"])
    with pytest.raises(InputError, match=r"line 4: '2022' in 'when' is a number after dates"):
        read(path, tmp_path / "spool", split_by="time:when")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_queries_without_labels_are_not_held_out(tmp_path, kind):
    cells = [f"tag {n % 3}" if n % 3 else "" for n in range(90)]
    path = write(cells, tmp_path / f"q.{kind}")
    raw = read(path, tmp_path / "spool", dialect=DIALECTS.get(kind, USUAL))
    settings = preprocessing.Settings(test=0.3, valid=0.2)
    raw, notes = preprocessing.split_and_filter(raw, settings)
    counts = {split: queries.items.count for split, queries in raw.splits.items()}
    assert counts == {"train": 34, "test": 18, "valid": 8}  # 0.3 of 60, and 0.2 of the other 42.
    assert all((np.diff(q.relevance.indptr) > 0).all() for q in raw.splits.values())
    assert notes["rows_read"] == 90 and notes["train_without_labels_dropped"] == 30
    lines = summary.preview(raw, notes).split("\n")
    assert "90 queries read: 34 train, 8 valid, 18 test, 30 left out" in lines


def test_queries_without_labels_of_a_given_test_split_are_kept_and_told(tmp_path):
    (tmp_path / "d").mkdir()
    write(["a", "", "b"], tmp_path / "d" / "train.csv")
    write(["a", "", "", "b"], tmp_path / "d" / "test.csv")
    raw = read(tmp_path / "d", tmp_path / "spool")
    raw, notes = preprocessing.split_and_filter(raw, preprocessing.Settings())
    assert raw.test.items.count == 4 and notes["test_without_labels_kept"] == 2
    assert "7 queries read: 2 train, 4 test, 1 left out" in summary.preview(raw, notes)
