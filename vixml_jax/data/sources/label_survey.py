"""What the labels of all rows look like, from which it is inferred how queries refer to labels."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vixml_jax.data.sources import list_text, values
from vixml_jax.data.sources.columns import IDS, TEXTS
from vixml_jax.data.sources.readers import Chunk
from vixml_jax.errors import InputError

_SEPARATORS = ("|", ";", "\t", ",")  # In order of preference.
_KNOWN, _ALL = "known", "all"  # Counts of the names in a cell, beside those of each naming.
_MAX_CELLS = 1 << 20  # Distinct cells that are kept, to compare separators by.
# A comma in fewer of the cells than this belongs to the labels, unless its parts are labels of
# other cells as well.
_RARE_COMMA = 0.05
# The preferred separator must be in at least this fraction of the cells that have another one.
_FEW = 0.1


class LabelSurvey:
    """Counts over all cells of the labels columns, of any number of tables.

    Args:
      known: Row of each label by its name, for each naming ('ids', 'texts'); empty without a label
        table.
      given: The explicit separator, '' for none; cells that are texts are then no lists. None: the
        separator is inferred.
    """

    def __init__(self, known: Mapping[str, Mapping[str, int]], given: str | None = None):
        self._known, self._given = known, given
        self._marks = tuple(dict.fromkeys((*_SEPARATORS, " ", *([given] if given else []))))
        self._num_lists = self._num_texts = self._num_list_texts = 0
        self._bracket: tuple[str, str] | None = None  # Place and text of a cell that is no list.
        self._list_place = ""  # Place and text of a cell that is a list written as text.
        self._marked: Counter[str] = Counter()  # Number of texts that have each mark.
        self._cells: set[str] = set()  # Distinct texts.
        # How many names there are, and how many are known, by separator (None: in lists).
        self._names: Counter[tuple[str | None, str]] = Counter()

    def add(self, chunk: Chunk, column: str) -> None:
        """Counts the cells of a chunk."""
        for row, value in enumerate(chunk.columns[column]):
            if isinstance(value, str):
                if value.strip():
                    self._add_text(value.strip(), chunk, row)
            elif value is not None:
                items = values.list_items(value, "", chunk, row, column)
                self._num_lists += bool(items)
                self._add_names(None, map(_as_text, items))

    def _add_text(self, text: str, chunk: Chunk, row: int) -> None:
        try:
            items = list_text.parse(text)
        except list_text.ShortenedError:
            items = []  # Refused with its line when the labels are read.
        if items is not None:
            self._num_list_texts += 1
            self._list_place = self._list_place or f"{chunk.where(row)}: {text[:40]!r}"
            if self._given is None:
                self._add_names(None, map(_as_text, items))
                return
        elif self._bracket is None and list_text.looks_like_list(text):
            self._bracket = chunk.where(row), text
        self._num_texts += 1
        marks = [mark for mark in self._marks if mark in _without_entities(text, mark)]
        self._marked.update(marks)
        if self._known:
            for mark in ("", *self._marks):
                parts = values.split_text(text, mark) if mark in marks else [text]
                self._add_names(mark, parts)
        elif len(self._cells) < _MAX_CELLS:
            self._cells.add(text)

    def _add_names(self, mark: str | None, names: Iterable[str]) -> None:
        """Counts the names of a cell that are known, if it is split at a mark."""
        for name in names:
            self._names[mark, _ALL] += 1
            short = values.as_integer(name)
            found = [
                naming for naming, known in self._known.items() if name in known or short in known
            ]
            for key in [*found, _KNOWN] if found else []:
                self._names[mark, key] += 1

    def separator(self) -> str:
        """The separator of several labels in a text; '' if there is none.

        With a label table, it is the separator that yields the most known labels. Without one, it
        is the first of `_SEPARATORS` whose parts are labels of other cells too, if the cells tell.

        Raises:
          InputError: If two separators are as likely, or a bracket seems to be part of a label.
        """
        if self._bracket is not None:
            place, text = self._bracket
            raise InputError(
                f"{place}: the labels {text[:40]!r} are in brackets, but are not a list of JSON, "
                "Python or numpy; if brackets belong to labels, pass --label_separator=none, or "
                "the separator"
            )
        if self._known:

            def known_minus_unknown(mark: str) -> int:
                return 2 * self._names[mark, _KNOWN] - self._names[mark, _ALL]

            return max(("", *_SEPARATORS, " "), key=known_minus_unknown) if self._num_texts else ""
        shared = {mark: self._fraction_shared(mark) for mark in _SEPARATORS if self._marked[mark]}
        if not shared.get(",", 1) and self._marked[","] < _RARE_COMMA * self._num_texts:
            del shared[","]
        enough = max(shared.values(), default=0) / 2
        marks = [mark for mark in shared if shared[mark] >= enough]
        most = max(marks, key=self._marked.__getitem__, default="")
        if marks and self._marked[marks[0]] < _FEW * self._marked[most]:
            raise InputError(
                f"{self._marked[most]:,} rows have {most!r} in their labels and "
                f"{self._marked[marks[0]]:,} have {marks[0]!r}; pass the one that separates "
                f"labels: --label_separator='{most}' or --label_separator='{marks[0]}'"
            )
        return marks[0] if marks else ""

    def _fraction_shared(self, mark: str) -> float:
        """The fraction of the parts of texts with a separator that other texts have as well."""
        parts = [set(values.split_text(text, mark)) for text in self._cells]
        texts_with = Counter(part for text_parts in parts for part in text_parts)
        divided = [part for text_parts in parts if len(text_parts) > 1 for part in text_parts]
        return sum(texts_with[part] > 1 for part in divided) / max(1, len(divided))

    def naming(self, separator: str) -> str:
        """Whether labels are named by 'ids' or 'texts' of the label table; by ids if equal."""
        counts = {
            naming: self._names[separator, naming] + self._names[None, naming]
            for naming in (IDS, TEXTS)
        }
        return TEXTS if counts[TEXTS] > counts[IDS] else IDS

    def describe(self, separator: str) -> str:
        """The separator, and how many rows have it."""
        if not separator:
            return "no separator (lists, or one label per query)"
        rows = f"in {self._marked[separator]:,} of {_rows(self._num_texts)}"
        lists = self._num_lists + (self._num_list_texts if self._given is None else 0)
        return f"separated by {separator!r} ({rows}{f', {lists:,} more have lists' * bool(lists)})"

    def warnings(self, separator: str) -> Iterator[str]:
        """Cells that may have been misunderstood."""
        others = [mark for mark in _SEPARATORS if mark != separator and self._marked[mark]]
        if others and self._given is None and not self._known:
            counts = " and ".join(f"{mark!r} in {_rows(self._marked[mark])}" for mark in others)
            yield (
                f"labels have {counts}, which stay part of the labels; pass --label_separator if "
                "they separate them"
            )
        if self._given and self._num_texts and not self._marked[self._given]:
            yield f"--label_separator={self._given}: no row has it"
        if self._given is not None and self._num_list_texts:
            yield (
                f"{_rows(self._num_list_texts)} with labels that look like lists, but were read as "
                f"text because --label_separator is given (first {self._list_place})"
            )


def _rows(count: int) -> str:
    return f"{count:,} {'row' if count == 1 else 'rows'}"


def _as_text(value: Any) -> str:
    """An item of a list as it is named, as far as it matters for looking it up."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def _without_entities(text: str, mark: str) -> str:
    """The text without HTML entities, whose semicolons do not separate."""
    return values.ENTITY.sub("", text) if mark == ";" and "&" in text else text
