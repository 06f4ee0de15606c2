"""Tests of data sets of Hugging Face `datasets`: saved on disk, as parquet, and by name."""

import json
import os
import sys

import numpy as np
import pytest
from absl import flags

from vixml_jax import prepare
from vixml_jax.data.sources import readers, tabular, tabular_files
from vixml_jax.data.sources.binary import parquet_file
from vixml_jax.data.sources.columns import Columns
from vixml_jax.errors import InputError

datasets = pytest.importorskip("datasets")
TAGS = ["red", "green, or so", "blue"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def draw(rng, count):
    """Random rows, with the names of their tags."""
    tags = [rng.permutation(3)[: rng.integers(1, 4)].tolist() for _ in range(count)]
    rows = {"text": [f"Größe {i}" for i in range(count)], "tags": tags}
    return rows, [{TAGS[tag] for tag in row} for row in tags]


def dataset_of(rows):
    tags = datasets.Sequence(datasets.ClassLabel(names=TAGS))
    features = datasets.Features({"text": datasets.Value("string"), "tags": tags})
    return datasets.Dataset.from_dict(rows, features=features)


def read(source, tmp_path):
    (tmp_path / "spool").mkdir(exist_ok=True)
    return tabular.read_tables(str(source), str(tmp_path / "spool"), names=Columns())


def contents(queries, raw):
    """Texts of queries, and the set of label texts of each."""
    labels = [text for chunk in raw.labels.read_texts() for text in chunk]
    relevance = queries.relevance
    texts = [text for chunk in queries.items.read_texts() for text in chunk]
    rows = zip(relevance.indptr, relevance.indptr[1:], strict=False)
    return texts, [{labels[label] for label in relevance.indices[a:b]} for a, b in rows]


@pytest.mark.parametrize("form", ["saved", "saved with shards", "parquet", "hub"])
def test_splits_and_names_of_classes_are_read(tmp_path, form, capsys):
    rng = np.random.default_rng()
    drawn = {
        split: draw(rng, int(rng.integers(2, 30))) for split in ("train", "validation", "test")
    }
    splits = datasets.DatasetDict({split: dataset_of(rows) for split, (rows, _) in drawn.items()})
    source = tmp_path / "set"
    if form.startswith("saved"):
        splits["unsupervised"] = dataset_of(draw(rng, 3)[0])
        shards = 2 if "shards" in form else 1
        splits.save_to_disk(str(source), num_shards=dict.fromkeys(splits, shards))
    else:
        (source / "data").mkdir(parents=True)
        for split, part in splits.items():
            part.to_parquet(str(source / "data" / f"{split}-00000-of-00001.parquet"))
    raw = read(f"hf:{source}" if form == "hub" else source, tmp_path)
    assert raw.name == "set"
    for split, (rows, names) in drawn.items():
        queries = raw.splits[{"validation": "valid"}.get(split, split)]
        assert contents(queries, raw) == (rows["text"], names)
    warned = "splits that are not read: unsupervised" in capsys.readouterr().out
    assert warned == form.startswith("saved")


def test_selected_rows_and_a_data_set_without_splits(tmp_path):
    rows, names = draw(np.random.default_rng(), 20)
    chosen = [19, 3, 7, 0]
    dataset_of(rows).select(chosen).save_to_disk(str(tmp_path / "set"))
    raw = read(tmp_path / "set", tmp_path)
    expected = [rows["text"][row] for row in chosen], [names[row] for row in chosen]
    assert contents(raw.train, raw) == expected


def test_scalar_classes_and_rows_without_a_class(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"text": list("abc"), "label": [1, -1, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "set"))
    (path,) = (tmp_path / "set").glob("*.arrow")
    (chunk,) = readers.read(str(path))
    assert chunk.columns == {"text": ["a", "b", "c"], "label": ["yes", None, "no"]}
    assert chunk.where(1) == f"{path}, row 2"


def test_chunks_of_images_are_small(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_file, "CHUNK_BYTES", 5000)
    images = [{"bytes": bytes([row]) * 1000, "path": f"{row}.png"} for row in range(23)]
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    rows = {"text": [str(row) for row in range(23)], "image": images}
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(str(tmp_path / "set"))
    made.to_parquet(str(tmp_path / "q.parquet"))
    for path in (*(tmp_path / "set").glob("*.arrow"), tmp_path / "q.parquet"):
        chunks = list(readers.read(str(path)))
        assert max(map(len, chunks)) <= 5
        assert [image for chunk in chunks for image in chunk.columns["image"]] == images
        assert [line for chunk in chunks for line in chunk.lines] == list(range(1, 24))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: os.remove(next(path.glob("*.arrow"))), "cannot be read"),
        (lambda path: (path / "state.json").write_text("{"), "save_to_disk"),
        (lambda path: (path / "state.json").write_text("{}"), "_data_files"),
        (lambda path: next(path.glob("*.arrow")).write_bytes(b"ARROW"), "not a complete arrow"),
    ],
)
def test_damaged_directories_are_refused(tmp_path, damage, message):
    dataset_of(draw(np.random.default_rng(), 9)[0]).save_to_disk(str(tmp_path / "set"))
    damage(tmp_path / "set")
    with pytest.raises(InputError, match=message) as refused:
        read(tmp_path / "set", tmp_path)
    assert str(tmp_path / "set") in str(refused.value) and "\n" not in str(refused.value)


def test_rows_selected_by_indices_are_refused(tmp_path):
    dataset_of(draw(np.random.default_rng(), 9)[0]).save_to_disk(str(tmp_path / "set"))
    path = tmp_path / "set" / "state.json"
    state = json.loads(path.read_text()) | {"_indices_data_files": [{"filename": "indices.arrow"}]}
    path.write_text(json.dumps(state))
    with pytest.raises(InputError, match="flatten_indices"):
        read(tmp_path / "set", tmp_path)


def test_splits_with_other_names_are_refused(tmp_path):
    part = dataset_of(draw(np.random.default_rng(), 9)[0])
    datasets.DatasetDict({"a": part, "b": part}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(InputError, match="its splits are a, b; expected train"):
        read(tmp_path / "set", tmp_path)


def test_names_that_cannot_be_loaded_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"^--source=hf:no/such: .*expected hf:NAME") as refused:
        tabular_files.find_tables("hf:no/such")
    assert "\n" not in str(refused.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs the package datasets; run: pip install"):
        tabular_files.find_tables("hf:imdb")


def test_the_command_reads_a_saved_data_set(tmp_path, capsys):
    rows, _ = draw(np.random.default_rng(), 30)
    dataset_of(rows).save_to_disk(str(tmp_path / "set"))
    values = flags.FlagValues()
    prepare.define_flags(values)
    values(["prepare", f"--source={tmp_path / 'set'}", "--dry_run"])
    prepare.run(values)
    output = " ".join(capsys.readouterr().out.split())
    assert "text '{text}' (inferred) labels 'tags' (inferred)" in output
    assert "dry run: nothing was written" in output
