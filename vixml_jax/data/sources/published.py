"""The published files of a public data set, checked and read row by row."""

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
# Labels are first: their file is small, so that a bad download is noticed early.
PARTS = (LABELS, "test", "train")
_QUERIES = ("train", "test")
_ARROW = "->"  # Separates the id and the text of a line.
_NO_LABELS = np.zeros(0, np.int64)
_ALL_COLUMNS = ("uid", "title", "content", "target_ind", "target_rel")


@dataclasses.dataclass(frozen=True)
class Layout:
    """File names of a release; of alternative names, the first that exists is used.

    Attributes:
      texts: File names of the texts of each part: one JSON object per line if a name ends in .json
        or .json.gz, else one text per line.
      relevance: File names of the relevance of train and test. Empty for JSON, where the labels are
        in the same object as the text.
      with_ids: Whether a line of text has the form `uid->text`.
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
    """Published facts about a data set.

    Attributes:
      key: Its name as `--source` and in TFDS.
      name: Its name in the literature.
      train, labels, test: Numbers of training queries, labels and test queries.
      fields: Fields that make up a text, in order: 'title', 'content'.
      max_tokens: Tokens of a text that the experiments keep, special tokens included.
      propensity_a, propensity_b: Constants A and B of the inverse propensities.
      citation: BibTeX entries.
      homepage: URL of the description, from where the files are downloaded by hand.
      download: Name of the download on that page.
      licence: Terms of use, as far as they are published.
      layouts: File names of its releases.
      encodings: Candidates for the text encoding; the first that decodes the whole file is used.
    """

    key: str
    name: str
    train: int
    labels: int
    test: int
    fields: tuple[str, ...]
    max_tokens: int
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
        """Number of items of each part."""
        return {part: getattr(self, part) for part in PARTS}

    def text(self, title: str, content: str) -> str:
        """The text of an item, from its fields."""
        values = {"title": title, "content": content}
        return " ".join(values[field] for field in self.fields).strip()


@dataclasses.dataclass(frozen=True)
class Files:
    """Paths of the files of a release, by part; filter files are optional."""

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
      InputError: If files are missing; names all of them, their source and their destination.
    """
    missing_by_layout: list[list[str]] = []
    for layout in dataset.layouts:
        texts, relevance = (
            {part: _first_existing(directory, names) for part, names in names_of.items()}
            for names_of in (layout.texts, layout.relevance)
        )
        required = [*texts.values(), *relevance.values()]
        missing = [path for path in required if not os.path.isfile(path)]
        if not missing:
            filters = {
                split: os.path.join(directory, f"filter_labels_{split}.txt") for split in _QUERIES
            }
            filters = {split: path for split, path in filters.items() if os.path.isfile(path)}
            return Files(layout, texts, relevance, filters)
        missing_by_layout.append(missing)
    raise InputError(
        f"--source={dataset.key}: {', '.join(min(missing_by_layout, key=len))} not found; download "
        f"{dataset.download} from {dataset.homepage} and unpack it into {directory} (or pass "
        "--manual_dir)"
    )


def _first_existing(directory: str, names: tuple[str, ...]) -> str:
    """The path of the first name that exists; of the first name if none does."""
    paths = [os.path.join(directory, name) for name in names]
    return next((path for path in paths if os.path.isfile(path)), paths[0])


def read(dataset: PublicDataset, files: Files, part: str) -> Iterator[dict[str, Any]]:
    """The rows of a part in order, with uid, title, content and labels, as the builder stores them.

    Raises:
      InputError: If a row is not valid; names its line. At the end, if the number of rows is not
        the published one.
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
            "rows; expected the complete published files (for another release, pass the directory "
            "as --source)"
        )


def _read_json(dataset: PublicDataset, path: str, part: str) -> Iterator[dict[str, Any]]:
    """The rows of a file with one JSON object per line."""
    needs_content = part == "train" and "content" in dataset.fields
    for chunk in readers.read(path, _ALL_COLUMNS):
        for row in range(len(chunk)):
            fields = {
                name: values_lib.text(chunk.columns[name][row], chunk, row, name)
                for name in ("uid", "title", "content")
            }
            if not fields["uid"] or chunk.columns["title"][row] is None:
                missing = "title" if fields["uid"] else "uid"
                raise InputError(
                    f"{chunk.where(row)}: no {missing!r}; expected uid, title, content, target_ind"
                )
            needs_content = needs_content and not fields["content"]
            fields["labels"] = [] if part == LABELS else _targets(chunk, row, dataset.labels)
            yield fields
    if needs_content:
        raise InputError(
            f"{path}: no row has 'content'; expected the files of {dataset.name}, not those of its "
            "variant with titles only"
        )


def _targets(chunk: Chunk, row: int, num_labels: int) -> list[int]:
    """The label rows of a query, in the published order."""
    labels, weights = (chunk.columns[name][row] for name in ("target_ind", "target_rel"))
    if not isinstance(labels, list):
        raise InputError(f"{chunk.where(row)}: target_ind is {labels!r:.40}, expected a list")
    for label in labels:
        if type(label) is not int or not 0 <= label < num_labels:
            raise InputError(
                f"{chunk.where(row)}: {label!r:.40} in target_ind, expected 0 to {num_labels - 1}"
            )
    if len(set(labels)) < len(labels):
        duplicate = next(label for label in labels if labels.count(label) > 1)
        raise InputError(
            f"{chunk.where(row)}: duplicate label {duplicate} in target_ind; expected each label "
            "once"
        )
    if weights is not None:  # All published weights are ones.
        is_valid = isinstance(weights, list) and len(weights) == len(labels)
        if not is_valid or any(not isinstance(w, int | float) or w <= 0 for w in weights):
            raise InputError(
                f"{chunk.where(row)}: target_rel is {weights!r:.40}, expected a positive number "
                f"for each of {len(labels)} labels"
            )
    return labels


def _read_lines(dataset: PublicDataset, files: Files, part: str) -> Iterator[dict[str, Any]]:
    """The rows of a file with one text per line, and their labels from the relevance file."""
    path = files.texts[part]
    relevance = None if part == LABELS else _read_relevance(dataset, files.relevance[part], part)
    row = 0
    for chunk in xml_repository.read_texts(path, encoding=_encoding_of(path, dataset.encodings)):
        for text in chunk:
            uid, labels = "", _NO_LABELS
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
    """The relevance of a split, of the published shape."""
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
    """The first encoding that decodes the whole file; the last one is not checked."""
    *candidates, last = encodings
    for encoding in candidates:
        try:
            for _ in xml_repository.read_texts(path, encoding=encoding):
                pass
        except InputError:
            continue
        return encoding
    return last
