"""Prepared data on disk: read back as written, written atomically, damage reported."""

import itertools
import json
import os

import numpy as np
import pytest
from scipy import sparse

from vixml_jax.data import store
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError

TEXTS = {"train": ["a", "", "Grün 漢"], "test": ["b"], "labels": ["l0", "l1"]}
TOKENS = {"train": [[2, 5, 3], [2, 3], [2, 9, 9, 3]], "test": [[2, 3]], "labels": [[7], []]}
INFO = {
    "name": "tiny", "num_labels": 2, "image_width": 4, "vocab_size": 10, "max_tokens": 4,
    "propensity_a": 0.6, "propensity_b": 2.6,
}  # fmt: skip


def offsets(rows):
    return np.cumsum([0, *map(len, rows)])


def write(path, *, image_value=3.0, info=INFO, tokenizer="{}", overwrite=False):
    with store.write(path, overwrite=overwrite) as writer:
        for split in TEXTS:
            with writer.strings(f"{split}_texts") as add:
                add(TEXTS[split][:1])
                add(TEXTS[split][1:])
            with writer.strings(f"{split}_ids") as add:
                add([f"{split} {i}" for i in range(len(TEXTS[split]))])
            writer.add(f"{split}_whole", np.arange(len(TEXTS[split]), dtype=np.int32))
            writer.add(f"{split}_tokens_offsets", offsets(TOKENS[split]))
            with writer.array(f"{split}_tokens", np.int32) as array:
                for row in TOKENS[split]:
                    array.append(np.array(row, np.int32))
        writer.add("train_images", np.full((2, 4), image_value, np.float16))
        writer.add("train_images_offsets", np.array([0, 0, 2, 2]))
        writer.add("test_images", np.zeros((0, 4), np.float16))
        writer.add("test_images_offsets", np.array([0, 0]))
        writer.add_relevance("train", sparse.csr_matrix(np.array([[1, 1], [0, 1], [1, 0.0]])))
        writer.add_relevance("test", sparse.csr_matrix((1, 2)))
        writer.add("train_filter", np.array([[2, 1]]))
        writer.add("test_filter", np.zeros((0, 2), np.int64))
        writer.finish(info, tokenizer)


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "set")
    return tmp_path / "set"


def test_read_back_as_written(path):
    dataset = PreparedDataset.open(path)
    for split in TEXTS:
        items = getattr(dataset, split)
        assert list(items.texts) == TEXTS[split]
        assert list(items.ids) == [f"{split} {i}" for i in range(len(items))]
        np.testing.assert_array_equal(items.full_lengths, np.arange(len(items)))
        begin = items.tokens.offsets
        rows = [items.tokens.values[a:b].tolist() for a, b in itertools.pairwise(begin)]
        assert rows == TOKENS[split]
        assert items.tokens.values.dtype == np.int32 and begin.dtype == np.int64
    assert (len(dataset.train), len(dataset.test), dataset.num_labels) == (3, 1, 2)
    assert dataset.train.texts[-1] == "Grün 漢"
    with pytest.raises(IndexError):
        dataset.train.texts[3]
    np.testing.assert_array_equal(dataset.train.images.values, np.full((2, 4), 3, np.float16))
    assert dataset.test.images.values.shape == (0, 4)
    assert dataset.labels.images is None
    np.testing.assert_array_equal(dataset.train_relevance.toarray(), [[1, 1], [0, 1], [1, 0]])
    assert dataset.train_relevance.dtype == np.float32
    np.testing.assert_array_equal(dataset.test_relevance.toarray(), [[0, 0]])
    np.testing.assert_array_equal(dataset.train_filter, [[2, 1]])
    assert dataset.test_filter.shape == (0, 2)
    assert (dataset.name, dataset.image_width, dataset.vocab_size) == ("tiny", 4, 10)
    assert (dataset.propensity_a, dataset.propensity_b, dataset.max_tokens) == (0.6, 2.6, 4)
    assert open(dataset.tokenizer).read() == "{}"


def test_arrays_are_memory_mapped(path):
    dataset = PreparedDataset.open(path)
    for array in (
        dataset.train.tokens.values, dataset.train.images.values, dataset.train_relevance.indices,
        dataset.train_relevance.data,
    ):  # fmt: skip
        while not isinstance(array, np.memmap):
            assert array.base is not None
            array = array.base
        assert not array.flags.writeable


