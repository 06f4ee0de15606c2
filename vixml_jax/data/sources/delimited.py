"""Rows of csv and tsv files: their dialect, and what of a file is not a row of its own."""

import collections
import contextlib
import csv
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from vixml_jax.errors import InputError
from vixml_jax.storage import text_files

MAX_COLUMNS = 1 << 14
NO_QUOTES = "none"  # Value of --quotechar: quotes are characters like others.
_DELIMITERS = {"csv": ",", "tsv": "\t"}
_QUOTES = {"csv": '"', "tsv": NO_QUOTES}
_CANDIDATES = (",", ";", "\t", "|")
_COMPARED = 100  # First lines that decide between delimiters of which the header has several.
_SHOWN = 3  # Places in a warning.
_MAX_ROW = 4 * text_files.MAX_LINE  # Characters of a row over several lines.
# Excel's hint of the delimiter, in a line before the header.
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?\n?', re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialect:
    """How text becomes cells.

    Attributes:
      encoding: Text encoding of csv, tsv and jsonl; a byte order mark takes precedence.
      delimiter: Character between the fields of csv and tsv; empty: a comma or a tab, by the name
        of the file, or another usual one if the header has only that.
      quotechar: Character around fields; empty: '"' in csv and none in tsv; 'none': none.
    """

    encoding: str = "utf-8"
    delimiter: str = ""
    quotechar: str = ""

    def __post_init__(self) -> None:
        text_files.check_encoding(self.encoding)
        object.__setattr__(self, "delimiter", self.delimiter.replace("\\t", "\t"))
        if len(self.delimiter) > 1 or self.delimiter in ("\n", "\r", '"'):
            raise InputError(
                f"--delimiter={self.delimiter}: expected one character, such as ';' (\\t is a tab)"
            )
        is_char = len(self.quotechar) == 1 and self.quotechar not in ("\n", "\r", self.delimiter)
        if self.quotechar not in ("", NO_QUOTES) and not is_char:
            raise InputError(
                f"--quotechar={self.quotechar}: expected one character other than the delimiter, "
                "or none"
            )

    def describe(self) -> str:
        """The settings that are not the usual ones, after the encoding."""
        given = {"delimiter": self.delimiter, "quotechar": self.quotechar}
        parts = [f"{name} {value!r}" for name, value in given.items() if value]
        return ", ".join([f"encoding {self.encoding}", *parts])


USUAL = Dialect()


class _Lines:
    """Iterator over the texts of lines, which can take lines back and be continued.

    Attributes:
      record: Number and text of each line since the record was cleared.
      error: The error of the last line that could not be decoded, which is given as a blank line.
      length: Characters of the record.
    """

    def __init__(self, lines: Iterator[tuple[int, str | InputError]]):
        self._lines, self._again = lines, collections.deque[tuple[int, str | InputError]]()
        self.record: list[tuple[int, str | InputError]] = []
        self.error: InputError | None = None
        self.length = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        # Not a line of one field, whose length is bounded: of ever more of them.
        if self.length > _MAX_ROW:
            raise csv.Error(f"the row is longer than {_MAX_ROW >> 20} MiB")
        line = self._again.popleft() if self._again else next(self._lines)
        self.record.append(line)
        self.length += len(line[1]) if isinstance(line[1], str) else 0
        if isinstance(line[1], InputError):
            self.error = line[1]
            return "\n"
        return line[1]

    @property
    def first(self) -> int:
        """Number of the first line of the record."""
        return self.record[0][0] if self.record else 1

    @property
    def last(self) -> int:
        """Number of the last line of the record."""
        return self.record[-1][0] if self.record else 1

    def take_back(self, first: int) -> None:
        """Gives the lines of the record again, from `record[first]` on."""
        self._again.extendleft(reversed(self.record[first:]))
        del self.record[first:]
        self.length = sum(len(text) for _, text in self.record if isinstance(text, str))

    def clear(self) -> None:
        """Begins a new record."""
        self.record.clear()
        self.error, self.length = None, 0


