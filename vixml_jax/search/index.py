"""What an index is, and what is done with its results: filter pairs out, recall against exact."""

from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int

from vixml_jax.structs import SearchResult

_BLOCK = 1 << 22  # Ids compared with filter pairs at a time.
_FEW = 8  # Filter pairs of a query that cost next to nothing.


class Index(Protocol):
    """Maximum inner product search over fixed label vectors.

    Attributes:
      settings: What to write down beside its results; json's types alone.
    """

    settings: dict[str, Any]

    def search(self, queries: Float[np.ndarray, "q e"], k: int) -> SearchResult:
        """Returns the k best labels of each query, numpy float32 and int32, best first."""
        ...


def over_fetch(pairs: Int[np.ndarray, "f 2"]) -> int:
    """How many results more to ask for, so that k are left once filter pairs are dropped."""
    return int(np.unique(pairs[:, 0], return_counts=True)[1].max(initial=0))


def pairs_of(pairs: Int[np.ndarray, "f 2"], rows: Int[np.ndarray, " r"]) -> Int[np.ndarray, "g 2"]:
    """The filter pairs of some queries, numbered among these.

    Args:
      pairs: (query, label), in any order.
      rows: Queries, ascending, each once.
    """
    at = np.searchsorted(rows, pairs[:, 0])
    there = at < len(rows)
    there[there] = rows[at[there]] == pairs[there, 0]
    return np.stack([at, pairs[:, 1]], axis=1)[there]


def search_filtered(
    index: Index, queries: Float[np.ndarray, "q e"], pairs: Int[np.ndarray, "f 2"], k: int
) -> SearchResult:
    """The k best labels of each query that are not filter pairs.

    A query is asked for as many results more as it has pairs, up to the next power of two: where
    one has thousands, the others cost no more than without it.

    Args:
      index: To search.
      queries: Any number.
      pairs: (query, label), in any order, twice or not.
      k: Columns of what is returned; short rows end in id -1, score -inf.
    """
    result = nothing(len(queries), k)
    count = np.bincount(pairs[:, 0], minlength=len(queries))
    more = 1 << np.ceil(np.log2(np.maximum(count, _FEW))).astype(int) if len(pairs) else count
    for extra in np.unique(more):
        rows = np.flatnonzero(more == extra)
        found = index.search(queries[rows], k + int(extra))
        kept = drop_filtered(found, pairs_of(pairs, rows), k)
        result.scores[rows], result.ids[rows] = kept
    return result


def drop_filtered(result: SearchResult, pairs: Int[np.ndarray, "f 2"], k: int) -> SearchResult:
    """Returns the k best results of each query that are not filter pairs.

    Args:
      result: [q, j], of j = k + over_fetch(pairs) where k must be left; rows end in absent ids.
      pairs: (query, label), in any order.
      k: Columns of what is returned, more than j too; short rows end in id -1, score -inf.
    """
    ids, scores = np.array(result.ids), np.array(result.scores)
    size = max(1, _BLOCK // max(1, ids.shape[1]))
    for start in range(0, len(pairs), size):
        queries, labels = pairs[start : start + size].T
        at, column = np.nonzero(ids[queries] == labels[:, None])
        ids[queries[at], column], scores[queries[at], column] = -1, -np.inf
        rows = np.unique(queries[at])
        order = np.argsort(ids[rows] < 0, axis=1, kind="stable")  # What is left moves up.
        ids[rows] = np.take_along_axis(ids[rows], order, axis=1)
        scores[rows] = np.take_along_axis(scores[rows], order, axis=1)
    return pad_columns(SearchResult(scores[:, :k], ids[:, :k]), k)


def nothing(num_queries: int, k: int) -> SearchResult:
    """The k best of no labels."""
    shape = num_queries, k
    return SearchResult(np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int32))


def pad_columns(result: SearchResult, k: int) -> SearchResult:
    """Fills rows up to k columns with id -1 and score -inf."""
    missing = ((0, 0), (0, max(0, k - result.ids.shape[1])))
    return SearchResult(
        np.pad(result.scores, missing, constant_values=-np.inf),
        np.pad(result.ids, missing, constant_values=-1),
    )


def recall_against(exact: SearchResult, result: SearchResult, k: int) -> float:
    """The share of the exact k best labels that are among the first k of `result`, in [0, 1].

    Labels that exact search lacks (k above their number) do not count; 1 where it found none.
    """
    wanted, found = np.asarray(exact.ids)[:, :k], np.asarray(result.ids)[:, :k]
    width = max(wanted.max(initial=0), found.max(initial=0)) + 2
    rows = np.arange(len(wanted), dtype=np.int64)[:, None] * width
    real = wanted >= 0
    hits = np.isin(rows + wanted, rows + found) & real  # -1 meets at most -1 of another row.
    return float(hits.sum() / real.sum()) if real.any() else 1.0
