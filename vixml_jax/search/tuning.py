"""Finds the cheapest search settings that reach a recall, from measurements on sample queries."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Measurement(NamedTuple):
    """Recall and speed of one setting of a tree index."""

    leaves_searched: int
    reordered: int  # Candidates scored exactly.
    recall: float
    queries_per_s: float


def frontier(
    measure: Callable[[int, int], Measurement],
    leaves: Sequence[int],
    reordered: Sequence[int],
    wanted: float,
) -> list[Measurement]:
    """Measures settings along the boundary between too little recall and enough.

    Recall grows with either number, so the boundary is walked as a staircase: from the fewest
    leaves and the most candidates, more leaves where the recall is too low, else fewer candidates.
    For each number of candidates that can suffice, the walk meets the fewest leaves that do, in at
    most `len(leaves) + len(reordered)` measurements.

    Args:
      measure: (leaves searched, reordered) -> measurement.
      leaves: Choices, ascending.
      reordered: Choices, ascending.
      wanted: Recall, in (0, 1].
    """
    found = []
    few, many = 0, len(reordered) - 1
    while few < len(leaves) and many >= 0:
        found.append(measure(leaves[few], reordered[many]))
        if found[-1].recall >= wanted:
            many -= 1
        else:
            few += 1
    return found


def choose(
    found: Sequence[Measurement], wanted: float, cost: Callable[[int, int], float]
) -> Measurement:
    """Returns the cheapest measurement with the wanted recall, else the one with the most recall.

    Settings are compared by a cost model instead of measured times, so that the choice is the same
    on a busy machine.

    Args:
      found: From `frontier`.
      wanted: Recall, in (0, 1].
      cost: (leaves searched, reordered) -> cost, in any unit.
    """

    def price(setting: Measurement) -> tuple[float, int, int]:
        leaves_searched, reordered = setting.leaves_searched, setting.reordered
        return cost(leaves_searched, reordered), leaves_searched, reordered

    sufficient = [setting for setting in found if setting.recall >= wanted]
    if sufficient:
        return min(sufficient, key=price)
    most = max(setting.recall for setting in found)
    return min((setting for setting in found if setting.recall == most), key=price)


def undominated(
    found: Sequence[Measurement], cost: Callable[[int, int], float]
) -> list[Measurement]:
    """Returns the settings with more recall than every cheaper one, cheapest first."""

    def price(setting: Measurement) -> tuple[float, float]:
        return cost(setting.leaves_searched, setting.reordered), -setting.recall

    best: list[Measurement] = []
    for setting in sorted(found, key=price):
        if not best or setting.recall > best[-1].recall:
            best.append(setting)
    return best


def steps(least: int, most: int, per_doubling: int = 2) -> list[int]:
    """Returns integers from `least` to `most`, both included, evenly spaced in their logarithm."""
    found, at = [], 0
    while (value := round(least * 2 ** (at / per_doubling))) < most:
        found.append(value)
        at += 1
    return sorted({*found, most})


def table(found: Sequence[Measurement], chosen: Measurement, k: int) -> str:
    """Formats measurements as a table, one per line; the chosen one is marked with '>'."""
    lines = [f"  {'leaves':>8} {'reordered':>10} {f'recall@{k}':>12} {'queries/s':>10}"]
    for setting in found:
        lines.append(
            f"{'>' if setting == chosen else ' '} {setting.leaves_searched:8,} "
            f"{setting.reordered:10,} {setting.recall:12.4f} {setting.queries_per_s:10,.0f}"
        )
    return "\n".join(lines)
