"""A user's own tables, read once: queries, labels and what holds between them."""

import array
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from scipy import sparse

from vixml_jax.data import filters, splitting, store
from vixml_jax.data.images import image_files
from vixml_jax.data.sources import columns, readers, values, xml_repository
from vixml_jax.data.sources.columns import IDS, ROWS, TEXTS, Columns, Roles
from vixml_jax.data.sources.label_vocab import LabelBook
from vixml_jax.data.sources.raw import (
    SPLITS,
    ItemImages,
    RawDataset,
    RawItems,
    RawQueries,
    describe_files,
)
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.data.sources.values import LABELS
from vixml_jax.errors import InputError

# Image paths and urls of each item of a part -> their pictures.
EmbedPaths = Callable[[str, list[list[str]]], ItemImages]


def find_tables(source: str, labels_source: str = "") -> dict[str, list[str]]:
    """The files of each part, sorted: of train, valid, test and labels; '' where none is named.

    Args:
      source: A file; or a directory of files, or of directories of shards, whose names begin with
        the name of a part ('train-00000.parquet', 'test.csv', 'labels/part-0.jsonl').
      labels_source: File or directory of shards of the labels, if they are elsewhere.

    Raises:
      InputError: If there is no table, or it is not plain which is what.
    """
    found: dict[str, list[str]] = {}
    for path, name in _list_tables("source", source):
        found.setdefault(_part_of(name) if os.path.isdir(source) else "", []).append(path)
    if labels_source:
        found[LABELS] = [path for path, _ in _list_tables("labels_source", labels_source)]
    paths: dict[str, str] = {}
    for path in (path for part in found.values() for path in part):
        other = paths.setdefault(readers.stem_of(path), path)
        if other != path:
            raise InputError(
                f"--source={source}: {os.path.basename(other)} and {os.path.basename(path)} have "
                "one name but for its ending, and would count twice; expected one of them"
            )
    if "" in found and set(found) & set(SPLITS):
        raise InputError(
            f"--source={source}: {os.path.basename(found[''][0])} beside files of a split; "
            "expected names that begin with train, valid, test or labels, or none that does"
        )
    if not set(found) & {"", "train"}:
        raise InputError(f"--source={source}: no table of training queries (train.csv, say)")
    return found


def _list_tables(flag: str, source: str) -> list[tuple[str, str]]:
    """Paths of tables, and the names that tell which part they are of."""
    if os.path.isfile(source):
        return [(source, "")]
    found = []
    for name in sorted(os.listdir(source)) if os.path.isdir(source) else []:
        path = os.path.join(source, name)
        inside = sorted(os.listdir(path)) if os.path.isdir(path) else [""]
        shards = [os.path.join(path, shard) if shard else path for shard in inside]
        found += [(shard, name) for shard in shards if readers.kind_of(shard)]
    if not found:
        raise InputError(
            f"--{flag}={source}: no such file, or no table in it; expected csv, tsv, jsonl or "
            "parquet, the XML repository's layout, or 'glyphs'"
        )
    return found


def _part_of(name: str) -> str:
    """The part that a name begins with, or ''."""
    word = name.lower()
    for sign in "-_. ":
        word = word.partition(sign)[0]
    return next((part for part, words in values.PARTS.items() if word in words), "")


