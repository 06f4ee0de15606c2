"""Prepared data sets on disk: written by `vixml_jax.prepare`, read back memory-mapped."""

import collections.abc
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import Annotated, Any, BinaryIO, NamedTuple, TypedDict

import msgspec
import numpy as np
from etils import epath
from jaxtyping import Float32, Int, Shaped, UInt8
from scipy import sparse

from vixml_jax.data import integrity
from vixml_jax.errors import InputError
from vixml_jax.storage import atomic, json_files, npy_files

FORMAT = 2  # Version of the files; raised when older data sets can no longer be read.
INFO = "dataset.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "valid", "test")  # Of queries; "valid" is optional.
PARTS = (*SPLITS, "labels")
_REMEDY = "prepare it again"
_INT32_MAX = np.iinfo(np.int32).max
NumLabels = Annotated[int, msgspec.Meta(ge=1, le=int(_INT32_MAX))]  # Ids are int32.


class Ragged(NamedTuple):
    """Rows of different lengths; row i is `values[offsets[i] : offsets[i + 1]]`."""

    values: Shaped[np.ndarray, "total *v"]
    offsets: Int[np.ndarray, " n+1"]  # int64.


def ranges(starts: Int[np.ndarray, " n"], lengths: Int[np.ndarray, " n"]) -> np.ndarray:
    """The integers of consecutive ranges, concatenated.

    Args:
      starts: First integer of each range.
      lengths: Number of integers of each range.

    Returns:
      starts[0], starts[0] + 1, ..., starts[0] + lengths[0] - 1, starts[1], ...
    """
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


class Texts(collections.abc.Sequence):
    """A sequence of texts stored as UTF-8; each text is decoded when it is accessed."""

    def __init__(self, utf8: UInt8[np.ndarray, " total"], offsets: Int[np.ndarray, " n+1"]):
        self._utf8 = utf8
        self._offsets = offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        index %= len(self)
        return self._utf8[self._offsets[index] : self._offsets[index + 1]].tobytes().decode("utf-8")

    def chunks(self, rows: int = 1 << 14) -> Iterator[list[str]]:
        """Yields all texts in order, `rows` at a time; much faster than one by one."""
        for start in range(0, len(self), rows):
            offsets = np.asarray(self._offsets[start : start + rows + 1])
            block = self._utf8[offsets[0] : offsets[-1]].tobytes()
            npy_files.release(self._utf8)
            ends = (offsets - offsets[0]).tolist()
            yield [block[a:b].decode("utf-8") for a, b in itertools.pairwise(ends)]


