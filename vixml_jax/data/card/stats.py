"""What there is to know of a prepared data set, counted exactly: lengths, labels, repeats."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int, UInt64
from scipy import sparse

from vixml_jax.data import filters
from vixml_jax.data.propensity import inverse_propensity
from vixml_jax.data.store import SPLITS, Items, PreparedDataset

# Groups of labels by how many training queries have them: name, least, most.
GROUPS = (("head", 101, None), ("torso", 6, 100), ("tail", 1, 5), ("unseen", 0, 0))
KEPT_WHOLE = 99  # Percent of the texts for which a length is suggested.
_BLOCK = 1 << 22  # Relevant pairs counted at a time: numpy makes int64 of them.


@dataclasses.dataclass(frozen=True)
class Distribution:
    """How often each number occurs: `counts[v]` items have v of something."""

    counts: Int[np.ndarray, " v"]

    @staticmethod
    def of(values: Int[np.ndarray, " n"]) -> "Distribution":
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
        """The least number that this share of the items do not exceed; 0 where there are none."""
        rank = -(-percent * self.items // 100)  # Rounded up, without a rounding of floats.
        return int(np.searchsorted(np.cumsum(self.counts), rank))

    def between(self, least: int, most: int | None) -> "Distribution":
        """Of the items that have from `least` to `most` (included; None: any number) alone."""
        inside = _within(np.arange(len(self.counts)), least, most)
        return Distribution(np.where(inside, self.counts, 0))


@dataclasses.dataclass(frozen=True)
class Part:
    """Queries of a split, or labels.

    Attributes:
      tokens: Of each text, before it is cut.
      cut, lost: Texts that are cut, and the tokens that they lose.
      empty: Texts without a character but white space.
      repeated: Texts, empty ones aside, that another item of the part has as well once case, width
        and white space do not count.
      distinct: How many different ones these are.
      pictures: Of each item; None where there are none of any.
    """

    tokens: Distribution
    cut: int
    lost: int
    empty: int
    repeated: int
    distinct: int
    pictures: Distribution | None


@dataclasses.dataclass(frozen=True)
class Split:
    """What the queries of a split have to do with labels and with training.

    Attributes:
      labels: Of each query.
      group_pairs: Relevant pairs whose label is in each of `GROUPS`.
      hopeless: Queries with labels, all of them unseen in training.
      recall_ceiling: Mean share of a query's labels that training has seen; a query without labels
        counts 0, as in the recall that `evaluate` measures.
      in_train: Queries whose text, as for `Part.repeated`, a training query has too; 0 for train.
    """

    labels: Distribution
    group_pairs: dict[str, int]
    hopeless: int
    recall_ceiling: float
    in_train: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """What `measure` finds.

    Attributes:
      parts: By name: train, perhaps valid, test, labels.
      splits: The same without labels.
      frequencies: Training queries of each label.
      inverse_propensity: The least and the largest of any label.
      suggested_max_tokens: Length that keeps 99 % of the training queries whole, and of the labels.
    """

    parts: dict[str, Part]
    splits: dict[str, Split]
    frequencies: Distribution
    inverse_propensity: tuple[float, float]
    suggested_max_tokens: int


def measure(dataset: PreparedDataset) -> Facts:
    """All numbers of the card. Texts are read once, a chunk at a time."""
    parts, splits = {}, {}
    frequency = _label_counts(dataset.train_relevance)
    known = np.zeros(0, np.uint64)
    for name in (*SPLITS, "labels"):
        items = getattr(dataset, name)
        if items is None:
            continue
        keys = filters.chunk_keys(items.texts.chunks())
        parts[name] = _measure_part(items, keys)
        if name == "train":
            known = np.unique(keys[keys != 0])
        if name != "labels":
            in_train = 0 if name == "train" else np.count_nonzero(np.isin(keys, known))
            relevance = getattr(dataset, f"{name}_relevance")
            splits[name] = _measure_split(relevance, frequency, int(in_train))
    weights = inverse_propensity(
        frequency, len(dataset.train), dataset.propensity_a, dataset.propensity_b
    )
    return Facts(
        parts=parts,
        splits=splits,
        frequencies=Distribution.of(frequency),
        inverse_propensity=(float(weights.min()), float(weights.max())),
        suggested_max_tokens=max(
            parts[name].tokens.percentile(KEPT_WHOLE) for name in ("train", "labels")
        ),
    )


def _measure_part(items: Items, keys: UInt64[np.ndarray, " n"]) -> Part:
    kept = np.diff(items.tokens.offsets)
    _, sizes = np.unique(keys[keys != 0], return_counts=True)
    return Part(
        tokens=Distribution.of(items.whole),
        cut=int(np.count_nonzero(items.whole > kept)),
        lost=int(items.whole.sum(dtype=np.int64) - kept.sum()),
        empty=int(np.count_nonzero(keys == 0)),
        repeated=int(sizes[sizes > 1].sum()),
        distinct=int(np.count_nonzero(sizes > 1)),
        pictures=None if items.images is None else Distribution.of(np.diff(items.images.offsets)),
    )


def _measure_split(
    relevance: sparse.csr_matrix, frequency: Int[np.ndarray, " l"], in_train: int
) -> Split:
    pairs = _label_counts(relevance)
    labels = np.diff(relevance.indptr)
    seen = relevance @ (frequency > 0).astype(np.float32)
    return Split(
        labels=Distribution.of(labels),
        group_pairs={
            name: int(pairs[_within(frequency, least, most)].sum()) for name, least, most in GROUPS
        },
        hopeless=int(np.count_nonzero((labels > 0) & (seen == 0))),
        recall_ceiling=float(np.sum(seen / np.maximum(labels, 1)) / max(len(labels), 1)),
        in_train=in_train,
    )


def _label_counts(relevance: sparse.csr_matrix) -> Int[np.ndarray, " l"]:
    """Queries of each label."""
    counts = np.zeros(relevance.shape[1], np.int64)
    for start in range(0, relevance.nnz, _BLOCK):
        counts += np.bincount(relevance.indices[start : start + _BLOCK], minlength=len(counts))
    return counts


def _within(numbers: Int[np.ndarray, " n"], least: int, most: int | None) -> Bool[np.ndarray, " n"]:
    return (numbers >= least) & (most is None or numbers <= most)


def percent(part: float, whole: float) -> str:
    """A share, with a decimal; 0 % and 100 % are nothing and all, never rounded."""
    if not part or not whole:
        return "0 %"
    if part == whole:
        return "100 %"
    share = 100 * part / whole
    if share < 0.05:
        return "<0.1 %"
    return ">99.9 %" if share >= 99.95 else f"{share:.1f} %"
