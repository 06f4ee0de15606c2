"""The cheapest setting of an index that finds what is asked for, from measurements on queries."""

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Measurement(NamedTuple):
    """What one setting of a tree finds, and how fast."""

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
    """Measurements along the border between settings that find too little and those that suffice.

    Recall grows with either number, so the border is walked as a staircase: from the fewest leaves
    and the most candidates, more leaves where the recall is short, else fewer candidates. For each
    number of candidates that can suffice it meets the fewest leaves that do, in
    `len(leaves) + len(reordered)` measurements at most.

    Args:
      measure: (leaves searched, reordered) -> what is found.
      leaves: To choose from, ascending.
      reordered: To choose from, ascending.
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
    """The cheapest measurement of the recall wanted; where none is, the one that finds most.

    Settings are compared by a model of their cost, not by their times: on a machine that is busy
    the choice stays the same.

    Args:
      found: From `frontier`.
      wanted: Recall, in (0, 1].
      cost: (leaves searched, reordered) -> cost, in any unit.
    """

    def price(one: Measurement) -> tuple[float, int, int]:
        return cost(one.leaves_searched, one.reordered), one.leaves_searched, one.reordered

    enough = [one for one in found if one.recall >= wanted]
    if enough:
        return min(enough, key=price)
    most = max(one.recall for one in found)
    return min((one for one in found if one.recall == most), key=price)


def undominated(
    found: Sequence[Measurement], cost: Callable[[int, int], float]
) -> list[Measurement]:
    """Those that find more than all that are cheaper, by the model of cost; the cheapest first."""
    best: list[Measurement] = []
    for one in sorted(
        found, key=lambda one: (cost(one.leaves_searched, one.reordered), -one.recall)
    ):
        if not best or one.recall > best[-1].recall:
            best.append(one)
    return best


def steps(least: int, most: int, per_doubling: int = 2) -> list[int]:
    """Whole numbers from `least` to `most`, both among them, evenly by their logarithms."""
    found, at = [], 0
    while (value := round(least * 2 ** (at / per_doubling))) < most:
        found.append(value)
        at += 1
    return sorted({*found, most})


def table(found: Sequence[Measurement], chosen: Measurement, k: int) -> str:
    """The measurements, one a line; the chosen one is marked."""
    lines = [f"  {'leaves':>8} {'reordered':>10} {f'recall@{k}':>12} {'queries/s':>10}"]
    for one in found:
        lines.append(
            f"{'>' if one == chosen else ' '} {one.leaves_searched:8,} {one.reordered:10,} "
            f"{one.recall:12.4f} {one.queries_per_s:10,.0f}"
        )
    return "\n".join(lines)
