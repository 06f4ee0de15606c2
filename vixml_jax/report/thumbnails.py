"""Thumbnails of the queries' images as `data:` URLs, so that the report needs no other file."""

import base64
import io
import os
from collections.abc import Collection

from vixml_jax.data.images import download
from vixml_jax.data.sources import columns, readers, values
from vixml_jax.data.sources.columns import Columns
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.errors import InputError

MAX_SIDE = 144  # Pixels.


def find(path: str, ids: Collection[str]) -> dict[str, list[str]]:
    """Returns the image files that a table lists for some ids. The table is read once.

    Args:
      path: A table whose id and image columns are recognised by their names, such as the source
        that the data were prepared from. Image paths are relative to its directory.
      ids: Ids to look up. A row without an id has its line number as id.

    Raises:
      InputError: If the file cannot be read, or has no image column.
    """
    names = readers.column_names(path, encoding="utf-8")
    roles = columns.assign(path, Columns(), "utf-8", names=names, labelled=False)
    if roles.image is None:
        raise InputError(f"--report_images={path}: no image column among {', '.join(names)}")
    ids, paths = set(ids), {}
    directory = os.path.dirname(os.path.abspath(path))
    for line, row in readers.read_rows(path):
        if isinstance(row, InputError):
            raise row
        id = str(row.get(roles.id, line)) if roles.id else str(line)
        if id in ids:
            chunk = Chunk(path, [line], {roles.image: [row.get(roles.image)]})
            parts = values.list_items(row.get(roles.image), "|", chunk, 0, roles.image)
            files = [values.text(part, chunk, 0, roles.image) for part in parts]
            paths[id] = [f if download.is_url(f) else os.path.join(directory, f) for f in files]
    return paths


def draw(path: str) -> str:
    """Returns an image file as a `data:` URL of at most MAX_SIDE pixels; "" if it is unreadable."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            small = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
