"""One part of tabular data (a split or the labels), collected while its tables are read."""

import array
import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from scipy import sparse

from vixml_jax.data import filters, splitting, store
from vixml_jax.data.images import image_embeddings, named_images
from vixml_jax.data.sources import columns, values, xml_repository
from vixml_jax.data.sources.columns import IDS, TEXTS, Roles
from vixml_jax.data.sources.raw import ItemImages, RawItems, RawQueries
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.data.sources.values import LABELS
from vixml_jax.errors import InputError

_SHOWN_IDS = 5  # Ids in a message.


class TabularPart:
    """The items of one part; texts and embeddings are written to the spool directory at once.

    Attributes:
      name: 'train', 'valid', 'test' or 'labels'.
      count: Number of items so far.
      num_empty: Number of empty texts.
      num_duplicates: Number of labels that were listed more than once for a query.
    """

    def __init__(self, name: str, writer: store.Writer, stack: contextlib.ExitStack):
        self.name, self.count, self.num_empty, self.num_duplicates = name, 0, 0, 0
        self._writer, self._stack = writer, stack
        self._add_texts = stack.enter_context(writer.strings(f"{name}_texts"))
        self._ids: list[str] | None = None
        self._texts: list[str] = []  # Of labels only, which queries may refer to by text.
        self._paths: list[str] = []
        # Index of the file among `_paths` and line of each row, for error messages.
        self._file, self._line = array.array("i"), array.array("q")
        self._images: named_images.Collector | None = None
        self._with_images = False
        self._vectors: store.ArrayFile | None = None
        self._width = 0
        self._vector_counts = array.array("q")
        self._labels, self._label_counts = array.array("i"), array.array("q")
        self._weights: array.array | None = None
        self._key: list[Any] | None = None
        self._has_dates: bool | None = None  # Rather than numbers, in the column to split by.

    @property
    def path(self) -> str:
        """The first file."""
        return self._paths[0]

    def where(self, row: int) -> str:
        """File and line of a row, for error messages."""
        return f"{self._paths[self._file[row]]}, line {self._line[row]}"

    def add(
        self,
        chunk: Chunk,
        rows: Sequence[int],
        roles: Roles,
        *,
        with_images: bool,
        labels: Sequence[list[int]] | None = None,
        weights: Sequence[list[float]] | None = None,
        split_kind: str = "",
    ) -> None:
        """Adds rows of a chunk. If one of them is invalid, the number of items does not change.

        Args:
          chunk: The chunk.
          rows: Rows of the chunk that belong to this part.
          roles: Roles of the columns.
          with_images: Whether the images will be embedded; see `named_images.Collector`.
          labels: Label rows of each query of the whole chunk; duplicates are dropped. None for a
            table of labels.
          weights: Weights of these labels, or None.
          split_kind: How to split, `splitting.GROUP` or `splitting.TIME` if there is a key.
        """
        texts = columns.texts(chunk, roles.text, rows)
        ids = [self._read_id(chunk, row, roles.id) for row in rows] if roles.id else None
        key = [self._read_key(chunk, row, roles.key, split_kind) for row in rows if roles.key]
        vectors = []
        if roles.embedding:
            vectors = [self._read_vectors(chunk, row, roles.embedding) for row in rows]
        if roles.image:
            self._add_images(chunk, rows, roles.image, with_images)
        for row_vectors in vectors:
            self._vector_counts.append(0 if row_vectors is None else len(row_vectors))
            if row_vectors is not None:
                self._vectors.append(row_vectors)
        self._add_texts(texts)
        if self.name == LABELS:
            self._texts += texts
        self.num_empty += sum(not text.strip() for text in texts)
        if ids is not None:
            self._ids = [] if self._ids is None else self._ids
            self._ids += ids
        if roles.key:
            self._key = [] if self._key is None else self._key
            self._key += key
        if not self._paths or self._paths[-1] != chunk.path:
            self._paths.append(chunk.path)
        self._file.extend([len(self._paths) - 1] * len(rows))
        self._line.extend(chunk.lines[row] for row in rows)
        if labels is not None:
            self._add_labels(rows, labels, weights)
        self.count += len(rows)

    def _read_id(self, chunk: Chunk, row: int, column: str) -> str:
        """The id of a row."""
        item_id = values.name(chunk.columns[column][row], chunk, row, column)
        if not item_id:
            raise InputError(f"{chunk.where(row)}: {column!r} is empty, expected an id")
        return item_id

    def _add_images(
        self, chunk: Chunk, rows: Sequence[int], column: str, with_images: bool
    ) -> None:
        """Adds the images of rows."""
        if self._images is None:
            directory = os.path.join(self._writer.directory, f"{self.name}_image_files")
            self._images = named_images.Collector(directory, wanted=with_images)
            self._with_images = with_images
        for row in rows:
            self._images.add(chunk, row, column)

    def _read_vectors(self, chunk: Chunk, row: int, column: str) -> np.ndarray | None:
        """The embeddings of a row, of the same width in all rows."""
        vectors = values.vectors(chunk.columns[column][row], chunk, row, column)
        if vectors is None:
            return None
        if self._vectors is None:
            self._width = vectors.shape[1]
            array_file = self._writer.array(f"{self.name}_embeddings", np.float16, (self._width,))
            self._vectors = self._stack.enter_context(array_file)
        if vectors.shape[1] != self._width:
            raise InputError(
                f"{chunk.where(row)}: {vectors.shape[1]} numbers per embedding in {column!r}, "
                f"expected {self._width} as in the rows before"
            )
        return vectors

    def _add_labels(
        self,
        rows: Sequence[int],
        labels: Sequence[list[int]],
        weights: Sequence[list[float]] | None,
    ) -> None:
        """Adds labels and weights of rows of a chunk, each label once."""
        if weights is not None and self._weights is None:
            self._weights = array.array("f")
        for row in rows:
            row_labels = labels[row]
            order = sorted(range(len(row_labels)), key=row_labels.__getitem__)
            kept = [
                index
                for n, index in enumerate(order)
                if not n or row_labels[index] != row_labels[order[n - 1]]
            ]
            self.num_duplicates += len(row_labels) - len(kept)
            self._labels.extend(row_labels[index] for index in kept)
            self._label_counts.append(len(kept))
            if weights is not None:
                self._weights.extend(weights[row][index] for index in kept)

    def _read_key(self, chunk: Chunk, row: int, column: str, split_kind: str) -> Any:
        """The value of a row to split by."""
        value = chunk.columns[column][row]
        if split_kind != splitting.TIME:
            return values.group(value, chunk, row, column)
        time, is_date = values.time(value, chunk, row, column), values.is_date(value)
        if self._has_dates not in (None, is_date):
            raise InputError(
                f"{chunk.where(row)}: {str(value)[:40]!r} in {column!r} is "
                f"{'a date after numbers' if is_date else 'a number after dates'}; expected only "
                "dates, or only numbers"
            )
        self._has_dates = is_date
        return time

    def rows_by(self, naming: str) -> dict[str, int]:
        """Row of each label by its id, its text or its number; the first row of equal ones.

        A label that is a number with decimals (`7.0`) is found by the integer (`7`) as well.
        """
        names = {TEXTS: self._texts, IDS: self._ids}.get(naming) or map(str, range(self.count))
        rows: dict[str, int] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, row)
        for name, row in list(rows.items()):
            rows.setdefault(values.as_integer(name), row)
        return rows

    def check_ids(self) -> None:
        """Raises an InputError that names the rows whose id an earlier row has."""
        if self._ids is None:
            return
        keys = filters.keys(self._ids)
        if len(np.unique(keys)) == len(keys):
            return
        first_row: dict[str, int] = {}
        repeated = [
            row for row, item_id in enumerate(self._ids)
            if first_row.setdefault(item_id, row) != row
        ]  # fmt: skip
        if not repeated:  # Only the hashes are equal.
            return
        row = repeated[0]
        ids = list(dict.fromkeys(self._ids[row] for row in repeated))
        others = ""
        if len(repeated) > 1:
            shown = ", ".join(repr(item_id[:40]) for item_id in ids[:_SHOWN_IDS])
            more = f" and {len(ids) - _SHOWN_IDS:,} more" if len(ids) > _SHOWN_IDS else ""
            others = f"; {len(repeated):,} rows in all have an id of an earlier row: {shown}{more}"
        flag = "label_id_column" if self.name == LABELS else "id_column"
        raise InputError(
            f"{self.where(row)}: id {self._ids[row][:40]!r} is already used in "
            f"{self.where(first_row[self._ids[row]])}{others}; expected unique ids: remove these "
            f"rows, or pass --{flag}=none to number the rows"
        )

    def warnings(self, labels_are: str) -> Iterator[str]:
        """Possible faults of the part; `labels_are` says how queries refer to labels."""
        if self.num_empty:
            yield f"{self.name}: empty texts: {self.num_empty:,}"
        if self.num_duplicates:
            yield (
                f"{self.name}: labels listed more than once for a query, of which each counts "
                f"once: {self.num_duplicates:,}"
            )
        if self.name == LABELS and labels_are == TEXTS:
            num_equal = self.count - len(set(self._texts))
            if num_equal:
                yield (
                    f"labels: {num_equal:,} have the text of an earlier label, which is the one "
                    "that queries name by it"
                )

    def items(self, spool: str) -> RawItems:
        """The items, read back from the spool directory."""
        utf8, offsets = (_load(spool, f"{self.name}_texts{suffix}") for suffix in ("", "_offsets"))
        item_images: ItemImages | None = None
        if self._vectors is not None:
            if self._with_images:
                raise InputError(
                    f"{self.path}: has both image embeddings and image paths; pass "
                    "--embedding_column=none, or omit --images"
                )
            counts = np.frombuffer(self._vector_counts, np.int64)
            vectors = _load(spool, f"{self.name}_embeddings")
            item_images = image_embeddings.RaggedImages(vectors, _offsets(counts), self.path)
        elif self._images is not None:
            item_images = self._images.images(self.path)
        texts = store.Texts(utf8, offsets)
        return RawItems(self.count, texts.chunks, item_images, self._ids)

    def queries(
        self,
        spool: str,
        num_labels: int,
        new_rows: Int[np.ndarray, " l"] | None,
    ) -> RawQueries:
        """The items and their labels.

        Args:
          spool: The spool directory.
          num_labels: Number of labels.
          new_rows: New row of each label if the labels were reordered, else None.
        """
        indices = np.frombuffer(self._labels, np.int32)
        if new_rows is not None:
            indices = new_rows[indices].astype(np.int32)
        data = np.ones(len(indices), np.float32)
        if self._weights is not None:
            data = np.frombuffer(self._weights, np.float32).copy()
        indptr = _offsets(np.frombuffer(self._label_counts, np.int64))
        matrix = sparse.csr_matrix((data, indices, indptr), shape=(self.count, num_labels))
        matrix.sort_indices()
        weights = None
        if self._weights is not None and len(data) and np.ptp(data):
            weights = matrix.data.copy()
        relevance = xml_repository.to_csr(np.diff(matrix.indptr), matrix.indices, num_labels)
        key = None if self._key is None else np.asarray(self._key)
        return RawQueries(self.items(spool), relevance, weights, key=key)


def _offsets(counts: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n+1"]:
    return np.concatenate([[0], np.cumsum(counts)])


def _load(spool: str, name: str) -> np.ndarray:
    """An array of the spool directory, memory-mapped unless it is empty."""
    path = os.path.join(spool, f"{name}.npy")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        return np.load(path, allow_pickle=False)
