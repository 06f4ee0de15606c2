"""Search with the first columns of vectors, for models that were trained for such widths."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vixml_jax.search import fusion
from vixml_jax.search.index import Index, Normalised
from vixml_jax.structs import SearchResult

_BLOCK = 1 << 16  # Vectors cut at a time.


class Prefix(NamedTuple):
    """Which columns of vectors are searched, of embeddings and of fused vectors (`fusion`) alike.

    Attributes:
      embedding: Width of embeddings, e.
      used: Columns of them that are searched, W; e: all.
    """

    embedding: int
    used: int

    @property
    def is_all(self) -> bool:
        """Whether vectors are searched as they are."""
        return self.used == self.embedding

    def num_parts(self, width: int) -> int:
        """Embeddings in a vector of this width: 1, or 2 if it is fused."""
        return 1 if width == self.embedding else 2

    def width(self, width: int) -> int:
        """Width of what is searched of vectors of this width."""
        return self.used if width == self.embedding else fusion.width(self.used)

    def labels(self, vectors: Float[np.ndarray, "n w"]) -> Float[np.ndarray, "n v"]:
        """Returns the part of label vectors: of a prototype z its first W columns at length 1.

        Of what the label head holds, they are the first columns as they are, since so they are
        trained, with the first columns of g at length 1 (`labels.head`). The terms of a label alone
        stay as they are.
        """
        if self.is_all:
            return vectors
        prototypes = _cut(vectors[:, : self.embedding], self.used)
        if self.num_parts(vectors.shape[1]) == 1:
            return prototypes
        head = vectors[:, self.embedding : self.embedding + self.used]
        return fusion.joined(prototypes, head, self._terms(vectors))

    def queries(self, vectors: Float[np.ndarray, "q w"]) -> Float[np.ndarray, "q v"]:
        """Returns the part of query vectors, whose parts q and g keep their lengths (weights)."""
        if self.is_all:
            return vectors
        queries = _cut(vectors[:, : self.embedding], self.used)
        if self.num_parts(vectors.shape[1]) == 1:
            return queries
        head = _cut(vectors[:, self.embedding : 2 * self.embedding], self.used)
        return fusion.joined(queries, head, self._terms(vectors))

    def _terms(self, vectors: Float[np.ndarray, "n w"]) -> Float[np.ndarray, "n t"]:
        return vectors[:, 2 * self.embedding :][:, : fusion.NUM_TERMS]

    def read(self, vectors: Any) -> Float[np.ndarray, "n v"]:
        """Returns the part of all label vectors as one float32 array, read block by block."""
        if self.is_all:
            return np.asarray(vectors, np.float32)
        count, width = vectors.shape
        result = np.empty((count, self.width(width)), np.float32)
        for start in range(0, count, _BLOCK):
            block = np.asarray(vectors[start : start + _BLOCK], np.float32)
            result[start : start + _BLOCK] = self.labels(block)
        return result


class PrefixIndex:
    """Searches an index over the first columns of vectors with those of the queries.

    Attributes:
      settings: Those of the index, and the `width`.
      log_sum: That of the index.
    """

    def __init__(self, index: Index, prefix: Prefix):
        self.settings: dict[str, Any] = {**index.settings, "width": prefix.used}
        self.log_sum = index.log_sum
        self._index, self._prefix = index, prefix

    def search(
        self,
        queries: Float[np.ndarray, "q w"],
        k: int,
        removed: Int[np.ndarray, " r"] | None = None,
    ) -> SearchResult:
        """See `Index`."""
        return self._index.search(self._prefix.queries(queries), k, removed)

    def search_normalised(
        self,
        queries: Float[np.ndarray, "q w"],
        k: int,
        removed: Int[np.ndarray, " r"] | None = None,
    ) -> Normalised:
        """See `Index`."""
        return self._index.search_normalised(self._prefix.queries(queries), k, removed)


def _cut(vectors: Float[np.ndarray, "n e"], used: int) -> Float[np.ndarray, "n u"]:
    """Returns the first columns, scaled to the length of all; zero where they are zero."""
    first = vectors[:, :used]
    length, of_first = (np.sqrt(np.einsum("ne,ne->n", x, x)) for x in (vectors, first))
    return first * (length / np.maximum(of_first, 1e-12))[:, None].astype(np.float32)