class DelimitedRows:
    """Iterator over the rows of a csv or tsv file and the lines where they begin.

    A row with a wrong number of fields, wrong quotes or a bad line yields an InputError instead,
    and reading continues in the line after the one where the row begins.

    Attributes:
      header: The column names.
      delimiter: The delimiter of the file, explicit or found in the header.
    """

    def __init__(self, path: str, kind: str, dialect: Dialect, warn: Callable[[str], None]):
        """Opens a file and reads its header.

        Args:
          path: The file.
          kind: 'csv' or 'tsv'.
          dialect: The dialect.
          warn: Is called with a sentence on lines that may have been misunderstood.

        Raises:
          InputError: If the header cannot be read or has a name twice.
        """
        csv.field_size_limit(text_files.MAX_LINE)
        self._path, self._kind, self._dialect, self._warn = path, kind, dialect, warn
        self._lines = _Lines(text_files.lines(path, dialect.encoding))
        self._quote = dialect.quotechar or _QUOTES[kind]
        self.delimiter = self._find_delimiter(_DELIMITERS[kind])
        self._rows = self._parser(self._lines, self.delimiter)
        header = self._next()
        if isinstance(header, InputError):
            raise header
        where = f"{path}, line {self._lines.first}"
        if not header or not any(header):
            raise InputError(f"{where}: no column names; expected a header line")
        check_names(where, header)
        self.header = header

    def _parser(self, lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
        """The rows of lines; raises a `csv.Error` for wrong quotes."""
        if self._quote == NO_QUOTES:
            return (_split(line, delimiter) for line in lines)
        return csv.reader(lines, delimiter=delimiter, quotechar=self._quote, strict=True)

    def _find_delimiter(self, usual: str) -> str:
        """The delimiter of the flag or of the first lines, which are read again afterwards."""
        first: list[str] = []
        while len(first) < _COMPARED and self._lines.length <= _MAX_ROW:
            line = next(self._lines, None)
            if line is None:
                break
            first.append(line)
        hint = _SEPARATOR_LINE.fullmatch(first[0]) if first else None
        self._lines.take_back(0 if hint is None else 1)
        if self._dialect.delimiter or hint is not None:
            return self._dialect.delimiter or hint[1]

        def widths(delimiter: str) -> list[int]:
            """Number of fields of each row up to the first that cannot be parsed."""
            found = []
            with contextlib.suppress(csv.Error):
                found.extend(len(row) for row in self._parser(iter(first), delimiter) if row)
            return found

        candidates = dict.fromkeys((usual, *_CANDIDATES))
        wide = [mark for mark in candidates if widths(mark)[:1] > [1]]
        even = [mark for mark in wide if len(set(widths(mark))) == 1]
        return next(iter(even or wide), usual)

    def describe_unusual(self) -> list[str]:
        """Delimiter and quotes, if they are not those of files of this name."""
        parts = []
        if self.delimiter != _DELIMITERS[self._kind]:
            parts.append(f"delimiter {self.delimiter!r}")
        if self._quote != _QUOTES[self._kind]:
            parts.append(f"quotechar {self._quote!r}")
        return parts

    def _next(self) -> list[str] | InputError | None:
        """The next row or its error; None at the end."""
        self._lines.clear()
        try:
            row = next(self._rows, None)
        except csv.Error as error:
            row = self._quote_error(error)
        return self._lines.error or row

    def _quote_error(self, error: csv.Error) -> InputError:
        """The error of a row whose quotes are wrong."""
        first, last = self._lines.first, self._lines.last
        if "unexpected end" in str(error):
            fault = "a quote is opened that is not closed before the end of the file"
        else:
            fault = f"not {self.delimiter!r}-separated text ({error})"
            fault += f" in line {last}" if last > first else ""
        return InputError(
            f"{self._path}, line {first}: {fault}; check the quotes (a quote inside a field is "
            f"doubled), or pass --quotechar={NO_QUOTES}"
        )

    def __iter__(self) -> Iterator[tuple[int, list[str] | InputError]]:
        told = _Suspicious()
        while (row := self._next()) is not None:
            lines = self._lines
            if not isinstance(row, InputError) and row and len(row) != len(self.header):
                row = self._width_error(len(row))
            if isinstance(row, InputError):
                if lines.error is None:
                    lines.take_back(1)
            elif self._quote == NO_QUOTES:
                told.add_quoted(lines.first, row, self._dialect.quotechar)
            elif len(lines.record) > 1:
                told.add_joined(lines.record, self.delimiter, len(self.header))
            if row or isinstance(row, InputError):  # Blank lines are skipped.
                yield lines.first, row
        for warning in told.warnings(self._path):
            self._warn(warning)

    def _width_error(self, width: int) -> InputError:
        """The error of a row with a wrong number of fields."""
        remedy = ""
        if self._quote == NO_QUOTES and '"' in str(self._lines.record[0][1]):
            remedy = "; if quotes enclose fields, pass --quotechar='\"'"
        elif len(self.header) == 1:
            remedy = "; if another character separates the fields, pass --delimiter"
        return InputError(
            f"{self._path}, line {self._lines.first}: {width} fields, expected {len(self.header)} "
            f"as in the header{remedy}"
        )


class _Suspicious:
    """Rows that may not be what the writer of the file meant."""

    def __init__(self) -> None:
        self._joined: list[tuple[int, int]] = []  # First and last line of some rows.
        self._num_joined_lines = self._num_joined_rows = 0
        self._num_quoted = self._first_quoted = 0

    def add_joined(
        self, record: list[tuple[int, str | InputError]], delimiter: str, width: int
    ) -> None:
        """Notes a row over several lines, if one of them has the delimiters of a row."""
        alike = sum(str(text).count(delimiter) == width - 1 for _, text in record[1:])
        if alike:
            self._num_joined_lines += alike
            self._num_joined_rows += 1
            if len(self._joined) < _SHOWN:
                self._joined.append((record[0][0], record[-1][0]))

    def add_quoted(self, line: int, row: list[str], quotechar: str) -> None:
        """Notes fields in quotes, unless the flag says that these are characters."""
        if quotechar:
            return
        for cell in row:
            if len(cell) > 1 and cell[0] == cell[-1] == '"':
                self._first_quoted = self._first_quoted or line
                self._num_quoted += 1

    def warnings(self, path: str) -> Iterator[str]:
        """A sentence on each kind."""
        if self._joined:
            places = ", ".join(f"lines {first} to {last}" for first, last in self._joined)
            places += ", ..." if self._num_joined_rows > len(self._joined) else ""
            yield (
                f"{path}: {self._num_joined_lines:,} lines that look like rows are within quotes, "
                f"and belong to rows that begin before ({places}); if a quote is missing there, "
                f"correct it, or pass --quotechar={NO_QUOTES}"
            )
        if self._num_quoted:
            yield (
                f"{path}: {self._num_quoted:,} fields are in quotes (first in line "
                f"{self._first_quoted}), which were read as characters; if they enclose fields, "
                "pass --quotechar='\"'"
            )


def check_names(where: str, names: Sequence[str]) -> None:
    """Raises an error if two columns have the same name, or there are too many."""
    if len(names) > MAX_COLUMNS:
        raise InputError(
            f"{where}: {len(names):,} columns; expected at most {MAX_COLUMNS:,}: remove those that "
            "are not used, or write several as a list"
        )
    if len(set(names)) < len(names):
        counts = collections.Counter(names)
        name = next(name for name in names if counts[name] > 1)
        what = f"column {name!r} occurs twice" if name else "several columns have no name"
        raise InputError(f"{where}: {what}; expected unique names")


def _split(line: str, delimiter: str) -> list[str]:
    """The fields of a line without quotes; none of blank lines."""
    text = line.removesuffix("\n").removesuffix("\r")
    return text.split(delimiter) if text.strip("\r\n") else []
