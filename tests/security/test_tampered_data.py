"""Prepared data that were damaged or changed: found when they are opened, or when they are used."""

import json
import os
import shutil

import numpy as np
import pytest

from tests.tiny import configuration, make_data
from vixml_jax import workdir
from vixml_jax.data import integrity
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError

HUGE = (-1, 2**31 - 1, -(2**31))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return make_data(root, valid=0.1)


@pytest.fixture
def data(good, tmp_path):
    return shutil.copytree(good, tmp_path / "set")


def refused(action, *parts):
    with pytest.raises(InputError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


def change(data, name, edit):
    values = np.load(data / f"{name}.npy")
    edit(values)
    np.save(data / f"{name}.npy", values)


def put(at, value):
    def edit(values):
        values.reshape(-1)[at % values.size] = value

    return edit


def names(good):
    with open(os.path.join(good, "dataset.json")) as file:
        return sorted(json.load(file)["arrays"])


def test_arrays_that_lead_out_of_the_data_are_refused_when_opened(good, data):
    rng = np.random.default_rng()
    PreparedDataset.open(data)
    for name in names(good):
        if name.endswith(("tokens", "offsets", "indices", "indptr", "filter")):
            for value in HUGE:
                if not np.load(data / f"{name}.npy").size:
                    continue
                change(data, name, put(int(rng.integers(1, 10**6)), value))
                refused(
                    lambda: PreparedDataset.open(data), str(data), name.split("_")[0], "damaged"
                )
                shutil.copy(os.path.join(good, f"{name}.npy"), data)
    info = json.loads((data / "dataset.json").read_text())
    for name, value in (("tokens", info["vocab_size"]), ("relevance_indices", info["num_labels"])):
        change(data, f"train_{name}", put(int(rng.integers(10**6)), value))  # One too many.
        refused(lambda: PreparedDataset.open(data), f"train_{name.partition('_')[0]}")
        shutil.copy(os.path.join(good, f"train_{name}.npy"), data)
    PreparedDataset.open(data).verify()


def test_offsets_that_descend_are_refused(good, data):
    def swap(values):
        values[1], values[2] = values[2] + 1, values[1]

    for name in ("train_texts_offsets", "labels_tokens_offsets", "test_images_offsets"):
        change(data, name, swap)
        refused(lambda: PreparedDataset.open(data), f"{name}.npy", "ascending")
        shutil.copy(os.path.join(good, f"{name}.npy"), data)


def flip(path, rng):
    """Flips a bit of the values of an array."""
    content = bytearray(path.read_bytes())
    if len(content) > 128:
        content[int(rng.integers(128, len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        return True
    return False


def test_every_flipped_bit_is_found_before_training_and_evaluation(good, data, tmp_path):
    rng = np.random.default_rng()
    config = configuration(str(data), tmp_path / "run")
    workdir.open_dataset(config)
    for name in names(good):
        path = data / f"{name}.npy"
        if flip(path, rng):
            refused(lambda: workdir.open_dataset(config), str(data), name.split("_")[0], "prepare")
            shutil.copy(os.path.join(good, f"{name}.npy"), data)
    workdir.open_dataset(config)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e4])
def test_image_embeddings_that_were_changed_are_refused(data, tmp_path, value):
    change(data, "train_images", put(17, value))
    refused(
        lambda: workdir.open_dataset(configuration(str(data), tmp_path / "run")),
        "train_images.npy", "SHA-256", "prepare it again",
    )  # fmt: skip


def test_the_tokenizer_and_the_recorded_sizes_are_checked(data):
    tokenizer, info = data / "tokenizer.json", data / "dataset.json"
    good = tokenizer.read_text()
    tokenizer.write_text(good + " ")
    refused(lambda: PreparedDataset.open(data), "dataset.json", "tokenizer.json")
    tokenizer.write_text(good)
    about = json.loads(info.read_text())
    for change_of in (
        {"propensity_a": 0.1}, {"max_tokens": 7}, {"vocab_size": 3}, {"num_labels": 19},
        {"image_width": 6},
    ):  # fmt: skip
        info.write_text(json.dumps(about | change_of))
        refused(lambda: PreparedDataset.open(data), str(data))
    info.write_text(json.dumps(about))
    PreparedDataset.open(data).verify()


def test_a_file_is_read_once_per_process(data, monkeypatch):
    dataset = PreparedDataset.open(data).verify()
    monkeypatch.setattr(integrity.hashlib, "sha256", lambda: pytest.fail("read again"))
    dataset.verify()
    monkeypatch.undo()
    change(data, "test_tokens", put(0, 0))
    refused(dataset.verify, "test_tokens.npy")
