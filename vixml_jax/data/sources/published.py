"""The files of a public data set as they are published, checked and read a row at a time."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from scipy import sparse

from vixml_jax.data.sources import readers, xml_repository
from vixml_jax.data.sources import values as values_lib
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.errors import InputError

LABELS = values_lib.LABELS
# Labels are first: their file is small, and what is wrong with a download shows soon.
PARTS = (LABELS, "test", "train")
_QUERIES = ("train", "test")
_ARROW = "->"  # Between the id and the text of a line.
_NONE = np.zeros(0, np.int64)
_ALL_COLUMNS = ("uid", "title", "content", "target_ind", "target_rel")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a release names its files; of several names, the first that there is.

    Attributes:
      texts: Of each part: a json object a line if a name ends in .json or .json.gz, else a text a
        line.
      relevance: Of train and test, where the texts are lines; in json it is beside the texts.
      with_ids: Whether a line is `uid->text`.
    """

    texts: Mapping[str, tuple[str, ...]]
    relevance: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    with_ids: bool = False


JSON = Layout(
    {
        part: (f"{prefix}.json.gz", f"{prefix}.json")
        for part, prefix in xml_repository.PREFIX.items()
        if part in PARTS
    }
)
PECOS = Layout(
    {"train": ("X.trn.txt",), "test": ("X.tst.txt",), LABELS: ("output-items.txt",)},
    {"train": ("Y.trn.npz",), "test": ("Y.tst.npz",)},
)
MUFIN = Layout(
    {
        "train": ("raw_data/train.raw.txt",),
        "test": ("raw_data/test.raw.txt",),
        LABELS: ("raw_data/label.raw.txt",),
    },
    {"train": ("trn_X_Y.txt",), "test": ("tst_X_Y.txt",)},
    with_ids=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PublicDataset:
    """What is published of a data set.

    Attributes:
      key: What `--source` and TFDS call it.
      name: What its authors call it.
      train, labels, test: How many there are of each.
      fields: What a text is made of, of title and content.
      propensity_a, propensity_b: Its constants of inverse propensity.
      citation: BibTeX.
      homepage: Where it is described, and downloaded by hand.
      download: What to look for there.
      licence: What is said of its use.
      layouts: Of its releases.
      encodings: Of its lines: the first that decodes the whole file.
    """

    key: str
    name: str
    train: int
    labels: int
    test: int
    fields: tuple[str, ...]
    propensity_a: float
    propensity_b: float
    citation: str
    homepage: str
    download: str
    licence: str
    layouts: tuple[Layout, ...] = (JSON,)
    encodings: tuple[str, ...] = ("utf-8", "latin-1")

    @property
    def sizes(self) -> dict[str, int]:
        """Items of each part."""
        return {part: getattr(self, part) for part in PARTS}

    def text(self, title: str, content: str) -> str:
        """The text of an item."""
        values = {"title": title, "content": content}
        return " ".join(values[field] for field in self.fields).strip()


@dataclasses.dataclass(frozen=True)
class Files:
    """Paths of a release, by part; filters are optional."""

    layout: Layout
    texts: dict[str, str]
    relevance: dict[str, str]
    filters: dict[str, str]

    @property
    def paths(self) -> list[str]:
        return [*self.texts.values(), *self.relevance.values(), *self.filters.values()]


def find(dataset: PublicDataset, directory: str) -> Files:
    """The files of a data set in a directory.

    Raises:
      InputError: If some are missing, with all of them, where to get them and where to put them.
    """
    missing: dict[int, list[str]] = {}
    for number, layout in enumerate(dataset.layouts):
        found = [
            {part: _first(directory, names) for part, names in table.items()}
            for table in (layout.texts, layout.relevance)
        ]
        absent = [path for table in found for path in table.values() if not os.path.isfile(path)]
        if not absent:
            names = {split: (f"filter_labels_{split}.txt",) for split in _QUERIES}
            filters = {split: _first(directory, one) for split, one in names.items()}
            there = {split: path for split, path in filters.items() if os.path.isfile(path)}
            return Files(layout, *found, there)
        missing[number] = absent
    nearest = missing[min(missing, key=lambda number: len(missing[number]))]
    raise InputError(
        f"--source={dataset.key}: {', '.join(nearest)} not found; download {dataset.download} from "
        f"{dataset.homepage} and unpack it into {directory} (or say --manual_dir)"
    )


def _first(directory: str, names: tuple[str, ...]) -> str:
    """The path of the first name that there is; of the first name where there is none."""
    paths = [os.path.join(directory, name) for name in names]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


def read(dataset: PublicDataset, files: Files, part: str) -> Iterator[dict[str, Any]]:
    """The rows of a part in order: uid, title, content and labels, as the builder stores them.

    Raises:
      InputError: If a row is at fault, with its line; or, at the end, if there are not as many as
        are published.
    """
    path = files.texts[part]
    if files.layout.relevance:
        rows = _read_lines(dataset, files, part)
    else:
        rows = _read_json(dataset, path, part)
    expected, count = dataset.sizes[part], 0
    for count, row in enumerate(rows, 1):
        if count <= expected:
            yield row
    if count != expected:
        raise InputError(
            f"{path}: {count:,} rows, but {dataset.name} was published with {expected:,} {part} "
            "rows; expected its published files, whole (of another release, read the directory: "
            "--source=DIR)"
        )


def _read_json(dataset: PublicDataset, path: str, part: str) -> Iterator[dict[str, Any]]:
    has_content = "content" not in dataset.fields
    for chunk in readers.read(path, _ALL_COLUMNS):
        for row in range(len(chunk)):
            found = {
                name: values_lib.text(chunk.columns[name][row], chunk, row, name)
                for name in ("uid", "title", "content")
            }
            if not found["uid"] or chunk.columns["title"][row] is None:
                missing = "title" if found["uid"] else "uid"
                raise InputError(
                    f"{chunk.where(row)}: no {missing!r}; expected uid, title, content, target_ind"
                )
            has_content = has_content or bool(found["content"])
            found["labels"] = [] if part == LABELS else _targets(chunk, row, dataset.labels)
            yield found
    if part == "train" and not has_content:
        raise InputError(
            f"{path}: no row has 'content', which {dataset.name} has; expected its own files, not "
            "those of the set of titles"
        )


def _targets(chunk: Chunk, row: int, num_labels: int) -> list[int]:
    """The labels of a query, in their order."""
    labels, weights = (chunk.columns[name][row] for name in ("target_ind", "target_rel"))
    if not isinstance(labels, list):
        raise InputError(f"{chunk.where(row)}: target_ind is {labels!r:.40}, expected a list")
    for label in labels:
        if type(label) is not int or not 0 <= label < num_labels:
            raise InputError(
                f"{chunk.where(row)}: {label!r:.40} in target_ind, expected 0 to {num_labels - 1}"
            )
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise InputError(f"{chunk.where(row)}: {twice} is in target_ind twice; expected it once")
    if weights is not None:  # Ones, wherever it is published.
        fine = isinstance(weights, list) and len(weights) == len(labels)
        if not fine or any(not isinstance(one, int | float) or one <= 0 for one in weights):
            raise InputError(
                f"{chunk.where(row)}: target_rel is {weights!r:.40}, expected a positive number "
                f"for each of {len(labels)} labels"
            )
    return labels


def _read_lines(dataset: PublicDataset, files: Files, part: str) -> Iterator[dict[str, Any]]:
    path = files.texts[part]
    relevance = None if part == LABELS else _read_relevance(dataset, files.relevance[part], part)
    row = 0
    for chunk in xml_repository.read_texts(path, encoding=_encoding_of(path, dataset.encodings)):
        for text in chunk:
            uid, labels = "", _NONE
            if files.layout.with_ids:
                uid, arrow, text = text.partition(_ARROW)
                if not arrow or not uid:
                    raise InputError(
                        f"{path}, line {row + 1}: found {uid[:40]!r}, expected 'uid{_ARROW}text'"
                    )
            if relevance is not None and row < relevance.shape[0]:
                labels = relevance.indices[slice(*relevance.indptr[row : row + 2])]
            yield {"uid": uid, "title": text, "content": "", "labels": labels}
            row += 1


def _read_relevance(dataset: PublicDataset, path: str, part: str) -> sparse.csr_matrix:
    relevance = xml_repository.read_relevance(path)
    expected = (dataset.sizes[part], dataset.labels)
    if relevance.shape != expected:
        raise InputError(
            f"{path}: {relevance.shape[0]:,} queries, {relevance.shape[1]:,} labels, but "
            f"{dataset.name} was published with {expected[0]:,} {part} queries and "
            f"{expected[1]:,} labels"
        )
    return relevance


def _encoding_of(path: str, encodings: Iterable[str]) -> str:
    """The first that decodes the whole file; the last is not tried."""
    *tried, last = encodings
    for encoding in tried:
        try:
            for _ in xml_repository.read_texts(path, encoding=encoding):
                pass
        except InputError:
            continue
        return encoding
    return last
