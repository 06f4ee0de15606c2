"""Sources that --data names directly: prepared once, in a cache, and again when they change."""

import gzip
import json
import os
import pathlib

import pytest

from tests.data.text.test_agreement import WORDS, write_tokenizer
from vixml_jax.data import on_demand
from vixml_jax.data.sources import catalog
from vixml_jax.data.store import PreparedDataset
from vixml_jax.data.text import agreement
from vixml_jax.errors import InputError

ROWS = [(f"{a} {b}", b) for a in WORDS[:4] for b in WORDS[3:]] * 2


def write_csv(path):
    path.write_text("title,tags\n" + "".join(f"{title},{tag}\n" for title, tag in ROWS))


def write_tsv(path):
    path.write_text("title\ttags\n" + "".join(f"{title}\t{tag}\n" for title, tag in ROWS))


def write_jsonl_gz(path):
    with gzip.open(path, "wt") as file:
        for title, tag in ROWS:
            file.write(json.dumps({"title": title, "tags": [tag]}) + "\n")


def write_shards(path):
    path.mkdir()
    write_csv(path / "train-0.csv")
    write_csv(path / "train-1.csv")
    write_csv(path / "valid.csv")
    write_csv(path / "test.csv")


def write_xml_repository(path):
    path.mkdir()
    (path / "lbl.raw.txt").write_text("wool\nsilk\n")
    for prefix in ("trn", "tst"):
        (path / f"{prefix}.raw.txt").write_text("red wool\nblue silk\n" * 20)
        (path / f"{prefix}_X_Y.txt").write_text("40 2\n" + "0:1\n1:1\n" * 20)


@pytest.mark.parametrize(
    "name, write",
    [
        ("my shop.csv", write_csv),
        ("shop.tsv", write_tsv),
        ("shop.jsonl.gz", write_jsonl_gz),
        ("shards", write_shards),
        ("LF-WikiSeeAlso-320K", write_xml_repository),
    ],
)
def test_a_source_is_prepared_once_with_the_tokenizer_of_the_model(tmp_path, capsys, name, write):
    model, source = write_tokenizer(tmp_path / "model", WORDS), tmp_path / name
    write(source)
    cache = str(tmp_path / "cache")
    dataset = on_demand.open_source(str(source), model, cache)
    assert "preparing it with the tokenizer of" in capsys.readouterr().out
    agreement.check(dataset, model)
    assert os.path.dirname(dataset.path) == cache
    sizes = [len(part) for part in (dataset.train, dataset.valid, dataset.test)]
    rows = {write_shards: 4 * len(ROWS), write_xml_repository: 80}.get(write, len(ROWS))
    assert sum(sizes) == rows and all(sizes)
    expected = (0.55, 1.5) if name.startswith("LF") else (0.6, 2.6)
    assert (dataset.propensity_a, dataset.propensity_b) == expected
    again = on_demand.open_source(str(source), model, cache)
    assert "prepared before" in capsys.readouterr().out and again.path == dataset.path
    trained = on_demand.open_source(str(source), "", cache)
    assert trained.path != dataset.path and trained.info["settings"]["tokenizer"] == "train"
    assert {entry.name for entry in pathlib.Path(cache).iterdir()} == {
        os.path.basename(path) for path in (dataset.path, trained.path)
    }


def test_a_changed_file_is_prepared_again(tmp_path):
    source, cache = tmp_path / "shop.csv", str(tmp_path / "cache")
    write_csv(source)
    first = on_demand.open_source(str(source), "", cache)
    with open(source, "a") as file:
        file.write("red coat,coat\n")
    second = on_demand.open_source(str(source), "", cache)
    assert second.content_hash != first.content_hash
    splits = [second.train, second.valid, second.test]
    assert sum(map(len, splits)) == len(ROWS) + 1


def test_a_prepared_data_set_is_opened_as_it_is(tmp_path, capsys):
    source = tmp_path / "shop.csv"
    write_csv(source)
    made = on_demand.open_source(str(source), "", str(tmp_path / "cache"))
    capsys.readouterr()
    found = on_demand.open_source(made.path, "some/model", str(tmp_path / "other"))
    assert found.content_hash == made.content_hash
    assert capsys.readouterr().out == "" and not (tmp_path / "other").exists()


def test_warnings_of_the_source_are_printed(tmp_path, capsys):
    source = tmp_path / "shop.csv"
    source.write_text(
        "title,tags,image\n" + "".join(f"{title},{tag},a.png\n" for title, tag in ROWS)
    )
    on_demand.open_source(str(source), "", str(tmp_path / "cache"))
    printed = capsys.readouterr().out
    assert "named, not read" in printed and "'{title}' (inferred)" in printed
    assert f"prepare --source={source} --out=data/shop --tokenizer=train --valid=0.1" in printed
    assert "inverse propensity: A 0.6, B 2.6 (the default; no data set of the catalogue)" in printed


@pytest.mark.parametrize("name", ["empty", "folder", "broken"])
def test_what_cannot_be_prepared_is_refused_in_one_line(tmp_path, name):
    source = tmp_path / name
    if name == "empty":
        source.write_text("")
    elif name == "folder":
        source.mkdir()
        (source / "notes.txt").write_text("none\n")
    else:
        source = tmp_path / "broken.csv"
        source.write_text("title,tags\n")
    with pytest.raises(InputError) as caught:
        on_demand.open_source(str(source), "", str(tmp_path / "cache"))
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--data=shop2\.csv: not found; expected a directory"):
        on_demand.open_source("shop2.csv", "", str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_missing_public_data_set_is_named(tmp_path):
    with pytest.raises(
        on_demand.NotPreparedError, match="download the raw text of LF-Wikip"
    ) as got:
        on_demand.open_source("data/LF_Wikipedia-500K.bert", "", str(tmp_path / "cache"))
    assert got.value.dataset is catalog.CATALOG["lf_wikipedia_500k"]
    assert "--max_tokens=256 --tokenizer=train" in str(got.value)


def test_glyphs_have_the_tokenizer_of_the_model(tmp_path):
    letters = write_tokenizer(tmp_path / "model", ["letter", "digit", "latin"])
    dataset = on_demand.open_glyphs(str(tmp_path / "data"), letters)
    agreement.check(dataset, letters)
    assert dataset.vocab_size == 7
    assert PreparedDataset.open(str(tmp_path / "data")).content_hash == dataset.content_hash