def test_hash_depends_only_on_the_content(path, tmp_path):
    first = PreparedDataset.open(path).content_hash
    same = {"info": {**INFO, "name": "other"}}
    changed = [
        {"image_value": 2.0},
        {"tokenizer": "{ }"},
        {"info": {**INFO, "propensity_a": 0.5}},
        {"info": {**INFO, "max_tokens": 5}},
    ]
    for number, options in enumerate([same, *changed]):
        write(tmp_path / str(number), **options)
        content_hash = PreparedDataset.open(tmp_path / str(number)).content_hash
        assert (content_hash == first) == (number == 0)


def test_failure_leaves_no_files(tmp_path):
    with pytest.raises(ZeroDivisionError), store.write(tmp_path / "a" / "set") as writer:
        writer.add("train_texts", np.zeros(3, np.uint8))
        raise ZeroDivisionError
    assert os.listdir(tmp_path / "a") == []


def test_only_prepared_data_is_replaced_and_only_with_overwrite(path, tmp_path):
    with pytest.raises(InputError, match="holds a prepared data set; replace it with --overwrite"):
        write(path)
    write(path, image_value=1.0, overwrite=True)
    assert PreparedDataset.open(path).train.images.values[0, 0] == 1.0
    with pytest.raises(ZeroDivisionError), store.write(path, overwrite=True):
        raise ZeroDivisionError
    assert PreparedDataset.open(path).train.images.values[0, 0] == 1.0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="exists and is not a prepared data set"):
        write(tmp_path / "mine", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="exists and is not a prepared data set"):
        write(tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert sorted(os.listdir(tmp_path)) == ["empty", "file", "mine", "set"]


@pytest.mark.parametrize(
    "name",
    ["train_tokens.npy", "train_images.npy", "train_relevance_indices.npy", "test_texts.npy"],
)
def test_missing_and_truncated_files_are_named(path, name):
    content = (path / name).read_bytes()
    for size in (len(content) - 1, 100, 0):
        (path / name).write_bytes(content[:size])
        with pytest.raises(InputError, match=f"{name}: truncated or damaged"):
            PreparedDataset.open(path)
    np.save(path / name, np.zeros(9, np.float32))
    with pytest.raises(InputError, match=rf"{name}: found float32 \(9,\), expected"):
        PreparedDataset.open(path)
    os.remove(path / name)
    with pytest.raises(InputError, match=f"{name}: not found"):
        PreparedDataset.open(path)


def test_other_and_incomplete_directories_are_refused(path, tmp_path):
    with pytest.raises(InputError, match=r"absent/dataset\.json: not found; expected a directory"):
        PreparedDataset.open(tmp_path / "absent")
    info = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps({**info, "format": 99}))
    with pytest.raises(InputError, match=r"dataset\.json: format 99, expected 2"):
        PreparedDataset.open(path)
    (path / "dataset.json").write_text('{"format": 1')
    with pytest.raises(InputError, match=r"dataset\.json: .*truncated; prepare it again"):
        PreparedDataset.open(path)
    without_width = {key: value for key, value in info.items() if key != "image_width"}
    (path / "dataset.json").write_text(json.dumps(without_width))
    with pytest.raises(InputError, match=r"json: .*missing required field `image_width`; prepare"):
        PreparedDataset.open(path)
    (path / "dataset.json").write_text(json.dumps({**info, "max_tokens": "4"}))
    with pytest.raises(InputError, match=r"json: Expected `int`, got `str` - at `\$.max_tokens`;"):
        PreparedDataset.open(path)
    for num_labels in (-1, 10**30):
        (path / "dataset.json").write_text(json.dumps({**info, "num_labels": num_labels}))
        with pytest.raises(InputError, match=r"dataset\.json: .*; prepare it again"):
            PreparedDataset.open(path)
    wrong = {**info["arrays"]["test_tokens"], "dtype": "int33"}
    arrays = {**info["arrays"], "test_tokens": wrong}
    (path / "dataset.json").write_text(json.dumps({**info, "arrays": arrays}))
    with pytest.raises(InputError, match=r"dataset\.json: array 'test_tokens': .*int33.*; prepare"):
        PreparedDataset.open(path)
    arrays = {name: array for name, array in info["arrays"].items() if name != "test_tokens"}
    (path / "dataset.json").write_text(json.dumps({**info, "arrays": arrays}))
    with pytest.raises(InputError, match=r"dataset\.json: no array 'test_tokens' is listed; prep"):
        PreparedDataset.open(path)
    (path / "dataset.json").write_text(json.dumps(info))
    os.remove(path / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json: not found"):
        PreparedDataset.open(path)
