"""Pictures of queries: found in the table that names them, and made small."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from vixml_jax.errors import InputError
from vixml_jax.report import thumbnails


def test_paths_are_those_of_the_rows_that_are_wanted(tmp_path):
    rows = [
        {"id": f"q{i}", "title": f"text {i}", "image": f"{i}.png|sub/{i}.jpg"} for i in range(9)
    ]
    rows[4]["image"] = None
    rows[5]["image"] = ["a.png", "https://example.com/b.png"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = thumbnails.find(str(path), ["q2", "q4", "q5", "q77"])
    assert found == {
        "q2": [str(tmp_path / "2.png"), str(tmp_path / "sub/2.jpg")],
        "q4": [],
        "q5": [str(tmp_path / "a.png"), "https://example.com/b.png"],
    }


def test_rows_without_ids_and_texts_are_known_by_their_line(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("image\na.png\nb.png\n")
    assert thumbnails.find(str(path), ["3"]) == {"3": [str(tmp_path / "b.png")]}


def test_a_table_without_pictures_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,text\n1,a\n")
    with pytest.raises(InputError, match="no image column among id, text"):
        thumbnails.find(str(path), ["1"])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "CMYK"])
def test_small_and_of_the_same_shape(mode, tmp_path):
    pixels = np.random.default_rng().integers(0, 255, (300, 600, 3), np.uint8)
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.fromarray(pixels).convert(mode).save(path)
    head, _, data = thumbnails.draw(str(path)).partition(",")
    assert head == "data:image/png;base64"
    small = Image.open(io.BytesIO(base64.b64decode(data)))
    assert small.size == (thumbnails.SIDE, thumbnails.SIDE // 2)


def test_what_is_no_picture_is_empty(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    for name in (path, tmp_path / "none.png", "https://example.com/b.png", tmp_path):
        assert thumbnails.draw(str(name)) == ""
