"""ViXML's published picture files: a row a picture, and a pickled map of items to rows."""

import os
import pathlib
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from tests.data.sources import random_tables
from vixml_jax.data import preprocessing
from vixml_jax.data.images import image_files
from vixml_jax.data.sources import tabular, xml_repository
from vixml_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[3]
WIDTH = 6
COUNTS = {"trn": 13, "tst": 5, "lbl": 7}
EMBEDDINGS, MAP = "{}_embs_imgs_3_1152_siglip2.npy", "{}_imgs_384_3_map.npy"


def objects(values):
    """An array of them, whatever they are."""
    array = np.empty(len(values), object)
    for n, value in enumerate(values):
        array[n] = value
    return array


def spell(rng, rows):
    """One of the ways a map may say the rows of an item."""
    ways = [rows, np.array(rows, np.int64), [np.int64(row) for row in rows]]
    if len(rows) == 1:
        ways += [rows[0], np.int64(rows[0])]
    if not rows:
        ways += [-1, [-1], np.array([-1])]
    if rows:
        ways += [[*rows, -1], [-1, *rows], np.array(rows, object)]
    return ways[rng.integers(len(ways))]


def write_pictures(directory, prefix, count, seed, *, width=WIDTH):
    """Random pictures of items; returns those of each item, as they must be found."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, count)
    lengths[:2] = 0, 3
    order = rng.permutation(lengths.sum() + 2).tolist()  # Two belong to no item.
    rows = [[order.pop() for _ in range(length)] for length in lengths]
    embeddings = rng.normal(size=(lengths.sum() + 2, width)).astype(np.float32)
    np.save(directory / EMBEDDINGS.format(prefix), embeddings)
    mapped = objects([spell(rng, item) for item in rows])
    np.save(directory / MAP.format(prefix), mapped, allow_pickle=True)
    return [embeddings[item].astype(np.float16) for item in rows]


def write_source(directory, seed=0, prefixes=tuple(COUNTS)):
    """A source in the XML repository's layout, with pictures; returns these."""
    directory.mkdir()
    rng = np.random.default_rng(seed)
    for prefix, count in COUNTS.items():
        texts = "".join(f"{prefix} {n} {rng.integers(99)}\n" for n in range(count))
        (directory / f"{prefix}.raw.txt").write_text(texts)
        if prefix != "lbl":
            rows = "".join(f"{rng.integers(7)}:1\n" for _ in range(count))
            (directory / f"{prefix}_X_Y.txt").write_text(f"{count} 7\n{rows}")
    return {
        prefix: write_pictures(directory, prefix, COUNTS[prefix], seed + n)
        for n, prefix in enumerate(prefixes)
    }


def check(found, expected):
    """Pictures of a prepared part against those of each item."""
    assert len(found.offsets) == len(expected) + 1
    for a, b, pictures in zip(found.offsets, found.offsets[1:], expected, strict=False):
        np.testing.assert_array_equal(found.values[a:b], pictures)


@pytest.mark.parametrize("seed", range(6))
def test_pictures_arrive_at_their_items(tmp_path, seed):
    held = write_source(tmp_path / "raw", seed)
    raw = preprocessing.read_source(str(tmp_path / "raw"))
    settings = preprocessing.Settings(vocab_size=64)
    dataset = preprocessing.prepare(raw, str(tmp_path / "out"), settings)
    assert dataset.image_width == WIDTH
    check(dataset.train.images, held["trn"])
    check(dataset.test.images, held["tst"])
    check(dataset.labels.images, held["lbl"])


def test_one_kind_of_items_may_be_without(tmp_path):
    held = write_source(tmp_path / "raw", prefixes=("tst", "lbl"))
    raw = xml_repository.read_xml_repository(str(tmp_path / "raw"))
    assert raw.train.items.images is None
    assert isinstance(raw.labels.images, image_files.FileImages)
    rows = np.array([1, 4, 6])
    np.testing.assert_array_equal(
        np.concatenate(list(raw.labels.images.read(rows))),
        np.concatenate([held["lbl"][row] for row in rows]),
    )


