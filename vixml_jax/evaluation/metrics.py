"""Ranking metrics from retrieved ids and relevance: numpy, in blocks of queries, bounded memory.

P, nDCG, PSP and PSnDCG are those of the XML repository
(http://manikvarma.org/downloads/XC/XMLRepository.html; Jain, Prabhu & Varma, Extreme Multi-label
Loss Functions, KDD 2016), normalised as its tools do (https://github.com/kunaldahiya/pyxclib);
R, MRR and MAP are those of information retrieval (Manning, Raghavan & Schütze, Introduction to
Information Retrieval, 2008, chapter 8); coverage is that of Schultheis et al., Generalized test
utilities for long-tail performance in extreme multi-label classification (NeurIPS 2023). Queries
without labels stay in every mean.

All but coverage are sums over hits: each hit adds something of its own, known from its rank, its
label and its query. So they can be told apart by query and by label.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from vixml_jax.errors import InputError

_BLOCK = 4096  # Queries judged at a time.
NEVER = np.iinfo(np.int32).max  # The best rank of a label that is never hit.


class Judged(NamedTuple):
    """A block of queries: their hits, one an entry, and what each adds to each metric."""

    queries: slice  # Of all queries.
    true: sparse.csr_matrix  # Their true labels, in canonical form.
    query: Int[np.ndarray, " h"]  # Of each hit, within the block.
    rank: Int[np.ndarray, " h"]  # From 0.
    label: Int[np.ndarray, " h"]
    gains: dict[str, Float[np.ndarray, " h"]]
    # What the gains of each query can be at most, where the metric is a ratio of two means.
    possible: dict[str, Float[np.ndarray, " b"]]


def compute_metrics(
    ids: Int[np.ndarray, "q k"],
    relevance: sparse.csr_matrix,
    inverse_propensity: Float[np.ndarray, " l"],
    *,
    ks: Sequence[int] = (1, 3, 5),
    recall_ks: Sequence[int] = (10, 100),
) -> dict[str, float]:
    """Returns every metric in percent, by name.

    With P_i the true labels of query i, hit_ij whether its j-th result is one of them, w_ij the
    weight of that label, D(n) = sum over j <= n of 1 / log2(j + 1), and means over all queries:

    * `P@k`: mean of sum_{j<=k} hit_ij / k.
    * `nDCG@k`: mean of sum_{j<=k} hit_ij / log2(j + 1) / D(min(k, |P_i|)).
    * `PSP@k`: the mean of sum_{j<=k} hit_ij w_ij over the largest that this mean can be: a ratio
      of two means, not a mean of ratios.
    * `PSnDCG@k`: likewise the mean of nDCG with gains hit_ij w_ij over the largest that it can be,
      each query of both divided by its D(min(k, |P_i|)).
    * `R@k`: mean of sum_{j<=k} hit_ij / |P_i|.
    * `MRR`: mean of 1 / rank of the first hit among all columns of `ids`; 0 without a hit.
    * `MAP@k`: mean of the sum of the precisions at the hits among the first k, / min(k, |P_i|).
    * `coverage@k`: of the labels that are true of any query, the share that is among the first k
      of at least one query that it is true of.

    Args:
      ids: Retrieved labels, best first, each once a row; -1 = absent. At least as many columns as
        the largest k.
      relevance: [q, l], nonzero where the label is true.
      inverse_propensity: The weight of each label, from its frequency in training.
      ks: Cuts of all but R and MRR.
      recall_ks: Cuts of R, and further ones of coverage.

    Raises:
      InputError: If there are no queries, or fewer columns than the largest k, or the shapes and
        ids do not belong together.
    """
    sums: dict[str, float] = {}
    possible: dict[str, float] = {}
    best_rank = np.full(relevance.shape[1], NEVER, np.int32)
    occurs = np.zeros(relevance.shape[1], bool)
    for block in judge_blocks(ids, relevance, inverse_propensity, ks=ks, recall_ks=recall_ks):
        for name, gains in block.gains.items():
            sums[name] = sums.get(name, 0.0) + float(gains.sum())
        for name, most in block.possible.items():
            possible[name] = possible.get(name, 0.0) + float(most.sum())
        np.minimum.at(best_rank, block.label, block.rank)
        occurs[block.true.indices] = True
    found = {
        name: 100.0 * ratio(value, possible.get(name, float(len(ids))))
        for name, value in sums.items()
    }
    return found | coverage(best_rank[occurs], (*ks, *recall_ks))


def coverage(best_rank: Int[np.ndarray, " l"], cuts: Sequence[int]) -> dict[str, float]:
    """`coverage@k` in percent, from the best rank at which each label that occurs was a hit."""
    return {
        f"coverage@{k}": 100.0 * ratio(float(np.count_nonzero(best_rank < k)), len(best_rank))
        for k in cuts
    }


def ratio(value: float, of: float) -> float:
    """0 of 0: where nothing was possible."""
    return value / of if of else 0.0


def judge_blocks(
    ids: Int[np.ndarray, "q k"],
    relevance: sparse.csr_matrix,
    inverse_propensity: Float[np.ndarray, " l"],
    *,
    ks: Sequence[int],
    recall_ks: Sequence[int],
) -> Iterator[Judged]:
    """All queries in order, a block at a time; the arguments are those of `compute_metrics`."""
    _check(ids, relevance, inverse_propensity, (*ks, *recall_ks))
    top = max(ks, default=0)
    gain = 1.0 / np.log2(np.arange(top) + 2.0)
    ideal = np.concatenate([[1.0], np.cumsum(gain)])  # Of no label: anything but 0.
    weights = np.asarray(inverse_propensity, np.float64)
    for start in range(0, len(ids), _BLOCK):
        queries = slice(start, min(start + _BLOCK, len(ids)))
        block, true = ids[queries], _canonical(relevance[queries])
        query, rank = np.nonzero(find_hits(block, true))  # In order of the ranks of each query.
        label, count = block[query, rank], np.diff(true.indptr)
        before = np.arange(len(query)) - np.searchsorted(query, query)  # Hits of better rank.
        weight, precision = weights[label], (before + 1) / (rank + 1)
        discount = gain[np.minimum(rank, top - 1)] if top else np.zeros(len(rank))
        largest = _largest_weights(true, weights, top)
        gains, possible = {}, {}
        for k in ks:
            inside, most = rank < k, np.minimum(count, k)
            scale = 1.0 / ideal[most]
            gains[f"P@{k}"] = inside / k
            gains[f"nDCG@{k}"] = inside * discount * scale[query]
            gains[f"PSP@{k}"] = inside * weight
            gains[f"PSnDCG@{k}"] = inside * weight * discount * scale[query]
            gains[f"MAP@{k}"] = inside * precision / most[query]
            possible[f"PSP@{k}"] = largest[:, :k].sum(axis=1)
            possible[f"PSnDCG@{k}"] = largest[:, :k] @ gain[:k] * scale
        for k in recall_ks:
            gains[f"R@{k}"] = (rank < k) / count[query]
        if ids.shape[1]:
            gains["MRR"] = (before == 0) / (rank + 1.0)
        yield Judged(queries, true, query, rank, label, gains, possible)


def find_hits(ids: Int[np.ndarray, "q k"], relevance: sparse.csr_matrix) -> Bool[np.ndarray, "q k"]:
    """Returns whether each retrieved label is a true label of its query.

    Args:
      ids: Retrieved labels; -1 = absent, never a hit. A few thousand rows stay in the cache.
      relevance: [q, l], an entry where the label is true.
    """
    count = np.diff(relevance.indptr)
    # With most true labels first, the rows that have a j-th one are the first few.
    order = np.argsort(-count, kind="stable")
    rows, first = ids[order], relevance.indptr[:-1][order]
    ranks = np.arange(count.max(initial=0))
    hits = np.zeros(rows.shape, bool)
    for j, few in enumerate(np.searchsorted(-count[order], -ranks)):
        hits[:few] |= rows[:few] == relevance.indices[first[:few] + j][:, None]
    found = np.empty_like(hits)
    found[order] = hits
    return found


def _check(
    ids: Int[np.ndarray, "q k"],
    relevance: sparse.csr_matrix,
    inverse_propensity: Float[np.ndarray, " l"],
    cuts: Sequence[int],
) -> None:
    num_queries, num_labels = relevance.shape
    if not num_queries:
        raise InputError("metrics: found no queries, expected at least one")
    if len(ids) != num_queries:
        raise InputError(f"metrics: found results of {len(ids)} queries, expected {num_queries}")
    if max(cuts, default=0) > ids.shape[1]:
        raise InputError(
            f"metrics at {max(cuts)}: found {ids.shape[1]} results a query; retrieve more"
        )
    if min(cuts, default=1) < 1:
        raise InputError(f"metrics at {min(cuts)}: expected a cut of at least 1")
    if len(inverse_propensity) != num_labels:
        raise InputError(
            f"metrics: found {len(inverse_propensity)} weights, expected one for each of "
            f"{num_labels} labels"
        )
    if ids.size and not -1 <= ids.min() <= ids.max() < num_labels:
        raise InputError(
            f"metrics: found label ids from {ids.min()} to {ids.max()}, expected -1 (absent) to "
            f"{num_labels - 1}"
        )


def _canonical(block: sparse.csr_matrix) -> sparse.csr_matrix:
    """The rows without explicit zeros and repeated entries, which would count as labels."""
    if block.has_canonical_format and block.data.all():
        return block
    block = block.copy()  # A slice of rows shares the memory of the whole.
    block.sum_duplicates()
    block.eliminate_zeros()
    return block


def _largest_weights(
    relevance: sparse.csr_matrix, weights: Float[np.ndarray, " l"], top: int
) -> Float[np.ndarray, "q top"]:
    """The largest weights among the true labels of each query, descending; 0 where there are none.

    Ordered by weight, they are what a perfect ranking would gain, whatever the discount.
    """
    count = np.diff(relevance.indptr)
    owner = np.repeat(np.arange(len(count)), count)
    values = weights[relevance.indices]
    values = values[np.lexsort((-values, owner))]  # The owners are in order already.
    rank = np.arange(len(owner)) - relevance.indptr[owner]
    largest = np.zeros((len(count), top))
    largest[owner[rank < top], rank[rank < top]] = values[rank < top]
    return largest
