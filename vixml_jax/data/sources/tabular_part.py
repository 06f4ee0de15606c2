"""One part of tabular data (a split or the labels), collected while its tables are read."""

import array
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from scipy import sparse

from vixml_jax.data import filters, splitting, store
from vixml_jax.data.images import image_embeddings
from vixml_jax.data.sources import columns, values, xml_repository
from vixml_jax.data.sources.columns import IDS, TEXTS, Roles
from vixml_jax.data.sources.raw import ItemImages, RawItems, RawQueries
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.data.sources.values import LABELS
from vixml_jax.errors import InputError

# Name of a part, and the image paths and URLs of each of its items -> their images.
EmbedPaths = Callable[[str, list[list[str]]], ItemImages]


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
        self._image_paths: list[list[str]] | None = None
        self._vectors: store.ArrayFile | None = None
        self._width = 0
        self._vector_counts = array.array("q")
        self._labels, self._label_counts = array.array("i"), array.array("q")
        self._weights: array.array | None = None
        self._key: list[Any] | None = None

    @property
    def path(self) -> str:
        """The first file."""
        return self._paths[0]

    def where(self, row: int) -> str:
        """File and line of a row, for error messages."""
        return f"{self._paths[self._file[row]]}, line {self._line[row]}"

    def add(self, chunk: Chunk, rows: Sequence[int], roles: Roles, with_images: bool) -> None:
        """Adds texts, ids, image paths (if `with_images`) and embeddings of rows of a chunk."""
        texts = columns.texts(chunk, roles.text, rows)
        self._add_texts(texts)
        if self.name == LABELS:
            self._texts += texts
        self.num_empty += sum(not text.strip() for text in texts)
        if not self._paths or self._paths[-1] != chunk.path:
            self._paths.append(chunk.path)
        self._file.extend([len(self._paths) - 1] * len(rows))
        self._line.extend(chunk.lines[row] for row in rows)
        if roles.id:
            self._ids = [] if self._ids is None else self._ids
            for row in rows:
                item_id = values.text(chunk.columns[roles.id][row], chunk, row, roles.id)
                if not item_id:
                    raise InputError(f"{chunk.where(row)}: {roles.id!r} is empty, expected an id")
                self._ids.append(item_id)
        if roles.image and with_images:
            self._image_paths = [] if self._image_paths is None else self._image_paths
            self._image_paths += [_image_paths(chunk, row, roles.image) for row in rows]
        if roles.embedding:
            for row in rows:
                self._add_vectors(chunk, row, roles.embedding)
        self.count += len(rows)

    def _add_vectors(self, chunk: Chunk, row: int, column: str) -> None:
        """Adds the embeddings of a row."""
        vectors = values.vectors(chunk.columns[column][row], chunk, row, column)
        self._vector_counts.append(0 if vectors is None else len(vectors))
        if vectors is None:
            return
        if self._vectors is None:
            self._width = vectors.shape[1]
            array_file = self._writer.array(f"{self.name}_embeddings", np.float16, (self._width,))
            self._vectors = self._stack.enter_context(array_file)
        if vectors.shape[1] != self._width:
            raise InputError(
                f"{chunk.where(row)}: {vectors.shape[1]} numbers per embedding in {column!r}, "
                f"expected {self._width} as in the rows before"
            )
        self._vectors.append(vectors)

    def add_labels(
        self,
        chunk: Chunk,
        rows: Sequence[int],
        labels: list[list[int]],
        weights: list[list[float]] | None,
        key: str | None,
        split_kind: str,
    ) -> None:
        """Adds labels, weights and split keys of rows of a chunk.

        Args:
          chunk: The chunk.
          rows: Rows of the chunk that belong to this part.
          labels: Label rows of each query of the whole chunk; duplicates are dropped.
          weights: Weights of these labels, or None.
          key: Column to split by, or None.
          split_kind: How to split, `splitting.GROUP` or `splitting.TIME` if there is a key.
        """
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
        if key:
            self._key = [] if self._key is None else self._key
            read = values.time if split_kind == splitting.TIME else values.group
            self._key += [read(chunk.columns[key][row], chunk, row, key) for row in rows]

    def rows_by(self, naming: str) -> dict[str, int]:
        """Row of each label by its id, its text or its number; the first row of equal ones."""
        names = {TEXTS: self._texts, IDS: self._ids}.get(naming) or map(str, range(self.count))
        rows: dict[str, int] = {}
        for row, name in enumerate(names):
            rows.setdefault(name, row)
        return rows

    def check_ids(self) -> None:
        """Raises an InputError if two rows have the same id."""
        if self._ids is None:
            return
        keys = filters.keys(self._ids)
        order = np.argsort(keys, kind="stable")
        for index in np.flatnonzero(np.diff(keys[order]) == 0):
            first, second = sorted(order[index : index + 2].tolist())
            if self._ids[first] == self._ids[second]:
                raise InputError(
                    f"{self.where(second)}: id {self._ids[second][:40]!r} is already used in "
                    f"{self.where(first)}; expected unique ids"
                )

    def items(self, spool: str, embed_paths: EmbedPaths | None) -> RawItems:
        """The items, read back from the spool directory."""
        utf8, offsets = (_load(spool, f"{self.name}_texts{suffix}") for suffix in ("", "_offsets"))
        item_images: ItemImages | None = None
        if self._vectors is not None:
            if self._image_paths is not None:
                raise InputError(
                    f"{self.path}: has both image embeddings and image paths; pass "
                    "--embedding_column=none, or omit --images"
                )
            counts = np.frombuffer(self._vector_counts, np.int64)
            vectors = _load(spool, f"{self.name}_embeddings")
            item_images = image_embeddings.RaggedImages(vectors, _offsets(counts), self.path)
        elif self._image_paths is not None and any(self._image_paths):
            item_images = embed_paths(self.name, self._image_paths)
        texts = store.Texts(utf8, offsets)
        return RawItems(self.count, texts.chunks, item_images, self._ids)

    def queries(
        self,
        spool: str,
        embed_paths: EmbedPaths | None,
        num_labels: int,
        new_rows: Int[np.ndarray, " l"] | None,
    ) -> RawQueries:
        """The items and their labels.

        Args:
          spool: The spool directory.
          embed_paths: See `tabular.read_tables`.
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
        return RawQueries(self.items(spool, embed_paths), relevance, weights, key=key)


def _image_paths(chunk: Chunk, row: int, column: str) -> list[str]:
    """Image paths and URLs of a row; relative paths are relative to the table."""
    directory = os.path.dirname(chunk.path)
    names = (
        values.text(name, chunk, row, column)
        for name in values.list_items(chunk.columns[column][row], "|", chunk, row, column)
    )
    return [name if "://" in name else os.path.join(directory, name) for name in names if name]


def _offsets(counts: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n+1"]:
    return np.concatenate([[0], np.cumsum(counts)])


def _load(spool: str, name: str) -> np.ndarray:
    """An array of the spool directory, memory-mapped unless it is empty."""
    path = os.path.join(spool, f"{name}.npy")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        return np.load(path, allow_pickle=False)
