"""Exact search over label vectors of 8 bits: a quarter of the memory, and the best scored again.

Each part of a vector (prototype, row of the label head) is stored as integers from -127 to 127 and
one float32 scale; the terms of a label alone, such as the bias of the head, stay float32. All
labels are scored by these numbers, which are converted to float32 block by block, so that a query
is not rounded and no device needs products of integers. The best few of each query are then scored
by their float32 vectors, which stay where they are: on the host, or in a memory-mapped file.
"""

from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from vixml_jax.runtime import processors
from vixml_jax.search import fusion
from vixml_jax.search import index as index_lib
from vixml_jax.search.index import Index, Normalised
from vixml_jax.search.prefix import Prefix
from vixml_jax.structs import SearchResult

LARGEST = 127
SHORTLIST = 4  # Labels scored again for each one that is returned.
_BLOCK = 1 << 14  # Vectors quantised at a time.


class Int8Vectors(NamedTuple):
    """Vectors of 8 bits; a pytree with the rows first in all its arrays.

    Attributes:
      values: Integers of each of the p parts.
      scales: Their float32 scales: a part is values * scale.
      terms: The columns after the parts of fused vectors (`fusion.NUM_TERMS`); r is 0 for vectors
        that are not fused.
    """

    values: Int8[Any, "n p u"]
    scales: Float[Any, "n p"]
    terms: Float[Any, "n r"]


def quantised(vectors: Any, prefix: Prefix) -> Int8Vectors:
    """Returns what is searched of label vectors, as integers.

    With s = max |x| / 127 of a part x, its integers are x / s rounded, so that no entry differs by
    more than s / 2.

    Args:
      vectors: [n, w], read block by block; see `Prefix`.
      prefix: Their columns that are searched.
    """
    count, width = vectors.shape
    parts = prefix.num_parts(width)
    num_terms = fusion.NUM_TERMS if parts > 1 else 0
    result = Int8Vectors(
        np.empty((count, parts, prefix.used), np.int8),
        np.empty((count, parts), np.float32),
        np.empty((count, num_terms), np.float32),
    )
    for start in range(0, count, _BLOCK):
        block = prefix.labels(np.asarray(vectors[start : start + _BLOCK], np.float32))
        end = parts * prefix.used
        found = of_parts(block[:, :end].reshape(len(block), parts, prefix.used))
        result.values[start : start + _BLOCK], result.scales[start : start + _BLOCK] = found
        result.terms[start : start + _BLOCK] = block[:, end : end + num_terms]
    return result


def of_parts(
    parts: Float[np.ndarray, "n p u"],
) -> tuple[Int8[np.ndarray, "n p u"], Float[np.ndarray, "n p"]]:
    """Returns integers and scales of the parts of vectors; see `quantised`."""
    largest = np.abs(parts).max(axis=2, initial=0.0)
    scales = np.maximum(largest / LARGEST, np.finfo(np.float32).tiny).astype(np.float32)
    values = np.clip(np.rint(parts / scales[..., None]), -LARGEST, LARGEST)
    return values.astype(np.int8), scales


def as_float(rows: Any, width: int) -> Float[Array, "n w"]:
    """Label vectors in float32 and padded to a width, if they are of 8 bits; others as they are."""
    if not isinstance(rows, Int8Vectors):
        return rows
    values = rows.values.astype(jnp.float32) * rows.scales[..., None]
    values = jnp.concatenate([values.reshape(len(values), -1), rows.terms], axis=1)
    return jnp.pad(values, ((0, 0), (0, width - values.shape[1])))


def num_rows(rows: Any) -> int:
    """Number of vectors, of float32 or of 8 bits."""
    return jax.tree.leaves(rows)[0].shape[0]


class RescoredIndex:
    """Searches an index of 8 bits, and scores the best labels of each query by float32 vectors.

    The scores returned are inner products in float32. `SHORTLIST` times as many labels as wanted
    are scored again, so a label of the k best is missed only if rounding its vector puts it behind
    all of these.

    Attributes:
      settings: Those of the index.
      log_sum: "int8": the labels scored again count exactly in the sum over all labels of
        `search_normalised`, all others by their vectors of 8 bits.
    """

    log_sum = "int8"

    def __init__(self, index: Index, vectors: Any, prefix: Prefix):
        """Combines an index and the vectors that it was made of.

        Args:
          index: Over `quantised(vectors, prefix)`.
          vectors: Label vectors [n, w]; some rows are read at a time.
          prefix: Their columns that are searched.
        """
        self.settings: dict[str, Any] = index.settings
        self._index, self._vectors, self._prefix = index, vectors, prefix
        self._threads = futures.ThreadPoolExecutor(processors.usable())

    def search(
        self,
        queries: Float[np.ndarray, "q v"],
        k: int,
        removed: Int[np.ndarray, " r"] | None = None,
    ) -> SearchResult:
        """Returns the k best labels of each query, best first, ties by the lower id."""
        rounded = self._index.search(queries, self._most(k), removed)
        return _first(self._rescored(queries, rounded), k)

    def search_normalised(
        self,
        queries: Float[np.ndarray, "q v"],
        k: int,
        removed: Int[np.ndarray, " r"] | None = None,
    ) -> Normalised:
        """See `Index`."""
        rounded, log_sum = self._index.search_normalised(queries, self._most(k), removed)
        exact = self._rescored(queries, rounded)
        scores = log_sum[:, None], rounded.scores, exact.scores
        largest = np.max([x.max(axis=1, initial=-np.inf) for x in scores], axis=0)[:, None]
        largest = np.where(np.isfinite(largest), largest, 0.0)
        total, of_rounded, of_exact = (
            np.exp(x.astype(np.float64) - largest).sum(axis=1) for x in scores
        )
        with np.errstate(divide="ignore"):
            corrected = np.log(np.maximum(total - of_rounded, 0.0) + of_exact) + largest[:, 0]
        return Normalised(_first(exact, k), corrected.astype(np.float32))

    def _most(self, k: int) -> int:
        return min(SHORTLIST * k, len(self._vectors))

    def _rescored(self, queries: Float[np.ndarray, "q v"], found: SearchResult) -> SearchResult:
        """Returns the labels found with their scores in float32, best first."""
        result = index_lib.empty_result(*found.ids.shape)

        def rescore(query: int) -> None:
            ids = np.sort(found.ids[query][found.ids[query] >= 0])
            rows = self._prefix.labels(np.asarray(self._vectors[ids], np.float32))
            scores = rows @ queries[query]
            order = np.argsort(-scores, kind="stable")  # Ties go to the lower id.
            result.scores[query, : len(ids)] = scores[order]
            result.ids[query, : len(ids)] = ids[order]

        list(self._threads.map(rescore, range(len(queries))))
        return result


def _first(found: SearchResult, k: int) -> SearchResult:
    return index_lib.pad_columns(SearchResult(*(x[:, :k] for x in found)), k)
