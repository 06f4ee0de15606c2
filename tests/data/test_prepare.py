"""End-to-end tests of data preparation: every array against the source, and the command."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from vixml_jax.data import preprocessing, summary
from vixml_jax.data.store import PreparedDataset
from vixml_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]
WORDS = np.array("red green blue car house tree Straße naïve 漢字 x1".split())


def write_source(directory, seed=0, *, train=30, test=11, labels=7, item_images=2, width=5):
    """Writes a random source, and returns its contents."""
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
        relevance[0] = False  # At least one query has no labels.
        rows = [" ".join(f"{label}:1" for label in np.flatnonzero(row)) for row in relevance]
        (directory / f"{prefix}_X_Y.txt").write_text(
            f"{count} {labels}\n" + "".join(f"{row}\n" for row in rows)
        )
        shape = (count, item_images, width) if item_images > 1 else (count, width)
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


@pytest.mark.parametrize("item_images", [1, 2])
def test_prepared_arrays_match_the_source(tmp_path, item_images):
    held = write_source(tmp_path / "raw", item_images=item_images)
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
            expected = held[prefix]["embeddings"][row].reshape(item_images, 5)[has]
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
    new_row = {int(row): k for k, row in enumerate(kept)}
    expected = {(new_row[q], label) for q, label in held["trn"]["filter"] if q in new_row}
    assert {tuple(pair) for pair in dataset.train_filter.tolist()} == expected
    info = dataset.info
    assert info["train_without_labels_dropped"] == 30 - len(kept)
    assert info["test_without_labels_kept"] == int(np.sum(~held["tst"]["relevance"].any(axis=1)))
    assert (dataset.image_width, dataset.propensity_a, dataset.propensity_b) == (5, 0.5, 0.4)
    assert dataset.vocab_size == tokenizer.get_vocab_size()
    description = summary.describe(dataset).split("\n")
    dropped = 30 - len(kept)
    noun = "query" if dropped == 1 else "queries"
    assert f"train: dropped {dropped} {noun} without labels" in description


def test_content_hash_depends_on_source_and_settings(tmp_path):
    write_source(tmp_path / "raw")
    first = prepare(tmp_path / "raw", tmp_path / "a").content_hash
    assert prepare(tmp_path / "raw", tmp_path / "b").content_hash == first
    assert prepare(tmp_path / "raw", tmp_path / "c", max_tokens=5).content_hash != first
    write_source(tmp_path / "other", seed=1)
    assert prepare(tmp_path / "other", tmp_path / "d").content_hash != first


def test_existing_data_set_is_kept_unless_it_differs(tmp_path, capsys):
    write_source(tmp_path / "raw")
    first = prepare(tmp_path / "raw", tmp_path / "out")
    changed = os.stat(first.tokenizer).st_mtime_ns
    again = prepare(tmp_path / "raw", tmp_path / "out")
    assert os.stat(again.tokenizer).st_mtime_ns == changed
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"that differs in max_tokens; pass --overwrite"):
        prepare(tmp_path / "raw", tmp_path / "out", max_tokens=5)
    write_source(tmp_path / "raw", seed=1)
    with pytest.raises(InputError, match=r"that differs in source; pass --overwrite"):
        prepare(tmp_path / "raw", tmp_path / "out")
    assert PreparedDataset.open(tmp_path / "out").content_hash == first.content_hash
    made = prepare(tmp_path / "raw", tmp_path / "out", overwrite=True)
    assert made.content_hash != first.content_hash
    assert sorted(os.listdir(tmp_path)) == ["out", "raw"]


def test_without_a_mask_zero_embeddings_are_absent_images(tmp_path):
    held = write_source(tmp_path / "raw")
    os.remove(tmp_path / "raw" / "tst_has_image.npy")
    embeddings = held["tst"]["embeddings"] * held["tst"]["has"][..., None]
    np.save(tmp_path / "raw" / "tst_image_embeddings.npy", embeddings)
    dataset = prepare(tmp_path / "raw", tmp_path / "out")
    np.testing.assert_array_equal(np.diff(dataset.test.images.offsets), held["tst"]["has"].sum(1))


def test_mask_with_one_value_per_item_covers_all_its_images(tmp_path):
    write_source(tmp_path / "raw")
    mask = np.arange(11) % 3 > 0
    np.save(tmp_path / "raw" / "tst_has_image.npy", mask)
    dataset = prepare(tmp_path / "raw", tmp_path / "out")
    np.testing.assert_array_equal(np.diff(dataset.test.images.offsets), 2 * mask)


@pytest.mark.parametrize(
    "name,array,message",
    [
        ("trn_image_embeddings", np.zeros((29, 2, 5), np.float32), "found 29 rows, expected 30"),
        ("trn_image_embeddings", np.zeros((30, 2, 5), int), "int64 (30, 2, 5), expected floating"),
        ("trn_image_embeddings", np.zeros(30, np.float32), "float32 (30,), expected floating"),
        ("trn_image_embeddings", np.zeros((30, 2, 6), np.float32), "unequal width"),
        ("trn_has_image", np.zeros(29, bool), "bool (29,), expected bool (30,) or (30, 2)"),
        ("trn_has_image", np.ones((30, 2), np.uint8), "uint8 (30, 2), expected bool"),
        ("trn_image_embeddings", np.array([{}] * 30), "holds Python objects"),
    ],
)  # fmt: skip
def test_invalid_embeddings_are_refused(tmp_path, name, array, message):
    write_source(tmp_path / "raw")
    np.save(tmp_path / "raw" / f"{name}.npy", array)
    with pytest.raises(InputError) as caught:
        prepare(tmp_path / "raw", tmp_path / "out")
    assert message in str(caught.value)
    assert os.listdir(tmp_path) == ["raw"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e6])
def test_embeddings_of_existing_images_must_be_finite(tmp_path, value):
    held = write_source(tmp_path / "raw")
    path = tmp_path / "raw" / "tst_image_embeddings.npy"
    embeddings, has = held["tst"]["embeddings"], held["tst"]["has"]
    absent = embeddings.copy()
    absent[~has] = value
    np.save(path, absent)
    prepare(tmp_path / "raw", tmp_path / "valid")
    row, slot = np.argwhere(has)[3]
    embeddings[row, slot, 2] = value
    np.save(path, embeddings)
    with pytest.raises(InputError, match=rf"tst_image_embeddings.npy, row {row} \(from 0\): not"):
        prepare(tmp_path / "raw", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["raw", "valid"]


def test_truncated_embeddings_are_refused(tmp_path):
    write_source(tmp_path / "raw")
    path = tmp_path / "raw" / "trn_image_embeddings.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"trn_image_embeddings.npy: truncated or damaged"):
        prepare(tmp_path / "raw", tmp_path / "out")


@pytest.mark.parametrize(
    "options,message",
    [
        ({"encoding": "utf-61"}, "--encoding=utf-61: expected a text encoding"),
        ({"vocab_size": 10}, "--vocab_size=10: expected at least 64"),
        ({"max_tokens": 2}, "--max_tokens=2: the tokenizer adds 2 special tokens"),
        ({"propensity_a": float("nan")}, "--propensity_a=nan: expected a number from 0 to 4.0"),
        ({"propensity_b": -1.0}, "--propensity_b=-1.0: expected a number from 0 to 10000.0"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, options, message):
    write_source(tmp_path / "raw")
    with pytest.raises(InputError) as caught:
        prepare(tmp_path / "raw", tmp_path / "out", **options)
    assert message in str(caught.value)
    assert os.listdir(tmp_path) == ["raw"]


def test_source_without_labelled_training_queries_is_refused(tmp_path):
    write_source(tmp_path / "raw")
    (tmp_path / "raw" / "trn_X_Y.txt").write_text("30 7\n" + "\n" * 30)
    with pytest.raises(InputError, match="no training query has a label"):
        prepare(tmp_path / "raw", tmp_path / "out")


def run_command(*words):
    return subprocess.run(
        [sys.executable, "-m", "vixml_jax.prepare", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_command_line(tmp_path):
    write_source(tmp_path / "raw")
    options = [f"--source={tmp_path / 'raw'}", f"--out={tmp_path / 'out'}", "--vocab_size=64"]
    done = run_command(*options)
    assert done.returncode == 0, done.stderr
    assert f"raw: prepared in {tmp_path / 'out'}" in done.stdout
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert info["max_tokens"] == 32 and info["num_test"] == 11
    for invalid, message in (
        (["--max_tokens=5"], "differs in max_tokens"),
        (["--encoding=ebcdic"], "--encoding"),
        (
            ["--source=/nowhere"],
            "--source=/nowhere: no such file, or a directory without tables",
        ),
    ):
        done = run_command(*options, *invalid)
        assert done.returncode == 2, invalid
        assert done.stderr.count("\n") == 1 and message in done.stderr


def test_command_does_not_import_jax(tmp_path):
    program = "import sys, vixml_jax.prepare; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
