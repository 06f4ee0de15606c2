"""Serving artifacts of a run: label ids, texts and vectors, tokenizer, training neighbours."""

import dataclasses
import filecmp
import functools
import hashlib
import os
import shutil
from typing import Annotated, Literal

import msgspec
import numpy as np
from jaxtyping import Float32, Int
from scipy import sparse

from vixml_jax import workdir as workdir_lib
from vixml_jax.data import store
from vixml_jax.data.store import PreparedDataset, Ragged, Texts
from vixml_jax.errors import InputError
from vixml_jax.storage import atomic, held, npy_files, regular_files, sealed

DIRECTORY = "serving"  # In a run directory.
ABOUT = "artifacts.json"
FORMAT = 1
# Names of version 0.1: the directory, its description, and the arrays of training queries.
_DIRECTORY_0_1, _ABOUT_0_1 = "answers", "answers.json"
_ARRAYS_0_1 = {
    "train_vectors": "memory",
    "train_indptr": "memory_indptr",
    "train_labels": "memory_labels",
}

_NUM_SAMPLED = 4096  # Training queries that new labels are compared with at most.

_Tokens = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]


class About(msgspec.Struct):
    """Contents of `artifacts.json`.

    Attributes:
      format: FORMAT.
      name: Name of the data set.
      step: Step of the model that made the vectors.
      content_hash: Of the prepared data.
      num_labels: Labels of the prepared data.
      max_tokens: Tokens after which texts are cut.
      mean_tokens: Tokens of a training query, on average.
      image_width: Width of the image embeddings in the prepared data; 0: there are none.
      images: Model that embedded the images, then ', aspect kept' or ', stretched'; empty: the data
        came with embeddings or has no images.
      arrays: Data type, shape and checksum of each array.
      tokenizer: SHA-256 of `tokenizer.json`; empty in artifacts of versions that did not record it.
    """

    format: Literal[1]
    name: str
    step: Annotated[int, msgspec.Meta(ge=0)]
    content_hash: str
    num_labels: store.NumLabels
    max_tokens: _Tokens
    mean_tokens: Annotated[float, msgspec.Meta(ge=0, le=1 << 20)]
    image_width: Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
    images: str
    arrays: dict[str, store.ArrayInfo]
    tokenizer: str = ""

    @property
    def has_train_vectors(self) -> bool:
        """Whether the artifacts hold vectors of the training queries."""
        return "train_vectors" in self.arrays or _ARRAYS_0_1["train_vectors"] in self.arrays


@dataclasses.dataclass(frozen=True)
class ServingArtifacts:
    """Labels and training queries as the model of one step encodes them; arrays are memory-mapped.

    Attributes:
      path: Directory of the artifacts.
      about: Contents of `artifacts.json`.
      ids, texts: Ids and texts of the labels.
      vectors: Unit prototypes of the labels. What a label head holds of a label is not here, but
        with the parameters of the model.
      train_vectors: Unit vectors of the training queries; None: saved without training neighbours.
      sample_tokens: Tokens of the training queries `sample_rows`; none in artifacts of versions
        that did not write them, whose heads read no words.
      train_relevance: Their labels, [training queries, labels], ones; None: likewise.
    """

    path: str
    about: About
    ids: Texts
    texts: Texts
    vectors: Float32[np.ndarray, "n e"]
    train_vectors: Float32[np.ndarray, "t e"] | None = None
    sample_tokens: Ragged | None = None
    train_relevance: sparse.csr_matrix | None = None

    @functools.cached_property
    def rows_by_id(self) -> dict[str, int]:
        """Rows of the labels by their ids."""
        ids = (name for chunk in self.ids.chunks() for name in chunk)
        return {name: row for row, name in enumerate(ids)}

    @staticmethod
    def open(path: str) -> "ServingArtifacts":
        """Opens artifacts that `save` wrote, and compares all files with their checksums.

        If another process replaces them meanwhile, the new ones are opened.

        Raises:
          InputError: If a file is missing or does not match its checksum in `artifacts.json`, or if
            the files do not fit each other.
        """
        return held.one_version(path, lambda: ServingArtifacts._open(path))

    @staticmethod
    def _open(path: str) -> "ServingArtifacts":
        about = read_about(path)

        def array(name: str) -> np.ndarray:
            return _open_array(path, about, name)

        def ragged(name: str, values: np.ndarray, offsets: np.ndarray, rows: int) -> None:
            if not npy_files.are_offsets(offsets, rows, len(values)):
                raise InputError(f"{_file(path, name)}: no offsets of {rows} rows; {_remedy(path)}")

        texts = {}
        for name in ("ids", "texts"):
            utf8, offsets = array(name), array(f"{name}_offsets")
            ragged(f"{name}_offsets", utf8, offsets, about.num_labels)
            texts[name] = Texts(utf8, offsets)
        vectors = array("vectors")
        train = {}
        if about.has_train_vectors:
            queries, indptr, indices = (
                array(name) for name in ("train_vectors", "train_indptr", "train_labels")
            )
            ragged("train_indptr", indices, indptr, len(queries))
            sample = Ragged(np.zeros(0, np.int32), np.zeros(1, np.int64))
            if "sample_tokens" in about.arrays:
                sample = Ragged(array("sample_tokens"), array("sample_tokens_offsets"))
                ragged("sample_tokens_offsets", *sample, len(sample_rows(len(queries))))
            if len(indices) and not 0 <= indices.min() <= indices.max() < about.num_labels:
                raise InputError(
                    f"{_file(path, 'train_labels')}: rows of labels outside 0 to "
                    f"{about.num_labels - 1}; {_remedy(path)}"
                )
            relevance = sparse.csr_matrix(
                (np.ones(len(indices), np.float32), indices, indptr),
                shape=(len(queries), about.num_labels),
            )
            train = {
                "train_vectors": queries, "train_relevance": relevance, "sample_tokens": sample,
            }  # fmt: skip
        _check_tokenizer(path, about)
        return ServingArtifacts(path, about, **texts, vectors=vectors, **train)


