"""Mixes labels of the nearest training queries into a ranking (supplement of the paper)."""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax.search import index
from vixml_jax.structs import SearchResult

PUBLISHED = (0.1, 100, 0.05)  # Weight, k and temperature of the paper.
WEIGHTS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
KS = (3, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.2)
_BLOCK = 4096  # Queries mixed at a time.
_TINY = np.finfo(np.float64).tiny


class Mixing(NamedTuple):
    """Settings of the mixing; `Mixing(*PUBLISHED)` is that of the paper.

    Attributes:
      weight: Weight of the labels of training neighbours, in [0, 1].
      k: Training queries retrieved for each query.
      temperature: Scores are divided by it before the softmax.
      joint: Search labels and training queries as one set, and keep only the best of both; k is
        then not used.
    """

    weight: float
    k: int
    temperature: float
    joint: bool = False


def mix_neighbours(
    labels: SearchResult,
    neighbours: SearchResult,
    relevance: sparse.csr_matrix,
    mixing: Mixing,
    k: int,
    never: Int[np.ndarray, "f 2"] | None = None,
    *,
    as_probabilities: bool = False,
) -> SearchResult:
    """Returns one ranking of the labels found by search and the labels of training neighbours.

    As published, one softmax runs over the scores of labels and training queries together. The
    final score of a label is `(1 - weight) * p(label) + weight * sum of p(training query)` over the
    training queries that have the label. Joint mixing keeps only the best of both, as many as
    `labels` has columns, ties in favour of labels: the results of searching one index that holds
    both.

    With probabilities, p(label) is given, the softmax runs over the scores of training queries
    alone, and each of these divides its probability equally among its labels. So the final score
    is a probability as well: that a label drawn from those of the query is this one.

    Args:
      labels: The best labels of each query, best first.
      neighbours: The nearest training queries of each query, by cosine, best first; the first
        `mixing.k` are used, in joint mixing as many as `labels` has columns.
      relevance: [training queries, labels], ones.
      mixing: Settings.
      k: Columns of the result.
      never: Filter pairs (query, label), which training neighbours must not bring back; None: there
        are none. `labels` must not contain them.
      as_probabilities: Whether the scores of `labels` are probabilities instead of cosines; mixing
        is not joint then.

    Returns:
      Best first, ties by the lower id; short rows end in id -1, score -inf.
    """
    result = index.empty_result(len(labels.ids), k)
    num_labels = relevance.shape[1]
    for start in range(0, len(result.ids), _BLOCK):
        rows = slice(start, start + _BLOCK)
        block = SearchResult(*(x[rows] for x in labels))
        near = SearchResult(*(x[rows] for x in neighbours))
        found, transferred = shares(block, near, relevance, mixing, as_probabilities)
        mixed = ((1.0 - mixing.weight) * found + mixing.weight * transferred).tocsr()
        row = np.repeat(np.arange(mixed.shape[0]), np.diff(mixed.indptr))
        if never is not None:
            pairs = index.pairs_of(never, np.arange(start, start + mixed.shape[0]))
            keys, banned = (
                x.astype(np.int64) * num_labels + y for x, y in ((row, mixed.indices), pairs.T)
            )
            mixed.data[np.isin(keys, banned)] = 0.0
            mixed.eliminate_zeros()
            row = np.repeat(np.arange(mixed.shape[0]), np.diff(mixed.indptr))
        order = np.lexsort((mixed.indices, -mixed.data, row))
        rank = np.arange(len(order)) - mixed.indptr[row]
        order, row, rank = order[rank < k], row[rank < k], rank[rank < k]
        result.ids[start + row, rank] = mixed.indices[order]
        result.scores[start + row, rank] = mixed.data[order]
    return result


def shares(
    labels: SearchResult,
    neighbours: SearchResult,
    relevance: sparse.csr_matrix,
    mixing: Mixing,
    as_probabilities: bool,
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Returns the probability of each label by search, and by training neighbours: [q, labels].

    The mixed score of a label is their mean, weighted by `1 - mixing.weight` and `mixing.weight`.

    Args:
      labels, neighbours, relevance, mixing, as_probabilities: As in `mix_neighbours`.
    """
    num_neighbours = labels.ids.shape[1] if mixing.joint else mixing.k
    neighbours = SearchResult(*(x[:, :num_neighbours] for x in neighbours))
    num_queries, num_labels = relevance.shape
    if as_probabilities:
        of_labels = np.where(labels.ids >= 0, labels.scores, 0.0).astype(np.float64)
        no_labels = np.zeros((len(labels.ids), 0), np.float32)
        of_queries = _softmax(no_labels, neighbours.scores, mixing)
        num_labels_of = np.maximum(np.diff(relevance.indptr), 1)
        of_queries = of_queries / num_labels_of[np.maximum(neighbours.ids, 0)]
    else:
        probabilities = _softmax(labels.scores, neighbours.scores, mixing)
        of_labels, of_queries = np.split(probabilities, [labels.ids.shape[1]], axis=1)
    found = _to_sparse(of_labels, labels.ids, num_labels)
    return found, _to_sparse(of_queries, neighbours.ids, num_queries) @ relevance


def _softmax(
    labels: Float[np.ndarray, "q j"], neighbours: Float[np.ndarray, "q m"], mixing: Mixing
) -> Float[np.ndarray, "q j+m"]:
    """Softmax over the scores of labels and training queries of each query, float64."""
    logits = np.concatenate([labels, neighbours], axis=1).astype(np.float64)
    if mixing.joint:
        worse = np.argsort(-logits, axis=1, kind="stable")[:, labels.shape[1] :]
        np.put_along_axis(logits, worse, -np.inf, axis=1)
    largest = logits.max(axis=1, keepdims=True)
    # A query without any neighbour has no probabilities to divide.
    largest = np.where(largest > -np.inf, largest, 0.0)
    exponents = (logits - largest) / mixing.temperature
    # At a low temperature exp would be zero, and a label that was found would be left out: down to
    # -20,000, for cosines at the least temperature, exponents stay in order and in range.
    exponents = np.where(exponents < -700.0, -700.0 + 4e-4 * (exponents + 700.0), exponents)
    exponentials = np.exp(exponents)
    return exponentials / np.maximum(exponentials.sum(axis=1, keepdims=True), _TINY)


def _to_sparse(
    values: Float[np.ndarray, "q j"], ids: Int[np.ndarray, "q j"], width: int
) -> sparse.csr_matrix:
    """Sparse [q, width] matrix with each value in the column of its id; absent ids are left out."""
    row, column = np.nonzero((ids >= 0) & (values > 0))
    entries = values[row, column], (row, ids[row, column])
    return sparse.csr_matrix(entries, shape=(len(ids), width))


def grid(most: int, *, joint: bool = True) -> list[Mixing]:
    """Returns the settings that tuning tries, those of the paper first.

    Joint mixing does not use k, so each of its weights and temperatures is tried once.

    Args:
      most: Maximum number of training queries retrieved.
      joint: Whether to try joint mixing too.
    """
    ks = sorted({min(k, most) for k in KS})
    separate = (
        Mixing(weight, k, temperature)
        for weight, k, temperature in itertools.product(WEIGHTS, ks, TEMPERATURES)
    )
    together = (
        Mixing(weight, most, temperature, joint=True)
        for weight, temperature in itertools.product(WEIGHTS, TEMPERATURES)
    )
    first = Mixing(*PUBLISHED)._replace(k=min(PUBLISHED[1], most))
    return list(dict.fromkeys([first, *separate, *(together if joint else ())]))