def test_own_files_go_first_and_changes_are_noticed(tmp_path):
    write_source(tmp_path / "raw")
    source = str(tmp_path / "raw")
    before = xml_repository.read_xml_repository(source).fingerprint["files"]
    for prefix in COUNTS:
        assert {EMBEDDINGS.format(prefix), MAP.format(prefix)} <= set(before)
    np.save(tmp_path / "raw" / "trn_image_embeddings.npy", np.ones((13, WIDTH), np.float32))
    raw = xml_repository.read_xml_repository(source)
    assert isinstance(raw.train.items.images, image_files.RawImages)
    assert isinstance(raw.test.items.images, image_files.FileImages)


def test_beside_random_tables(tmp_path, monkeypatch):
    directory = tmp_path / "d"
    directory.mkdir()
    rows = [{"id": f"q{n}", "text": f"t{n}", "labels": ["u"]} for n in range(5)]
    random_tables.write_rows(rows, directory / "train.jsonl")
    held = write_pictures(directory, "trn", 5, 3)
    (tmp_path / "spool").mkdir()
    monkeypatch.chdir(directory)
    raw = tabular.read_tables(".", str(tmp_path / "spool"), find_images=image_files.read_images)
    found = np.concatenate(list(raw.train.items.images.read(np.arange(5))))
    np.testing.assert_array_equal(found, np.concatenate(held))
    # What is changed beside a table changes the source.
    (directory / "filter_labels_train.txt").write_text("q1\tu\n")
    again = tabular.read_tables(".", str(tmp_path / "spool"), find_images=image_files.read_images)
    files = {"train.jsonl", EMBEDDINGS.format("trn"), MAP.format("trn")}
    assert set(raw.fingerprint["files"]) == files
    assert set(again.fingerprint["files"]) == {*files, "filter_labels_train.txt"}


def test_a_set_without_any_pictures(tmp_path):
    np.save(tmp_path / EMBEDDINGS.format("lbl"), np.zeros((0, WIDTH), np.float32))
    np.save(tmp_path / MAP.format("lbl"), objects([-1, [], [-1]]), allow_pickle=True)
    found = image_files.read_images(str(tmp_path), "lbl", 3)
    assert found.width == WIDTH
    np.testing.assert_array_equal(found.offsets(np.arange(3)), [0, 0, 0, 0])
    assert [len(block) for block in found.read(np.arange(3))] == [0]


def test_other_numbers_in_the_names(tmp_path):
    np.save(tmp_path / "tst_embs_imgs_1_768_siglip2.npy", np.ones((2, 768), np.float32))
    np.save(tmp_path / "tst_imgs_224_1_map.npy", objects([[1], -1, 0]), allow_pickle=True)
    found = image_files.read_images(str(tmp_path), "tst", 3)
    np.testing.assert_array_equal(found.rows, [[1], [-1], [0]])


def test_only_what_is_asked_for_is_read(tmp_path):
    # 6 GB of which nearly all is a hole: were it read whole, memory would show it.
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
    found = image_files.read_images(str(tmp_path), "trn", 3)
    values = np.concatenate(list(found.read(np.arange(3))))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values.shape == (3, 1152) and values.dtype == np.float16
    np.testing.assert_array_equal(values[:, 7], [(num - 1) % 251, 0, 650_000 % 251])
    assert peak < 1 << 22


def test_blocks_are_those_of_one_piece(tmp_path, monkeypatch):
    held = write_pictures(tmp_path, "trn", 40, 5)
    found = image_files.read_images(str(tmp_path), "trn", 40)
    rows = np.random.default_rng(0).permutation(40)[:30]
    monkeypatch.setattr(image_files, "_BLOCK", 3 * WIDTH * 7)
    blocks = list(found.read(rows))
    assert len(blocks) == 5
    np.testing.assert_array_equal(
        np.concatenate(blocks), np.concatenate([held[row] for row in rows])
    )
    np.testing.assert_array_equal(np.diff(found.offsets(rows)), [len(held[row]) for row in rows])


def refused(directory, count=3):
    with pytest.raises(InputError) as caught:
        image_files.read_images(str(directory), "trn", count)
    message = str(caught.value)
    assert message.startswith(str(directory)) and "\n" not in message
    return message


