"""Public data sets as ArrayRecord files of TFDS: built once, whole by themselves, read at random.

TFDS is used without TensorFlow. Its `GeneratorBasedBuilder` needs TensorFlow once a split is larger
than 1 GiB, also where nothing is shuffled, and then holds the split in memory; `ShardBasedBuilder`
writes rows in their order, and holds a shard.
"""

import array
import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from scipy import sparse

from vixml_jax import errors
from vixml_jax.data import progress, store
from vixml_jax.data.sources import published, xml_repository
from vixml_jax.data.sources.published import LABELS, PublicDataset
from vixml_jax.data.sources.raw import describe_files
from vixml_jax.errors import InputError

VERSION = "1.0.0"  # Of what a build holds: raised when older ones can no longer be read.
_SHARD = 1 << 15  # Rows of a file, and so at most of memory, when it is written.
_CHUNK = 1 << 13  # Rows read at a time.
_TEXTS = ("title", "content")
_FAILED_CALL = re.compile(r"\w\(\) failed: ")  # How ArrayRecord tells of a full disk.
_ABOUT = "published.json"  # What a build was made from.


def builder(
    dataset: PublicDataset, *, data_dir: str | None = None, manual_dir: str | None = None
) -> Any:
    """The builder of a data set, a `tfds.core.DatasetBuilder`.

    `download_and_prepare()` builds it, `as_data_source(split)` reads it; splits are train, test and
    labels, with the features uid, title, content and labels. What was built is opened by
    `tfds.builder_from_directory` too.

    Args:
      dataset: Of the catalogue.
      data_dir: Where TFDS keeps what is built; None: TFDS's own (~/tensorflow_datasets, or
        $TFDS_DATA_DIR).
      manual_dir: Where the files downloaded by hand are; None: downloads/manual/KEY in `data_dir`.
    """
    return _builder_class()(dataset, data_dir, manual_dir)


@functools.cache
def _builder_class() -> type:
    """The builder; TFDS takes a second to import."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_builder

    class PublicBuilder(dataset_builder.ShardBasedBuilder):
        """Any data set of the catalogue."""

        VERSION = tfds.core.Version(VERSION)
        pkg_dir_path = None

        def __init__(self, dataset: PublicDataset, data_dir: str | None, manual_dir: str | None):
            self.dataset = dataset
            self.name = dataset.key.replace(".", "_")  # In TFDS, names have no dot.
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
            del dl_manager  # Nothing can be downloaded without a browser.
            files = published.find(self.dataset, self.manual_dir)
            # Still the unfinished directory, which is renamed when all is written.
            _copy_beside(self.dataset, files, self.data_dir)
            return {
                part: _shards(_watched(self.dataset, files, part), count)
                for part, count in self.dataset.sizes.items()
            }

    return PublicBuilder


def _copy_beside(dataset: PublicDataset, files: published.Files, directory: str) -> None:
    """Keeps the filter pairs, once they are known to be fine, and what the build is made from."""
    for split, path in files.filters.items():
        xml_repository.read_filter(path, (dataset.sizes[split], dataset.labels))
        shutil.copyfile(path, os.path.join(directory, os.path.basename(path)))
    with open(os.path.join(directory, _ABOUT), "w", encoding="utf-8") as file:
        json.dump({"files": describe_files(files.paths)}, file)


def _watched(dataset: PublicDataset, files: published.Files, part: str) -> Iterator[dict[str, Any]]:
    rows = published.read(dataset, files, part)
    with progress.watch(f"{dataset.name} {part}", dataset.sizes[part]) as done:
        for row in rows:
            yield row
            done(1)


def _shards(rows: Iterator[dict[str, Any]], count: int) -> list[Any]:
    """Functions that give the rows of one shard each; they are called in order."""

    def shard(start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from zip(itertools.count(start), itertools.islice(rows, _SHARD))
        if start + _SHARD >= count:
            next(rows, None)  # There are as many as there should be, or this raises.

    return [functools.partial(shard, start) for start in range(0, count, _SHARD)]


def build(maker: Any) -> None:
    """Builds what a builder builds, if it is not there.

    Raises:
      InputError: If the files in its manual directory are missing or at fault; or, if it is there,
        if they have changed or it is damaged.
    """
    import tensorflow_datasets as tfds

    if os.path.isdir(maker.data_dir):
        _check(maker)
    else:
        published.find(maker.dataset, maker.manual_dir)
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        try:
            with errors.writing(f"--data_dir={maker.data_dir}"):
                maker.download_and_prepare(download_config=config)
        except RuntimeError as error:
            if not _FAILED_CALL.search(str(error)):
                raise
            raise InputError(
                f"--data_dir={maker.data_dir}: cannot be written ({error}); nothing of it was kept"
            ) from None


def _check(maker: Any) -> None:
    """Refuses a build that is not of these sizes, or not of the files beside it."""
    sizes = {part: found.num_examples for part, found in maker.info.splits.items()}
    if sizes != maker.dataset.sizes:
        raise InputError(
            f"{maker.data_dir}: holds {sizes or 'nothing'}, but {maker.dataset.name} was published "
            f"with {maker.dataset.sizes}; {_again(maker)}"
        )
    try:
        files = published.find(maker.dataset, maker.manual_dir)
    except InputError:
        return  # The published files may go once the set is built.
    before = sources(maker)
    now = describe_files(files.paths)
    changed = sorted(name for name in before | now if before.get(name) != now.get(name))
    if changed:
        raise InputError(
            f"{maker.data_dir}: was built before {', '.join(changed)} in {maker.manual_dir} "
            f"changed; {_again(maker)}"
        )


def sources(maker: Any) -> dict[str, list[int]]:
    """Size and time of change of each file that a set was built from, by name.

    Raises:
      InputError: If the build does not say.
    """
    path = os.path.join(maker.data_dir, _ABOUT)
    if not os.path.isfile(path):
        raise InputError(f"{path}: not found; {_again(maker)}")
    with open(path, encoding="utf-8") as file:
        return json.load(file)["files"]


def _again(maker: Any) -> str:
    return f"remove {maker.data_dir} to have it built again"


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a built data set.

    Attributes:
      maker: The builder.
      source: Serialised rows, by number.
      ids: Published ids, decoded when asked for; None: there are none.
      relevance: Ones at the labels of each row, [rows, labels].
    """

    maker: Any
    source: Sequence[bytes]
    ids: Sequence[str] | None
    relevance: sparse.csr_matrix

    def read_texts(self) -> Iterator[list[str]]:
        """The texts in order, a chunk at a time."""
        compose = self.maker.dataset.text
        for examples in _read(self.maker, self.source):
            yield [
                compose(*(row[name].bytes_list.value[0].decode("utf-8") for name in _TEXTS))
                for row in examples
            ]


