"""Images that a source names or contains, before a vision model embeds them."""

import array
import contextlib
import dataclasses
import os
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float16, Int

from vixml_jax.data import store
from vixml_jax.data.images import image_embeddings, image_files, image_reader
from vixml_jax.data.images.image_reader import ImageSource
from vixml_jax.data.sources import values
from vixml_jax.data.sources.raw import ItemImages, RawDataset, SelectedImages
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.errors import InputError

_SEPARATOR = "|"  # Of the images of a text cell.
# Base64 text of the formats that web pages and JSON files contain, for cells without `data:`.
_BASE64_STARTS = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")  # PNG, JPEG, GIF, WebP.
_BYTES = bytes | bytearray | memoryview
_LEAST_BASE64 = 100  # Characters; shorter texts are paths.


class NamedImages(NamedTuple):
    """The images that items name, one item after the other; an `ItemImages` without embeddings.

    Attributes:
      names: Path or URL of each image.
      at: Where the images of each item begin.
      path: The file that names them, for messages.
      origins: For images whose content the source has, and which `names` has as temporary files:
        where they come from, by path of the file.
    """

    names: Sequence[str]
    at: Int[np.ndarray, " n+1"]
    path: str
    origins: Mapping[str, str] = {}

    @property
    def width(self) -> int:
        """No dimensions, since there are no embeddings."""
        return 0

    def offsets(self, rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, " r+1"]:
        """Where the images of each row begin among the images of all `rows`."""
        return np.concatenate([[0], np.cumsum(self.at[rows + 1] - self.at[rows])])

    def read(self, rows: Int[np.ndarray, " r"]) -> Iterator[Float16[np.ndarray, "k v"]]:
        """Must not be called: the images are not embedded."""
        raise ValueError(f"{self.path}: images are not embedded")

    def select(self, rows: Int[np.ndarray, " r"]) -> "NamedImages":
        """The images of some items."""
        offsets = self.offsets(rows)
        taken = store.ranges(self.at[rows], np.diff(offsets)).tolist()
        return self._replace(names=[self.names[i] for i in taken], at=offsets)

    def by_item(self) -> list[list[str]]:
        """The names of each item's images."""
        ends = zip(self.at[:-1].tolist(), self.at[1:].tolist(), strict=True)
        return [list(self.names[start:end]) for start, end in ends]


def find(directory: str, prefix: str, count: int) -> NamedImages | None:
    """The images named in `{prefix}_images.txt`; see `image_files.read_paths`."""
    paths = image_files.read_paths(directory, prefix, count)
    if paths is None:
        return None
    at = np.concatenate([[0], np.cumsum([len(item) for item in paths], dtype=np.int64)])
    names = [name for item in paths for name in item]
    return NamedImages(names, at, os.path.join(directory, f"{prefix}_images.txt"))


def find_embeddings_or_names(directory: str, prefix: str, count: int) -> ItemImages | None:
    """The embeddings beside the texts (`image_embeddings.read_images`), else the named images."""
    embeddings = image_embeddings.read_images(directory, prefix, count)
    return find(directory, prefix, count) if embeddings is None else embeddings


def parts(raw: RawDataset) -> dict[str, NamedImages]:
    """The named images of each split and of the labels, where there are any."""
    images = {part: queries.items.images for part, queries in raw.splits.items()}
    images["labels"] = raw.labels.images
    named = {part: _named(part_images) for part, part_images in images.items()}
    return {part: part_images for part, part_images in named.items() if part_images is not None}


def _named(images: ItemImages | None) -> NamedImages | None:
    """The images if they are named ones, or selected from such."""
    if isinstance(images, SelectedImages):
        inner = _named(images.images)
        return None if inner is None else inner.select(images.rows)
    return images if isinstance(images, NamedImages) else None


def replace(raw: RawDataset, images: Mapping[str, ItemImages | None]) -> RawDataset:
    """The data set with other images of some parts."""
    changes: dict[str, Any] = {
        part: dataclasses.replace(
            queries, items=dataclasses.replace(queries.items, images=images[part])
        )
        for part, queries in raw.splits.items()
        if part in images
    }
    if "labels" in images:
        changes["labels"] = dataclasses.replace(raw.labels, images=images["labels"])
    return dataclasses.replace(raw, **changes)


def drop(raw: RawDataset) -> RawDataset:
    """The data set without named images, which no model embeds, and a warning that says so."""
    named = parts(raw)
    count = sum(len(images.names) for images in named.values())
    raw = replace(raw, dict.fromkeys(named))
    if not count:
        return raw
    images = "1 image" if count == 1 else f"{count:,} images"
    return _with_warning(raw, f"{images} named, not read: add --images=MODEL (a SigLIP checkpoint)")


