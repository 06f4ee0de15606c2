"""An index of a run's labels to which labels were added and from which labels were removed."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vixml_jax.search import index
from vixml_jax.search.index import Index, Normalised
from vixml_jax.structs import SearchResult


class UpdatedIndex:
    """Searches the original and the added labels and leaves out the removed ones.

    Ids of added labels follow those of the original labels.

    Attributes:
      settings: Those of the original index.
      log_sum: Likewise.
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
        self.log_sum = original.log_sum
        self._original, self._added, self._num_original = original, added, num_original
        removed = np.unique(removed)
        is_original = removed < num_original
        self._removed = removed[is_original], removed[~is_original] - num_original

    def search(self, queries: Float[np.ndarray, "q e"], k: int) -> SearchResult:
        """Returns the k best labels of each query, best first."""
        of_original, of_added = self._removed
        found = [self._original.search(queries, k, of_original)]
        if self._added is not None:
            found.append(self._added.search(queries, k, of_added))
        return self._merge(found, k)

    def search_normalised(self, queries: Float[np.ndarray, "q e"], k: int) -> Normalised:
        """Returns the result of `search`, and the log of the sum of exp(score) over all labels.

        Added labels count, removed ones do not.
        """
        of_original, of_added = self._removed
        found = [self._original.search_normalised(queries, k, of_original)]
        if self._added is not None:
            found.append(self._added.search_normalised(queries, k, of_added))
        best = self._merge([one.best for one in found], k)
        return Normalised(best, np.logaddexp.reduce([one.log_sum for one in found]))

    def _merge(self, found: list[SearchResult], k: int) -> SearchResult:
        """Returns the k best of the original and the added labels."""
        if len(found) > 1:
            scores, ids = found[1]
            found[1] = SearchResult(scores, np.where(ids >= 0, ids + self._num_original, -1))
        scores, ids = (np.concatenate(x, axis=1) for x in zip(*found, strict=True))
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, ids = (np.take_along_axis(x, order, axis=1) for x in (scores, ids))
        ids = np.where(scores > -np.inf, ids, -1).astype(np.int32)
        return index.pad_columns(SearchResult(scores, ids), k)