def open_part(maker: Any, part: str) -> Part:
    """A part of what was built: its labels and ids, and where its texts are."""
    import tensorflow_datasets as tfds

    raw_bytes = tfds.decode.DeserializeMethod.RAW_BYTES
    source = maker.as_data_source(part, deserialize_method=raw_bytes)
    utf8, lengths = [], array.array("q")
    labels, counts = array.array("i"), array.array("q")
    with progress.watch(f"{maker.dataset.name} {part} labels", len(source)) as done:
        for examples in _read(maker, source):
            names = [row["uid"].bytes_list.value[0] for row in examples]
            utf8.append(b"".join(names))
            lengths.extend(map(len, names))
            if part != LABELS:
                for row in examples:
                    found = row["labels"].int64_list.value
                    labels.extend(found)
                    counts.append(len(found))
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
    """Ones at the labels, which are sorted here."""
    indptr = np.concatenate([[0], np.cumsum(counts)])
    data = np.ones(len(indices), np.int8)
    matrix = sparse.csr_matrix((data, indices, indptr), shape=(len(counts), columns))
    matrix.sort_indices()
    return xml_repository.to_csr(counts, matrix.indices, columns)


def _read(maker: Any, source: Sequence[bytes]) -> Iterator[list[Any]]:
    """The features of the rows in order, a chunk at a time.

    The records are parsed here: TFDS's own decoding, feature by feature, is many times slower.

    Raises:
      InputError: If a file is missing or damaged; records have checksums.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    parse = tf_example_pb2.Example.FromString
    for start in range(0, len(source), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(source)))
        try:
            records = source.__getitems__(list(rows))
            if not all(records):  # Of a file without its end, some versions give empty ones.
                raise RuntimeError(f"rows from {start} are empty")
        except RuntimeError as error:
            raise InputError(f"{maker.data_dir}: damaged ({error}); {_again(maker)}") from None
        yield [parse(record).features.feature for record in records]


def filter_of(maker: Any, split: str) -> Int[np.ndarray, "f 2"] | None:
    """Published filter pairs of train or test; None: there are none."""
    path = os.path.join(maker.data_dir, f"filter_labels_{split}.txt")
    if not os.path.isfile(path):
        return None
    return xml_repository.read_filter(path, (maker.dataset.sizes[split], maker.dataset.labels))
