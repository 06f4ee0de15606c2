"""Thumbnails: image files looked up in a table, and scaled down."""

import base64
import io
import json

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from vixml_jax.data.sources.columns import Columns
from vixml_jax.data.sources.delimited import Dialect
from vixml_jax.data.sources.reading import Reading
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


def test_rows_without_ids_are_found_by_their_number(tmp_path):
    """Prepared data name such rows by their number from 0."""
    path = tmp_path / "rows.csv"
    path.write_text("image\na.png\nb.png\n")
    assert thumbnails.find(str(path), ["1"]) == {"1": [str(tmp_path / "b.png")]}
    with pytest.raises(InputError, match=r"has none of the queries .*'2'; expected the table that"):
        thumbnails.find(str(path), ["2"])
    path.write_text("image,Split\na.png,train\nb.png,test\n")
    with pytest.raises(InputError, match="no id column among image, Split; expected one, because"):
        thumbnails.find(str(path), ["1"])


def test_ids_are_read_as_prepared_data_have_them(tmp_path):
    path, content = tmp_path / "rows.parquet", png_content()
    table = pyarrow.table({
        "id": [1.0, 2.0, None], "text": list("abc"), "image": [{"bytes": content, "path": "x"}] * 3
    })  # fmt: skip
    parquet.write_table(table, path)
    found = thumbnails.find(str(path), ["2"])
    assert found == {"2": [content]} and thumbnails.draw(content).startswith("data:image/png;")


def test_columns_and_dialect_of_the_data_are_used(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes("Nr;Bild;Größe;image\n7;ü.png;3;x.png\n".encode("cp1252"))
    dialect = Dialect(encoding="cp1252", delimiter=";")
    reading = Reading(kind="csv", columns=Columns(id="Nr", image="Bild"), dialect=dialect)
    assert thumbnails.find(str(path), ["7"], reading) == {"7": [str(tmp_path / "ü.png")]}


def png_content():
    out = io.BytesIO()
    Image.new("RGB", (300, 100), "red").save(out, "PNG")
    return out.getvalue()


def test_thumbnails_are_upright_and_on_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(tmp_path / "x.png", exif=exif)
    data = thumbnails.draw(str(tmp_path / "x.png")).partition(",")[2]
    small = Image.open(io.BytesIO(base64.b64decode(data)))
    assert small.size == (20, 40) and small.getcolors() == [(800, (255, 255, 255))]


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
