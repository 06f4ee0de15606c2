"""ViXML's published image files: a row per image, and a pickled map of items to rows."""

import os
import pathlib
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from tests.data.sources import random_tables
from vixml_jax.data import preprocessing
from vixml_jax.data.images import image_embeddings
from vixml_jax.data.sources import tabular, xml_repository
from vixml_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[3]
WIDTH = 6
COUNTS = {"trn": 13, "tst": 5, "lbl": 7}
EMBEDDINGS, MAP = "{}_embs_imgs_3_1152_siglip2.npy", "{}_imgs_384_3_map.npy"


def objects(values):
    """An array of Python objects of any kind."""
    array = np.empty(len(values), object)
    for n, value in enumerate(values):
        array[n] = value
    return array


def spell(rng, rows):
    """One of the ways to write the rows of an item in a map."""
    ways = [rows, np.array(rows, np.int64), [np.int64(row) for row in rows]]
    if len(rows) == 1:
        ways += [rows[0], np.int64(rows[0])]
    if not rows:
        ways += [-1, [-1], np.array([-1])]
    if rows:
        ways += [[*rows, -1], [-1, *rows], np.array(rows, object)]
    return ways[rng.integers(len(ways))]


def write_images(directory, prefix, count, seed, *, width=WIDTH):
    """Writes random images of items; returns the expected images of each item."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, count)
    lengths[:2] = 0, 3
    order = rng.permutation(lengths.sum() + 2).tolist()  # Two images belong to no item.
    rows = [[order.pop() for _ in range(length)] for length in lengths]
    embeddings = rng.normal(size=(lengths.sum() + 2, width)).astype(np.float32)
    np.save(directory / EMBEDDINGS.format(prefix), embeddings)
    mapped = objects([spell(rng, item) for item in rows])
    np.save(directory / MAP.format(prefix), mapped, allow_pickle=True)
    return [embeddings[item].astype(np.float16) for item in rows]


def write_source(directory, seed=0, prefixes=tuple(COUNTS)):
    """Writes a source in the XML repository's layout, with images; returns these."""
    directory.mkdir()
    rng = np.random.default_rng(seed)
    for prefix, count in COUNTS.items():
        texts = "".join(f"{prefix} {n} {rng.integers(99)}\n" for n in range(count))
        (directory / f"{prefix}.raw.txt").write_text(texts)
        if prefix != "lbl":
            rows = "".join(f"{rng.integers(7)}:1\n" for _ in range(count))
            (directory / f"{prefix}_X_Y.txt").write_text(f"{count} 7\n{rows}")
    return {
        prefix: write_images(directory, prefix, COUNTS[prefix], seed + n)
        for n, prefix in enumerate(prefixes)
    }


def check(images, expected):
    """Compares the images of a prepared split with those of each item."""
    assert len(images.offsets) == len(expected) + 1
    for a, b, item_images in zip(images.offsets, images.offsets[1:], expected, strict=False):
        np.testing.assert_array_equal(images.values[a:b], item_images)


@pytest.mark.parametrize("seed", range(6))
def test_images_belong_to_their_items(tmp_path, seed):
    held = write_source(tmp_path / "raw", seed)
    raw = preprocessing.read_source(str(tmp_path / "raw"))
    settings = preprocessing.Settings(vocab_size=64)
    dataset = preprocessing.prepare(raw, str(tmp_path / "out"), settings)
    assert dataset.image_width == WIDTH
    check(dataset.train.images, held["trn"])
    check(dataset.test.images, held["tst"])
    check(dataset.labels.images, held["lbl"])


def test_a_split_may_have_no_images(tmp_path):
    held = write_source(tmp_path / "raw", prefixes=("tst", "lbl"))
    raw = xml_repository.read_xml_repository(str(tmp_path / "raw"))
    assert raw.train.items.images is None
    assert isinstance(raw.labels.images, image_embeddings.FileImages)
    rows = np.array([1, 4, 6])
    np.testing.assert_array_equal(
        np.concatenate(list(raw.labels.images.read(rows))),
        np.concatenate([held["lbl"][row] for row in rows]),
    )


def test_other_embedding_files_have_priority(tmp_path):
    write_source(tmp_path / "raw")
    source = str(tmp_path / "raw")
    before = xml_repository.read_xml_repository(source).fingerprint["files"]
    for prefix in COUNTS:
        assert {EMBEDDINGS.format(prefix), MAP.format(prefix)} <= set(before)
    np.save(tmp_path / "raw" / "trn_image_embeddings.npy", np.ones((13, WIDTH), np.float32))
    raw = xml_repository.read_xml_repository(source)
    assert isinstance(raw.train.items.images, image_embeddings.RawImages)
    assert isinstance(raw.test.items.images, image_embeddings.FileImages)


