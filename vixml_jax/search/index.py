"""The interface of a search index, filter pairs removed from its results, and recall."""

from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, Int

from vixml_jax.structs import SearchResult

_BLOCK = 1 << 22  # Ids compared with filter pairs at a time.
_SMALLEST = np.float32(np.log(np.finfo(np.float32).tiny))  # Log of the smallest probability.
_FEW = 8  # Extra results per query that cost next to nothing.


class Normalised(NamedTuple):
    """The best labels of each query, and what turns their scores into probabilities.

    Attributes:
      best: The labels, best first, with their scores.
      log_sum: Logarithm of the sum of exp(score) over all labels, float32; -inf without labels.
    """

    best: SearchResult
    log_sum: Float[np.ndarray, " q"]


class Index(Protocol):
    """Maximum inner product search over fixed label vectors.

    Attributes:
      settings: How the index was built and is searched, in JSON types; saved with results.
      log_sum: "exact" if `search_normalised` sums over all labels, "sampled" if it estimates the
        sum, "int8" if it sums scores of vectors of 8 bits.
    """

    settings: dict[str, Any]
    log_sum: str

    def search(
        self,
        queries: Float[np.ndarray, "q e"],
        k: int,
        removed: Int[np.ndarray, " r"] | None = None,
    ) -> SearchResult:
        """Returns the k best labels of each query, numpy float32 and int32, best first.

        Args:
          queries: Any number.
          k: Columns of the result; where fewer labels are found, rows end in id -1, score -inf.
          removed: Distinct ids of labels that are as if they were not in the index.
        """
        ...

    def search_normalised(
        self,
        queries: Float[np.ndarray, "q e"],
        k: int,
        removed: Int[np.ndarray, " r"] | None = None,
    ) -> Normalised:
        """Returns the result of `search`, and the log of the sum of exp(score) over all labels.

        Args:
          queries, k, removed: As of `search`.
        """
        ...


def over_fetch(pairs: Int[np.ndarray, "f 2"]) -> int:
    """Returns how many extra results leave k per query after filter pairs are dropped."""
    return int(np.unique(pairs[:, 0], return_counts=True)[1].max(initial=0))


def pairs_of(pairs: Int[np.ndarray, "f 2"], rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, "g 2"]:
    """Returns the filter pairs of a subset of the queries, renumbered within the subset.

    Args:
      pairs: (query, label), in any order.
      rows: The queries of the subset, ascending and distinct.
    """
    at = np.searchsorted(rows, pairs[:, 0])
    selected = at < len(rows)
    selected[selected] = rows[at[selected]] == pairs[selected, 0]
    return np.stack([at, pairs[:, 1]], axis=1)[selected]


def search_filtered(
    index: Index,
    queries: Float[np.ndarray, "q e"],
    pairs: Int[np.ndarray, "f 2"],
    k: int,
    *,
    as_probabilities: bool = False,
) -> SearchResult:
    """Returns the k best labels of each query that are not filter pairs.

    Each query retrieves as many extra results as it has filter pairs, rounded up to a power of two.
    Queries with the same number of extra results are searched together, so a single query with
    thousands of pairs does not slow down the others.

    Args:
      index: To search.
      queries: Any number.
      pairs: (query, label), in any order; duplicates are allowed.
      k: Columns of the result; short rows end in id -1, score -inf.
      as_probabilities: Return the probability of each label, exp(score) divided by its sum over all
        labels (those of filter pairs included), in place of its score.
    """
    result = empty_result(len(queries), k)
    count = np.bincount(pairs[:, 0], minlength=len(queries))
    extras = 1 << np.ceil(np.log2(np.maximum(count, _FEW))).astype(int) if len(pairs) else count
    for extra in np.unique(extras):
        rows = np.flatnonzero(extras == extra)
        if as_probabilities:
            found = probabilities(index.search_normalised(queries[rows], k + int(extra)))
        else:
            found = index.search(queries[rows], k + int(extra))
        result.scores[rows], result.ids[rows] = drop_filtered(found, pairs_of(pairs, rows), k)
    return result