@dataclasses.dataclass(frozen=True)
class Items:
    """The queries of a split, or the labels.

    Attributes:
      texts: Text of each item.
      tokens: Tokens of each text after truncation, int32.
      images: Image embeddings of each item, float16 [total, v]; None if the source has none.
      ids: Ids of the items in the source.
      full_lengths: Number of tokens of each text before truncation, int32.
    """

    texts: Texts
    tokens: Ragged
    images: Ragged | None
    ids: Texts | None = None
    full_lengths: Int[np.ndarray, " n"] | None = None

    def __len__(self) -> int:
        return len(self.texts)


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """A data set as `prepare` wrote it; arrays stay on disk until they are read.

    Attributes:
      path: Directory of the data set.
      info: Contents of `dataset.json`.
      train: Training queries.
      test: Test queries.
      labels: Labels.
      train_relevance: Ones at the labels of each training query [queries, labels], float32, with
        sorted column indices. Every training query has a label.
      test_relevance: As `train_relevance`; a test query may have no label.
      train_filter: Pairs (query, label) that are never predicted, int64 [f, 2].
      test_filter: As `train_filter`, of the test queries.
      valid: Queries held out of training; None if there is no validation split.
      valid_relevance: As `test_relevance`, of the validation queries; None without them.
      valid_filter: As `train_filter`, of the validation queries; None without them.
      train_weights: Weight of each entry of `train_relevance.data` when positives are sampled,
        float32; None if all weights are equal.
    """

    path: str
    info: dict[str, Any]
    train: Items
    test: Items
    labels: Items
    train_relevance: sparse.csr_matrix
    test_relevance: sparse.csr_matrix
    train_filter: Int[np.ndarray, "f 2"]
    test_filter: Int[np.ndarray, "g 2"]
    valid: Items | None = None
    valid_relevance: sparse.csr_matrix | None = None
    valid_filter: Int[np.ndarray, "h 2"] | None = None
    train_weights: Float32[np.ndarray, " nnz"] | None = None

    def split(self, name: str) -> tuple[Items, sparse.csr_matrix, Int[np.ndarray, "f 2"]]:
        """Queries, relevance and filter pairs of 'train', 'valid' or 'test'.

        Raises:
          InputError: If there is no such split.
        """
        if getattr(self, name) is None:
            raise InputError(
                f"{self.path}: has no validation split; prepare it again with --valid=0.02, for "
                "example"
            )
        return tuple(getattr(self, name + part) for part in ("", "_relevance", "_filter"))

    @property
    def name(self) -> str:
        return self.info["name"]

    @property
    def num_labels(self) -> int:
        return self.info["num_labels"]

    @property
    def image_width(self) -> int:
        """Width of the image embeddings; 0 if there are none."""
        return self.info["image_width"]

    @property
    def propensity_a(self) -> float:
        return self.info["propensity_a"]

    @property
    def propensity_b(self) -> float:
        return self.info["propensity_b"]

    @property
    def content_hash(self) -> str:
        """SHA-256 of all arrays, the tokenizer, the propensity constants and `max_tokens`."""
        return self.info["content_hash"]

    @property
    def tokenizer(self) -> str:
        """Path of the tokenizer file, in the format of the `tokenizers` library."""
        return os.path.join(self.path, TOKENIZER)

    @property
    def vocab_size(self) -> int:
        return self.info["vocab_size"]

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a text, special tokens included."""
        return self.info["max_tokens"]

    @staticmethod
    def open(path: str | os.PathLike) -> "PreparedDataset":
        """Opens the data set in `path`, and checks that its arrays fit each other.

        `verify` finds damage that leaves them fitting.

        Raises:
          InputError: If a file is missing, truncated, or does not match `dataset.json`.
        """
        path = os.fspath(path)
        info = read_info(path)
        tokenizer = os.path.join(path, TOKENIZER)
        if not os.path.isfile(tokenizer):
            raise InputError(
                f"{tokenizer}: not found; the prepared data set is incomplete, {_REMEDY}"
            )

        opened: dict[str, np.ndarray] = {}

        def array(name: str) -> np.ndarray:
            opened[name] = open_array(path, name, info, INFO, _REMEDY)
            return opened[name]

        def items(split: str) -> Items:
            texts = Texts(array(f"{split}_texts"), array(f"{split}_texts_offsets"))
            tokens = Ragged(array(f"{split}_tokens"), array(f"{split}_tokens_offsets"))
            images = None
            if f"{split}_images" in info["arrays"]:
                images = Ragged(array(f"{split}_images"), array(f"{split}_images_offsets"))
            ids = Texts(array(f"{split}_ids"), array(f"{split}_ids_offsets"))
            return Items(texts, tokens, images, ids, array(f"{split}_whole"))

        def relevance(split: str) -> sparse.csr_matrix:
            data, indices, indptr = (
                array(f"{split}_relevance_{name}") for name in ("data", "indices", "indptr")
            )
            if not npy_files.is_csr(data, indices, indptr, info["num_labels"]):
                raise InputError(
                    f"{os.path.join(path, split)}_relevance_*.npy: damaged (no matrix with "
                    f"{info['num_labels']:,} columns); {_REMEDY}"
                )
            matrix = sparse.csr_matrix(
                (data, indices, indptr), shape=(len(indptr) - 1, info["num_labels"]), copy=False
            )
            # `add_relevance` writes it so; scipy would read the whole matrix to find out.
            matrix.has_canonical_format = True
            return matrix

        parts: dict[str, Any] = {"labels": items("labels")}
        for split in SPLITS:
            if split == "valid" and "valid_texts" not in info["arrays"]:
                continue
            parts[split] = items(split)
            parts[f"{split}_relevance"] = relevance(split)
            parts[f"{split}_filter"] = array(f"{split}_filter")
        if "train_weights" in info["arrays"]:
            parts["train_weights"] = array("train_weights")
        integrity.check_content_hash(os.path.join(path, INFO), tokenizer, info)
        integrity.check(path, opened, PARTS, info)
        return PreparedDataset(path, info, **parts)

    def verify(self) -> "PreparedDataset":
        """Compares the bytes of all arrays with their checksums, once per process.

        Raises:
          InputError: If an array has changed since it was written.
        """
        integrity.verify(self.path, self.info)
        return self


class ArrayInfo(TypedDict):
    """What `Writer.arrays` records of each array."""

    dtype: str
    shape: list[int]
    sha256: str


class _Info(TypedDict):
    """The fields of `dataset.json` that are read here; there may be others."""

    name: str
    num_labels: NumLabels
    image_width: int
    vocab_size: int
    max_tokens: int
    propensity_a: float
    propensity_b: float
    content_hash: str
    arrays: dict[str, ArrayInfo]


def read_info(path: str) -> dict[str, Any]:
    """The contents of `dataset.json` in the directory `path`.

    Raises:
      InputError: If `path` is not a prepared data set of this format.
    """
    file_name = os.path.join(path, INFO)
    if not epath.Path(file_name).exists():
        raise InputError(
            f"{file_name}: not found; expected a directory that python -m vixml_jax.prepare wrote"
        )
    info = json_files.read(file_name, dict[str, Any], _REMEDY)
    if info.get("format") != FORMAT:
        raise InputError(f"{file_name}: format {info.get('format')}, expected {FORMAT}; {_REMEDY}")
    try:
        msgspec.convert(info, _Info)
    except msgspec.ValidationError as error:
        raise InputError(f"{file_name}: {error}; {_REMEDY}") from None
    return info


def open_array(
    path: str, name: str, info: dict[str, Any], info_name: str, remedy: str
) -> Shaped[np.ndarray, "..."]:
    """An array that a `Writer` wrote, memory-mapped unless it is empty.

    Args:
      path: Directory of the array.
      name: Name of the array.
      info: Has under `arrays` the dtype and shape of each array, as `Writer.arrays` gives them.
      info_name: Name of the file that `info` was read from, for messages.
      remedy: What the user can do about a damaged file, for messages.

    Raises:
      InputError: If the file is missing or truncated, or has another dtype or shape.
    """
    file_name = os.path.join(path, f"{name}.npy")
    expected = info["arrays"].get(name)
    if expected is None:
        raise InputError(f"{os.path.join(path, info_name)}: no array {name!r} is listed; {remedy}")
    try:
        dtype, shape = np.dtype(expected["dtype"]), tuple(expected["shape"])
    except (TypeError, ValueError, SyntaxError) as error:
        raise InputError(
            f"{os.path.join(path, info_name)}: array {name!r}: {error}; {remedy}"
        ) from None
    array = np.asarray(npy_files.open_mapped(file_name, remedy))
    if (array.dtype, array.shape) != (dtype, shape):
        raise InputError(
            f"{file_name}: found {array.dtype} {array.shape}, expected {dtype} {shape} as in "
            f"{info_name}; {remedy}"
        )
    return array


class ArrayFile:
    """A `.npy` file that grows by rows; appended rows go straight to disk.

    Args:
      file: Open for writing, empty.
      dtype: Of the array.
      row_shape: Shape of a row: all dimensions of the array but the first.
    """

    def __init__(self, file: BinaryIO, dtype: Any, row_shape: tuple[int, ...]):
        self._file = file
        self._dtype = np.dtype(dtype)
        self._row_shape = row_shape
        self._hash = hashlib.sha256()
        self._rows = 0
        self._write_header()
        self._begin = file.tell()

    def append(self, rows: Shaped[np.ndarray, "n *v"]) -> None:
        """Appends rows, converted to the dtype of the array."""
        rows = np.ascontiguousarray(rows, self._dtype)
        assert rows.shape[1:] == self._row_shape, (rows.shape, self._row_shape)
        data = memoryview(rows).cast("B") if rows.size else b""
        self._file.write(data)
        self._hash.update(data)
        self._rows += len(rows)

    def finish(self) -> dict[str, Any]:
        """Writes the number of rows into the header; returns dtype, shape and SHA-256."""
        self._file.seek(0)
        self._write_header()
        assert self._file.tell() == self._begin  # numpy pads headers for larger counts.
        return {
            "dtype": self._dtype.str,
            "shape": [self._rows, *self._row_shape],
            "sha256": self._hash.hexdigest(),
        }

    def _write_header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": self._dtype.str,
                "fortran_order": False,
                "shape": (self._rows, *self._row_shape),
            },
        )


class Writer:
    """Writes the files of a prepared data set into a temporary directory."""

    def __init__(self, directory: str):
        self._directory = directory
        self._arrays: dict[str, dict[str, Any]] = {}

    @property
    def directory(self) -> str:
        """The temporary directory, which `write` renames at the end."""
        return self._directory

    @property
    def arrays(self) -> dict[str, dict[str, Any]]:
        """Dtype, shape and SHA-256 of each array written so far, by name."""
        return dict(self._arrays)

    @contextlib.contextmanager
    def array(self, name: str, dtype: Any, row_shape: tuple[int, ...] = ()) -> Iterator[ArrayFile]:
        """Yields a new array to append to."""
        with open(os.path.join(self._directory, f"{name}.npy"), "wb") as file:
            array = ArrayFile(file, dtype, row_shape)
            yield array
            self._arrays[name] = array.finish()

    def add(self, name: str, values: Shaped[np.ndarray, "n *v"]) -> None:
        """Writes an array."""
        with self.array(name, values.dtype, values.shape[1:]) as array:
            array.append(values)

    @contextlib.contextmanager
    def strings(self, name: str) -> Iterator[Callable[[list[str]], None]]:
        """Yields a function that appends texts to two new arrays: UTF-8 bytes and offsets."""
        sizes = [np.zeros(1, np.int64)]
        with self.array(name, np.uint8) as file:

            def append(texts: list[str]) -> None:
                encoded = [text.encode("utf-8") for text in texts]
                file.append(np.frombuffer(b"".join(encoded), np.uint8))
                sizes.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))

            yield append
        self.add(f"{name}_offsets", np.cumsum(np.concatenate(sizes)))

    def add_relevance(self, split: str, relevance: sparse.csr_matrix) -> None:
        """Writes a relevance matrix in canonical form; indices are int32 where they fit."""
        small = max(relevance.nnz, *relevance.shape) <= _INT32_MAX
        index = np.int32 if small else np.int64
        with self.array(f"{split}_relevance_data", np.float32) as array:
            ones = np.ones(min(relevance.nnz, 1 << 20), np.float32)
            for start in range(0, relevance.nnz, 1 << 20):
                array.append(ones[: relevance.nnz - start])
        self.add(f"{split}_relevance_indices", relevance.indices.astype(index, copy=False))
        self.add(f"{split}_relevance_indptr", relevance.indptr.astype(index, copy=False))

    def finish(self, info: dict[str, Any], tokenizer: str) -> None:
        """Writes the tokenizer and `dataset.json`.

        Args:
          info: Contents of `dataset.json`. `format`, `content_hash` and `arrays` are added here;
            the hash covers the arrays, the tokenizer, `propensity_a`, `propensity_b` and
            `max_tokens`, but not where they came from.
          tokenizer: JSON of the `tokenizers` library.
        """
        with open(os.path.join(self._directory, TOKENIZER), "w", encoding="utf-8") as file:
            file.write(tokenizer)
        digest = integrity.content_hash(self._arrays, tokenizer.encode("utf-8"), info)
        info = {"format": FORMAT, **info, "content_hash": digest, "arrays": self._arrays}
        with open(os.path.join(self._directory, INFO), "w", encoding="utf-8") as file:
            json.dump(info, file, indent=2, ensure_ascii=False)
            file.write("\n")


@contextlib.contextmanager
def write(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Writer]:
    """Yields a writer whose directory is renamed to `path` if no exception is raised.

    Args:
      path: Directory to write; its parents are created.
      overwrite: Whether to replace a prepared data set in `path`. Other files and directories are
        never replaced.

    Raises:
      InputError: If `path` must not be replaced.
    """
    check_free(path, overwrite)
    with atomic.directory(path) as temporary:
        yield Writer(temporary)
        check_free(path, overwrite)  # Another process may have written it in the meantime.


def check_free(path: str, overwrite: bool) -> None:
    """Checks that `path` can be written.

    Raises:
      InputError: If `path` is a file, a directory with other files, or a prepared data set and
        `overwrite` is False.
    """
    if not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path)):
        return
    if not os.path.isfile(os.path.join(path, INFO)):
        raise InputError(
            f"--out={path}: exists and is not a prepared data set; choose another directory"
        )
    if not overwrite:
        raise InputError(
            f"--out={path}: holds a prepared data set; replace it with --overwrite, or choose "
            "another directory"
        )
