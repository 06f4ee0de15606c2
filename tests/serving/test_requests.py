"""Reading queries and labels from tables; an invalid row affects no other."""

import csv
import json

import numpy as np
import pytest

from vixml_jax.data.sources.columns import Columns
from vixml_jax.data.sources.delimited import Dialect
from vixml_jax.data.sources.reading import Reading
from vixml_jax.errors import InputError
from vixml_jax.serving import requests
from vixml_jax.serving.requests import Query


def read(path, reading=None, dialect=None, **names):
    options = requests.Options(Columns(**names), dialect or {}, reading)
    return list(requests.read_queries(str(path), options))


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
            form = {}
            if kind == "tsv":  # A cell has no line breaks, and quotes are characters.
                rows = [{**row, "text": row["text"].replace("\n", " ")} for row in rows]
                form = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
            writer = csv.DictWriter(file, list(rows[0]), **form)
            writer.writeheader()
            for row in rows:
                lists = {name: "|".join(row[name]) for name in ("image", "filter")}
                writer.writerow({**row, **lists})
    found = read(path)
    assert [x.error for x in found] == [""] * len(rows)
    assert [(x.id, x.images, x.listed) for x in found] == [
        (row["id"], [str(tmp_path / name) for name in row["image"]], row["filter"]) for row in rows
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


def test_a_column_may_occur_first_in_a_late_row_and_after_a_bad_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = ["{bad", *['{"text": "a"}'] * 1200, '{"text": "b", "embedding": [1.0, 2.0]}']
    path.write_text("\n".join(rows))
    bad, *rest, last = read(path)
    assert "line 1" in bad.error and len(rest) == 1200 and not any(x.error for x in rest)
    np.testing.assert_array_equal(last.embeddings, [[1.0, 2.0]])


def test_blocks_are_read_when_needed():
    read_rows = []

    def rows():
        for i in range(10):
            read_rows.append(i)
            yield Query(i, str(i), "text", (), None, [])

    blocks = ([query.line for query in block] for block in requests.in_blocks(rows(), 4))
    assert next(blocks) == [0, 1, 2, 3] and len(read_rows) == 4
    assert list(blocks) == [[4, 5, 6, 7], [8, 9]]


def test_blocks_of_long_texts_are_shorter():
    text = "x" * (requests._BLOCK_LENGTH // 2)
    rows = (Query(i, str(i), text, (), None, []) for i in range(7))
    assert [len(block) for block in requests.in_blocks(rows, 4)] == [3, 3, 1]


def test_an_unreadable_row_gets_no_id_if_the_table_has_ids(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,text\n3,one\n4,too,many\n,two\n")
    assert [(x.line, x.id, bool(x.error)) for x in read(path)] == [
        (2, "3", False), (3, None, True), (4, "4", False)
    ]  # fmt: skip


def shop_reading(**columns):
    columns = {"text": "{title} by {brand}", "id": "sku", "label_separator": ";"} | columns
    dialect = Dialect(encoding="cp1252", delimiter=";")
    return Reading(kind="csv", columns=Columns(**columns), dialect=dialect)


def test_queries_are_read_as_the_data_of_the_run(tmp_path, capsys):
    """Template, id column, encoding, delimiter and separator come from prepare; flags win."""
    path = tmp_path / "rows.csv"
    path.write_bytes("id;sku;title;brand;filter\n1;s1;Käse;Ömer;'a|b\n".encode("cp1252"))
    (found,) = read(path, shop_reading())
    assert (found.id, found.text, found.listed) == ("s1", "Käse by Ömer", ["'a|b"])
    printed = capsys.readouterr().out
    assert "text '{title} by {brand}', id 'sku', encoding cp1252, delimiter ';'" in printed
    (found,) = read(path, shop_reading(), id="id", text="{brand}: {title}")
    assert (found.id, found.text) == ("1", "Ömer: Käse")
    path.write_bytes(path.read_bytes().decode("cp1252").encode("utf-8"))
    (found,) = read(path, shop_reading(), {"encoding": "utf-8"})
    assert found.text == "Käse by Ömer"
    path.write_text(path.read_text("utf-8").replace(";", "^"), "utf-8")
    (found,) = read(path, shop_reading(), {"encoding": "utf-8", "delimiter": "^"})
    assert (found.text, found.listed) == ("Käse by Ömer", ["'a|b"])


def test_a_list_of_labels_is_separated_as_in_the_data_of_the_run(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text('title\tbrand\tfilter\nCup\tAcme\ta; b\nCup\tAcme\t["x; y", "z"]\n')
    assert [x.listed for x in read(path, shop_reading())] == [["a", "b"], ["x; y", "z"]]
    for unknown in ("", "none"):
        path.write_text("title\tbrand\tfilter\nCup\tAcme\ta|b\n")
        assert read(path, shop_reading(label_separator=unknown))[0].listed == ["a", "b"]


def test_a_file_of_another_format_has_its_own_dialect(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"title": "Käse", "brand": "Ömer"}, ensure_ascii=False) + "\n", "utf-8"
    )
    assert read(path, shop_reading())[0].text == "Käse by Ömer"


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_template_needs_all_its_columns(kind, tmp_path):
    path = tmp_path / f"rows.{kind}"
    path.write_text("title;price\nCup;3\n" if kind == "csv" else '{"title": "Cup", "price": 3}\n')
    with pytest.raises(InputError, match=r"no column 'brand', of which .*\(\{title\} by") as error:
        read(path, shop_reading())
    assert "'title', 'price'; pass --text" in str(error.value) and "\n" not in str(error.value)
    assert read(path, shop_reading(), text="title")[0].text == "Cup"


@pytest.mark.parametrize("column", ["title", "price: eur", "a!b", "x[0]"])
def test_a_single_column_may_have_another_name_in_queries(column, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    path.write_text(f"text,{column}\nother,Cup\n")
    reading = Reading(kind="csv", columns=Columns(text=f"{{{column}}}"), dialect=Dialect())
    assert read(path, reading)[0].text == "Cup"
    path.write_text("id,text\n1,Cup\n")
    assert read(path, reading)[0].text == "Cup"
    assert "text '{text}'" in capsys.readouterr().out


def test_labels_to_be_added_have_the_columns_of_the_table_of_labels(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text('id,code,title,name,examples\n1,c1,no,Scarves,"wool, red|silk"\n')
    columns = Columns(text="{title}", id="id", label_text="{name}", label_id="code")
    options = requests.Options(reading=Reading(kind="csv", columns=columns, dialect=Dialect()))
    (label,) = requests.read_labels(str(path), options)
    assert (label.id, label.text, label.listed) == ("c1", "Scarves", ["wool, red", "silk"])


def test_all_rows_are_given_or_told(tmp_path):
    """A quote that is not closed swallows no rows: each is a query or an error."""
    for kind, mark in (("tsv", "\t"), ("csv", ",")):
        path = tmp_path / f"rows.{kind}"
        titles = ["lamp", '"Best of jazz', "cup", "tv stand 42", "mug"]
        path.write_text(
            f"id{mark}title\n" + "".join(f"{i}{mark}{t}\n" for i, t in enumerate(titles))
        )
        found = read(path)
        assert [x.line for x in found] == [2, 3, 4, 5, 6]
        wrong = [] if kind == "tsv" else [3]
        assert [x.line for x in found if x.error] == wrong
        good = [x.text for x in found if not x.error]
        assert good == [t for i, t in enumerate(titles) if i + 2 not in wrong]
