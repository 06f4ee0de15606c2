"""Tunes the weights of prototypes, label head and training neighbours on held-out queries.

The rankings are those of `mixing.mix_neighbours`. Mixings that differ in their weight alone share
everything but the weighted sum, and only the ranks of true labels are computed, since no metric
depends on which wrong labels are ranked between them.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from vixml_jax.augmentation import settings
from vixml_jax.augmentation.mixing import Mixing, shares
from vixml_jax.augmentation.settings import Scoring
from vixml_jax.runtime import progress
from vixml_jax.search import index
from vixml_jax.search.fusion import Fusion
from vixml_jax.structs import SearchResult

# Weights of prototypes, label head and frequency that are tried. The last ones are prototypes
# alone, at a temperature of 0.05.
FUSIONS = (
    *(
        Fusion(weight, 1.0, frequency)
        for frequency in (0.0, 0.3, 0.6)
        for weight in (0.0, 5.0, 10.0, 15.0, 20.0, 30.0)
    ),
    Fusion(50.0, 1.0),
    Fusion(20.0, 0.0),
)
_BLOCK = 512  # Queries whose candidates are ranked at a time.


class Validation(NamedTuple):
    """Queries held out of training, and what is known of them.

    Attributes:
      neighbours: Their nearest training queries, best first, by cosine.
      truth: [queries, labels], their true labels.
      relevance: [training queries, labels], ones.
      never: Filter pairs (query, label).
      k: Columns of a ranking that its evaluation reads.
    """

    neighbours: SearchResult
    truth: sparse.csr_matrix
    relevance: sparse.csr_matrix
    never: Int[np.ndarray, "f 2"]
    k: int


# Returns the value of a ranking, the larger the better. Of the ranking only true labels are given,
# each at its rank; all other ids are -1.
Evaluate = Callable[[SearchResult], float]


def tune(
    found: Mapping[Fusion | None, SearchResult],
    validation: Validation,
    evaluate: Evaluate,
    mixings: Sequence[Mixing],
    *,
    title: str = "",
) -> list[dict[str, Any]]:
    """Evaluates fusions and mixings; returns rows of `settings.to_row`, best first.

    First each fusion is evaluated alone. Then all mixings with the best fusion, all fusions with
    the best mixing, and so on until the best of both stays the same.

    Args:
      found: The best labels of each query by fusion, without filter pairs: probabilities; for None,
        which is then the only one, cosines.
      validation: The queries.
      evaluate: Called with rankings of `validation.k` columns, from several threads.
      mixings: To try.
      title: Title of the progress display; empty: no progress is shown.

    Returns:
      Of equal ones, the first without neighbours comes first.
    """
    values = {
        scoring: evaluate(rankings(found, validation, scoring)) for scoring in map(Scoring, found)
    }

    def try_all(fusion: Fusion | None, mixings: Sequence[Mixing], title: str) -> None:
        new = [mixing for mixing in mixings if Scoring(fusion, mixing) not in values]
        tried = evaluate_all(
            found[fusion],
            validation,
            evaluate,
            new,
            as_probabilities=fusion is not None,
            title=title,
        )
        values.update({Scoring(fusion, mixing): value for mixing, value in tried.items()})

    def best(scorings: Iterable[Scoring]) -> Scoring:
        return max(scorings, key=values.__getitem__)

    fusion, done = best(map(Scoring, found)).fusion, set()
    while fusion not in done:
        done.add(fusion)
        try_all(fusion, mixings, title)
        mixing = best(Scoring(fusion, mixing) for mixing in mixings).mixing
        for other in found:
            try_all(other, [mixing], "")
        fusion = best(Scoring(other, mixing) for other in found).fusion
    best_first = sorted(values, key=lambda scoring: -values[scoring])
    return [settings.to_row(scoring, values[scoring]) for scoring in best_first]


def rankings(
    found: Mapping[Fusion | None, SearchResult], validation: Validation, scoring: Scoring
) -> SearchResult:
    """Returns the ranking of a scoring as `tune` evaluates it.

    Args:
      found, validation: See `tune`.
      scoring: How labels are scored.
    """
    labels, kept = found[scoring.fusion], []
    if scoring.mixing is None:
        return SearchResult(*(x[:, : validation.k] for x in labels))

    def keep(result: SearchResult) -> float:
        kept.append(result)
        return 0.0

    as_probabilities = scoring.fusion is not None
    evaluate_all(labels, validation, keep, [scoring.mixing], as_probabilities=as_probabilities)
    return kept[0]


def evaluate_all(
    labels: SearchResult,
    validation: Validation,
    evaluate: Evaluate,
    mixings: Sequence[Mixing],
    *,
    as_probabilities: bool = False,
    title: str = "",
) -> dict[Mixing, float]:
    """Returns the value of the ranking of each mixing, in the order given.

    Args:
      labels: The best labels of each query, best first, without filter pairs.
      validation: The queries.
      evaluate: Called with rankings of `validation.k` columns, from several threads.
      mixings: To try.
      as_probabilities: See `mix_neighbours`.
      title: Title of the progress display; empty: no progress is shown.
    """
    groups: dict[Mixing, list[Mixing]] = {}
    for mixing in mixings:
        groups.setdefault(mixing._replace(weight=0.5), []).append(mixing)
    found: dict[Mixing, float] = {}

    def evaluate_group(group: list[Mixing]) -> int:
        candidates = list(_candidates(labels, validation, group[0], as_probabilities))
        for mixing in group:
            result = index.empty_result(len(labels.ids), validation.k)
            for part in candidates:
                part.write_true_labels(mixing.weight, result)
            found[mixing] = evaluate(result)
        return len(group)

    with (
        progress.track(title, len(mixings), shown=bool(title)) as advance,
        futures.ThreadPoolExecutor(os.cpu_count()) as threads,
    ):
        for count in threads.map(evaluate_group, groups.values()):
            advance(count)
    return {mixing: found[mixing] for mixing in mixings}


class _Candidates(NamedTuple):
    """Labels of a block of queries that can be ranked first with some weight, by ascending id.

    Attributes:
      first: Row of the first query.
      ids: Labels; rows are padded at the end.
      found, transferred: Their probabilities by search and by training neighbours; 0 in padding.
      row, column: Where the true labels are.
    """

    first: int
    ids: Int[np.ndarray, "q c"]
    found: Float[np.ndarray, "q c"]
    transferred: Float[np.ndarray, "q c"]
    row: Int[np.ndarray, " t"]
    column: Int[np.ndarray, " t"]

    def write_true_labels(self, weight: float, result: SearchResult) -> None:
        """Writes the true labels among the first of the ranking with a weight to their ranks."""
        scores = (1.0 - weight) * self.found + weight * self.transferred
        # The sort is stable: ties go to the lower id, which is in an earlier column.
        order = np.argsort(-scores, axis=1, kind="stable")
        ranks = np.empty_like(order)
        np.put_along_axis(ranks, order, np.arange(scores.shape[1])[None], axis=1)
        rank, score = ranks[self.row, self.column], scores[self.row, self.column]
        is_ranked = (rank < result.ids.shape[1]) & (score > 0.0)
        row, column, rank = self.row[is_ranked], self.column[is_ranked], rank[is_ranked]
        result.ids[self.first + row, rank] = self.ids[row, column]
        result.scores[self.first + row, rank] = score[is_ranked]


def _candidates(
    labels: SearchResult, validation: Validation, mixing: Mixing, as_probabilities: bool
) -> Iterator[_Candidates]:
    """Yields the candidates of each block of queries, for mixings that differ in weight alone."""
    num_labels = validation.relevance.shape[1]
    for first in range(0, len(labels.ids), _BLOCK):
        rows = slice(first, first + _BLOCK)
        block, near = (
            SearchResult(*(x[rows] for x in result)) for result in (labels, validation.neighbours)
        )
        found, transferred = shares(block, near, validation.relevance, mixing, as_probabilities)
        both = (found + 1j * transferred).tocsr()  # Both values of each label of either matrix.
        both.sort_indices()
        row = np.repeat(np.arange(both.shape[0]), np.diff(both.indptr))
        keys = row.astype(np.int64) * num_labels + both.indices
        kept = np.ones(len(keys), bool)
        pairs = index.pairs_of(validation.never, first + np.arange(both.shape[0]))
        if len(pairs):
            kept = ~np.isin(keys, pairs[:, 0].astype(np.int64) * num_labels + pairs[:, 1])
        kept[kept] = _can_be_first(row[kept], both.data[kept], validation.k)
        row, ids, values, keys = row[kept], both.indices[kept], both.data[kept], keys[kept]
        truth = validation.truth[rows].tocoo()
        is_true = np.isin(keys, truth.row.astype(np.int64) * num_labels + truth.col)
        column = _position(row)
        shape = both.shape[0], int(column.max(initial=-1)) + 1
        arrays = np.full(shape, -1, np.int32), np.zeros(shape), np.zeros(shape)
        for array, x in zip(arrays, (ids, values.real, values.imag), strict=True):
            array[row, column] = x
        yield _Candidates(first, *arrays, row[is_true], column[is_true])


def _can_be_first(row: Int[np.ndarray, " n"], values: np.ndarray, k: int) -> Bool[np.ndarray, " n"]:
    """Marks the labels that can be among the k best of their query for some weight.

    Of the labels that only search found, or only training neighbours have, these are the k best.

    Args:
      row: Query of each label; labels of a query are consecutive, by ascending id.
      values: Probability by search, and as imaginary part by training neighbours.
      k: Columns of a ranking.
    """
    kept = (values.real > 0) & (values.imag > 0)
    of_one = np.flatnonzero(~kept)
    for part in (values.real, values.imag):
        entry = of_one[part[of_one] > 0]
        kept[entry[_is_largest(row[entry], part[entry], k)]] = True
    return kept


def _is_largest(
    row: Int[np.ndarray, " n"], values: Float[np.ndarray, " n"], k: int
) -> Bool[np.ndarray, " n"]:
    """Marks the k largest positive values of each row, ties by the earlier one; rows ascend."""
    if not len(row):
        return np.zeros(0, bool)
    position = _position(row)
    table = np.zeros((row[-1] + 1, max(k, position.max() + 1)))
    table[row, position] = values
    least = np.partition(table, table.shape[1] - k, axis=1)[row, table.shape[1] - k]
    marked = values > least
    tied = np.flatnonzero(values == least)  # At least as many as are missing in the row.
    missing = k - np.bincount(row[marked], minlength=len(table))
    marked[tied[_position(row[tied]) < missing[row[tied]]]] = True
    return marked


def _position(row: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Position of each entry within its row; rows ascend."""
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    return np.arange(len(row)) - np.repeat(starts, np.diff(starts, append=len(row)))
