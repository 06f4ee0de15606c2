"""How queries refer to labels in own tables: by id, text or row, told or guessed."""

from collections.abc import Sequence
from typing import Any, Protocol

from vixml_jax.data.sources import values as values_lib
from vixml_jax.data.sources.columns import AUTO, IDS, ROWS, TEXTS, Roles
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.errors import InputError

_SEPARATORS = ("|", ";", "\t", ",")


class LabelTable(Protocol):
    """A table of labels."""

    count: int
    path: str

    def known(self, are: str) -> dict[str, int]:
        """Rows by id or by text."""
        ...


class LabelBook:
    """Labels of a table, or those met so far, and how queries refer to them."""

    def __init__(self, are: str, separator: str):
        if are not in (AUTO, IDS, TEXTS, ROWS):
            raise InputError(f"--labels_are={are}: expected one of auto, ids, texts, rows")
        self.are = are
        self.separator = separator.replace("\\t", "\t")
        self.row_of: dict[str, int] = {}
        self._part: LabelTable | None = None
        self._guessed = bool(separator)

    def know(self, part: LabelTable) -> None:
        """Takes the labels of a table."""
        self._part = part

    def resolve(
        self, chunk: Chunk, roles: Roles
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Rows of the labels of each query, and their weights; labels of weight 0 are left out."""
        values, column = chunk.columns[roles.labels], roles.labels
        if self.are == AUTO and self._part is not None and column == "target_ind":
            self.are = ROWS  # As the XML repository has it.
        if not self._guessed:
            self._guess_separator(values)
        if self.are == AUTO or (self._part is not None and not self.row_of):
            self._guess_kind(chunk, roles.labels)
        found, weights = [], None if roles.weights is None else []
        for row, value in enumerate(values):
            refs = values_lib.pieces(value, self.separator, chunk, row, column)
            at = [self._row(ref, chunk, row, column) for ref in refs]
            if weights is not None:
                counts = values_lib.numbers(chunk, row, roles.weights, self.separator)
                if len(counts) != len(at):
                    raise InputError(
                        f"{chunk.where(row)}: {len(counts)} values in {roles.weights!r} for "
                        f"{len(at)} labels; expected as many"
                    )
                at = [one for one, count in zip(at, counts, strict=True) if count]
                weights.append([count for count in counts if count])
            found.append(at)
        return found, weights

    def _row(self, ref: Any, chunk: Chunk, row: int, column: str) -> int:
        if self.are == ROWS:
            if isinstance(ref, str) and ref.isdigit() and len(ref) < 19:
                ref = int(ref)
            if not isinstance(ref, int) or isinstance(ref, bool) or not 0 <= ref < self._part.count:
                raise InputError(
                    f"{chunk.where(row)}: label {str(ref)[:40]!r} in {column!r}, expected a row "
                    f"of the label table, 0 to {self._part.count - 1}"
                )
            return ref
        name = ref if isinstance(ref, str) else values_lib.text(ref, chunk, row, column)
        if self._part is None:
            if not name:
                raise InputError(f"{chunk.where(row)}: an empty label in {column!r}")
            values_lib.text(name, chunk, row, column)  # That it can be written.
            return self.row_of.setdefault(name, len(self.row_of))
        at = self.row_of.get(name)
        if at is None:
            raise InputError(
                f"{chunk.where(row)}: label {name[:40]!r} in {column!r} is not among the "
                f"{self.are} of the {self._part.count:,} labels in {self._part.path}; expected one "
                "(--labels_are, --label_separator say how it is read)"
            )
        return at

    def _guess_separator(self, values: Sequence[Any]) -> None:
        """What stands between labels: what makes known labels of all, or what occurs at all."""
        said = [value for value in values if isinstance(value, str) and value]
        said = [value for value in said if not value.lstrip().startswith("[")][:1000]
        if not said:
            return  # Lists so far.
        self._guessed = True
        if self._part is None:
            self.separator = next(
                (sign for sign in _SEPARATORS if any(sign in value for value in said)), ""
            )
            return
        known = set().union(
            *(self._part.known(are) for are in ((IDS, TEXTS) if self.are == AUTO else (self.are,)))
        )

        def known_less_unknown(sign: str) -> int:
            parts = (part for value in said for part in (value.split(sign) if sign else [value]))
            return sum(1 if part.strip() in known else -1 for part in parts if part.strip())

        self.separator = max(("", *_SEPARATORS, " "), key=known_less_unknown)

    def _guess_kind(self, chunk: Chunk, column: str) -> None:
        """Whether labels are named by id, text or row of the label table."""
        if self._part is None:
            self.are = TEXTS
            return
        if self.are == AUTO:
            refs = [
                ref if isinstance(ref, str) else str(ref)
                for row, value in enumerate(chunk.columns[column])
                for ref in values_lib.pieces(value, self.separator, chunk, row, column)
            ]
            if not refs:
                return  # None so far.
            by_id, by_text = (
                sum(ref in known for ref in refs)
                for known in (self._part.known(IDS), self._part.known(TEXTS))
            )
            self.are = TEXTS if by_text > by_id else IDS
        if self.are != ROWS:
            self.row_of = self._part.known(self.are)