def test_images_of_tables(tmp_path, monkeypatch):
    directory = tmp_path / "d"
    directory.mkdir()
    rows = [{"id": f"q{n}", "text": f"t{n}", "labels": ["u"]} for n in range(5)]
    random_tables.write_rows(rows, directory / "train.jsonl")
    held = write_images(directory, "trn", 5, 3)
    (tmp_path / "spool").mkdir()
    monkeypatch.chdir(directory)
    raw = tabular.read_tables(
        ".", str(tmp_path / "spool"), find_images=image_embeddings.read_images
    )
    values = np.concatenate(list(raw.train.items.images.read(np.arange(5))))
    np.testing.assert_array_equal(values, np.concatenate(held))
    # Files beside the tables belong to the source.
    (directory / "filter_labels_train.txt").write_text("q1\tu\n")
    again = tabular.read_tables(
        ".", str(tmp_path / "spool"), find_images=image_embeddings.read_images
    )
    files = {"train.jsonl", EMBEDDINGS.format("trn"), MAP.format("trn")}
    assert set(raw.fingerprint["files"]) == files
    assert set(again.fingerprint["files"]) == {*files, "filter_labels_train.txt"}


def test_no_item_has_an_image(tmp_path):
    np.save(tmp_path / EMBEDDINGS.format("lbl"), np.zeros((0, WIDTH), np.float32))
    np.save(tmp_path / MAP.format("lbl"), objects([-1, [], [-1]]), allow_pickle=True)
    images = image_embeddings.read_images(str(tmp_path), "lbl", 3)
    assert images.width == WIDTH
    np.testing.assert_array_equal(images.offsets(np.arange(3)), [0, 0, 0, 0])
    assert [len(block) for block in images.read(np.arange(3))] == [0]


def test_file_names_with_other_numbers(tmp_path):
    np.save(tmp_path / "tst_embs_imgs_1_768_siglip2.npy", np.ones((2, 768), np.float32))
    np.save(tmp_path / "tst_imgs_224_1_map.npy", objects([[1], -1, 0]), allow_pickle=True)
    images = image_embeddings.read_images(str(tmp_path), "tst", 3)
    np.testing.assert_array_equal(images.rows, [[1], [-1], [0]])


