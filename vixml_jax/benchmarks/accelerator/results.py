"""Results of the parts on disk, JSON and a Markdown table, rewritten as each part ends."""

import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from vixml_jax.errors import InputError
from vixml_jax.storage import atomic, json_files

JSON, TABLE = "results.json", "results.md"
_REMEDY = "choose another --out, or delete it"


class Row(msgspec.Struct):
    """One measurement or check.

    Attributes:
      what: What was measured, with its unit.
      value: A number, or a text where it is none.
      wanted: What was expected, or the goal; empty for nothing.
      passed: Whether a check passed; None: it is a measurement only.
    """

    what: str
    value: float | str
    wanted: str = ""
    passed: bool | None = None


class Part(msgspec.Struct):
    """The result of a part.

    Attributes:
      state: "done" or "failed".
      seconds: It took.
      rows: In the order of measurement.
      error: Why it failed, in one line; empty if it did not.
      log: Name of the file with its output, beside the results.
    """

    state: Literal["done", "failed"]
    seconds: float
    rows: list[Row]
    error: str = ""
    log: str = ""


class Results(msgspec.Struct):
    """All that was measured so far.

    Attributes:
      about: What the results depend on: size, data, devices, versions.
      parts: By name.
    """

    about: dict[str, str]
    parts: dict[str, Part]


def at_most(what: str, value: float, limit: float) -> Row:
    """A check of a number that should be small; one that is not finite fails."""
    finite = math.isfinite(value)
    wanted = f"at most {limit:.2g}"
    return Row(
        what, float(value) if finite else str(value), wanted, bool(finite and value <= limit)
    )


def is_true(what: str, passed: bool) -> Row:
    """A check that holds or does not."""
    return Row(what, "yes" if passed else "no", "yes", bool(passed))


def open_results(directory: str, about: dict[str, str]) -> Results:
    """The results of earlier calls in a directory, or none.

    Raises:
      InputError: If they are those of other devices, versions or settings, or damaged.
    """
    path = os.path.join(directory, JSON)
    if not json_files.is_there(path):
        return Results(about, {})
    found = json_files.read(path, Results, _REMEDY)
    for name, value in about.items():
        if found.about.get(name) != value:
            raise InputError(
                f"{path}: holds results with {name} {found.about.get(name)!r}, not {value!r}; "
                f"{_REMEDY}"
            )
    return found


def write(directory: str, results: Results) -> None:
    """Writes both files, each atomically."""
    json_files.write(os.path.join(directory, JSON), msgspec.to_builtins(results))
    atomic.write_text(os.path.join(directory, TABLE), markdown(results))


def markdown(results: Results) -> str:
    """A line for each thing that results depend on, the table, and the errors."""
    lines = [f"- {name}: {value}" for name, value in results.about.items()]
    lines += ["", "| part | what | value | wanted | |", "|---|---|---:|---|---|"]
    for name, part in results.parts.items():
        lines += [_line(name, row) for row in part.rows]
        end = f"{name} | the part, seconds | {_number(part.seconds)} | | {part.state}"
        lines.append(f"| {end} |")
    errors = [
        f"- {name} failed: {_cell(part.error)} (see {part.log})"
        for name, part in results.parts.items()
        if part.state == "failed"
    ]
    return "\n".join([*lines, *([""] if errors else []), *errors, ""])


def _line(part: str, row: Row) -> str:
    verdict = {None: "", True: "ok", False: "FAILED"}[row.passed]
    cells = part, row.what, _number(row.value), row.wanted, verdict
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _number(value: float | str) -> str:
    """A number with four digits, or with all of them before the point."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def failed_checks(rows: Sequence[Row]) -> str:
    """The checks that failed, in one line; empty if none did."""
    failed = [f"{row.what}: {_number(row.value)} ({row.wanted})" for row in rows if _fails(row)]
    return "; ".join(failed)


def _fails(row: Row) -> Any:
    return row.passed is False
