"""Reading queries and labels from tables; an invalid row affects no other."""

import csv
import json

import numpy as np
import pytest

from vixml_jax.data.sources.columns import Columns
from vixml_jax.errors import InputError
from vixml_jax.serving import requests


def read(path, **names):
    return list(requests.read(str(path), Columns(**names), list_column="filter"))


def random_rows(rng, count):
    words = ["red", "blue", "ωμέγα", 'a "quoted", word', "two\nlines", ""]
    return [
        {
            "id": f"q{i}",
            "text": " ".join(rng.choice(words, rng.integers(1, 5))),
            "image": [f"{name}.png" for name in rng.integers(0, 99, rng.integers(0, 3))],
            "filter": [f"label {n}" for n in rng.integers(0, 9, rng.integers(0, 3))],
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_rows_are_read_as_they_were_written(kind, tmp_path):
    rows = random_rows(np.random.default_rng(), 60)
    path = tmp_path / f"rows.{kind}"
    with open(path, "w", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            if kind == "tsv":  # A cell of a tsv file has no line breaks.
                rows = [{**row, "text": row["text"].replace("\n", " ")} for row in rows]
            delimiter = "," if kind == "csv" else "\t"
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            for row in rows:
                lists = {name: "|".join(row[name]) for name in ("image", "filter")}
                writer.writerow({**row, **lists})
    found = read(path)
    assert [x.error for x in found] == [""] * len(rows)
    assert [(x.id, x.images, x.listed) for x in found] == [
        (row["id"], row["image"], row["filter"]) for row in rows
    ]
    assert [" ".join(x.text.split()) for x in found] == [" ".join(r["text"].split()) for r in rows]


def test_an_invalid_row_does_not_stop_the_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"text": "fine"}\n{"text": "cut of\n[1, 2]\n{"text": 7}\n{"text": {"a": 1}}\n{}\n'
        '{"text": "fine, too", "id": "x"}\n'
    )
    found = read(path)
    assert [bool(x.error) for x in found[:3]] == [False, True, True]
    assert [x.line for x in found] == [1, 2, 3, 4, 5, 6, 7]
    assert f"{path}, line 2" in found[1].error and f"{path}, line 3" in found[2].error
    assert found[4].error and "line 5" in found[4].error
    assert (found[0].id, found[0].text) == ("1", "fine")
    assert (found[6].id, found[6].text, found[6].error) == ("x", "fine, too", "")


def test_undecodable_bytes_are_an_error_of_their_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "\xff\xfe"}\n{"text": "three"}\n')
    found = read(path)
    assert [x.text for x in found] == ["one", "", "three"] and "line 2" in found[1].error


def test_columns_are_explicit_or_inferred(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("code,title,brand\n7,Lamp,Acme\n8,Cup,\n")
    found = read(path, id="code", text="{title} by {brand}")
    assert [x.id for x in found] == ["7", "8"] and found[0].text == "Lamp by Acme"
    assert [x.text for x in read(path)] == ["Lamp", "Cup"]


def test_image_embeddings(tmp_path):
    path = tmp_path / "rows.jsonl"
    vectors = np.random.default_rng().normal(size=(2, 5)).astype(np.float16)
    path.write_text(
        json.dumps({"text": "a", "embedding": vectors.tolist()})
        + "\n"
        + json.dumps({"text": "b", "embedding": vectors[0].tolist()})
        + '\n{"text": "c", "embedding": null}\n{"text": "d", "embedding": ["x"]}\n'
    )
    several, single, none, invalid = read(path)
    np.testing.assert_array_equal(several.embeddings, vectors)
    np.testing.assert_array_equal(single.embeddings, vectors[:1])
    assert none.embeddings is None and not none.error
    assert "line 4" in invalid.error


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_rows_is_refused(content, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"no rows|empty \(0 bytes\)"):
        read(path)


def test_blocks_are_read_when_needed():
    read_rows = []

    def rows():
        for i in range(10):
            read_rows.append(i)
            yield i

    blocks = requests.in_blocks(rows(), 4)
    assert list(next(blocks)) == [0, 1, 2, 3] and len(read_rows) == 4
    assert [list(block) for block in blocks] == [[4, 5, 6, 7], [8, 9]]


def test_an_unreadable_row_gets_no_id_if_the_table_has_ids(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,text\n3,one\n4,too,many\n,two\n")
    assert [(x.line, x.id, bool(x.error)) for x in read(path)] == [
        (2, "3", False), (3, None, True), (4, "4", False)
    ]  # fmt: skip
