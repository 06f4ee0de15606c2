"""Exact statistics of a prepared data set: text lengths, labels, images and repeated texts."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int, UInt64
from scipy import sparse

from vixml_jax.data import filters
from vixml_jax.data.propensity import inverse_propensity
from vixml_jax.data.store import PARTS, Items, PreparedDataset

# Groups of labels by their number of training queries: name, least, most (None: no limit).
GROUPS = (("head", 101, None), ("torso", 6, 100), ("tail", 1, 5), ("unseen", 0, 0))
UNTRUNCATED_PERCENT = 99  # Percent of the texts that the suggested length does not truncate.
_BLOCK = 1 << 22  # Relevant pairs counted at a time, since NumPy copies them to int64.


@dataclasses.dataclass(frozen=True)
class Distribution:
    """How often each number occurs: `counts[v]` items have v of something (such as tokens)."""

    counts: Int[np.ndarray, " v"]

    @staticmethod
    def of(values: Int[np.ndarray, " n"]) -> "Distribution":
        """The distribution of one number per item."""
        return Distribution(np.bincount(values, minlength=1))

    @property
    def items(self) -> int:
        return int(self.counts.sum())

    @property
    def total(self) -> int:
        return int(self.counts @ np.arange(len(self.counts)))

    @property
    def mean(self) -> float:
        return self.total / max(self.items, 1)

    @property
    def maximum(self) -> int:
        return int(np.max(np.flatnonzero(self.counts), initial=0))

    def percentile(self, percent: int) -> int:
        """The smallest number that `percent` of the items do not exceed; 0 without items."""
        rank = -(-percent * self.items // 100)  # Rounded up, in integers.
        return int(np.searchsorted(np.cumsum(self.counts), rank))

    def between(self, least: int, most: int | None) -> "Distribution":
        """The distribution of items from `least` to `most`, both included; None: no upper limit."""
        inside = _within(np.arange(len(self.counts)), least, most)
        return Distribution(np.where(inside, self.counts, 0))


@dataclasses.dataclass(frozen=True)
class Part:
    """Statistics of the queries of a split, or of the labels.

    Attributes:
      tokens: Tokens of each text before truncation.
      truncated_texts: Number of truncated texts.
      truncated_tokens: Number of tokens that they lose.
      empty: Texts without characters other than white space.
      repeated: Items whose text, unless empty, another item of the part has too, without regard
        to case, character width and white space.
      distinct: Number of distinct texts among the repeated ones.
      images: Images of each item; None if the part has no images.
    """

    tokens: Distribution
    truncated_texts: int
    truncated_tokens: int
    empty: int
    repeated: int
    distinct: int
    images: Distribution | None


@dataclasses.dataclass(frozen=True)
class Split:
    """How the queries of a split relate to labels and to the training split.

    Attributes:
      labels: Labels of each query.
      group_pairs: Number of relevant pairs by the group of their label in `GROUPS`.
      only_unseen: Queries with labels, all of which do not occur in training.
      recall_ceiling: Mean fraction of the labels of a query that occur in training; a query
        without labels counts as 0, as in the recall that `evaluate` measures.
      in_train: Queries whose text a training query has too, compared as for `Part.repeated`; 0
        for the training split.
    """

    labels: Distribution
    group_pairs: dict[str, int]
    only_unseen: int
    recall_ceiling: float
    in_train: int


@dataclasses.dataclass(frozen=True)
class DatasetStats:
    """All statistics of a data set.

    Attributes:
      parts: Statistics of train, valid (if there is one), test and labels, by name.
      splits: Further statistics of these except labels.
      frequencies: Training queries of each label.
      inverse_propensity: The smallest and the largest inverse propensity of a label.
      suggested_max_tokens: Length that truncates at most 1 % of the training queries and of the
        labels.
    """

    parts: dict[str, Part]
    splits: dict[str, Split]
    frequencies: Distribution
    inverse_propensity: tuple[float, float]
    suggested_max_tokens: int


def measure(dataset: PreparedDataset) -> DatasetStats:
    """Measures a data set. Texts are read once, a chunk at a time."""
    parts, splits = {}, {}
    frequency = label_counts(dataset.train_relevance)
    train_keys = np.zeros(0, np.uint64)
    for name in PARTS:
        items = getattr(dataset, name)
        if items is None:
            continue
        keys = filters.chunk_keys(items.texts.chunks())
        parts[name] = _measure_part(items, keys)
        if name == "train":
            train_keys = np.unique(keys[keys != 0])
        if name != "labels":
            in_train = 0 if name == "train" else np.count_nonzero(np.isin(keys, train_keys))
            relevance = getattr(dataset, f"{name}_relevance")
            splits[name] = _measure_split(relevance, frequency, int(in_train))
    weights = inverse_propensity(
        frequency, len(dataset.train), dataset.propensity_a, dataset.propensity_b
    )
    return DatasetStats(
        parts=parts,
        splits=splits,
        frequencies=Distribution.of(frequency),
        inverse_propensity=(float(weights.min()), float(weights.max())),
        suggested_max_tokens=max(
            parts[name].tokens.percentile(UNTRUNCATED_PERCENT) for name in ("train", "labels")
        ),
    )


def _measure_part(items: Items, keys: UInt64[np.ndarray, " n"]) -> Part:
    kept = np.diff(items.tokens.offsets)
    _, sizes = np.unique(keys[keys != 0], return_counts=True)
    return Part(
        tokens=Distribution.of(items.full_lengths),
        truncated_texts=int(np.count_nonzero(items.full_lengths > kept)),
        truncated_tokens=int(items.full_lengths.sum(dtype=np.int64) - kept.sum()),
        empty=int(np.count_nonzero(keys == 0)),
        repeated=int(sizes[sizes > 1].sum()),
        distinct=int(np.count_nonzero(sizes > 1)),
        images=None if items.images is None else Distribution.of(np.diff(items.images.offsets)),
    )


def _measure_split(
    relevance: sparse.csr_matrix, frequency: Int[np.ndarray, " l"], in_train: int
) -> Split:
    pairs = label_counts(relevance)
    labels = np.diff(relevance.indptr)
    seen = relevance @ (frequency > 0).astype(np.float32)
    return Split(
        labels=Distribution.of(labels),
        group_pairs={
            name: int(pairs[_within(frequency, least, most)].sum()) for name, least, most in GROUPS
        },
        only_unseen=int(np.count_nonzero((labels > 0) & (seen == 0))),
        recall_ceiling=float(np.sum(seen / np.maximum(labels, 1)) / max(len(labels), 1)),
        in_train=in_train,
    )


def label_counts(relevance: sparse.csr_matrix) -> Int[np.ndarray, " l"]:
    """Number of queries of each label."""
    counts = np.zeros(relevance.shape[1], np.int64)
    for start in range(0, relevance.nnz, _BLOCK):
        counts += np.bincount(relevance.indices[start : start + _BLOCK], minlength=len(counts))
    return counts


def _within(numbers: Int[np.ndarray, " n"], least: int, most: int | None) -> Bool[np.ndarray, " n"]:
    return (numbers >= least) & (most is None or numbers <= most)


def percent(part: float, total: float) -> str:
    """A fraction in percent with one decimal; 0 % and 100 % are exact, never rounded."""
    if not part or not total:
        return "0 %"
    if part == total:
        return "100 %"
    value = 100 * part / total
    if value < 0.05:
        return "<0.1 %"
    return ">99.9 %" if value >= 99.95 else f"{value:.1f} %"
