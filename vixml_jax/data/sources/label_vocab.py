"""How queries refer to labels in tabular data: by id, text or row, explicit or inferred."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from vixml_jax.data.sources import values as values_lib
from vixml_jax.data.sources.columns import AUTO, IDS, NONE, ROWS, TEXTS, Roles
from vixml_jax.data.sources.label_survey import LabelSurvey
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.errors import InputError

_SHOWN = 3  # Names in a message.
# Words that programs write for a missing value.
_MISSING = {"nan", "none", "null", "n/a", "<na>", "nat", "#n/a"}


class LabelRows(Protocol):
    """The rows of a label table."""

    count: int
    path: str

    def rows_by(self, naming: str) -> dict[str, int]:
        """Row of each label by its id ('ids'), its text ('texts') or its number ('rows')."""


class LabelVocab:
    """The known labels and how queries refer to them.

    Without a label table, labels are named by their texts and numbered as they occur. What is not
    explicit is inferred by `infer` from all rows, before the first is resolved.

    Attributes:
      labels_are: 'ids', 'texts' or 'rows' of the label table; 'auto' until it is inferred.
      separator: Separator of several labels in a text; '' if there is none.
      row_of: Row of each label by its name.
      num_zero: Number of labels of weight 0, which are left out.
    """

    def __init__(self, labels_are: str, separator: str):
        if labels_are not in (AUTO, IDS, TEXTS, ROWS):
            raise InputError(f"--labels_are={labels_are}: expected one of auto, ids, texts, rows")
        self.labels_are = labels_are
        self.separator = "" if separator == NONE else separator.replace("\\t", "\t")
        self.row_of: dict[str, int] = {}
        self.num_zero = 0
        self._is_given = bool(separator)
        self._table: LabelRows | None = None
        self._known: dict[str, dict[str, int]] = {}  # Rows of the table by naming and name.
        self._survey: LabelSurvey | None = None
        self._num_as_integer = 0

    def use_table(self, table: LabelRows) -> None:
        """Restricts the labels to the rows of a label table."""
        self._table = table
        namings = (IDS, TEXTS) if self.labels_are == AUTO else (self.labels_are,)
        self._known = {naming: table.rows_by(naming) for naming in namings}

    def new_survey(self) -> LabelSurvey:
        """A survey, to be filled with the labels of a table."""
        return LabelSurvey(self._known, self.separator if self._is_given else None)

    def infer(self, survey: LabelSurvey, column: str) -> None:
        """Infers the separator and the naming of labels, unless they are explicit.

        Args:
          survey: Of the labels of all queries.
          column: Name of the column of labels.

        Raises:
          InputError: If the separator is ambiguous.
        """
        self._survey = survey
        if not self._is_given:
            self.separator = survey.separator()
        if self.labels_are == AUTO:
            if self._table is None:
                self.labels_are = TEXTS
            elif column == "target_ind":  # As in the JSON files of the XML repository.
                self.labels_are = ROWS
            else:
                self.labels_are = survey.naming(self.separator)
        if self._table is not None and self.labels_are != ROWS:
            self.row_of = self._known[self.labels_are]
        self._known = {}

    def resolve(
        self, chunk: Chunk, roles: Roles
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Returns the label rows of each query and their weights; omits labels of weight 0."""
        column = roles.labels
        label_rows, weights = [], None if roles.weights is None else []
        for row, value in enumerate(chunk.columns[column]):
            if self._is_given and isinstance(value, str):
                references = values_lib.split_text(value, self.separator)
            else:
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
                self.num_zero += len(row_weights) - len(labels)
                weights.append([weight for weight in row_weights if weight])
            label_rows.append(labels)
        return label_rows, weights

    def _row(self, reference: Any, chunk: Chunk, row: int, column: str) -> int:
        """The row of a label."""
        if self.labels_are == ROWS:
            return self._numbered_row(reference, chunk, row, column)
        if isinstance(reference, str) and (label := self.row_of.get(reference)) is not None:
            return label
        name = values_lib.name(reference, chunk, row, column)
        if self._table is None:
            if not name:
                raise InputError(f"{chunk.where(row)}: empty label in {column!r}; expected a text")
            return self.row_of.setdefault(name, len(self.row_of))
        label = self.row_of.get(name)
        if label is None:
            label = self.row_of.get(values_lib.as_integer(name))
            self._num_as_integer += 1
        if label is None:
            examples = ", ".join(repr(known[:20]) for known in [*self.row_of][:_SHOWN])
            raise InputError(
                f"{chunk.where(row)}: label {name[:40]!r} in {column!r} is not among the "
                f"{self.labels_are} of the {self._table.count:,} labels in {self._table.path} "
                f"({examples}, ...); check --labels_are and --label_separator"
            )
        return label

    def _numbered_row(self, reference: Any, chunk: Chunk, row: int, column: str) -> int:
        """The row of a label that is given as a number."""
        number = reference
        if isinstance(number, str):
            digits = values_lib.as_integer(number)
            number = int(digits) if digits.isdecimal() and len(digits) < 19 else number
        elif isinstance(number, float | np.floating) and float(number).is_integer():
            number = int(number)
        is_row = isinstance(number, int) and not isinstance(number, bool)
        if not is_row or not 0 <= number < self._table.count:
            raise InputError(
                f"{chunk.where(row)}: label {str(reference)[:40]!r} in {column!r}, expected a "
                f"row of the label table, 0 to {self._table.count - 1}"
            )
        return number

    def describe(self, count: int) -> str:
        """A line on the number of labels and how queries refer to them."""
        separator = self._survey.describe(self.separator)
        if self._table is not None:
            return f"{count:,} labels in the label table, named by {self.labels_are}; {separator}"
        return f"{count:,} distinct labels of the queries; {separator}"

    def warnings(self) -> Iterator[str]:
        """Labels that may have been misunderstood."""
        yield from self._survey.warnings(self.separator)
        if self.num_zero:
            yield f"labels of weight 0, which are left out: {self.num_zero:,}"
        if self._num_as_integer:
            yield f"labels with decimals, such as 7.0, read as integers: {self._num_as_integer:,}"
        if self._table is None:
            yield from self._doubtful_names()

    def _doubtful_names(self) -> Iterator[str]:
        """Labels that look like missing values, and those that occur as `7` and as `7.0`."""
        missing = [name for name in self.row_of if name.lower() in _MISSING]
        if missing:
            yield (
                f"{', '.join(map(repr, missing))} among the labels looks like a missing value; "
                "leave such cells empty if they have no label"
            )
        both = [
            name for name in self.row_of
            if (short := values_lib.as_integer(name)) != name and short in self.row_of
        ]  # fmt: skip
        if both:
            shown = ", ".join(
                f"{values_lib.as_integer(name)!r} and {name!r}" for name in both[:_SHOWN]
            )
            yield (
                "labels that occur with and without decimals, and count as different: "
                f"{len(both):,} ({shown})"
            )
