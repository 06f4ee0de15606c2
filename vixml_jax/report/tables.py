"""Results of an evaluation as a text table."""

from collections.abc import Mapping, Sequence

COLUMNS = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@3", "PSP@5", "R@10", "R@100", "MRR")


def format_table(rows: Mapping[str, Mapping[str, float]], columns: Sequence[str] = COLUMNS) -> str:
    """Returns an aligned table of percentages, one line per row; "-" where a metric is missing.

    Args:
      rows: Metrics by name of the row, in display order.
      columns: Metrics to show, in this order; those that no row has are left out.
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
