"""PreparedDataset: what prepare writes and everything else reads, memory-mapped."""

import collections.abc
import contextlib
import dataclasses
import hashlib
import itertools
import json
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float32, Int, Shaped, UInt8
from scipy import sparse

from vixml_jax.errors import InputError
from vixml_jax.storage import atomic

FORMAT = 2  # Of the files; raised when older sets can no longer be read.
INFO = "dataset.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "valid", "test")  # Of queries; valid need not be there.
PARTS = (*SPLITS, "labels")
_INT32_MAX = np.iinfo(np.int32).max


class Ragged(NamedTuple):
    """Rows of unequal length; row i is `values[offsets[i] : offsets[i + 1]]`."""

    values: Shaped[np.ndarray, "total *v"]
    offsets: Int[np.ndarray, " n+1"]  # int64.


def ranges(starts: Int[np.ndarray, " n"], lengths: Int[np.ndarray, " n"]) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (lengths[0] of them), starts[1], ..."""
    before = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - before, lengths)


class Texts(collections.abc.Sequence):
    """Texts that are decoded when asked for."""

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
        """All texts in order, so many at a time: much faster than one by one."""
        for start in range(0, len(self), rows):
            offsets = np.asarray(self._offsets[start : start + rows + 1])
            block = self._utf8[offsets[0] : offsets[-1]].tobytes()
            _release(self._utf8)
            ends = (offsets - offsets[0]).tolist()
            yield [block[a:b].decode("utf-8") for a, b in itertools.pairwise(ends)]


def _release(array: Shaped[np.ndarray, "..."]) -> None:
    """Lets go of the pages of a mapped file that were read: they would count as our memory."""
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, mmap.mmap):
        array.madvise(mmap.MADV_DONTNEED)


@dataclasses.dataclass(frozen=True)
class Items:
    """Queries of a split, or labels: their texts, tokens and pictures."""

    texts: Texts
    tokens: Ragged  # int32.
    images: Ragged | None  # float16 [total, v]; None where the source has no pictures of these.
    ids: Texts | None = None  # What the source calls them.
    whole: Int[np.ndarray, " n"] | None = None  # int32, tokens of each text before it was cut.

    def __len__(self) -> int:
        return len(self.texts)


@dataclasses.dataclass(frozen=True)
class PreparedDataset:
    """A data set as `prepare` wrote it; arrays stay on disk until they are read.

    Attributes:
      path: Its directory.
      info: What `dataset.json` says.
      train, test, labels: Items of each kind.
      train_relevance, test_relevance: Ones at the labels of each query [queries, labels], float32,
        column indices sorted. Every training query has a label; a test query may have none.
      train_filter, test_filter: Pairs (query, label) that are never predicted, int64 [f, 2].
      valid, valid_relevance, valid_filter: Queries held out of training, to choose by; None: all
        are trained on.
      train_weights: What each one of `train_relevance.data` counts when positives are drawn,
        float32; None: all the same.
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
                f"{self.path}: has no {name} split; prepare it again with --valid=0.02, say"
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
        """Width of the image embeddings; 0: there are none."""
        return self.info["image_width"]

    @property
    def propensity_a(self) -> float:
        return self.info["propensity_a"]

    @property
    def propensity_b(self) -> float:
        return self.info["propensity_b"]

    @property
    def content_hash(self) -> str:
        """SHA-256 of all arrays, the tokenizer and the propensity constants."""
        return self.info["content_hash"]

    @property
    def tokenizer(self) -> str:
        """Path of the tokenizer, in the format of the `tokenizers` library."""
        return os.path.join(self.path, TOKENIZER)

    @property
    def vocab_size(self) -> int:
        return self.info["vocab_size"]

    @property
    def max_tokens(self) -> int:
        """Tokens of an item at most, special ones included."""
        return self.info["max_tokens"]

    @staticmethod
    def open(path: str | os.PathLike) -> "PreparedDataset":
        """Opens the data set in `path`, reading little more than headers.

        Raises:
          InputError: If a file is missing, truncated, or of another size than `dataset.json` says.
        """
        path = os.fspath(path)
        info = read_info(path)
        tokenizer = os.path.join(path, TOKENIZER)
        if not os.path.isfile(tokenizer):
            raise InputError(
                f"{tokenizer}: not found; the prepared data set is incomplete, {_AGAIN}"
            )

        def array(name: str) -> np.ndarray:
            return open_array(path, name, info, INFO, _AGAIN)

        def items(split: str) -> Items:
            texts = Texts(array(f"{split}_texts"), array(f"{split}_texts_offsets"))
            tokens = Ragged(array(f"{split}_tokens"), array(f"{split}_tokens_offsets"))
            images = None
            if f"{split}_images" in info["arrays"]:
                images = Ragged(array(f"{split}_images"), array(f"{split}_images_offsets"))
            ids = Texts(array(f"{split}_ids"), array(f"{split}_ids_offsets"))
            return Items(texts, tokens, images, ids, array(f"{split}_whole"))

        def relevance(split: str) -> sparse.csr_matrix:
            parts = tuple(
                array(f"{split}_relevance_{part}") for part in ("data", "indices", "indptr")
            )
            matrix = sparse.csr_matrix(
                parts, shape=(len(parts[2]) - 1, info["num_labels"]), copy=False
            )
            matrix.has_canonical_format = True  # As written; scipy would read all to find out.
            return matrix

        found: dict[str, Any] = {"labels": items("labels")}
        for split in SPLITS:
            if split == "valid" and "valid_texts" not in info["arrays"]:
                continue
            found[split] = items(split)
            found[f"{split}_relevance"] = relevance(split)
            found[f"{split}_filter"] = array(f"{split}_filter")
        if "train_weights" in info["arrays"]:
            found["train_weights"] = array("train_weights")
        return PreparedDataset(path, info, **found)


