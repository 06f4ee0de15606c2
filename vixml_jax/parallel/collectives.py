"""Communication volume of a compiled program, read from its HLO text."""

import math
import re
from typing import NamedTuple

import jax

from vixml_jax.parallel import hlo_text

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COLLECTIVE = re.compile(rf"\s({'|'.join(KINDS)})(-start)?\(")


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: One of `KINDS`.
      shapes: Shapes of the unsharded arrays: outputs of an all-gather, inputs of a reduce-scatter.
      size: Total size of these arrays in bytes.
      devices: Number of devices in one group.
      times: Number of executions per run of the program.
      op_name: Name of the traced JAX operation, as far as XLA preserves it.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    size: int
    devices: int
    times: int
    op_name: str

    @property
    def sent(self) -> float:
        """Bytes that each device sends per run of the program, with ring algorithms.

        That is (N - 1) / N of the array for all-gather, reduce-scatter and all-to-all, twice that
        for all-reduce (https://arxiv.org/abs/1802.05799), and the array itself for
        collective-permute.
        """
        factor = 2.0 if self.kind == "all-reduce" else 1.0
        if self.kind != "collective-permute":
            factor *= (self.devices - 1) / self.devices
        return factor * self.size * self.times


def collectives(program: jax.stages.Compiled) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text.

    Raises:
      ValueError: If a loop with collectives has an unknown number of iterations.
    """
    return read_collectives(program.as_text())


def read_collectives(text: str) -> list[Collective]:
    """As `collectives`, from the text of the optimised HLO.

    A loop with an unknown number of iterations counts as infinite, which is an error if it holds a
    collective.
    """
    bodies, entry = hlo_text.computations(text)
    times = hlo_text.executions(bodies, entry)
    found: list[Collective] = []
    index_of: dict[str, int] = {}  # Channel id -> index in `found`.
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if not match or not times[name]:
                continue
            if math.isinf(times[name]):
                raise ValueError(
                    f"the loop {name} has an unknown number of iterations, and holds the "
                    f"collective: {line.strip()[:200]}"
                )
            collective = _parse(line, match, int(times[name]))
            # On TPUs a collective that overlaps with other work is repeated in the text of every
            # fusion that it overlaps with, also in fusions within loops.
            channel = re.search(r"channel_id=(\d+)", line)
            if channel and ("fused" in name or "fusion" in name):
                if channel[1] in index_of:
                    index = index_of[channel[1]]
                    fewest = min(found[index].times, collective.times)
                    found[index] = found[index]._replace(times=fewest)
                    continue
                index_of[channel[1]] = len(found)
            found.append(collective)
    return found


def _parse(line: str, match: re.Match[str], times: int) -> Collective:
    kind, devices = match[1], _group_size(line)
    arrays = hlo_text.arrays(line[: match.start()].split(" = ", 1)[1])
    if match[2] and kind != "all-reduce":  # Yields operands, results, contexts.
        arrays = tuple(a for a in arrays if a.dtype not in ("u32", "s32") or a.shape)
        arrays = arrays[len(arrays) // 2 :]
    shapes = tuple(array.shape for array in arrays)
    size = sum(array.size for array in arrays)
    if kind == "reduce-scatter":
        size *= devices
    named = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, shapes, size, devices, times, named[1] if named else "")


def _group_size(line: str) -> int:
    """Number of devices in a group.

    XLA writes groups as {{0,1},{2,3}}, as [groups,devices]<=[all], as axes of a mesh such as
    mesh['x'=2,'y'=4] {'y'}, or as pairs.

    Raises:
      ValueError: If the groups are written in another way.
    """
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    if counted:
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        part = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])  # Or 'x':(offset)size.
        return math.prod(int(size) if size else sizes[name] for name, size in part)
    if "source_target_pairs" in line:
        return 2
    raise ValueError(f"unknown notation of replica groups: {line.strip()[:300]}")