def read_tables(
    source: str,
    spool: str,
    *,
    names: Columns | None = None,
    labels_source: str = "",
    split_by: str = splitting.RANDOM,
    encoding: str = "utf-8",
    embed_paths: EmbedPaths | None = None,
    find_images: xml_repository.FindImages | None = None,
) -> RawDataset:
    """Reads tables once, from first to last; texts and embeddings go to files in `spool`.

    Queries are of the split that their file or their split column names, else all of training. Rows
    keep their order. Without a label table, labels are the distinct texts of the labels column,
    sorted.

    Args:
      source, labels_source: See `find_tables`.
      spool: A directory that outlives the result.
      names: Of columns, where they are not to be guessed.
      split_by: If 'group:COLUMN' or 'time:COLUMN', that column is kept as the key.
      encoding: Of texts in csv and jsonl.
      embed_paths: Makes pictures of the image column; None: it is not read.
      find_images: Of {trn,val,tst,lbl} files in a directory, where no column has pictures.

    Raises:
      InputError: If a file, a row or a flag is at fault.
    """
    names = names or Columns()
    manner, key_column = splitting.parse(split_by)
    found = find_tables(source, labels_source)
    understood: list[str] = []
    with contextlib.ExitStack() as stack:
        writer = store.Writer(spool)
        book = LabelBook(names.labels_are, names.label_separator)
        label_part = None
        if LABELS in found:
            label_part = _Part(LABELS, writer, stack)
            roles = columns.assign(found[LABELS][0], names, encoding, of_labels=True)
            for chunk in _read(found[LABELS], roles, encoding):
                label_part.add(chunk, range(len(chunk)), roles, embed_paths is not None)
            label_part.check_ids()
            book.know(label_part)
            understood.append(
                columns.understand("labels", found[LABELS], roles, names, encoding, label=True)
            )
        elif names.labels_are in (IDS, ROWS):
            raise InputError(f"--labels_are={names.labels_are}: there is no label table")
        parts: dict[str, _Part] = {}
        for name in ("", *SPLITS):
            if name not in found:
                continue
            divided = name in ("", "train")
            roles = columns.assign(
                found[name][0], names, encoding, key=key_column if divided else ""
            )
            for chunk in _read(found[name], roles, encoding):
                whole = [name or "train"] * len(chunk)
                splits = whole if not roles.split or name else values.splits(chunk, roles.split)
                labels, weights = book.resolve(chunk, roles)
                for split in dict.fromkeys(splits):
                    rows = [row for row, one in enumerate(splits) if one == split]
                    if split not in parts:
                        parts[split] = _Part(split, writer, stack)
                    parts[split].add(chunk, rows, roles, embed_paths is not None)
                    parts[split].add_labels(chunk, rows, labels, weights, roles.key, manner)
            understood.append(
                columns.understand(name or "queries", found[name], roles, names, encoding)
            )
    if "train" not in parts:
        raise InputError(f"--source={source}: no training queries")
    for part in parts.values():
        part.check_ids()
    if label_part is None:
        texts = sorted(book.row_of)
        labels = RawItems(len(texts), lambda: [texts], None, texts)
        renumbered = np.empty(len(texts), np.int64)
        renumbered[[book.row_of[text] for text in texts]] = np.arange(len(texts))
    else:
        labels, renumbered = label_part.items(spool, embed_paths), None
    if not labels.count:
        raise InputError(f"--source={source}: no query has a label")
    queries = {
        split: part.queries(spool, embed_paths, labels.count, renumbered)
        for split, part in parts.items()
    }
    files = [path for paths in found.values() for path in paths]
    if os.path.isdir(source):
        beside = ("filter_labels_train.txt", "filter_labels_valid.txt", "filter_labels_test.txt")
        files += [
            os.path.join(source, name)
            for name in os.listdir(source)
            if name in beside or name.endswith(xml_repository.PICTURE_FILES)
        ]
        if find_images is not None:
            labels, queries = _with_images(labels, queries, source, find_images)
        for split in sorted({*SPLITS} - {*queries}):
            if os.path.exists(path := os.path.join(source, f"filter_labels_{split}.txt")):
                raise InputError(
                    f"{path}: the source has no {split} split; expected its pairs in "
                    "filter_labels_train.txt, whose queries take theirs along when held out"
                )
        queries = {
            split: _with_filter(split, found, labels, source, book.are == ROWS, encoding)
            for split, found in queries.items()
        }
    every = {name: found.items.images for name, found in queries.items()}
    image_files.check_widths({**every, LABELS: labels.images}, source)
    said = [_say_labels(book, label_part is None, labels.count)]
    return RawDataset(
        name=os.path.basename(os.path.abspath(source)).partition(".")[0],
        fingerprint={
            "path": os.path.abspath(source),
            "files": describe_files(files, source if os.path.isdir(source) else ""),
            "columns": dataclasses.asdict(names),
            "split_by": split_by,
        },
        labels=labels,
        understood=(*understood, *said),
        warnings=tuple(_warnings(parts, label_part)),
        **queries,
    )


def _read(paths: list[str], roles: Roles, encoding: str) -> Iterator[Chunk]:
    """The chunks of all shards; every shard has the columns that are used."""
    for path in paths:
        size = 0
        for chunk in readers.read(path, roles.used, encoding=encoding):
            missing = [name for name in roles.used if name not in chunk.columns]
            if missing:
                there = readers.column_names(path, encoding=encoding)
                raise InputError(f"{path}: no column {missing[0]!r}; found {', '.join(there)}")
            size += len(chunk)
            yield chunk
        if not size:
            raise InputError(f"{path}: no rows; expected some, or no such file")


