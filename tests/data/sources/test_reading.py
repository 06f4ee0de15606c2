"""Tests of what is kept of how tables were read, and of finding tables by their names."""

import dataclasses
import json
import os

import msgspec
import numpy as np
import pytest
from absl import flags

from vixml_jax import prepare
from vixml_jax.data.sources import columns, tabular, tabular_files, xml_repository
from vixml_jax.data.sources.columns import Columns
from vixml_jax.data.sources.delimited import Dialect
from vixml_jax.data.sources.reading import Reading
from vixml_jax.errors import InputError


def reading_of(source, tmp_path, dialect=Dialect(), **names):  # noqa: B008
    spool = tmp_path / "spool"
    spool.mkdir(exist_ok=True)
    raw = tabular.read_tables(str(source), str(spool), names=Columns(**names), dialect=dialect)
    found = json.loads(json.dumps(dataclasses.asdict(raw.reading)))
    assert msgspec.convert(found, Reading) == raw.reading
    return raw.reading


def test_inferred_and_explicit_columns_are_kept(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_text("sku;title;brand;tags;image\n1;a;A;x|y;1.png\n2;b;B;y;2.png\n")
    reading = reading_of(path, tmp_path, text="{title} by {{{brand}}}")
    assert reading == Reading(
        kind="csv",
        columns=Columns(
            id="sku", text="{title} by {{{brand}}}", labels="tags", label_separator="|",
            labels_are=reading.columns.labels_are, image="image",
        ),
        dialect=Dialect(),
    )  # fmt: skip
    assert reading.describe() == (
        "text '{title} by {{{brand}}}', id 'sku', image 'image', encoding utf-8"
    )


def test_title_and_body_are_kept_as_a_template(tmp_path):
    (tmp_path / "q.jsonl").write_text(
        '{"title": "a", "description": "b", "tags": ["x"]}\n'
        '{"title": "", "description": "c", "tags": ["x"]}\n'
    )
    reading = reading_of(tmp_path / "q.jsonl", tmp_path)
    assert reading.columns.text == "{title} {description}"
    again = reading_of(tmp_path / "q.jsonl", tmp_path, text=reading.columns.text)
    assert again.columns.text == reading.columns.text


def test_later_tables_may_lack_ids_and_images(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_text("sku,title,tags,image\n1,a,x,1.png\n2,b,y,2.png\n")
    reading = reading_of(path, tmp_path, text="title")
    names = ["product_id", "title", "image"]
    assert reading.columns_for(names) == Columns(text=reading.columns.text, image="image")
    roles = columns.assign(
        "new.csv", reading.columns_for(names), Dialect(), names=names, labelled=False
    )
    assert (roles.id, roles.image) == ("product_id", "image")
    kept = reading_of(path, tmp_path, id="none", image="none")
    assert kept.columns_for(["sku", "title", "image"]) == Columns(
        id="none", text=kept.columns.text, image="none"
    )


def test_columns_of_the_label_table_are_kept(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("q,labels\na,1;2\nb,2\n")
    (tmp_path / "set" / "labels.csv").write_text("uid,wording\n1,red\n2,blue\n")
    reading = reading_of(tmp_path / "set", tmp_path, text="q", label_text="wording")
    assert (reading.columns.label_id, reading.columns.labels_are) == ("uid", "ids")
    kept = reading.columns_for(["uid", "wording"], label_table=True)
    assert (kept.id, kept.text) == ("uid", reading.columns.label_text)


def test_the_dialect_is_kept_for_files_of_the_same_kind(tmp_path):
    (tmp_path / "q.csv").write_bytes("text;labels\nÄ;x\n".encode("cp1252"))
    dialect = Dialect(encoding="cp1252", delimiter=";")
    reading = reading_of(tmp_path / "q.csv", tmp_path, dialect)
    assert reading.dialect_for("new.csv.gz") == dialect
    assert reading.dialect_for("new.jsonl") == Dialect()


def run(*words):
    values = flags.FlagValues()
    prepare.define_flags(values)
    values(["prepare", *words])
    prepare.run(values)


def test_the_command_keeps_the_reading_and_prints_the_format(tmp_path, capsys):
    lines = "".join(f"{i};Größe {i};x,{i % 2}\n" for i in range(20))
    (tmp_path / "q.csv").write_bytes(("id;title;tags\n" + lines).encode("utf-16"))
    source, out = f"--source={tmp_path / 'q.csv'}", tmp_path / "out"
    run(source, "--dry_run")
    assert "  format    encoding utf-16-le, delimiter ';'\n" in capsys.readouterr().out
    run(source, f"--out={out}", "--vocab_size=64", "--max_tokens=8")
    kept = json.loads((out / "dataset.json").read_text())["reading"]
    reading = msgspec.convert(kept, Reading)
    assert (reading.kind, reading.columns.labels) == ("csv", "tags")
    run(source, f"--out={out}", "--vocab_size=64", "--max_tokens=8")
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"^--delimiter=;;: expected one character"):
        run(source, "--dry_run", "--delimiter=;;")
    with pytest.raises(InputError, match=r"^--source=.*\\udcff.csv: the path has bytes"):
        run(f"--source={tmp_path}/\udcff.csv", "--dry_run")


def test_other_quotes_and_delimiters_by_flags(tmp_path, capsys):
    (tmp_path / "q.tsv").write_text("id^title^tags\n1^$a^b$^x\n2^c^y\n3^d^x\n")
    run(f"--source={tmp_path / 'q.tsv'}", "--dry_run", "--delimiter=^", "--quotechar=$")
    output = capsys.readouterr().out
    assert "  format    delimiter '^', quotechar '$'\n" in output and "a^b" in output


def files_of(directory, names):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text,labels\na,x\n")
    found = tabular_files.find_tables(str(directory))
    return {part: [os.path.relpath(p, directory) for p in paths] for part, paths in found.items()}


def test_shards_in_a_directory_of_another_name_belong_to_their_own_parts(tmp_path):
    names = ["data/train-0.csv", "data/train-1.csv", "data/validation-0.csv", "data/test-0.csv"]
    assert files_of(tmp_path, ["README.md", *names]) == {
        "train": names[:2], "valid": names[2:3], "test": names[3:],
    }  # fmt: skip


def test_a_part_in_a_format_that_is_not_read_is_refused(tmp_path):
    for number, name in enumerate(("test.xlsx", "valid.csv.bz2", "labels.txt", "dev.zip")):
        directory = tmp_path / str(number)
        with pytest.raises(InputError, match=f"{name} cannot be read; expected csv, tsv"):
            files_of(directory, ["train.csv", name])
        assert files_of(directory, [f"{name.partition('.')[0]}.csv"])
    kept = ["train.csv", "train.txt", "notes.txt", "tst_images.txt", "test.log"]
    assert files_of(tmp_path / "kept", kept) == {"train": ["train.csv"]}


def test_names_of_the_hub_and_of_files():
    assert tabular_files.name_of("hf:org/set") == tabular_files.name_of("a/set.csv.gz") == "set"
    assert tabular_files.identity("hf:org/set") == "hf:org/set"
    assert tabular_files.identity("a") == os.path.abspath("a")


@pytest.mark.parametrize("written, given", [
    ("utf-8-sig", "utf-8"), ("utf-16", "utf-8"), ("utf-16", "latin-1"), ("utf-16-le", "utf-16-le"),
    ("cp1252", "cp1252"),
])  # fmt: skip
def test_encodings_of_the_xml_repository(tmp_path, monkeypatch, written, given):
    monkeypatch.setattr(xml_repository, "_BLOCK", 50)
    rng = np.random.default_rng()
    texts = ["".join(rng.choice(list("aäöü €ß,"), rng.integers(0, 20))) for _ in range(99)]
    path = tmp_path / "trn, ä.raw.txt"
    path.write_bytes("".join(f"{text}\n" for text in texts).encode(written))
    chunks = list(xml_repository.read_texts(str(path), encoding=given))
    assert [text for chunk in chunks for text in chunk] == texts
    assert xml_repository.count_lines(str(path), encoding=given) == 99


def test_utf_8_read_as_latin_1_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("plain\nGrün\n", encoding="utf-8")
    with pytest.raises(InputError, match="is UTF-8, and would be garbled as latin-1"):
        list(xml_repository.read_texts(str(tmp_path / "a.txt"), encoding="latin-1"))