@pytest.mark.parametrize(
    "mapped,fault",
    [
        (objects([[0], -1]), "2 items, but there are 3 texts in trn.raw.txt"),
        (objects([[0], -1, [1], [1]]), "4 items, but there are 3 texts"),
        (objects([[0], [1, 4], -1]), "item 1 (from 0): row 4, expected one below 4"),
        (objects([-1, [1, 2], [3, -2]]), "item 2 (from 0): row -2, expected one below 4"),
        (objects([-1, 2**31 - 1, [1]]), "item 1 (from 0): row 2147483647, expected one below 4"),
        (objects([-1, np.array([9]), [5]]), "item 1 (from 0): row 9, expected one below 4"),
        (objects([[0], None, -1]), "item 1 (from 0): NoneType, expected an integer"),
        (objects([[0], -1, "1"]), "item 2 (from 0): str, expected an integer"),
        (objects([[0], {1: 2}, -1]), "holds the opcode b'}'; expected integers, lists and arrays"),
        (objects([[0], [0] * 101, -1]), "item 1 (from 0): 101 pictures, expected 100 at most"),
        (np.zeros((3, 1), object), "expected objects in one dimension"),
        (np.zeros(3, int), "expected objects in one dimension"),
    ],
)
def test_maps_that_do_not_fit(tmp_path, mapped, fault):
    np.save(tmp_path / EMBEDDINGS.format("trn"), np.ones((4, WIDTH), np.float32))
    np.save(tmp_path / MAP.format("trn"), mapped, allow_pickle=True)
    message = refused(tmp_path)
    assert MAP.format("trn") in message and fault in message


@pytest.mark.parametrize(
    "embeddings,fault",
    [
        (np.ones((4, 2, 3), np.float32), "float32 (4, 2, 3), expected floating point [pictures"),
        (np.ones((4, 3), int), "int64 (4, 3), expected floating point"),
        (np.ones((4, 0), np.float32), "float32 (4, 0), expected floating point"),
        (objects([1, 2, 3, 4]), "not a whole .npy file"),
    ],
)
def test_embeddings_that_do_not_fit(tmp_path, embeddings, fault):
    np.save(tmp_path / EMBEDDINGS.format("trn"), embeddings, allow_pickle=True)
    np.save(tmp_path / MAP.format("trn"), objects([0, 1, 2]), allow_pickle=True)
    message = refused(tmp_path)
    assert EMBEDDINGS.format("trn") in message and fault in message


def test_there_must_be_one_file_of_each(tmp_path):
    write_pictures(tmp_path, "trn", 3, 0)
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
    assert image_files.read_images(str(tmp_path), "trn", 3) is None


def test_widths_must_be_equal(tmp_path):
    write_source(tmp_path / "raw")
    write_pictures(tmp_path / "raw", "tst", COUNTS["tst"], 1, width=WIDTH + 1)
    with pytest.raises(InputError, match=r"unequal width \(.*trn_embs.* 6, tst_embs.* 7"):
        xml_repository.read_xml_repository(str(tmp_path / "raw"))


@pytest.mark.parametrize("value", [np.nan, -np.inf, 7e4])
def test_pictures_must_be_finite_where_they_are_used(tmp_path, value):
    embeddings = np.ones((4, WIDTH), np.float32)
    embeddings[3, 2] = value
    np.save(tmp_path / EMBEDDINGS.format("trn"), embeddings)
    for mapped, fine in (([[0, 2], -1, 1], True), ([[0, 2], -1, [1, 3]], False)):
        np.save(tmp_path / MAP.format("trn"), objects(mapped), allow_pickle=True)
        found = image_files.read_images(str(tmp_path), "trn", 3)
        if fine:
            assert sum(map(len, found.read(np.arange(3)))) == 3
            continue
        with pytest.raises(InputError, match=r"siglip2.npy, row 3 \(from 0\): not finite in float"):
            list(found.read(np.arange(3)))
        assert sum(map(len, found.read(np.array([0, 1])))) == 2


class Touch:
    """Pickled as a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_malicious_map_is_refused_through_the_door(tmp_path):
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
        f"error: {path}: holds the name '{os.system.__module__}.system'; expected integers, lists "
        "and arrays of integers alone, and nothing else was made or run\n"
    )
    program = f"import numpy; numpy.load({str(path)!r}, allow_pickle=True)"
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert marker.exists()  # Numpy ran it.