def probabilities(found: Normalised) -> SearchResult:
    """Returns exp(score - log_sum) in place of each score; absent labels keep -inf.

    They are in (0, 1]: a sum that is estimated, or rounded, can be less than one of its terms, and
    a label that was found stays one that was found where float32 has no smaller number.
    """
    scores, ids = found.best
    values = np.full_like(scores, -np.inf)
    query, column = np.nonzero(ids >= 0)
    log_probability = scores[query, column] - found.log_sum[query]
    values[query, column] = np.exp(np.clip(log_probability, _SMALLEST, 0.0))
    return SearchResult(values, ids)


def without(found: SearchResult, removed: Int[np.ndarray, " r"], k: int) -> SearchResult:
    """Returns the k best of the labels found that are not removed; short rows end in id -1."""
    gone = np.isin(found.ids, removed)
    scores, ids = np.where(gone, -np.inf, found.scores), np.where(gone, -1, found.ids)
    scores, ids = _absent_last(SearchResult(scores, ids))
    return pad_columns(SearchResult(scores[:, :k], ids[:, :k]), k)


def drop_filtered(result: SearchResult, pairs: Int[np.ndarray, "f 2"], k: int) -> SearchResult:
    """Returns the k best results of each query that are not filter pairs.

    Args:
      result: [q, j]; j = k + over_fetch(pairs) guarantees that k are left. Absent ids come last in
        their row.
      pairs: (query, label), in any order.
      k: Columns of the result, which may exceed j; short rows end in id -1, score -inf.
    """
    ids, scores = np.array(result.ids), np.array(result.scores)
    size = max(1, _BLOCK // max(1, ids.shape[1]))
    for start in range(0, len(pairs), size):
        queries, labels = pairs[start : start + size].T
        at, column = np.nonzero(ids[queries] == labels[:, None])
        ids[queries[at], column], scores[queries[at], column] = -1, -np.inf
        rows = np.unique(queries[at])
        scores[rows], ids[rows] = _absent_last(SearchResult(scores[rows], ids[rows]))
    return pad_columns(SearchResult(scores[:, :k], ids[:, :k]), k)


def _absent_last(found: SearchResult) -> SearchResult:
    """Moves absent ids to the end of their row; the others keep their order."""
    order = np.argsort(found.ids < 0, axis=1, kind="stable")
    return SearchResult(*(np.take_along_axis(x, order, axis=1) for x in found))


def padded_size(count: int) -> int:
    """Returns the number of queries to which `count` are padded, so that few programs are compiled.

    It is a power of two, at least 8.
    """
    return 1 << max(3, (count - 1).bit_length())


def padded_sizes(most: int) -> list[int]:
    """Returns what `padded_size` returns for up to `most` queries."""
    return sorted({padded_size(1 << n) for n in range(most.bit_length())} | {padded_size(most)})


def empty_result(num_queries: int, k: int) -> SearchResult:
    """Returns a result in which every label is absent (id -1, score -inf)."""
    shape = num_queries, k
    return SearchResult(np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32))


def pad_columns(result: SearchResult, k: int) -> SearchResult:
    """Extends rows to k columns with id -1 and score -inf."""
    missing = ((0, 0), (0, max(0, k - result.ids.shape[1])))
    return SearchResult(
        np.pad(result.scores, missing, constant_values=-np.inf),
        np.pad(result.ids, missing, constant_values=-1),
    )


def recall_against(exact: SearchResult, result: SearchResult, k: int) -> float:
    """Returns the fraction of the exact k best labels found in the first k of `result`, in [0, 1].

    Absent ids of the exact result (k above the number of labels) do not count. The recall is 1
    where the exact result is empty.
    """
    wanted, found = np.asarray(exact.ids)[:, :k], np.asarray(result.ids)[:, :k]
    width = max(wanted.max(initial=0), found.max(initial=0)) + 2
    rows = np.arange(len(wanted), dtype=np.int64)[:, None] * width
    real = wanted >= 0
    # Ids are made unique per row; -1 becomes a number that no real id of another row has.
    hits = np.isin(rows + wanted, rows + found) & real
    return float(hits.sum() / real.sum()) if real.any() else 1.0
