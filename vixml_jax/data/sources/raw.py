"""A data set as its source has it, before it is tokenised; views of parts of it."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, Float, Float16, Int, Num
from scipy import sparse

SPLITS = ("train", "valid", "test")


class ItemImages(Protocol):
    """Pictures of items as embeddings, read a block at a time."""

    @property
    def width(self) -> int: ...

    @property
    def path(self) -> str:
        """For messages."""

    def offsets(self, rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, " r+1"]:
        """Where the pictures of each of the rows begin among all of them."""

    def read(self, rows: Int[np.ndarray, " r"]) -> Iterator[Float16[np.ndarray, "k v"]]:
        """The pictures of the rows in order, those that there are, a block at a time."""


@dataclasses.dataclass(frozen=True)
class SelectedImages:
    """Those of some rows of others."""

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
    """Texts and pictures of one kind of items.

    Attributes:
      count: Items.
      read_texts: Starts to read the texts anew, and gives them in order, a chunk at a time.
      images: Their pictures, if the source has any.
      ids: What the source calls them, one a row; None: it does not say, and rows are counted.
      rows: Of a part: the rows that they have in the whole; None: this is the whole.
    """

    count: int
    read_texts: Callable[[], Iterable[list[str]]]
    images: ItemImages | None = None
    ids: Sequence[str] | None = None
    rows: Int[np.ndarray, " n"] | None = None

    def select(self, rows: Int[np.ndarray, " r"]) -> "RawItems":
        """Those of the rows, which ascend."""
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
        """What an item is called: its id, or the number of its row in the source."""
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
    """The texts that are kept."""
    start = 0
    for chunk in chunks:
        stay = kept[start : start + len(chunk)]
        start += len(chunk)
        if stay.all():
            yield chunk
        else:
            yield [text for text, keep in zip(chunk, stay, strict=True) if keep]


@dataclasses.dataclass(frozen=True)
class RawQueries:
    """Queries of one split and what is known of their labels.

    Attributes:
      items: The queries.
      relevance: float32 ones in canonical form, [queries, labels].
      weights: What each of these ones counts when a positive is drawn, in the order of
        `relevance.indices`; None: all the same.
      filter: int64 pairs (query, label) that are never predicted, sorted; None: the source says
        nothing of them.
      key: What queries are split by: a number for each group, or a time; None: not told.
    """

    items: RawItems
    relevance: sparse.csr_matrix
    weights: Float[np.ndarray, " nnz"] | None = None
    filter: Int[np.ndarray, "f 2"] | None = None
    key: Num[np.ndarray, " n"] | None = None

    def select(self, rows: Int[np.ndarray, " r"]) -> "RawQueries":
        """Those of the rows, which ascend."""
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
    """The matrix, known to have sorted indices, each once."""
    matrix.has_canonical_format = True
    return matrix


def _renumber(
    pairs: Int[np.ndarray, "f 2"], kept: Bool[np.ndarray, " n"]
) -> Int[np.ndarray, "g 2"]:
    """Filter pairs of the queries that are kept, by their new rows."""
    pairs = pairs[kept[pairs[:, 0]]]
    return np.stack([np.cumsum(kept)[pairs[:, 0]] - 1, pairs[:, 1]], axis=1)


@dataclasses.dataclass(frozen=True)
class RawDataset:
    """A data set as its source has it.

    Attributes:
      name: For tables.
      fingerprint: What tells this source and its state from another, for `dataset.json`.
      labels: The labels.
      train: The queries.
      test, valid: Those held out of training, if the source has some or they were taken out.
      understood: How the source was read, a line each.
      warnings: What its owner should know, a line each.
    """

    name: str
    fingerprint: dict[str, object]
    labels: RawItems
    train: RawQueries
    test: RawQueries | None = None
    valid: RawQueries | None = None
    understood: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, RawQueries]:
        """The splits that there are, by name."""
        return {name: found for name in SPLITS if (found := getattr(self, name)) is not None}


def describe_files(paths: Iterable[str], directory: str = "") -> dict[str, list[int]]:
    """Size and time of change of each file, by name; by its path from a directory, if told."""
    stats = {}
    for path in sorted(paths):
        stat = os.stat(path)
        name = os.path.relpath(path, directory) if directory else os.path.basename(path)
        stats[name] = [stat.st_size, stat.st_mtime_ns]
    return stats
