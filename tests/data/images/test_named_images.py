"""Images in cells of tables: paths, URLs and contents; how they are collected and selected."""

import base64
import pathlib

import numpy as np
import pytest

from vixml_jax.data.images import named_images
from vixml_jax.data.images.named_images import NamedImages
from vixml_jax.data.sources.raw import RawDataset, RawItems, RawQueries, SelectedImages
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.errors import InputError

CONTENT = b"\x89PNG\r\n\x1a\n" + bytes(range(100))
TEXT = base64.b64encode(CONTENT).decode()


def read(cell, path="dir/rows.jsonl"):
    return named_images.read_cell(Chunk(path, [7], {"image": [cell]}), 0, "image")


@pytest.mark.parametrize("cell,expected", [
    (None, []), ("", []), ("  ", []), ([], []), ([None, ""], []),
    ({"bytes": None, "path": None}, []),
    ("a.png", ["dir/a.png"]), (" a b.png ", ["dir/a b.png"]), ("/x/a.png", ["/x/a.png"]),
    ("a.png|sub/b.png", ["dir/a.png", "dir/sub/b.png"]),
    (["a.png", "/b.png"], ["dir/a.png", "/b.png"]),
    ('["a.png", "b.png"]', ["dir/a.png", "dir/b.png"]),
    (np.array(["a.png", "b.png"], object), ["dir/a.png", "dir/b.png"]),
    ("https://h/a.png|http://h/b.png", ["https://h/a.png", "http://h/b.png"]),
    ("file:///x/a%20b.png", ["/x/a b.png"]),
    (12, ["dir/12"]),
    (CONTENT, [CONTENT]), (bytearray(CONTENT), [CONTENT]), (memoryview(CONTENT), [CONTENT]),
    ([CONTENT, "a.png"], [CONTENT, "dir/a.png"]),
    ({"bytes": CONTENT, "path": "a.png"}, [CONTENT]),
    ({"bytes": None, "path": "a.png"}, ["dir/a.png"]), ({"path": "http://h/a"}, ["http://h/a"]),
    ({"bytes": TEXT}, [CONTENT]),
    ([{"bytes": CONTENT, "path": None}, {"path": "b.png"}], [CONTENT, "dir/b.png"]),
    (f"data:image/png;base64,{TEXT}", [CONTENT]),
    (f"data:;base64,{TEXT}|b.png", [CONTENT, "dir/b.png"]),
    (TEXT, [CONTENT]), ([TEXT, TEXT[:40] + "\n" + TEXT[40:]], [CONTENT, CONTENT]),
    ("/9j/" + "x" * 200 + ".jpg", ["/9j/" + "x" * 200 + ".jpg"]),  # A path after all.
    ("/9j/4AAQ", ["/9j/4AAQ"]),  # Too short to be an image.
])  # fmt: skip
def test_cells(cell, expected):
    assert read(cell) == expected


@pytest.mark.parametrize("cell", [
    {"bytes": "no base64!"}, {"width": 5}, {}, True, [[1, 2], [3, 4]], "data:image/png;base64",
    "data:image/png;base64,?", {"path": ["a.png"]}, {"bytes": 5},
])  # fmt: skip
def test_other_cells_are_refused(cell):
    with pytest.raises(InputError) as caught:
        read(cell)
    assert str(caught.value).startswith("dir/rows.jsonl, line 7: 'image' is ")
    assert "expected text" in str(caught.value) and "\n" not in str(caught.value)


def test_paths_of_a_table_in_the_working_directory():
    assert read("a.png", path="rows.csv") == ["a.png"]


@pytest.mark.parametrize("wanted", [True, False])
def test_contents_are_written_where_they_are_wanted(wanted, tmp_path):
    cells = ["a.png", None, CONTENT, ["b.png", {"bytes": CONTENT[:9], "path": "c"}]]
    collector = named_images.Collector(str(tmp_path / "spool"), wanted=wanted)
    chunk = Chunk("rows.parquet", range(1, 5), {"image": cells})
    for row in range(4):
        collector.add(chunk, row, "image")
    images = collector.images("rows.parquet")
    assert list(np.diff(images.at)) == [1, 0, 1, 2] and images.names[::2] == ["a.png", "b.png"]
    if wanted:
        assert [pathlib.Path(x).read_bytes() for x in images.names[1::2]] == [CONTENT, CONTENT[:9]]
        assert [images.origins[x] for x in images.names[1::2]] == [
            "rows.parquet, row 3", "rows.parquet, row 4"
        ]  # fmt: skip
    else:
        assert not (tmp_path / "spool").exists() and not images.origins


def test_cells_without_images_are_counted_or_refused(tmp_path):
    chunk = Chunk("rows.jsonl", [1, 2], {"image": [{"width": 5}, None]})
    collector = named_images.Collector(str(tmp_path), wanted=False)
    for row in (1, 0):
        collector.add(chunk, row, "image")
    assert list(collector.images("x").at) == [0, 0, 1]
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: 'image' is "):
        named_images.Collector(str(tmp_path), wanted=True).add(chunk, 0, "image")
    assert named_images.Collector(str(tmp_path), wanted=True).images("x") is None


def test_selections_of_selections():
    rng = np.random.default_rng()
    names = [[f"{i}/{j}" for j in range(rng.integers(0, 4))] for i in range(40)]
    at = np.cumsum([0, *map(len, names)])
    images = NamedImages([name for item in names for name in item], at, "x")
    assert images.by_item() == names
    first, second = np.sort(rng.choice(40, 25, replace=False)), np.arange(0, 25, 2)
    selected = SelectedImages(SelectedImages(images, first), second)
    items = RawItems(13, lambda: [], selected)
    raw = RawDataset("x", {}, RawItems(40, lambda: [], images), RawQueries(items, None))
    parts = named_images.parts(raw)
    assert parts["labels"].by_item() == names
    assert parts["train"].by_item() == [names[first[i]] for i in second]
    rows = np.arange(13)
    np.testing.assert_array_equal(parts["train"].offsets(rows), selected.offsets(rows))
    dropped = named_images.drop(raw)
    assert dropped.labels.images is dropped.train.items.images is None
    total = sum(map(len, names)) + len(parts["train"].names)
    assert dropped.warnings == (
        f"{total:,} images named, not read: add --images=MODEL (a SigLIP checkpoint)",
    )


def test_data_without_named_images_have_no_warning():
    raw = RawDataset("x", {}, RawItems(2, lambda: []), RawQueries(RawItems(2, lambda: []), None))
    assert named_images.drop(raw).warnings == named_images.check_files(raw).warnings == ()
