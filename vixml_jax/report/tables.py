"""What an evaluation shows and keeps: a table for the screen and a json file."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from vixml_jax.storage import atomic

COLUMNS = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@3", "PSP@5", "R@10", "R@100", "MRR")


def format_table(rows: Mapping[str, Mapping[str, float]], columns: Sequence[str] = COLUMNS) -> str:
    """An aligned table of percent values, one line a row; a dash where a row lacks a column.

    Args:
      rows: Metrics by the name of the row, in the order shown.
      columns: Metrics shown, in this order; those that no row has are left out.
    """
    columns = [column for column in columns if any(column in row for row in rows.values())]
    cells = [["", *columns]]
    for name, row in rows.items():
        cells.append([name, *(f"{row[c]:.2f}" if c in row else "-" for c in columns)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_json(path: str | os.PathLike, results: Mapping[str, Any]) -> None:
    """Writes results, under a temporary name that is then renamed; makes the directories above.

    Raises:
      ValueError: If a value is not finite: json has no word for it.
      TypeError: If a value is not json's. Either way what lay at `path` stays.
    """
    text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    atomic.write_text(path, text + "\n")
