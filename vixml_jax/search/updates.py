"""An index of labels to which others were added, and from which some were removed."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vixml_jax.search import index
from vixml_jax.search.index import Index
from vixml_jax.structs import SearchResult


class ChangedIndex:
    """Searches both and leaves out what was removed; ids of added labels follow the others.

    Attributes:
      settings: Of the first index.
    """

    def __init__(
        self, first: Index, added: Index | None, num_first: int, removed: Int[np.ndarray, " r"]
    ):
        """Takes the two indexes.

        Args:
          first: Of the labels that there were.
          added: Of those that were added; None: none were.
          num_first: How many the first has.
          removed: Ids of labels that are not to be found.
        """
        self.settings: dict[str, Any] = first.settings
        self._first, self._added, self._num_first = first, added, num_first
        self._removed = np.asarray(removed)

    def search(self, queries: Float[np.ndarray, "q e"], k: int) -> SearchResult:
        """Returns the k best labels of each query, best first."""
        # Few numbers of results, so that few programs are compiled.
        more = len(self._removed) and 1 << (len(self._removed) - 1).bit_length()
        found = [self._first.search(queries, k + more)]
        if self._added is not None:
            scores, ids = self._added.search(queries, k + more)
            found.append(SearchResult(scores, np.where(ids >= 0, ids + self._num_first, -1)))
        scores, ids = (np.concatenate(x, axis=1) for x in zip(*found, strict=True))
        scores = np.where(np.isin(ids, self._removed), -np.inf, scores)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, ids = (np.take_along_axis(x, order, axis=1) for x in (scores, ids))
        ids = np.where(scores > -np.inf, ids, -1).astype(np.int32)
        return index.pad_columns(SearchResult(scores, ids), k)
