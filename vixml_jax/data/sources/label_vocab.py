"""How queries refer to labels in tabular data: by id, text or row, explicit or inferred."""

from collections.abc import Sequence
from typing import Any, Protocol

from vixml_jax.data.sources import values as values_lib
from vixml_jax.data.sources.columns import AUTO, IDS, ROWS, TEXTS, Roles
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.errors import InputError

_SEPARATORS = ("|", ";", "\t", ",")
_INFERENCE_ROWS = 1000  # Cells from which the separator is inferred.


class LabelRows(Protocol):
    """The rows of a label table."""

    count: int
    path: str

    def rows_by(self, naming: str) -> dict[str, int]:
        """Row of each label by its id ('ids'), its text ('texts') or its number ('rows')."""


class LabelVocab:
    """The known labels and how queries refer to them.

    Without a label table, labels are named by their texts and numbered as they occur.

    Attributes:
      labels_are: 'ids', 'texts' or 'rows' of the label table; 'auto' until it is inferred.
      separator: Separator of several labels in a string; may be empty.
      row_of: Row of each label by its name.
    """

    def __init__(self, labels_are: str, separator: str):
        if labels_are not in (AUTO, IDS, TEXTS, ROWS):
            raise InputError(f"--labels_are={labels_are}: expected one of auto, ids, texts, rows")
        self.labels_are = labels_are
        self.separator = separator.replace("\\t", "\t")
        self.row_of: dict[str, int] = {}
        self._table: LabelRows | None = None
        self._separator_known = bool(separator)

    def use_table(self, table: LabelRows) -> None:
        """Restricts the labels to the rows of a label table."""
        self._table = table

    def resolve(
        self, chunk: Chunk, roles: Roles
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Returns the label rows of each query and their weights; omits labels of weight 0."""
        values, column = chunk.columns[roles.labels], roles.labels
        if self.labels_are == AUTO and self._table is not None and column == "target_ind":
            self.labels_are = ROWS  # As in the JSON files of the XML repository.
        if not self._separator_known:
            self._infer_separator(values)
        if self.labels_are == AUTO or (self._table is not None and not self.row_of):
            self._infer_naming(chunk, column)
        label_rows, weights = [], None if roles.weights is None else []
        for row, value in enumerate(values):
            references = values_lib.list_items(value, self.separator, chunk, row, column)
            labels = [self._row(reference, chunk, row, column) for reference in references]
            if weights is not None:
                row_weights = values_lib.numbers(chunk, row, roles.weights, self.separator)
                if len(row_weights) != len(labels):
                    raise InputError(
                        f"{chunk.where(row)}: {len(row_weights)} weights in {roles.weights!r} for "
                        f"{len(labels)} labels; expected one weight per label"
                    )
                labels = [
                    label for label, weight in zip(labels, row_weights, strict=True) if weight
                ]
                weights.append([weight for weight in row_weights if weight])
            label_rows.append(labels)
        return label_rows, weights

    def _row(self, reference: Any, chunk: Chunk, row: int, column: str) -> int:
        """The row of a label."""
        if self.labels_are == ROWS:
            number = reference
            if isinstance(number, str) and number.isdigit() and len(number) < 19:
                number = int(number)
            is_row = isinstance(number, int) and not isinstance(number, bool)
            if not is_row or not 0 <= number < self._table.count:
                raise InputError(
                    f"{chunk.where(row)}: label {str(reference)[:40]!r} in {column!r}, expected a "
                    f"row of the label table, 0 to {self._table.count - 1}"
                )
            return number
        name = reference
        if not isinstance(name, str):
            name = values_lib.text(reference, chunk, row, column)
        if self._table is None:
            if not name:
                raise InputError(f"{chunk.where(row)}: empty label in {column!r}; expected a text")
            values_lib.text(name, chunk, row, column)  # Checks that it can be encoded.
            return self.row_of.setdefault(name, len(self.row_of))
        label = self.row_of.get(name)
        if label is None:
            raise InputError(
                f"{chunk.where(row)}: label {name[:40]!r} in {column!r} is not among the "
                f"{self.labels_are} of the {self._table.count:,} labels in {self._table.path}; "
                "check --labels_are and --label_separator"
            )
        return label

    def _infer_separator(self, values: Sequence[Any]) -> None:
        """Infers the separator from the first cells that are strings.

        With a label table, it is the separator that yields the most known labels. Without one, it
        is the first of the usual separators that occurs.
        """
        cells = [value for value in values if isinstance(value, str) and value]
        cells = [value for value in cells if not value.lstrip().startswith("[")][:_INFERENCE_ROWS]
        if not cells:
            return  # Only lists so far.
        self._separator_known = True
        if self._table is None:
            self.separator = next(
                (mark for mark in _SEPARATORS if any(mark in value for value in cells)), ""
            )
            return
        namings = (IDS, TEXTS) if self.labels_are == AUTO else (self.labels_are,)
        known = set().union(*map(self._table.rows_by, namings))

        def known_minus_unknown(mark: str) -> int:
            parts = (part for value in cells for part in (value.split(mark) if mark else [value]))
            return sum(1 if part.strip() in known else -1 for part in parts if part.strip())

        self.separator = max(("", *_SEPARATORS, " "), key=known_minus_unknown)

    def _infer_naming(self, chunk: Chunk, column: str) -> None:
        """Infers whether labels are named by id or text, and looks up their rows."""
        if self._table is None:
            self.labels_are = TEXTS
            return
        if self.labels_are == AUTO:
            references = [
                reference if isinstance(reference, str) else str(reference)
                for row, value in enumerate(chunk.columns[column])
                for reference in values_lib.list_items(value, self.separator, chunk, row, column)
            ]
            if not references:
                return  # No labels so far.
            num_ids, num_texts = (
                sum(reference in rows for reference in references)
                for rows in map(self._table.rows_by, (IDS, TEXTS))
            )
            self.labels_are = TEXTS if num_texts > num_ids else IDS
        if self.labels_are != ROWS:
            self.row_of = self._table.rows_by(self.labels_are)
