"""The labels of a run at one moment: those of training and all updates; a view never changes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from vixml_jax.errors import InputError
from vixml_jax.search import fusion as fusion_lib
from vixml_jax.search.fusion import HeadRows
from vixml_jax.search.index import Index
from vixml_jax.search.updates import UpdatedIndex
from vixml_jax.serving import label_updates
from vixml_jax.serving.artifacts import ServingArtifacts
from vixml_jax.serving.label_updates import LabelUpdates


@dataclasses.dataclass(frozen=True)
class LabelView:
    """Labels by row, by id and by vector, all of one version of the label updates.

    Rows of added labels follow those of the run.

    Attributes:
      artifacts: Serving artifacts of the run.
      head_rows: Of the labels of the run; None: it has no head.
      updates: Labels added to the run and removed from it.
      index: Over the vectors of the labels.
    """

    artifacts: ServingArtifacts
    head_rows: HeadRows | None
    updates: LabelUpdates
    index: Index

    @functools.cached_property
    def relevance(self) -> sparse.csr_matrix:
        """Labels of the training queries, [training queries, rows]; artifacts must hold them."""
        return label_updates.apply_to_relevance(self.artifacts.train_relevance, self.updates)

    @property
    def num_labels(self) -> int:
        """Number of labels that can be found."""
        updates = self.updates
        return len(self.artifacts.ids) + len(updates.ids) - len(updates.removed)

    def label(self, row: int) -> tuple[str, str]:
        """Returns id and text of a label."""
        count = len(self.artifacts.ids)
        source, at = (self.artifacts, row) if row < count else (self.updates, row - count)
        return source.ids[at], source.texts[at]

    def rows(self, start: int = 0) -> Iterator[int]:
        """Yields the rows of the labels that can be found, from `start` on."""
        count = len(self.artifacts.ids) + len(self.updates.ids)
        return (row for row in range(start, count) if row not in self._removed)

    def row_of(self, name: str) -> int | None:
        """Returns the row of a label by its id; None if there is no such label."""
        row = self._added_rows.get(name)
        if row is None:
            row = self.artifacts.rows_by_id.get(name)
        return None if row in self._removed else row

    @functools.cached_property
    def _added_rows(self) -> dict[str, int]:
        first = len(self.artifacts.ids)
        return {name: first + i for i, name in enumerate(self.updates.ids)}

    @functools.cached_property
    def _removed(self) -> frozenset[int]:
        return frozenset(self.updates.removed.tolist())

    def label_vectors(self, rows: Int[np.ndarray, " m"]) -> Float[np.ndarray, "m w"]:
        """Returns the vectors of labels as they are searched: prototypes, fused with the head."""
        count, head_rows = len(self.artifacts.ids), self.head_rows
        own, added = np.flatnonzero(rows < count), np.flatnonzero(rows >= count)
        vectors = np.empty((len(rows), label_width(self.artifacts, head_rows)), np.float32)
        labels = self.artifacts.vectors
        if head_rows is not None:
            labels = fusion_lib.LabelRows(labels, head_rows)
        vectors[own] = labels[rows[own]]
        vectors[added] = self.updates.vectors[rows[added] - count]
        return vectors

    def filter_pairs(
        self, never: Sequence[Sequence[str]] | None, count: int
    ) -> Int[np.ndarray, "f 2"]:
        """Returns (query, label) pairs of the labels that must not be predicted.

        Args:
          never: For each query, ids of labels; None: there are none.
          count: Number of queries.

        Raises:
          InputError: If an id is unknown, or there are filters for another number of queries, or
            one that is no list.
        """
        if never is None or not any(never):
            never = [()] * count
        if len(never) != count:
            raise InputError(f"found filters for {len(never)} queries, expected {count}")
        pairs = []
        for query, names in enumerate(never):
            if isinstance(names, str):  # Its characters may be ids as well.
                raise InputError(
                    f"query {query}: found one text, {names[:40]!r}, as its filter, expected a "
                    "list of ids"
                )
            for name in names:
                row = self.row_of(name)
                if row is None:
                    raise InputError(f"query {query}: unknown label {name[:60]!r} in its filter")
                pairs.append((query, row))
        return np.array(pairs, np.int64).reshape(-1, 2)


def label_width(artifacts: ServingArtifacts, head_rows: HeadRows | None) -> int:
    """Width of the vectors that represent labels in the search."""
    width = artifacts.vectors.shape[1]
    return width if head_rows is None else fusion_lib.width(width)


def make(
    artifacts: ServingArtifacts,
    head_rows: HeadRows | None,
    run_index: Index,
    updates: LabelUpdates,
    exact: Callable[[Float[np.ndarray, "m w"]], Index],
) -> LabelView:
    """Returns the view of a run's labels after updates.

    Args:
      artifacts, head_rows, updates: See `LabelView`.
      run_index: Over the vectors of the run's labels alone.
      exact: Returns an exact index over vectors.
    """
    index = run_index
    if len(updates.ids) or len(updates.removed):
        added = exact(updates.vectors) if len(updates.ids) else None
        index = UpdatedIndex(run_index, added, len(artifacts.ids), updates.removed)
    return LabelView(artifacts, head_rows, updates, index)
