"""Public data sets as ArrayRecord files of TFDS: built once, self-contained, with random access.

TFDS is used without TensorFlow. Its `GeneratorBasedBuilder` needs TensorFlow for a split larger
than 1 GiB, even without shuffling, and then keeps the split in memory; `ShardBasedBuilder` writes
rows in order and keeps one shard in memory.
"""

import array
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from jaxtyping import Int
from scipy import sparse

from vixml_jax import errors
from vixml_jax.data import store
from vixml_jax.data.sources import published, xml_repository
from vixml_jax.data.sources.published import LABELS, PublicDataset
from vixml_jax.data.sources.raw import file_stats
from vixml_jax.errors import InputError
from vixml_jax.runtime import progress
from vixml_jax.storage import json_files, locks

VERSION = "1.0.0"  # Version of the build format; increased when older builds cannot be read.
_SHARD = 1 << 15  # Rows per file, which are in memory while it is written.
_CHUNK = 1 << 13  # Rows read at a time.
_TEXTS = ("title", "content")
_FAILED_CALL = re.compile(r"\w\(\) failed: ")  # ArrayRecord's error for a full disk.
_INFO = "dataset_info.json"  # As TFDS names it.
_SOURCES = "published.json"  # The published files of which a build was made.


def builder(
    dataset: PublicDataset, *, data_dir: str | None = None, manual_dir: str | None = None
) -> Any:
    """The builder of a data set, a `tfds.core.DatasetBuilder`.

    `download_and_prepare()` builds the data set and `as_data_source(split)` reads it. The splits
    are train, test and labels, with the features uid, title, content and labels.
    `tfds.builder_from_directory` opens a finished build as well.

    Args:
      dataset: A data set of the catalogue.
      data_dir: Directory for builds; None: the default of TFDS (~/tensorflow_datasets, or
        $TFDS_DATA_DIR).
      manual_dir: Directory of the files downloaded by hand; None: downloads/manual/KEY in
        `data_dir`.
    """
    return _builder_class()(dataset, data_dir, manual_dir)


@functools.cache
def _builder_class() -> type:
    """The builder class; defined in a function because TFDS takes a second to import."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_builder

    class PublicBuilder(dataset_builder.ShardBasedBuilder):
        """Builder of any data set of the catalogue."""

        VERSION = tfds.core.Version(VERSION)
        pkg_dir_path = None

        def __init__(self, dataset: PublicDataset, data_dir: str | None, manual_dir: str | None):
            self.dataset = dataset
            self.name = dataset.key.replace(".", "_")  # TFDS does not allow dots.
            super().__init__(data_dir=data_dir or None, file_format="array_record")
            self.manual_dir = manual_dir or os.path.join(
                self.data_dir_root, "downloads", "manual", dataset.key
            )

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"{self.dataset.name}. {self.dataset.licence}",
                homepage=self.dataset.homepage,
                citation=self.dataset.citation,
                disable_shuffling=True,
                features=tfds.features.FeaturesDict(
                    {
                        "uid": tfds.features.Text(),
                        "title": tfds.features.Text(),
                        "content": tfds.features.Text(),
                        "labels": tfds.features.Sequence(np.int64),
                    }
                ),
            )

        def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Any]]:
            del dl_manager  # The files can only be downloaded with a browser.
            files = published.find(self.dataset, self.manual_dir)
            # At this point data_dir is a temporary directory, which TFDS renames at the end.
            _write_extra_files(self.dataset, files, self.data_dir)
            return {
                part: _shards(_with_progress(self.dataset, files, part), count)
                for part, count in self.dataset.sizes.items()
            }

    return PublicBuilder


def _write_extra_files(dataset: PublicDataset, files: published.Files, directory: str) -> None:
    """Copies the filter files after checking them, and records the published files."""
    for split, path in files.filters.items():
        xml_repository.read_filter(path, (dataset.sizes[split], dataset.labels))
        shutil.copyfile(path, os.path.join(directory, os.path.basename(path)))
    with open(os.path.join(directory, _SOURCES), "w", encoding="utf-8") as file:
        json.dump({"files": file_stats(files.paths)}, file)


def _with_progress(
    dataset: PublicDataset, files: published.Files, part: str
) -> Iterator[dict[str, Any]]:
    """The rows of a part, with a progress bar."""
    rows = published.read(dataset, files, part)
    with progress.track(f"{dataset.name} {part}", dataset.sizes[part], unit="rows") as done:
        for row in rows:
            yield row
            done(1)


def _shards(rows: Iterator[dict[str, Any]], count: int) -> list[Any]:
    """Functions that return the rows of one shard each; they must be called in order."""

    def shard(start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from zip(itertools.count(start), itertools.islice(rows, _SHARD))
        if start + _SHARD >= count:
            next(rows, None)  # Raises an error if the number of rows is not the published one.

    return [functools.partial(shard, start) for start in range(0, count, _SHARD)]


def build(maker: Any) -> None:
    """Builds a data set, unless it is built already; waits for another process that builds it.

    Args:
      maker: Its builder.

    Raises:
      InputError: If the published files are missing, not valid, or have changed since the build; or
        if the build is damaged.
    """
    if not os.path.isdir(maker.data_dir):
        published.find(maker.dataset, maker.manual_dir)
        root = maker.data_dir_root
        with errors.writing(f"--data_dir={root}"):
            os.makedirs(root, exist_ok=True)
            doing, name = f"building {maker.dataset.name}", f".{maker.name}.lock"
            with locks.exclusive(root, doing=doing, wait_s=math.inf, name=name):
                if not os.path.isdir(maker.data_dir):
                    _build(maker)
                    return
    is_described = os.path.isfile(os.path.join(maker.data_dir, _INFO))
    if is_described and not maker.info.initialized:  # Built since the builder was made.
        maker.info.read_from_directory(maker.data_dir)
    _check(maker)


def _build(maker: Any) -> None:
    import tensorflow_datasets as tfds

    config = tfds.download.DownloadConfig(try_download_gcs=False)
    try:
        with errors.writing(f"--data_dir={maker.data_dir}"):
            maker.download_and_prepare(download_config=config)
    except RuntimeError as error:
        if not _FAILED_CALL.search(str(error)):
            raise
        raise InputError(
            f"--data_dir={maker.data_dir}: cannot be written ({error}); the unfinished files "
            "were removed"
        ) from None


def _check(maker: Any) -> None:
    """Raises an error for a build of other sizes or of other files than the published ones."""
    sizes = {part: info.num_examples for part, info in maker.info.splits.items()}
    if sizes != maker.dataset.sizes:
        raise InputError(
            f"{maker.data_dir}: contains {sizes or 'nothing'}, but {maker.dataset.name} was "
            f"published with {maker.dataset.sizes}; {_remedy(maker)}"
        )
    try:
        files = published.find(maker.dataset, maker.manual_dir)
    except InputError:
        return  # The published files may be removed after the build.
    before = sources(maker)
    now = file_stats(files.paths)
    changed = sorted(name for name in before | now if before.get(name) != now.get(name))
    if changed:
        raise InputError(
            f"{maker.data_dir}: was built before {', '.join(changed)} in {maker.manual_dir} "
            f"changed; {_remedy(maker)}"
        )


class _Sources(msgspec.Struct):
    """Contents of `published.json`."""

    files: dict[str, list[int]]  # Size and modification time by name.


def sources(maker: Any) -> dict[str, list[int]]:
    """Size and modification time of each published file of a build, by name.

    Raises:
      InputError: If the build does not record them.
    """
    path = os.path.join(maker.data_dir, _SOURCES)
    return json_files.read(path, _Sources, _remedy(maker)).files


def _remedy(maker: Any) -> str:
    return f"remove {maker.data_dir} to rebuild it"


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a built data set.

    Attributes:
      maker: The builder.
      source: The serialised rows, with random access.
      ids: Published ids, decoded on access; None if there are none.
      relevance: Relevance matrix [rows, labels].
    """

    maker: Any
    source: Sequence[bytes]
    ids: Sequence[str] | None
    relevance: sparse.csr_matrix

    def read_texts(self) -> Iterator[list[str]]:
        """The texts in order, in chunks."""
        compose = self.maker.dataset.text
        for examples in _read(self.maker, self.source):
            yield [
                compose(*(row[name].bytes_list.value[0].decode("utf-8") for name in _TEXTS))
                for row in examples
            ]


