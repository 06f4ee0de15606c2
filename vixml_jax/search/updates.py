"""An index of a run's labels to which labels were added and from which labels were removed."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vixml_jax.search import index
from vixml_jax.search.index import Index
from vixml_jax.structs import SearchResult


class UpdatedIndex:
    """Searches the original and the added labels and leaves out the removed ones.

    Ids of added labels follow those of the original labels.

    Attributes:
      settings: Those of the original index.
    """

    def __init__(
        self,
        original: Index,
        added: Index | None,
        num_original: int,
        removed: Int[np.ndarray, " r"],
    ):
        """Combines two indexes.

        Args:
          original: Over the original labels.
          added: Over the added labels; None: there are none.
          num_original: Number of original labels.
          removed: Ids of removed labels, original or added.
        """
        self.settings: dict[str, Any] = original.settings
        self._original, self._added, self._num_original = original, added, num_original
        self._removed = np.asarray(removed)

    def search(self, queries: Float[np.ndarray, "q e"], k: int) -> SearchResult:
        """Returns the k best labels of each query, best first."""
        # A power of two extra results, so that few programs are compiled.
        extra = len(self._removed) and 1 << (len(self._removed) - 1).bit_length()
        found = [self._original.search(queries, k + extra)]
        if self._added is not None:
            scores, ids = self._added.search(queries, k + extra)
            found.append(SearchResult(scores, np.where(ids >= 0, ids + self._num_original, -1)))
        scores, ids = (np.concatenate(x, axis=1) for x in zip(*found, strict=True))
        scores = np.where(np.isin(ids, self._removed), -np.inf, scores)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, ids = (np.take_along_axis(x, order, axis=1) for x in (scores, ids))
        ids = np.where(scores > -np.inf, ids, -1).astype(np.int32)
        return index.pad_columns(SearchResult(scores, ids), k)
