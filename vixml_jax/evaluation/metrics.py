"""Ranking metrics from retrieved label ids and a relevance matrix, in numpy.

P, nDCG, PSP and PSnDCG are those of the XML repository
(http://manikvarma.org/downloads/XC/XMLRepository.html; Jain, Prabhu & Varma, Extreme Multi-label
Loss Functions, KDD 2016), normalised as its tools do (https://github.com/kunaldahiya/pyxclib);
R, MRR and MAP are those of information retrieval (Manning, Raghavan & Schütze, Introduction to
Information Retrieval, 2008, chapter 8); coverage is that of Schultheis et al., Generalized test
utilities for long-tail performance in extreme multi-label classification (NeurIPS 2023). Queries
without labels are part of every mean.

Queries are evaluated in blocks, so that memory does not grow with their number. Every metric except
coverage is a sum over hits, and the term of a hit depends only on its rank, its label and its
query. The same terms therefore also give the metrics per query and per group of labels.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from vixml_jax.errors import InputError

KS, RECALL_KS = (1, 3, 5), (10, 100)  # Cut-offs of all metrics but R and MRR, and those of R.
_BLOCK = 4096  # Queries evaluated at a time.
NEVER = np.iinfo(np.int32).max  # Best rank of a label without a hit.


class BlockHits(NamedTuple):
    """The hits of a block of queries, and the term that each hit adds to each metric.

    Attributes:
      queries: The block's rows among all queries.
      true: True labels of the block's queries, in canonical form.
      query: Row of each hit within the block.
      rank: Rank of each hit, from 0.
      label: Label of each hit.
      gains: By metric, the term of each hit.
      possible: By metric, the largest sum of gains that each query can reach. Only for metrics that
        are a ratio of two means.
    """

    queries: slice
    true: sparse.csr_matrix
    query: Int[np.ndarray, " h"]
    rank: Int[np.ndarray, " h"]
    label: Int[np.ndarray, " h"]
    gains: dict[str, Float[np.ndarray, " h"]]
    possible: dict[str, Float[np.ndarray, " b"]]


def cuts(num_results: int) -> dict[str, tuple[int, ...]]:
    """Returns the arguments `ks` and `recall_ks` for so many results per query.

    With fewer than 5 labels there is no P@5: it would count predictions that cannot exist.
    """
    return {
        name: tuple(k for k in all_cuts if k <= num_results)
        for name, all_cuts in (("ks", KS), ("recall_ks", RECALL_KS))
    }


def compute_metrics(
    ids: Int[np.ndarray, "q k"],
    relevance: sparse.csr_matrix,
    inverse_propensity: Float[np.ndarray, " l"],
    *,
    ks: Sequence[int] = KS,
    recall_ks: Sequence[int] = RECALL_KS,
) -> dict[str, float]:
    """Returns every metric in percent, by name.

    Let P_i be the true labels of query i, hit_ij whether its j-th result is one of them, w_ij the
    weight of that label, and D(n) = sum over j <= n of 1 / log2(j + 1). Means are over all queries.

    * `P@k`: mean of sum_{j<=k} hit_ij / k.
    * `nDCG@k`: mean of sum_{j<=k} hit_ij / log2(j + 1) / D(min(k, |P_i|)).
    * `PSP@k`: mean of sum_{j<=k} hit_ij w_ij, divided by the largest possible value of that mean.
      This is a ratio of two means, not a mean of ratios.
    * `PSnDCG@k`: mean of nDCG@k with gains hit_ij w_ij, divided by its largest possible value. In
      both means each query is divided by its D(min(k, |P_i|)).
    * `R@k`: mean of sum_{j<=k} hit_ij / |P_i|.
    * `MRR`: mean of 1 / rank of the first hit among all columns of `ids`; 0 without a hit.
    * `MAP@k`: mean of (sum of the precisions at the hits among the first k) / min(k, |P_i|).
    * `coverage@k`: fraction of the labels that are true for some query which are among the first
      k results of at least one of these queries.

    Args:
      ids: Retrieved labels, best first, each at most once per row; -1 = absent. At least as many
        columns as the largest k.
      relevance: [q, l], nonzero where the label is true.
      inverse_propensity: Weight of each label, from its frequency in training.
      ks: Cut-offs of all metrics except R and MRR.
      recall_ks: Cut-offs of R, and additional ones of coverage.

    Raises:
      InputError: If there are no queries, if `ids` has fewer columns than the largest k, or if
        shapes or ids do not match.
    """
    sums: dict[str, float] = {}
    possible: dict[str, float] = {}
    best_rank = np.full(relevance.shape[1], NEVER, np.int32)
    occurs = np.zeros(relevance.shape[1], bool)
    for block in hits_by_block(ids, relevance, inverse_propensity, ks=ks, recall_ks=recall_ks):
        for name, gains in block.gains.items():
            sums[name] = sums.get(name, 0.0) + float(gains.sum())
        for name, largest in block.possible.items():
            possible[name] = possible.get(name, 0.0) + float(largest.sum())
        np.minimum.at(best_rank, block.label, block.rank)
        occurs[block.true.indices] = True
    values = {
        name: 100.0 * ratio(value, possible.get(name, float(len(ids))))
        for name, value in sums.items()
    }
    return values | coverage(best_rank[occurs], (*ks, *recall_ks))


def coverage(best_rank: Int[np.ndarray, " l"], cuts: Sequence[int]) -> dict[str, float]:
    """Returns `coverage@k` in percent.

    Args:
      best_rank: Best rank, from 0, at which each label that is true for some query was a hit; NEVER
        for a label without a hit.
      cuts: Values of k.
    """
    return {
        f"coverage@{k}": 100.0 * ratio(float(np.count_nonzero(best_rank < k)), len(best_rank))
        for k in cuts
    }


def ratio(value: float, total: float) -> float:
    """Returns value / total; 0 if the total is 0."""
    return value / total if total else 0.0


def hits_by_block(
    ids: Int[np.ndarray, "q k"],
    relevance: sparse.csr_matrix,
    inverse_propensity: Float[np.ndarray, " l"],
    *,
    ks: Sequence[int],
    recall_ks: Sequence[int],
) -> Iterator[BlockHits]:
    """Yields the hits of all queries in order, block by block.

    Args:
      ids, relevance, inverse_propensity, ks, recall_ks: As in `compute_metrics`.

    Raises:
      InputError: As in `compute_metrics`.
    """
    _check(ids, relevance, inverse_propensity, (*ks, *recall_ks))
    top = max(ks, default=0)
    gain = 1.0 / np.log2(np.arange(top) + 2.0)
    # The first entry is for queries without labels, whose gains are 0; it only has to be nonzero.
    ideal = np.concatenate([[1.0], np.cumsum(gain)])
    weights = np.asarray(inverse_propensity, np.float64)
    for start in range(0, len(ids), _BLOCK):
        queries = slice(start, min(start + _BLOCK, len(ids)))
        block, true = ids[queries], _canonical(relevance[queries])
        query, rank = np.nonzero(find_hits(block, true))  # Sorted by query, then by rank.
        label, count = block[query, rank], np.diff(true.indptr)
        before = np.arange(len(query)) - np.searchsorted(query, query)  # Better hits.
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
        yield BlockHits(queries, true, query, rank, label, gains, possible)


def find_hits(ids: Int[np.ndarray, "q k"], relevance: sparse.csr_matrix) -> Bool[np.ndarray, "q k"]:
    """Returns whether each retrieved label is a true label of its query.

    Args:
      ids: Retrieved labels; -1 = absent, never a hit. With a few thousand rows per call the arrays
        fit in the processor's cache.
      relevance: [q, l], with an entry where the label is true.
    """
    count = np.diff(relevance.indptr)
    # Rows are sorted by their number of true labels, descending, so that the rows with at least j
    # true labels come first.
    order = np.argsort(-count, kind="stable")
    rows, first = ids[order], relevance.indptr[:-1][order]
    ranks = np.arange(count.max(initial=0))
    hits = np.zeros(rows.shape, bool)
    for j, num in enumerate(np.searchsorted(-count[order], -ranks)):
        hits[:num] |= rows[:num] == relevance.indices[first[:num] + j][:, None]
    unsorted = np.empty_like(hits)
    unsorted[order] = hits
    return unsorted


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
            f"metrics at {max(cuts)}: found {ids.shape[1]} results per query; retrieve more"
        )
    if min(cuts, default=1) < 1:
        raise InputError(f"metrics at {min(cuts)}: expected a cut-off of at least 1")
    if len(inverse_propensity) != num_labels:
        raise InputError(
            f"metrics: found {len(inverse_propensity)} weights, expected one for each of the "
            f"{num_labels} labels"
        )
    if ids.size and not -1 <= ids.min() <= ids.max() < num_labels:
        raise InputError(
            f"metrics: found label ids from {ids.min()} to {ids.max()}, expected -1 (absent) to "
            f"{num_labels - 1}"
        )


def _canonical(block: sparse.csr_matrix) -> sparse.csr_matrix:
    """Returns the rows without explicit zeros and repeated entries, which would count as labels."""
    if block.has_canonical_format and block.data.all():
        return block
    block = block.copy()  # A slice of rows shares its arrays with the full matrix.
    block.sum_duplicates()
    block.eliminate_zeros()
    return block


def _largest_weights(
    relevance: sparse.csr_matrix, weights: Float[np.ndarray, " l"], top: int
) -> Float[np.ndarray, "q top"]:
    """Returns the `top` largest weights of each query's true labels, descending, padded with 0.

    They are the gains of the best possible ranking, for any decreasing discount.
    """
    count = np.diff(relevance.indptr)
    query = np.repeat(np.arange(len(count)), count)
    values = weights[relevance.indices]
    values = values[np.lexsort((-values, query))]  # `query` itself is sorted already.
    rank = np.arange(len(query)) - relevance.indptr[query]
    largest = np.zeros((len(count), top))
    largest[query[rank < top], rank[rank < top]] = values[rank < top]
    return largest
