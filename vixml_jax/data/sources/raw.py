"""The contents of a source before tokenization, and views of some of its rows."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Float, Float16, Int, Num
from scipy import sparse

from vixml_jax.storage import text_files

SPLITS = ("train", "valid", "test")


class ItemImages(Protocol):
    """Image embeddings of items, read a block at a time."""

    @property
    def width(self) -> int:
        """Dimensions of an embedding."""

    @property
    def path(self) -> str:
        """The file they come from, for error messages."""

    def offsets(self, rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, " r+1"]:
        """Where the images of each row begin among the images of all `rows`."""

    def read(self, rows: Int[np.ndarray, " r"]) -> Iterator[Float16[np.ndarray, "k v"]]:
        """The images of the rows in order, a block at a time; rows may have none."""


@dataclasses.dataclass(frozen=True)
class SelectedImages:
    """The images of selected rows of another `ItemImages`."""

    images: ItemImages
    rows: Int[np.ndarray, " n"]

    @property
    def width(self) -> int:
        return self.images.width

    @property
    def path(self) -> str:
        return self.images.path

    def offsets(self, rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, " r+1"]:
        return self.images.offsets(self.rows[rows])

    def read(self, rows: Int[np.ndarray, " r"]) -> Iterator[Float16[np.ndarray, "k v"]]:
        return self.images.read(self.rows[rows])


@dataclasses.dataclass(frozen=True)
class RawItems:
    """Texts, images and ids of queries or labels.

    Attributes:
      count: Number of items.
      read_texts: Returns an iterator over the texts in order, in chunks. It can be called again.
      images: Image embeddings; None if the source has none.
      ids: Ids in the source, one per row; None if it has none, and row numbers are used instead.
      rows: Row numbers in the source, for selected rows; None if these are all rows.
    """

    count: int
    read_texts: Callable[[], Iterable[list[str]]]
    images: ItemImages | None = None
    ids: Sequence[str] | None = None
    rows: Int[np.ndarray, " n"] | None = None

    def select(self, rows: Int[np.ndarray, " r"]) -> "RawItems":
        """The items of some rows, given in ascending order."""
        if len(rows) == self.count:
            return self
        kept = np.zeros(self.count, bool)
        kept[rows] = True
        return RawItems(
            len(rows),
            lambda: _select(self.read_texts(), kept),
            None if self.images is None else SelectedImages(self.images, rows),
            None if self.ids is None else _SelectedIds(self.ids, rows),
            rows if self.rows is None else self.rows[rows],
        )

    def name(self, row: int) -> str:
        """The id of an item, or its row number in the source if there are no ids."""
        if self.ids is not None:
            return self.ids[row]
        return str(row if self.rows is None else self.rows[row])


@dataclasses.dataclass(frozen=True)
class _SelectedIds(Sequence):
    ids: Sequence[str]
    rows: Int[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> str:
        return self.ids[int(self.rows[index])]


def _select(chunks: Iterable[list[str]], kept: Bool[np.ndarray, " n"]) -> Iterator[list[str]]:
    """The texts of the rows where `kept` is True, in chunks."""
    start = 0
    for chunk in chunks:
        chunk_kept = kept[start : start + len(chunk)]
        start += len(chunk)
        if chunk_kept.all():
            yield chunk
        else:
            yield [text for text, keep in zip(chunk, chunk_kept, strict=True) if keep]


@dataclasses.dataclass(frozen=True)
class RawQueries:
    """The queries of one split and their labels.

    Attributes:
      items: The queries.
      relevance: float32 [queries, labels] in canonical format, 1 at each relevant label.
      weights: Sampling weight of each relevant label as a positive, in the order of
        `relevance.indices`; None means equal weights.
      filter: int64 pairs (query, label) that are never predicted, sorted; None if the source does
        not define any.
      key: Value to split by, one per query: a group number or a time; None if not requested.
    """

    items: RawItems
    relevance: sparse.csr_matrix
    weights: Float[np.ndarray, " nnz"] | None = None
    filter: Int[np.ndarray, "f 2"] | None = None
    key: Num[np.ndarray, " n"] | None = None

    def select(self, rows: Int[np.ndarray, " r"]) -> "RawQueries":
        """The queries of some rows, given in ascending order."""
        if len(rows) == self.items.count:
            return self
        lengths = np.diff(self.relevance.indptr)
        kept = np.zeros(self.items.count, bool)
        kept[rows] = True
        return RawQueries(
            self.items.select(rows),
            canonical(self.relevance[rows]),
            None if self.weights is None else self.weights[np.repeat(kept, lengths)],
            None if self.filter is None else _renumber(self.filter, kept),
            None if self.key is None else self.key[rows],
        )


def canonical(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """The matrix, marked as having sorted indices without duplicates."""
    matrix.has_canonical_format = True
    return matrix


def _renumber(
    pairs: Int[np.ndarray, "f 2"], kept: Bool[np.ndarray, " n"]
) -> Int[np.ndarray, "g 2"]:
    """The filter pairs of the kept queries, with their new row numbers."""
    pairs = pairs[kept[pairs[:, 0]]]
    return np.stack([np.cumsum(kept)[pairs[:, 0]] - 1, pairs[:, 1]], axis=1)


@dataclasses.dataclass(frozen=True)
class RawDataset:
    """The contents of a source.

    Attributes:
      name: Name of the data set.
      fingerprint: Identifies the source and its state; stored in `dataset.json`.
      labels: The labels.
      train: The training queries.
      test, valid: The queries of these splits, from the source or held out of training.
      summary: How the source was read, for the preview; an entry may have several lines.
      warnings: Possible faults of the source, one line each.
      notes: How labels were read, in one line each, which are stored and always printed.
      reading: How tables were read, a `reading.Reading`; None for other sources.
    """

    name: str
    fingerprint: dict[str, object]
    labels: RawItems
    train: RawQueries
    test: RawQueries | None = None
    valid: RawQueries | None = None
    summary: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    reading: Any | None = None

    @property
    def splits(self) -> dict[str, RawQueries]:
        """The existing splits by name."""
        return {name: queries for name in SPLITS if (queries := getattr(self, name)) is not None}


def file_stats(paths: Iterable[str], directory: str = "") -> dict[str, list[int]]:
    """Size in bytes and modification time in nanoseconds of each file.

    Args:
      paths: The files.
      directory: If given, the keys are paths relative to it; else the names of the files.
    """
    stats = {}
    for path in sorted(paths):
        text_files.check_path(path)
        stat = os.stat(path)
        name = os.path.relpath(path, directory) if directory else os.path.basename(path)
        stats[name] = [stat.st_size, stat.st_mtime_ns]
    return stats
