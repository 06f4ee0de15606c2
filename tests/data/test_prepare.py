"""prepare from end to end: every array against the source, errors through the door."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from vixml_jax.data import preprocessing
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
WORDS = np.array("red green blue car house tree Straße naïve 漢字 x1".split())


def write_source(directory, seed=0, *, train=30, test=11, labels=7, pictures=2, width=5):
    """A random source on disk, and what it holds."""
    rng = np.random.default_rng(seed)
    directory.mkdir(exist_ok=True)
    held = {}
    for prefix, count in (("trn", train), ("tst", test), ("lbl", labels)):
        texts = [" ".join(rng.choice(WORDS, rng.integers(0, 9))) for _ in range(count)]
        (directory / f"{prefix}.raw.txt").write_bytes("".join(f"{t}\n" for t in texts).encode())
        held[prefix] = {"texts": texts}
        if prefix == "lbl":
            continue
        relevance = rng.random((count, labels)) < 0.3
        relevance[0] = False  # A query without labels at least.
        rows = [" ".join(f"{label}:1" for label in np.flatnonzero(row)) for row in relevance]
        (directory / f"{prefix}_X_Y.txt").write_text(
            f"{count} {labels}\n" + "".join(f"{row}\n" for row in rows)
        )
        shape = (count, pictures, width) if pictures > 1 else (count, width)
        embeddings = rng.normal(size=shape).astype(np.float32)
        has = rng.random(shape[:-1]) < 0.6
        np.save(directory / f"{prefix}_image_embeddings.npy", embeddings)
        np.save(directory / f"{prefix}_has_image.npy", has)
        pairs = rng.permutation(count * labels)[:20]
        split = "train" if prefix == "trn" else "test"
        (directory / f"filter_labels_{split}.txt").write_text(
            "".join(f"{pair // labels} {pair % labels}\n" for pair in pairs)
        )
        held[prefix] |= {
            "relevance": relevance,
            "embeddings": embeddings,
            "has": has,
            "filter": {(int(pair // labels), int(pair % labels)) for pair in pairs},
        }
    return held


def prepare(source, out, **options):
    overwrite = options.pop("overwrite", False)
    settings = preprocessing.Settings(**{"max_tokens": 6, "vocab_size": 64, **options})
    raw = preprocessing.read_source(str(source), encoding=settings.encoding)
    return preprocessing.prepare(raw, str(out), settings, overwrite=overwrite)


@pytest.mark.parametrize("pictures", [1, 2])
def test_everything_arrives(tmp_path, pictures):
    held = write_source(tmp_path / "raw", pictures=pictures)
    dataset = prepare(tmp_path / "raw", tmp_path / "out", propensity_a=0.5, propensity_b=0.4)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(dataset.tokenizer)
    kept = np.flatnonzero(held["trn"]["relevance"].any(axis=1))
    assert 0 not in kept
    for items, prefix, rows in (
        (dataset.train, "trn", kept),
        (dataset.test, "tst", range(11)),
        (dataset.labels, "lbl", range(7)),
    ):
        texts = [held[prefix]["texts"][row] for row in rows]
        assert list(items.texts) == texts
        for text, a, b in zip(texts, items.tokens.offsets, items.tokens.offsets[1:], strict=False):
            assert items.tokens.values[a:b].tolist() == tokenizer.encode(text).ids
            assert 2 <= b - a <= 6
        if prefix == "lbl":
            assert items.images is None
            continue
        begin = items.images.offsets
        for k, row in enumerate(rows):
            has = np.atleast_1d(held[prefix]["has"][row])
            expected = held[prefix]["embeddings"][row].reshape(pictures, 5)[has]
            np.testing.assert_array_equal(
                items.images.values[begin[k] : begin[k + 1]], expected.astype(np.float16)
            )
    np.testing.assert_array_equal(
        dataset.train_relevance.toarray(), held["trn"]["relevance"][kept].astype(np.float32)
    )
    np.testing.assert_array_equal(
        dataset.test_relevance.toarray(), held["tst"]["relevance"].astype(np.float32)
    )
    assert {tuple(pair) for pair in dataset.test_filter.tolist()} == held["tst"]["filter"]
    place = {int(row): k for k, row in enumerate(kept)}
    expected = {(place[q], label) for q, label in held["trn"]["filter"] if q in place}
    assert {tuple(pair) for pair in dataset.train_filter.tolist()} == expected
    info = dataset.info
    assert info["train_without_labels_dropped"] == 30 - len(kept)
    assert info["test_without_labels_kept"] == int(np.sum(~held["tst"]["relevance"].any(axis=1)))
    assert (dataset.image_width, dataset.propensity_a, dataset.propensity_b) == (5, 0.5, 0.4)
    assert dataset.vocab_size == tokenizer.get_vocab_size()
    assert "were dropped" in preprocessing.describe(dataset)


def test_same_source_same_hash(tmp_path):
    write_source(tmp_path / "raw")
    first = prepare(tmp_path / "raw", tmp_path / "a").content_hash
    assert prepare(tmp_path / "raw", tmp_path / "b").content_hash == first
    assert prepare(tmp_path / "raw", tmp_path / "c", max_tokens=5).content_hash != first
    write_source(tmp_path / "other", seed=1)
    assert prepare(tmp_path / "other", tmp_path / "d").content_hash != first


def test_what_is_there_is_kept(tmp_path, capsys):
    write_source(tmp_path / "raw")
    first = prepare(tmp_path / "raw", tmp_path / "out")
    changed = os.stat(first.tokenizer).st_mtime_ns
    again = prepare(tmp_path / "raw", tmp_path / "out")
    assert os.stat(again.tokenizer).st_mtime_ns == changed
    assert "prepared already" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"prepared otherwise \(other max_tokens\); --overwrite"):
        prepare(tmp_path / "raw", tmp_path / "out", max_tokens=5)
    write_source(tmp_path / "raw", seed=1)
    with pytest.raises(InputError, match=r"prepared otherwise \(other source\); --overwrite"):
        prepare(tmp_path / "raw", tmp_path / "out")
    assert PreparedDataset.open(tmp_path / "out").content_hash == first.content_hash
    made = prepare(tmp_path / "raw", tmp_path / "out", overwrite=True)
    assert made.content_hash != first.content_hash
    assert sorted(os.listdir(tmp_path)) == ["out", "raw"]


def test_pictures_without_a_mask_are_those_that_are_not_zero(tmp_path):
    held = write_source(tmp_path / "raw")
    os.remove(tmp_path / "raw" / "tst_has_image.npy")
    embeddings = held["tst"]["embeddings"] * held["tst"]["has"][..., None]
    np.save(tmp_path / "raw" / "tst_image_embeddings.npy", embeddings)
    dataset = prepare(tmp_path / "raw", tmp_path / "out")
    np.testing.assert_array_equal(np.diff(dataset.test.images.offsets), held["tst"]["has"].sum(1))


def test_a_mask_by_item_covers_all_its_pictures(tmp_path):
    write_source(tmp_path / "raw")
    mask = np.arange(11) % 3 > 0
    np.save(tmp_path / "raw" / "tst_has_image.npy", mask)
    dataset = prepare(tmp_path / "raw", tmp_path / "out")
    np.testing.assert_array_equal(np.diff(dataset.test.images.offsets), 2 * mask)


@pytest.mark.parametrize(
    "name,array,fault",
    [
        ("trn_image_embeddings", np.zeros((29, 2, 5), np.float32), "29 rows, but there are 30"),
        ("trn_image_embeddings", np.zeros((30, 2, 5), int), "int64 (30, 2, 5), expected floating"),
        ("trn_image_embeddings", np.zeros(30, np.float32), "float32 (30,), expected floating"),
        ("trn_image_embeddings", np.zeros((30, 2, 6), np.float32), "unequal width"),
        ("trn_has_image", np.zeros(29, bool), "bool (29,), expected bool (30,) or (30, 2)"),
        ("trn_has_image", np.ones((30, 2), np.uint8), "uint8 (30, 2), expected bool"),
        ("trn_image_embeddings", np.array([{}] * 30), "not a whole .npy file"),
    ],
)  # fmt: skip
def test_bad_embeddings_are_refused(tmp_path, name, array, fault):
    write_source(tmp_path / "raw")
    np.save(tmp_path / "raw" / f"{name}.npy", array)
    with pytest.raises(InputError) as caught:
        prepare(tmp_path / "raw", tmp_path / "out")
    assert fault in str(caught.value)
    assert os.listdir(tmp_path) == ["raw"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
def test_embeddings_must_be_finite_where_there_is_a_picture(tmp_path, value):
    held = write_source(tmp_path / "raw")
    path = tmp_path / "raw" / "tst_image_embeddings.npy"
    embeddings, has = held["tst"]["embeddings"], held["tst"]["has"]
    absent = embeddings.copy()
    absent[~has] = value
    np.save(path, absent)
    prepare(tmp_path / "raw", tmp_path / "fine")
    row, slot = np.argwhere(has)[3]
    embeddings[row, slot, 2] = value
    np.save(path, embeddings)
    with pytest.raises(InputError, match=rf"tst_image_embeddings.npy, row {row} \(from 0\): not"):
        prepare(tmp_path / "raw", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["fine", "raw"]


def test_truncated_embeddings_are_refused(tmp_path):
    write_source(tmp_path / "raw")
    path = tmp_path / "raw" / "trn_image_embeddings.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"trn_image_embeddings.npy: not a whole .npy file"):
        prepare(tmp_path / "raw", tmp_path / "out")


@pytest.mark.parametrize(
    "options,fault",
    [
        ({"encoding": "utf-16"}, "--encoding=utf-16: expected one of utf-8, latin-1"),
        ({"vocab_size": 10}, "--vocab_size=10: expected at least 64"),
        ({"max_tokens": 2}, "--max_tokens=2: the tokenizer adds 2 special tokens"),
        ({"propensity_a": float("nan")}, "--propensity_a=nan: expected a finite number"),
        ({"propensity_b": -1.0}, "--propensity_b=-1.0: expected a finite number"),
    ],
)
def test_bad_settings_are_refused(tmp_path, options, fault):
    write_source(tmp_path / "raw")
    with pytest.raises(InputError) as caught:
        prepare(tmp_path / "raw", tmp_path / "out", **options)
    assert fault in str(caught.value)
    assert os.listdir(tmp_path) == ["raw"]


def test_training_queries_must_have_labels(tmp_path):
    write_source(tmp_path / "raw")
    (tmp_path / "raw" / "trn_X_Y.txt").write_text("30 7\n" + "\n" * 30)
    with pytest.raises(InputError, match="no training query has a label"):
        prepare(tmp_path / "raw", tmp_path / "out")


def door(*words):
    return subprocess.run(
        [sys.executable, "-m", "vixml_jax.prepare", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_door(tmp_path):
    write_source(tmp_path / "raw")
    options = [f"--source={tmp_path / 'raw'}", f"--out={tmp_path / 'out'}", "--vocab_size=64"]
    done = door(*options)
    assert done.returncode == 0, done.stderr
    assert f"raw: in {tmp_path / 'out'}" in done.stdout
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert info["max_tokens"] == 32 and info["num_test"] == 11
    for bad, fault in (
        (["--max_tokens=5"], "prepared otherwise"),
        (["--encoding=ebcdic"], "--encoding"),
        (["--source=/nowhere"], "--source=/nowhere: no such file, or no table in it"),
    ):
        done = door(*options, *bad)
        assert done.returncode == 2, bad
        assert done.stderr.count("\n") == 1 and fault in done.stderr


def test_the_door_takes_no_jax(tmp_path):
    program = "import sys, vixml_jax.prepare; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