def _file(path: str, name: str) -> str:
    return os.path.join(path, f"{name}.npy")


def _open_array(path: str, about: About, name: str) -> np.ndarray:
    """Opens an array and compares it with its checksum."""
    if name not in about.arrays:
        name = _ARRAYS_0_1.get(name, name)
    values = store.open_array(path, name, {"arrays": about.arrays}, ABOUT, _remedy(path))
    data = memoryview(values).cast("B") if values.size else b""
    if hashlib.sha256(data).hexdigest() != about.arrays[name]["sha256"]:
        raise InputError(f"{_file(path, name)}: does not match its checksum; {_remedy(path)}")
    return values


def _check_tokenizer(path: str, about: About) -> None:
    """Compares the tokenizer with its checksum, if one was recorded."""
    name = os.path.join(path, store.TOKENIZER)
    if about.tokenizer and _digest(name, path) != about.tokenizer:
        raise InputError(f"{name}: does not match its checksum; {_remedy(path)}")


def _digest(name: str, path: str) -> str:
    """SHA-256 of a file in the artifacts `path`."""
    try:
        with regular_files.open_binary(name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{name}: {error.strerror or error}; {_remedy(path)}") from None


def locate(workdir: str) -> str:
    """Returns the directory of a run's serving artifacts, which need not exist yet."""
    return workdir_lib.path_of(workdir, DIRECTORY, _DIRECTORY_0_1)


def read_about(path: str) -> About:
    """Reads `artifacts.json` of a directory.

    Raises:
      InputError: If it is missing, damaged or of another format, or if its arrays do not fit each
        other.
    """
    name = workdir_lib.path_of(path, ABOUT, _ABOUT_0_1)
    about = sealed.read(name, About, _remedy(path))
    shapes = {array: info["shape"] for array, info in about.arrays.items()}
    width = shapes.get("vectors", [0, 0])[-1]
    expected = {"vectors": [about.num_labels, width]}
    if about.has_train_vectors:
        queries = "train_vectors" if "train_vectors" in shapes else _ARRAYS_0_1["train_vectors"]
        expected[queries] = [shapes[queries][0] if shapes[queries] else 0, width]
    for array in ("ids_offsets", "texts_offsets"):
        expected[array] = [about.num_labels + 1]
    for array in ("ids", "texts"):
        expected[array] = shapes.get(array, [0])[:1]
    for array, shape in expected.items():
        if shapes.get(array) != shape:
            raise InputError(
                f"{name}: array {array!r} has shape {shapes.get(array)}, expected {shape}; "
                f"{_remedy(path)}"
            )
    return about


def has_labels_of(path: str, dataset: PreparedDataset) -> bool:
    """Whether artifacts have the labels of a data set, in its order, and its tokenizer.

    Args:
      path: Directory of the artifacts, which need not exist.
      dataset: Prepared data.
    """
    tokenizer = os.path.join(path, store.TOKENIZER)
    if not os.path.isfile(tokenizer):
        return False
    about, other = read_about(path), dataset.info["arrays"]
    _check_tokenizer(path, about)
    return filecmp.cmp(tokenizer, dataset.tokenizer, shallow=False) and all(
        about.arrays[name]["sha256"] == other[f"labels_{name}"]["sha256"]
        for name in ("ids", "ids_offsets")
    )


def _remedy(path: str) -> str:
    return f"remove the directory {path}; it is then written again"


def save(
    path: str,
    dataset: PreparedDataset,
    step: int,
    vectors: Float32[np.ndarray, "n e"],
    train_vectors: Float32[np.ndarray, "t e"] | None,
) -> None:
    """Writes the serving artifacts of a run atomically; replaces those of another step.

    Args:
      path: Directory.
      dataset: Prepared data of the run.
      step: Step of the model.
      vectors: Unit prototypes of the labels. Those of a vector store are not stored twice: the
        artifacts then hold a hard link to its file.
      train_vectors: Unit vectors of the training queries, likewise; None: without training
        neighbours.
    """
    with atomic.directory(path) as temporary:
        writer = store.Writer(temporary)
        for name, texts in (("ids", dataset.labels.ids), ("texts", dataset.labels.texts)):
            with writer.strings(name) as append:
                for chunk in texts.chunks():
                    append(chunk)
        linked = _link_or_write(writer, "vectors", vectors)
        if train_vectors is not None:
            linked |= _link_or_write(writer, "train_vectors", train_vectors)
            writer.add("train_indptr", np.asarray(dataset.train_relevance.indptr))
            writer.add("train_labels", np.asarray(dataset.train_relevance.indices))
            values, offsets = dataset.train.tokens
            rows = sample_rows(len(dataset.train))
            starts, lengths = offsets[rows], offsets[rows + 1] - offsets[rows]
            writer.add("sample_tokens", values[store.ranges(starts, lengths)])
            writer.add("sample_tokens_offsets", np.concatenate([[0], np.cumsum(lengths)]))
        shutil.copyfile(dataset.tokenizer, os.path.join(temporary, store.TOKENIZER))
        offsets = dataset.train.tokens.offsets
        about = About(
            format=FORMAT,
            name=dataset.name,
            step=step,
            content_hash=dataset.content_hash,
            num_labels=dataset.num_labels,
            max_tokens=dataset.max_tokens,
            mean_tokens=float(offsets[-1]) / max(1, len(offsets) - 1),
            image_width=dataset.image_width,
            images=dataset.info["settings"]["images"],
            arrays=writer.arrays | linked,
            tokenizer=_digest(os.path.join(temporary, store.TOKENIZER), path),
        )
        sealed.write(os.path.join(temporary, ABOUT), msgspec.structs.asdict(about))


def sample_rows(count: int) -> Int[np.ndarray, " s"]:
    """The training queries, of `count`, with which new labels are compared; ascending."""
    return np.sort(np.random.default_rng(0).permutation(count)[:_NUM_SAMPLED])


def _link_or_write(
    writer: store.Writer, name: str, vectors: Float32[np.ndarray, "n e"]
) -> dict[str, store.ArrayInfo]:
    """Adds vectors to the artifacts; returns what `artifacts.json` says of a file that is linked.

    A file of a vector store is replaced as a whole when its vectors change, so a link to it keeps
    the vectors.
    """
    vectors = np.asanyarray(vectors, np.float32)
    path = os.path.join(writer.directory, f"{name}.npy")
    source = getattr(vectors, "filename", None)  # Of a memory-mapped array.
    if source is not None:
        try:
            os.link(source, path)
            values = np.load(path, mmap_mode="r", allow_pickle=False)
            if np.array_equal(values, vectors):  # It is all of the file, as it is now.
                digest = hashlib.sha256(memoryview(values).cast("B")).hexdigest()
                info = {"dtype": values.dtype.str, "shape": [*values.shape], "sha256": digest}
                return {name: info}
            os.remove(path)
        except (OSError, ValueError):  # No hard links here, or not a file of one array.
            if os.path.lexists(path):
                os.remove(path)
    writer.add(name, vectors)
    return {}