_AGAIN = "prepare it again"


def read_info(path: str) -> dict[str, Any]:
    """What `dataset.json` in `path` says.

    Raises:
      InputError: If `path` is not a prepared data set of this format.
    """
    file_name = os.path.join(path, INFO)
    try:
        info = json.loads(epath.Path(file_name).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{file_name}: not found; expected a directory that python -m vixml_jax.prepare wrote"
        ) from None
    except ValueError as error:
        raise InputError(f"{file_name}: not readable as JSON ({error}); {_AGAIN}") from None
    found = info.get("format") if isinstance(info, dict) else None
    if found != FORMAT:
        raise InputError(f"{file_name}: format {found}, expected {FORMAT}; {_AGAIN}")
    return info


def open_array(
    path: str, name: str, info: dict[str, Any], said_in: str, again: str
) -> Shaped[np.ndarray, "..."]:
    """An array of a `Writer`, memory-mapped (an empty one cannot be), its header checked.

    Args:
      path: The directory.
      name: Of the array.
      info: Has `arrays` as the writer had them.
      said_in: The file that `info` was read from.
      again: What to do where the array is not what it was.

    Raises:
      InputError: If it is missing, truncated or another.
    """
    file_name = os.path.join(path, f"{name}.npy")
    expected = info["arrays"].get(name)
    if expected is None:
        raise InputError(f"{os.path.join(path, said_in)}: says nothing of {name}; {again}")
    dtype, shape = np.dtype(expected["dtype"]), tuple(expected["shape"])
    empty = 0 in shape
    try:
        array = np.load(file_name, mmap_mode=None if empty else "r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError(f"{file_name}: not found; {again}") from None
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{file_name}: truncated or damaged ({error}); {again}") from None
    if (array.dtype, array.shape) != (dtype, shape):
        raise InputError(
            f"{file_name}: found {array.dtype} {array.shape}, expected {dtype} {shape} as in "
            f"{said_in}; {again}"
        )
    return np.asarray(array)


class ArrayFile:
    """A `.npy` file that grows by rows: what is appended goes straight to disk."""

    def __init__(self, file: BinaryIO, dtype: Any, row_shape: tuple[int, ...]):
        self._file = file
        self._dtype = np.dtype(dtype)
        self._row_shape = row_shape
        self._hash = hashlib.sha256()
        self._rows = 0
        self._header()
        self._begin = file.tell()

    def append(self, rows: Shaped[np.ndarray, "n *v"]) -> None:
        rows = np.ascontiguousarray(rows, self._dtype)
        assert rows.shape[1:] == self._row_shape, (rows.shape, self._row_shape)
        data = memoryview(rows).cast("B") if rows.size else b""
        self._file.write(data)
        self._hash.update(data)
        self._rows += len(rows)

    def finish(self) -> dict[str, Any]:
        """Puts the number of rows into the header; returns dtype, shape and digest."""
        self._file.seek(0)
        self._header()
        assert self._file.tell() == self._begin  # numpy reserves room for any number of rows.
        return {
            "dtype": self._dtype.str,
            "shape": [self._rows, *self._row_shape],
            "sha256": self._hash.hexdigest(),
        }

    def _header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": self._dtype.str,
                "fortran_order": False,
                "shape": (self._rows, *self._row_shape),
            },
        )