def open_part(maker: Any, part: str) -> Part:
    """Opens a part of a build and reads its labels and ids; texts stay on disk."""
    import tensorflow_datasets as tfds

    raw_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
    source = maker.as_data_source(part, deserialize_method=raw_bytes)
    utf8, lengths = [], array.array("q")
    labels, counts = array.array("i"), array.array("q")
    title = f"{maker.dataset.name} {part} labels"
    with progress.track(title, len(source), unit="rows") as done:
        for examples in _read(maker, source):
            uids = [row["uid"].bytes_list.value[0] for row in examples]
            utf8.append(b"".join(uids))
            lengths.extend(map(len, uids))
            if part != LABELS:
                for row in examples:
                    row_labels = row["labels"].int64_list.value
                    labels.extend(row_labels)
                    counts.append(len(row_labels))
            done(len(examples))
    if part == LABELS:
        counts.extend([0] * len(source))
    relevance = _to_csr(np.frombuffer(labels, np.int32), np.asarray(counts), maker.dataset.labels)
    ids = None
    if any(lengths):
        offsets = np.concatenate([[0], np.cumsum(np.asarray(lengths))])
        ids = store.Texts(np.frombuffer(b"".join(utf8), np.uint8), offsets)
    return Part(maker, source, ids, relevance)


def _to_csr(
    indices: Int[np.ndarray, " nnz"], counts: Int[np.ndarray, " n"], columns: int
) -> sparse.csr_matrix:
    """The relevance matrix of labels that need not be sorted."""
    indptr = np.concatenate([[0], np.cumsum(counts)])
    data = np.ones(len(indices), np.int8)
    matrix = sparse.csr_matrix((data, indices, indptr), shape=(len(counts), columns))
    matrix.sort_indices()
    return xml_repository.to_csr(counts, matrix.indices, columns)


def _read(maker: Any, source: Sequence[bytes]) -> Iterator[list[Any]]:
    """The features of the rows in order, in chunks.

    The records are parsed here, because TFDS decodes feature by feature and is many times slower.

    Raises:
      InputError: If a file is missing or damaged, which the checksums of the records reveal.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    parse = tf_example_pb2.Example.FromString
    for start in range(0, len(source), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(source)))
        try:
            records = source.__getitems__(list(rows))
            if not all(records):  # Some versions return empty records for a truncated file.
                raise RuntimeError(f"rows from {start} are empty")
        except RuntimeError as error:
            raise InputError(f"{maker.data_dir}: damaged ({error}); {_remedy(maker)}") from None
        yield [parse(record).features.feature for record in records]


def filter_of(maker: Any, split: str) -> Int[np.ndarray, "f 2"] | None:
    """The published filter pairs of train or test; None if there are none."""
    path = os.path.join(maker.data_dir, f"filter_labels_{split}.txt")
    if not os.path.isfile(path):
        return None
    return xml_repository.read_filter(path, (maker.dataset.sizes[split], maker.dataset.labels))
