"""Thumbnails of the queries' images as `data:` URLs, so that the report needs no other file."""

import base64
import io
from collections.abc import Collection

from vixml_jax.data.images import image_reader, named_images
from vixml_jax.data.images.image_reader import ImageSource
from vixml_jax.data.sources import columns, readers, values
from vixml_jax.data.sources.columns import Columns
from vixml_jax.data.sources.delimited import USUAL
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.data.sources.reading import Reading
from vixml_jax.errors import InputError

MAX_SIDE = 144  # Pixels.


def find(
    path: str, ids: Collection[str], reading: Reading | None = None
) -> dict[str, list[ImageSource]]:
    """Returns the images that a table gives for some ids. The table is read once.

    Args:
      path: A table, such as the source that the data were prepared from. In a table without ids,
        the id of a row is its number from 0, as in data prepared from it.
      ids: Ids to look up.
      reading: How the tables of the data were read. Columns that it does not know are recognised by
        their names.

    Raises:
      InputError: If the file cannot be read, has no image column or none of the ids.
    """
    dialect = USUAL if reading is None else reading.dialect_for(path)
    names = readers.column_names(path, dialect=dialect)
    kept = Columns() if reading is None else reading.columns_for(names)
    image = "" if kept.image == columns.NONE else kept.image
    given = Columns(id=kept.id, image=image)
    roles = columns.assign(path, given, dialect, names=names, labelled=False)
    if roles.image is None:
        raise InputError(f"--report_images={path}: no image column among {', '.join(names)}")
    if roles.id is None and any(name.strip().lower() in columns.SPLIT_NAMES for name in names):
        # Rows are numbered within each split.
        raise InputError(
            f"--report_images={path}: no id column among {', '.join(names)}; expected one, because "
            "the table has several splits"
        )
    ids, found = set(ids), {}
    for number, (line, row) in enumerate(readers.read_rows(path, dialect=dialect)):
        if isinstance(row, InputError):
            raise row
        chunk = Chunk(path, [line], {name: [row.get(name)] for name in roles.used})
        id = str(number)
        if roles.id:
            id = values.text(row.get(roles.id), chunk, 0, roles.id)
        if id in ids:
            found[id] = named_images.read_cell(chunk, 0, roles.image)
    if ids and not found:
        raise InputError(
            f"--report_images={path}: has none of the queries that the report shows, such as "
            f"{min(ids)!r}; expected the table that the data were prepared from"
        )
    return found


def draw(source: ImageSource) -> str:
    """Returns an image as a `data:` URL of at most MAX_SIDE pixels; "" if it is unreadable."""
    try:
        small = image_reader.read(source)
    except (OSError, ValueError):
        return ""
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii")