class Writer:
    """Files of a prepared data set in a directory that is not yet named."""

    def __init__(self, directory: str):
        self._directory = directory
        self._arrays: dict[str, dict[str, Any]] = {}

    @property
    def directory(self) -> str:
        """Where the files are until they are named."""
        return self._directory

    @property
    def arrays(self) -> dict[str, dict[str, Any]]:
        """Dtype, shape and digest of each array so far, by name."""
        return dict(self._arrays)

    @contextlib.contextmanager
    def array(self, name: str, dtype: Any, row_shape: tuple[int, ...] = ()) -> Iterator[ArrayFile]:
        """A new array, to be appended to."""
        with open(os.path.join(self._directory, f"{name}.npy"), "wb") as file:
            array = ArrayFile(file, dtype, row_shape)
            yield array
            self._arrays[name] = array.finish()

    def add(self, name: str, values: Shaped[np.ndarray, "n *v"]) -> None:
        """A whole array."""
        with self.array(name, values.dtype, values.shape[1:]) as array:
            array.append(values)

    @contextlib.contextmanager
    def strings(self, name: str) -> Iterator[Callable[[list[str]], None]]:
        """Two new arrays, texts as UTF-8 and their offsets; yields what appends some."""
        sizes = [np.zeros(1, np.int64)]
        with self.array(name, np.uint8) as file:

            def append(texts: list[str]) -> None:
                encoded = [text.encode("utf-8") for text in texts]
                file.append(np.frombuffer(b"".join(encoded), np.uint8))
                sizes.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))

            yield append
        self.add(f"{name}_offsets", np.cumsum(np.concatenate(sizes)))

    def add_relevance(self, split: str, relevance: sparse.csr_matrix) -> None:
        """Relevance in canonical form; 32-bit indices wherever they suffice."""
        small = max(relevance.nnz, *relevance.shape) <= _INT32_MAX
        index = np.int32 if small else np.int64
        with self.array(f"{split}_relevance_data", np.float32) as array:
            ones = np.ones(min(relevance.nnz, 1 << 20), np.float32)
            for start in range(0, relevance.nnz, 1 << 20):
                array.append(ones[: relevance.nnz - start])
        self.add(f"{split}_relevance_indices", relevance.indices.astype(index, copy=False))
        self.add(f"{split}_relevance_indptr", relevance.indptr.astype(index, copy=False))

    def finish(self, info: dict[str, Any], tokenizer: str) -> None:
        """Writes the tokenizer and `dataset.json`, the content hash in it.

        Args:
          info: What is to be known of the set; `content_hash` covers its propensity constants and
            length of texts, all arrays and the tokenizer, but not where they came from.
          tokenizer: In the JSON of the `tokenizers` library.
        """
        with open(os.path.join(self._directory, TOKENIZER), "w", encoding="utf-8") as file:
            file.write(tokenizer)
        content = {
            "arrays": self._arrays,
            "tokenizer": hashlib.sha256(tokenizer.encode("utf-8")).hexdigest(),
            **{key: info[key] for key in ("propensity_a", "propensity_b", "max_tokens")},
        }
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        whole = {"format": FORMAT, **info, "content_hash": digest, "arrays": self._arrays}
        with open(os.path.join(self._directory, INFO), "w", encoding="utf-8") as file:
            json.dump(whole, file, indent=2, ensure_ascii=False)
            file.write("\n")


@contextlib.contextmanager
def write(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Writer]:
    """Yields a writer; its files appear under `path` together, or not at all.

    Args:
      path: A directory; its parents are made.
      overwrite: Whether a prepared data set there is replaced; anything else never is.

    Raises:
      InputError: If `path` may not be replaced.
    """
    check_free(path, overwrite)
    with atomic.directory(path) as temporary:
        yield Writer(temporary)
        check_free(path, overwrite)  # Another process may have been faster.


def check_free(path: str, overwrite: bool) -> None:
    """Refuses to write where something is that may not be replaced.

    Raises:
      InputError: If `path` is a file, a directory of something else, or a prepared data set that
        must not be overwritten.
    """
    if not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path)):
        return
    if not os.path.isfile(os.path.join(path, INFO)):
        raise InputError(
            f"--out={path}: exists and is no prepared data set; choose another directory"
        )
    if not overwrite:
        raise InputError(
            f"--out={path}: holds a prepared data set; --overwrite replaces it, or choose another"
        )
