"""Ranking metrics from retrieved ids and relevance: numpy, whole arrays, bounded memory.

P, nDCG, PSP and PSnDCG are those of the XML repository
(http://manikvarma.org/downloads/XC/XMLRepository.html; Jain, Prabhu & Varma, Extreme Multi-label
Loss Functions, KDD 2016), normalised as its tools do (https://github.com/kunaldahiya/pyxclib);
R, MRR and MAP are those of information retrieval (Manning, Raghavan & Schütze, Introduction to
Information Retrieval, 2008, chapter 8). Queries without labels stay in every mean.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from vixml_jax.errors import InputError

_BLOCK = 4096  # Queries judged at a time.


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

    Args:
      ids: Retrieved labels, best first, each once a row; -1 = absent. At least as many columns as
        the largest k.
      relevance: [q, l], nonzero where the label is true.
      inverse_propensity: The weight of each label, from its frequency in training.
      ks: Cuts of all but R and MRR.
      recall_ks: Cuts of R.

    Raises:
      InputError: If there are no queries, or fewer columns than the largest k, or the shapes and
        ids do not belong together.
    """
    _check(ids, relevance, inverse_propensity, (*ks, *recall_ks))
    top = max(ks, default=0)
    gain = 1.0 / np.log2(np.arange(top) + 2.0)
    ideal = np.concatenate([[1.0], np.cumsum(gain)])  # Of no label: anything but 0.
    weights = np.asarray(inverse_propensity, np.float64)
    sums: dict[str, float] = {}
    add = functools.partial(_add, sums)
    for start in range(0, len(ids), _BLOCK):
        block, true = ids[start : start + _BLOCK], _canonical(relevance[start : start + _BLOCK])
        hits, count = find_hits(block, true), np.diff(true.indptr)
        found = np.where(hits[:, :top], weights[block[:, :top]], 0.0)
        best = _largest_weights(true, weights, top)
        precisions = np.cumsum(hits[:, :top], axis=1) / np.arange(1, top + 1) * hits[:, :top]
        for k in ks:
            possible = np.minimum(count, k)
            add(f"P@{k}", hits[:, :k].sum(axis=1) / k)
            add(f"nDCG@{k}", hits[:, :k] @ gain[:k] / ideal[possible])
            add(f"PSP@{k}", found[:, :k], best[:, :k])
            scale = gain[:k] / ideal[possible][:, None]
            add(f"PSnDCG@{k}", found[:, :k] * scale, best[:, :k] * scale)
            add(f"MAP@{k}", precisions[:, :k].sum(axis=1) / np.maximum(possible, 1))
        for k in recall_ks:
            add(f"R@{k}", hits[:, :k].sum(axis=1) / np.maximum(count, 1))
        if hits.shape[1]:
            add("MRR", hits.any(axis=1) / (hits.argmax(axis=1) + 1.0))
    return {
        name: 100.0 * _ratio(value, sums.get(f"{name} of", float(len(ids))))
        for name, value in sums.items()
        if not name.endswith(" of")
    }


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


def _add(
    sums: dict[str, float],
    name: str,
    values: Float[np.ndarray, "..."],
    best: Float[np.ndarray, "..."] | None = None,
) -> None:
    """Adds to a metric what a block reached and, where it is a ratio of means, could reach."""
    sums[name] = sums.get(name, 0.0) + float(values.sum())
    if best is not None:
        sums[f"{name} of"] = sums.get(f"{name} of", 0.0) + float(best.sum())


def _ratio(value: float, of: float) -> float:
    return value / of if of else 0.0  # No query has labels: nothing was possible.


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
