"""Retrieval-augmented inference: training queries remember their labels (paper, supplement)."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax.search import index
from vixml_jax.structs import SearchResult

PUBLISHED = (0.1, 100, 0.05)
WEIGHTS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
KS = (3, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.2)
_BLOCK = 4096  # Queries mixed at a time.


class Mixing(NamedTuple):
    """How labels found by their own vectors and those of near training queries become one ranking.

    As published: `Mixing(*PUBLISHED)`.
    """

    weight: float  # What memory counts, in [0, 1].
    k: int  # Training queries remembered.
    temperature: float  # Scores are divided by it before the softmax.
    joint: bool = False  # As many of labels and training queries together as there are labels.


def mix_in_memory(
    labels: SearchResult,
    memory: SearchResult,
    relevance: sparse.csr_matrix,
    mixing: Mixing,
    k: int,
    never: Int[np.ndarray, "f 2"] | None = None,
) -> SearchResult:
    """Labels found by their own vectors and by those of training queries, as one ranking.

    The scores of both go through one softmax; a label's final score is
    `(1 - weight) * (its own share) + weight * (shares of the training queries that have it)`.
    Joint mixing takes of both together only the best, as many as there are columns of `labels`, the
    labels first among equals: what a search of one index that holds both would find.

    Args:
      labels: The best labels of each query, best first.
      memory: The best training queries of each query, by the same kind of score, best first; the
        first `mixing.k` count, in joint mixing as many as `labels` has.
      relevance: [training queries, labels], ones.
      mixing: See there.
      k: Columns of what is returned.
      never: (query, label), filter pairs, which near training queries do not bring back; None:
        there are none. `labels` must be without them already.

    Returns:
      Best first, of equal scores the lower id first; short rows end in id -1, score -inf.
    """
    few = labels.ids.shape[1] if mixing.joint else mixing.k
    memory = SearchResult(memory.scores[:, :few], memory.ids[:, :few])
    ids = np.full((len(labels.ids), k), -1, np.int32)
    scores = np.full((len(labels.ids), k), -np.inf, np.float32)
    num_queries, num_labels = relevance.shape
    for start in range(0, len(ids), _BLOCK):
        rows = slice(start, start + _BLOCK)
        shares = _shares(labels.scores[rows], memory.scores[rows], mixing)
        own, remembered = np.split(shares, [labels.ids.shape[1]], axis=1)
        mixed = (1.0 - mixing.weight) * _as_rows(own, labels.ids[rows], num_labels)
        votes = _as_rows(remembered, memory.ids[rows], num_queries) @ relevance
        mixed = (mixed + mixing.weight * votes).tocsr()
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
        ids[start + row, rank] = mixed.indices[order]
        scores[start + row, rank] = mixed.data[order]
    return SearchResult(scores, ids)


def _shares(
    labels: Float[np.ndarray, "q j"], memory: Float[np.ndarray, "q m"], mixing: Mixing
) -> Float[np.ndarray, "q j+m"]:
    """The softmax over labels and training queries of each query, float64."""
    logits = np.concatenate([labels, memory], axis=1).astype(np.float64)
    if mixing.joint:
        worse = np.argsort(-logits, axis=1, kind="stable")[:, labels.shape[1] :]
        np.put_along_axis(logits, worse, -np.inf, axis=1)
    shares = np.exp((logits - logits.max(axis=1, keepdims=True)) / mixing.temperature)
    return shares / shares.sum(axis=1, keepdims=True)


def _as_rows(
    shares: Float[np.ndarray, "q j"], ids: Int[np.ndarray, "q j"], width: int
) -> sparse.csr_matrix:
    """[q, width], the share of an id in its column; absent ids nowhere."""
    row, column = np.nonzero((ids >= 0) & (shares > 0))
    found = shares[row, column], (row, ids[row, column])
    return sparse.csr_matrix(found, shape=(len(ids), width))


def grid(most: int) -> list[Mixing]:
    """What `tune` tries, the published mixing first, of at most so many training queries.

    Joint mixing knows no k: each of its weights and temperatures is tried once.
    """
    ks = sorted({min(k, most) for k in KS})
    apart = (
        Mixing(weight, k, temperature)
        for weight, k, temperature in itertools.product(WEIGHTS, ks, TEMPERATURES)
    )
    joint = (
        Mixing(weight, most, temperature, joint=True)
        for weight, temperature in itertools.product(WEIGHTS, TEMPERATURES)
    )
    first = Mixing(*PUBLISHED)._replace(k=min(PUBLISHED[1], most))
    return list(dict.fromkeys([first, *apart, *joint]))


def tune(
    labels: SearchResult,
    memory: SearchResult,
    relevance: sparse.csr_matrix,
    judge: Callable[[SearchResult], float],
    mixings: Sequence[Mixing],
    title: str = "",
    never: Int[np.ndarray, "f 2"] | None = None,
) -> list[tuple[Mixing, float]]:
    """Each mixing and what `judge` says of its result, best first, of equals the first given.

    Args:
      labels, memory, relevance: As of `mix_in_memory`, of queries held out of training.
      judge: Of as many columns as `labels` has; larger is better.
      mixings: To be tried.
      title: Of the bar that shows progress; empty: none.
      never: As of `mix_in_memory`.
    """
    import tqdm

    found = []
    for mixing in tqdm.tqdm(mixings, desc=title, disable=not title, leave=False):
        mixed = mix_in_memory(labels, memory, relevance, mixing, labels.ids.shape[1], never)
        found.append((mixing, judge(mixed)))
    return sorted(found, key=lambda pair: -pair[1])