class _Part:
    """The items of one part as they are read: what is large goes to the spool at once."""

    def __init__(self, name: str, writer: store.Writer, stack: contextlib.ExitStack):
        self.name, self.count, self.empty = name, 0, 0
        self.repeated = 0  # Labels given twice to one query.
        self._writer, self._stack = writer, stack
        self._add_texts = stack.enter_context(writer.strings(f"{name}_texts"))
        self._ids: list[str] | None = None
        self._texts: list[str] = []  # Of labels, that queries may be found by.
        self._places: list[str] = []  # Paths, and
        self._file, self._line = array.array("i"), array.array("q")  # file and line of each row.
        self._images: list[list[str]] | None = None
        self._vectors: store.ArrayFile | None = None
        self._width = 0
        self._vector_counts = array.array("q")
        self._labels, self._counts = array.array("i"), array.array("q")
        self._weights: array.array | None = None
        self._key: list[Any] | None = None

    @property
    def path(self) -> str:
        return self._places[0]

    def where(self, row: int) -> str:
        """File and line of a row, for messages."""
        return f"{self._places[self._file[row]]}, line {self._line[row]}"

    def add(self, chunk: Chunk, rows: Sequence[int], roles: Roles, with_images: bool) -> None:
        """Takes texts, ids, pictures and embeddings of some rows."""
        texts = columns.texts(chunk, roles.text, rows)
        self._add_texts(texts)
        if self.name == LABELS:
            self._texts += texts
        self.empty += sum(not text.strip() for text in texts)
        if not self._places or self._places[-1] != chunk.path:
            self._places.append(chunk.path)
        self._file.extend([len(self._places) - 1] * len(rows))
        self._line.extend(chunk.lines[row] for row in rows)
        if roles.id:
            self._ids = [] if self._ids is None else self._ids
            for row in rows:
                name = values.text(chunk.columns[roles.id][row], chunk, row, roles.id)
                if not name:
                    raise InputError(f"{chunk.where(row)}: {roles.id!r} is empty, expected an id")
                self._ids.append(name)
        if roles.image and with_images:
            self._images = [] if self._images is None else self._images
            base = os.path.dirname(chunk.path)
            for row in rows:
                value = chunk.columns[roles.image][row]
                names = (
                    values.text(name, chunk, row, roles.image)
                    for name in values.pieces(value, "|", chunk, row, roles.image)
                )
                self._images.append(
                    [name if "://" in name else os.path.join(base, name) for name in names if name]
                )
        if roles.embedding:
            for row in rows:
                self._add_vectors(chunk, row, roles.embedding)
        self.count += len(rows)

    def _add_vectors(self, chunk: Chunk, row: int, column: str) -> None:
        vectors = values.vectors(chunk.columns[column][row], chunk, row, column)
        self._vector_counts.append(0 if vectors is None else len(vectors))
        if vectors is None:
            return
        if self._vectors is None:
            self._width = vectors.shape[1]
            opened = self._writer.array(f"{self.name}_embeddings", np.float16, (self._width,))
            self._vectors = self._stack.enter_context(opened)
        if vectors.shape[1] != self._width:
            raise InputError(
                f"{chunk.where(row)}: an embedding of {vectors.shape[1]} numbers in {column!r}, "
                f"expected {self._width} as above"
            )
        self._vectors.append(vectors)

    def add_labels(
        self,
        chunk: Chunk,
        rows: Sequence[int],
        labels: list[list[int]],
        weights: list[list[float]] | None,
        key: str | None,
        manner: str,
    ) -> None:
        """Takes the labels of some rows, and what they are split by."""
        if weights is not None and self._weights is None:
            self._weights = array.array("f")
        for row in rows:
            found = labels[row]
            order = sorted(range(len(found)), key=found.__getitem__)
            kept = [at for n, at in enumerate(order) if not n or found[at] != found[order[n - 1]]]
            self.repeated += len(found) - len(kept)
            self._labels.extend(found[at] for at in kept)
            self._counts.append(len(kept))
            if weights is not None:
                self._weights.extend(weights[row][at] for at in kept)
        if key:
            self._key = [] if self._key is None else self._key
            read = values.time if manner == splitting.TIME else values.group
            self._key += [read(chunk.columns[key][row], chunk, row, key) for row in rows]

    def known(self, are: str) -> dict[str, int]:
        """Row of each label by its id, its text or its number; of equal ones, the first."""
        names = {TEXTS: self._texts, IDS: self._ids}.get(are) or map(str, range(self.count))
        found: dict[str, int] = {}
        for row, name in enumerate(names):
            found.setdefault(name, row)
        return found

    def check_ids(self) -> None:
        """Refuses an id that two rows have."""
        if self._ids is None:
            return
        keys = filters.keys(self._ids)
        order = np.argsort(keys, kind="stable")
        for at in np.flatnonzero(np.diff(keys[order]) == 0):
            one, other = sorted(order[at : at + 2].tolist())
            if self._ids[one] == self._ids[other]:
                raise InputError(
                    f"{self.where(other)}: id {self._ids[other][:40]!r} is that of "
                    f"{self.where(one)} too; expected each once"
                )

    def items(self, spool: str, embed_paths: EmbedPaths | None) -> RawItems:
        """What was taken, read back from the spool."""
        utf8, offsets = (_load(spool, f"{self.name}_texts{ending}") for ending in ("", "_offsets"))
        pictures: ItemImages | None = None
        if self._vectors is not None:
            if self._images is not None:
                raise InputError(
                    f"{self.path}: both embeddings and image files; say --embedding_column=none, "
                    "or leave out --images"
                )
            at = np.concatenate([[0], np.cumsum(np.frombuffer(self._vector_counts, np.int64))])
            vectors = _load(spool, f"{self.name}_embeddings")
            pictures = image_files.RaggedImages(vectors, at, self.path)
        elif self._images is not None and any(self._images):
            pictures = embed_paths(self.name, self._images)
        texts = store.Texts(utf8, offsets)
        return RawItems(self.count, texts.chunks, pictures, self._ids)

    def queries(
        self,
        spool: str,
        embed_paths: EmbedPaths | None,
        num_labels: int,
        renumbered: Int[np.ndarray, " l"] | None,
    ) -> RawQueries:
        """The items and their labels; `renumbered` are the labels' rows, if not as they came."""
        indices = np.frombuffer(self._labels, np.int32)
        if renumbered is not None:
            indices = renumbered[indices].astype(np.int32)
        data = np.ones(len(indices), np.float32)
        if self._weights is not None:
            data = np.frombuffer(self._weights, np.float32).copy()
        indptr = np.concatenate([[0], np.cumsum(np.frombuffer(self._counts, np.int64))])
        matrix = sparse.csr_matrix((data, indices, indptr), shape=(self.count, num_labels))
        matrix.sort_indices()
        weights = None
        if self._weights is not None and len(data) and np.ptp(data):
            weights = matrix.data.copy()
        relevance = xml_repository.to_csr(np.diff(matrix.indptr), matrix.indices, num_labels)
        key = None if self._key is None else np.asarray(self._key)
        return RawQueries(self.items(spool, embed_paths), relevance, weights, key=key)