def test_only_the_requested_rows_are_read(tmp_path):
    # A sparse file of 6 GB; reading all of it would show in the memory use.
    path, num = tmp_path / EMBEDDINGS.format("trn"), 1_300_000
    header = {"descr": "<f4", "fortran_order": False, "shape": (num, 1152)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()
        for row in (0, 650_000, num - 1):
            file.seek(begin + row * 1152 * 4)
            file.write(np.full(1152, row % 251, np.float32).tobytes())
    np.save(tmp_path / MAP.format("trn"), objects([[num - 1, 0], -1, 650_000]), allow_pickle=True)
    tracemalloc.start()
    images = image_embeddings.read_images(str(tmp_path), "trn", 3)
    values = np.concatenate(list(images.read(np.arange(3))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values.shape == (3, 1152) and values.dtype == np.float16
    np.testing.assert_array_equal(values[:, 7], [(num - 1) % 251, 0, 650_000 % 251])
    assert peak < 1 << 22


def test_blocks_are_equal_to_one_read(tmp_path, monkeypatch):
    held = write_images(tmp_path, "trn", 40, 5)
    images = image_embeddings.read_images(str(tmp_path), "trn", 40)
    rows = np.random.default_rng(0).permutation(40)[:30]
    monkeypatch.setattr(image_embeddings, "_BLOCK", 3 * WIDTH * 7)
    blocks = list(images.read(rows))
    assert len(blocks) == 5
    np.testing.assert_array_equal(
        np.concatenate(blocks), np.concatenate([held[row] for row in rows])
    )
    np.testing.assert_array_equal(np.diff(images.offsets(rows)), [len(held[row]) for row in rows])


def refused(directory, count=3):
    """The message of the error that reading the images raises."""
    with pytest.raises(InputError) as caught:
        image_embeddings.read_images(str(directory), "trn", count)
    message = str(caught.value)
    assert message.startswith(str(directory)) and "\n" not in message
    return message


@pytest.mark.parametrize(
    "mapped,fault",
    [
        (objects([[0], -1]), "found 2 items, expected 3, as many as texts in trn.raw.txt"),
        (objects([[0], -1, [1], [1]]), "found 4 items, expected 3, as many as texts"),
        (objects([[0], [1, 4], -1]), "item 1 (from 0): found row 4, expected one below 4"),
        (objects([-1, [1, 2], [3, -2]]), "item 2 (from 0): found row -2, expected one below 4"),
        (objects([-1, 2**31 - 1, [1]]), "found row 2147483647, expected one below 4"),
        (objects([-1, np.array([9]), [5]]), "item 1 (from 0): found row 9, expected one below 4"),
        (objects([[0], None, -1]), "item 1 (from 0): found NoneType, expected an integer"),
        (objects([[0], -1, "1"]), "item 2 (from 0): found str, expected an integer"),
        (objects([[0], {1: 2}, -1]), "found the opcode b'}'; expected only integers, lists and"),
        (objects([[0], [0] * 101, -1]), "item 1 (from 0): found 101 images, expected at most 100"),
        (np.zeros((3, 1), object), "expected objects in one dimension"),
        (np.zeros(3, int), "expected objects in one dimension"),
    ],
)
def test_invalid_maps_are_refused(tmp_path, mapped, fault):
    np.save(tmp_path / EMBEDDINGS.format("trn"), np.ones((4, WIDTH), np.float32))
    np.save(tmp_path / MAP.format("trn"), mapped, allow_pickle=True)
    message = refused(tmp_path)
    assert MAP.format("trn") in message and fault in message


@pytest.mark.parametrize(
    "embeddings,fault",
    [
        (
            np.ones((4, 2, 3), np.float32),
            "found float32 (4, 2, 3), expected floating point [images",
        ),
        (np.ones((4, 3), int), "found int64 (4, 3), expected floating point"),
        (np.ones((4, 0), np.float32), "found float32 (4, 0), expected floating point"),
        (objects([1, 2, 3, 4]), "holds Python objects, which are not read (found object (4,))"),
    ],
)
def test_invalid_embeddings_are_refused(tmp_path, embeddings, fault):
    np.save(tmp_path / EMBEDDINGS.format("trn"), embeddings, allow_pickle=True)
    np.save(tmp_path / MAP.format("trn"), objects([0, 1, 2]), allow_pickle=True)
    message = refused(tmp_path)
    assert EMBEDDINGS.format("trn") in message and fault in message


def test_one_file_of_each_kind_is_expected(tmp_path):
    write_images(tmp_path, "trn", 3, 0)
    embeddings, mapped = (tmp_path / name.format("trn") for name in (EMBEDDINGS, MAP))
    content = mapped.read_bytes()
    mapped.unlink()
    assert "/trn_imgs_*_map.npy: found none, expected one such file" in refused(tmp_path)
    mapped.write_bytes(content)
    (tmp_path / "trn_imgs_224_3_map.npy").write_bytes(content)
    assert "found trn_imgs_224_3_map.npy, trn_imgs_384_3_map.npy, expected" in refused(tmp_path)
    (tmp_path / "trn_imgs_224_3_map.npy").unlink()
    embeddings.unlink()
    assert "/trn_embs_imgs_*_siglip2.npy: found none, expected" in refused(tmp_path)
    mapped.unlink()
    assert image_embeddings.read_images(str(tmp_path), "trn", 3) is None


def test_widths_must_be_equal(tmp_path):
    write_source(tmp_path / "raw")
    write_images(tmp_path / "raw", "tst", COUNTS["tst"], 1, width=WIDTH + 1)
    with pytest.raises(InputError, match=r"unequal width \(.*trn_embs.* 6, tst_embs.* 7"):
        xml_repository.read_xml_repository(str(tmp_path / "raw"))


@pytest.mark.parametrize("value", [np.nan, -np.inf, 7e4])
def test_only_images_that_are_used_must_be_finite(tmp_path, value):
    embeddings = np.ones((4, WIDTH), np.float32)
    embeddings[3, 2] = value
    np.save(tmp_path / EMBEDDINGS.format("trn"), embeddings)
    for mapped, valid in (([[0, 2], -1, 1], True), ([[0, 2], -1, [1, 3]], False)):
        np.save(tmp_path / MAP.format("trn"), objects(mapped), allow_pickle=True)
        images = image_embeddings.read_images(str(tmp_path), "trn", 3)
        if valid:
            assert sum(map(len, images.read(np.arange(3)))) == 3
            continue
        with pytest.raises(InputError, match=r"siglip2.npy, row 3 \(from 0\): not finite in float"):
            list(images.read(np.arange(3)))
        assert sum(map(len, images.read(np.array([0, 1])))) == 2


class Touch:
    """Pickled as a shell command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_prepare_refuses_a_malicious_map(tmp_path):
    write_source(tmp_path / "raw")
    marker, path = tmp_path / "marker", tmp_path / "raw" / MAP.format("tst")
    np.save(path, objects([[0], Touch(marker), -1, -1, -1]), allow_pickle=True)
    done = subprocess.run(
        [sys.executable, "-m", "vixml_jax.prepare", f"--source={tmp_path / 'raw'}",
         f"--out={tmp_path / 'out'}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and not marker.exists()
    assert done.stderr == (
        f"error: {path}: found the name '{os.system.__module__}.system'; expected only integers, "
        "lists and arrays of integers (no code of the file was run)\n"
    )
    program = f"import numpy; numpy.load({str(path)!r}, allow_pickle=True)"
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert marker.exists()  # NumPy runs the command.
