"""Small pictures of some queries, as text that a page shows without another file."""

import base64
import io
import os
from collections.abc import Collection

from vixml_jax.data.images import download
from vixml_jax.data.sources import columns, readers, values
from vixml_jax.data.sources.columns import Columns
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.errors import InputError

SIDE = 144  # Pixels at most, either way.


def find(path: str, ids: Collection[str]) -> dict[str, list[str]]:
    """Paths of the pictures that a table names for some ids, read in one pass.

    Args:
      path: Of a table with an id and an image column, named so that they are guessed: the source of
        the data will do. Paths are relative to it.
      ids: Whose pictures are wanted; a row without an id has its line for one.

    Raises:
      InputError: If the file cannot be read, or has no such columns.
    """
    names = readers.column_names(path, encoding="utf-8")
    roles = columns.assign(path, Columns(), "utf-8", names=names, labelled=False)
    if roles.image is None:
        raise InputError(f"--report_pictures={path}: no image column among {', '.join(names)}")
    wanted, found = set(ids), {}
    directory = os.path.dirname(os.path.abspath(path))
    for line, row in readers.read_rows(path):
        if isinstance(row, InputError):
            raise row
        name = str(row.get(roles.id, line)) if roles.id else str(line)
        if name in wanted:
            chunk = Chunk(path, [line], {roles.image: [row.get(roles.image)]})
            parts = values.pieces(row.get(roles.image), "|", chunk, 0, roles.image)
            named = [values.text(part, chunk, 0, roles.image) for part in parts]
            found[name] = [p if download.is_url(p) else os.path.join(directory, p) for p in named]
    return found


def draw(path: str) -> str:
    """A picture as a `data:` url, no larger than SIDE; empty where it is none on this disk."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            small = ImageOps.exif_transpose(picture).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""
    small.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
