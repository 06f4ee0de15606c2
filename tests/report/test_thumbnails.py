"""Thumbnails: image files looked up in a table, and scaled down."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from vixml_jax.errors import InputError
from vixml_jax.report import thumbnails


def test_find_returns_the_images_of_the_given_ids(tmp_path):
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


def test_rows_without_ids_are_found_by_line_number(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("image\na.png\nb.png\n")
    assert thumbnails.find(str(path), ["3"]) == {"3": [str(tmp_path / "b.png")]}


def test_table_without_image_column_is_rejected(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id,text\n1,a\n")
    with pytest.raises(InputError, match="no image column among id, text"):
        thumbnails.find(str(path), ["1"])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "CMYK"])
def test_thumbnail_keeps_the_aspect_ratio(mode, tmp_path):
    pixels = np.random.default_rng().integers(0, 255, (300, 600, 3), np.uint8)
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.fromarray(pixels).convert(mode).save(path)
    head, _, data = thumbnails.draw(str(path)).partition(",")
    assert head == "data:image/png;base64"
    small = Image.open(io.BytesIO(base64.b64decode(data)))
    assert small.size == (thumbnails.MAX_SIDE, thumbnails.MAX_SIDE // 2)


def test_unreadable_image_gives_an_empty_string(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\nno more")
    for name in (path, tmp_path / "none.png", "https://example.com/b.png", tmp_path):
        assert thumbnails.draw(str(name)) == ""