def check_files(raw: RawDataset) -> RawDataset:
    """The data set with a warning if image files that it names do not exist."""
    names = dict.fromkeys(name for images in parts(raw).values() for name in images.names)
    missing = [name for name in names if "://" not in name and not os.path.isfile(name)]
    if not missing:
        return raw
    return _with_warning(
        raw,
        f"image files that do not exist: {len(missing):,} of {len(names):,}; the first is "
        f"{missing[0]}",
    )


def _with_warning(raw: RawDataset, warning: str) -> RawDataset:
    return dataclasses.replace(raw, warnings=(*raw.warnings, warning))


class Collector:
    """Collects the images of a column while tables are read.

    Args:
      directory: Where the content of images is written to; created when needed.
      wanted: Whether the images will be embedded. If not, they are only counted: no content is
        written, and a cell that is not an image counts as one.
    """

    def __init__(self, directory: str, *, wanted: bool):
        self._directory, self._wanted = directory, wanted
        self._names: list[str] = []
        self._counts = array.array("q")
        self._origins: dict[str, str] = {}

    def add(self, chunk: Chunk, row: int, column: str) -> None:
        """Adds the images of the next item."""
        try:
            sources = read_cell(chunk, row, column)
        except InputError:
            if self._wanted:
                raise
            sources = [""]
        for source in sources:
            if isinstance(source, bytes):
                source = self._write(source, chunk.where(row))
            self._names.append(source)
        self._counts.append(len(sources))

    def _write(self, content: bytes, where: str) -> str:
        path = os.path.join(self._directory, f"image_{len(self._names)}")
        if self._wanted:
            os.makedirs(self._directory, exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
            self._origins[path] = where
        return path

    def images(self, path: str) -> NamedImages | None:
        """All images; None if there are none."""
        if not self._names:
            return None
        at = np.concatenate([[0], np.cumsum(np.frombuffer(self._counts, np.int64))])
        return NamedImages(self._names, at, path, self._origins)


def read_cell(chunk: Chunk, row: int, column: str) -> list[ImageSource]:
    """The images of a cell: paths, relative to the table, URLs, or contents.

    A cell has one image or a list of them; in a text, '|' separates several. An image is a path,
    an http, https, file or data URL, base64 text, binary content, or the structure {bytes, path}
    of Hugging Face `datasets`, in which the content is preferred.

    Raises:
      InputError: If the cell has something else; names the line.
    """
    cell = chunk.columns[column][row]
    if isinstance(cell, dict | _BYTES):
        items = [cell]
    elif isinstance(cell, str) and cell.strip().startswith("data:"):
        items = cell.split(_SEPARATOR)
    else:
        items = values.list_items(cell, _SEPARATOR, chunk, row, column)
    sources = (_source(item, chunk, row, column) for item in items)
    return [source for source in sources if source is not None]


def _source(item: Any, chunk: Chunk, row: int, column: str) -> ImageSource | None:
    """One image of a cell; None for an empty one."""
    if isinstance(item, dict):
        content, path = item.get("bytes"), item.get("path")
        if not item.keys() & {"bytes", "path"} or not isinstance(content, str | _BYTES | None):
            raise _unknown(item, chunk, row, column)
        item = path if content is None else content
        if isinstance(content, str):
            try:
                return image_reader.decode_base64(content)
            except ValueError:
                raise _unknown(content, chunk, row, column) from None
    if item is None:
        return None
    if isinstance(item, _BYTES):
        return bytes(item)
    if isinstance(item, list | tuple | dict | bool | np.ndarray):
        raise _unknown(item, chunk, row, column)
    name = values.text(item, chunk, row, column).strip()
    if not name:
        return None
    if name.startswith("data:"):
        try:
            return image_reader.decode_data_url(name)
        except ValueError:
            raise _unknown(name, chunk, row, column) from None
    if len(name) >= _LEAST_BASE64 and name.startswith(_BASE64_STARTS):
        with contextlib.suppress(ValueError):  # A path after all.
            return image_reader.decode_base64(name)
    if name.startswith("file://"):
        try:
            return urllib.request.url2pathname(urllib.parse.urlsplit(name).path)
        except ValueError:
            raise _unknown(name, chunk, row, column) from None
    return name if "://" in name else os.path.join(os.path.dirname(chunk.path), name)


def _unknown(value: Any, chunk: Chunk, row: int, column: str) -> InputError:
    return InputError(
        f"{chunk.where(row)}: {column!r} is {str(value)[:40]!r}, expected text (a path, a URL or "
        "base64) or the content of an image"
    )