def _load(spool: str, name: str) -> np.ndarray:
    """An array of the spool, memory-mapped; an empty one cannot be."""
    path = os.path.join(spool, f"{name}.npy")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        return np.load(path, allow_pickle=False)


def _with_images(
    labels: RawItems,
    queries: dict[str, RawQueries],
    directory: str,
    find_images: xml_repository.FindImages,
) -> tuple[RawItems, dict[str, RawQueries]]:
    """Items with the pictures of files beside the tables, where columns gave none."""

    def find(part: str, items: RawItems) -> RawItems:
        if items.images is not None:
            return items
        found = find_images(directory, xml_repository.PREFIX[part], items.count)
        return items if found is None else dataclasses.replace(items, images=found)

    queries = {
        split: dataclasses.replace(found, items=find(split, found.items))
        for split, found in queries.items()
    }
    return find(LABELS, labels), queries


def _with_filter(
    split: str, queries: RawQueries, labels: RawItems, directory: str, by_rows: bool, encoding: str
) -> RawQueries:
    """Queries with the pairs of `filter_labels_SPLIT.txt`, by ids (or rows) with a tab or a space
    between; as they are where there is no such file."""
    path = os.path.join(directory, f"filter_labels_{split}.txt")
    if not os.path.exists(path):
        return queries
    if by_rows or (queries.items.ids is None and labels.ids is None):
        pairs = xml_repository.read_filter(path, queries.relevance.shape)
        return dataclasses.replace(queries, filter=pairs)
    rows = [
        {items.name(row): row for row in range(items.count)} for items in (queries.items, labels)
    ]
    pairs: set[tuple[int, int]] = set()
    for number, line in readers.read_lines(path, encoding):
        line = line.strip()
        pair = line.split("\t") if "\t" in line else line.split()
        if not pair:
            continue
        if len(pair) != 2 or pair[0] not in rows[0] or pair[1] not in rows[1]:
            raise InputError(
                f"{path}, line {number}: found {line[:60]!r}, expected the id of a query and of a "
                "label"
            )
        at = rows[0][pair[0]], rows[1][pair[1]]
        if at in pairs:
            raise InputError(
                f"{path}, line {number}: pair {line[:60]!r} is given twice; expected each once "
                "(sort -u)"
            )
        pairs.add(at)
    found = np.array(sorted(pairs), np.int64).reshape(-1, 2)
    return dataclasses.replace(queries, filter=found)


def _say_labels(book: LabelBook, implied: bool, count: int) -> str:
    between = f"separated by {book.separator!r}" if book.separator else "in lists or one a query"
    if implied:
        return f"labels: {count:,} distinct texts of queries, {between}"
    return f"labels: {count:,} in their table, named by their {book.are}, {between}"


def _warnings(parts: dict[str, _Part], label_part: _Part | None) -> Iterator[str]:
    """What the owner of the tables should know."""
    for part in [*parts.values(), *([] if label_part is None else [label_part])]:
        if part.empty:
            yield f"{part.name}: {part.empty:,} texts are empty"
        if part.repeated:
            yield f"{part.name}: {part.repeated:,} labels given twice to one query count once"
