"""Communication volume of a compiled program, read from its HLO text."""

import math
import re
from typing import NamedTuple

import jax

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
          "u32": 4, "f64": 8, "s64": 8, "u64": 8}  # fmt: skip
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_COLLECTIVE = re.compile(rf"\s({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


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
    bodies, entry = _computations(text)
    times: dict[str, float] = dict.fromkeys(bodies, 0)
    times[entry] = 1
    # Callees come before their callers in the text.
    for name in reversed(bodies):
        for line in bodies[name]:
            iterations = 1.0
            if " while(" in line:
                iterations = _iterations(line, bodies)
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [part.strip().lstrip("%") for part in branches.split(",")]
            for callee in called:
                if callee in times and times[name]:
                    times[callee] += times[name] * iterations
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


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Instructions of each computation by its name, and the name of the entry computation."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith(" "):
            match = _COMPUTATION.match(line)
            current = match[1] if match else None
            if current:
                bodies[current] = []
                if line.startswith("ENTRY"):
                    entry = current
        elif current and _INSTRUCTION.match(line):
            bodies[current].append(line)
    return bodies, entry


def _iterations(line: str, bodies: dict[str, list[str]]) -> float:
    """Number of iterations of a loop; infinity if it is not in the text.

    XLA for TPUs does not annotate it. There it follows from the condition, which compares a counter
    with a constant: the counter starts at zero in all loops that JAX and XLA generate. Loops that
    XLA generates to split a matrix product may count in larger steps than one.
    """
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition, body = (
        bodies.get(re.search(rf"{part}=%?([\w.\-]+)", line)[1], [])
        for part in ("condition", "body")
    )
    values, counts = _scalars(condition), _scalars(body)
    for instruction in condition:
        below = re.search(
            r"ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", instruction
        )
        if below and below[2] in values:
            index = next(
                int(counter[1])
                for other in condition
                if (counter := re.search(rf"%?{re.escape(below[1])} = .*index=(\d+)", other))
            )
            step = 1
            root = next(other for other in reversed(body) if other.lstrip().startswith("ROOT"))
            names = re.findall(r"%?([\w.\-]+)", re.search(r" tuple\((.*?)\)", root)[1])
            for other in body:
                if re.match(rf"\s+%?{re.escape(names[index])} = .* add\(", other):
                    added = re.findall(r"%?([\w.\-]+)", re.search(r" add\((.*?)\)", other)[1])
                    step = next((counts[name] for name in added if name in counts), 1)
            return -(-values[below[2]] // step)
    return math.inf


def _scalars(lines: list[str]) -> dict[str, int]:
    """Integer constants of a computation by name."""
    pattern = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
    return {match[1]: int(match[2]) for line in lines if (match := pattern.search(line))}


def _parse(line: str, match: re.Match[str], times: int) -> Collective:
    kind, devices = match[1], _group_size(line)
    arrays = _ARRAY.findall(line[: match.start()].split(" = ", 1)[1])
    if match[2] and kind != "all-reduce":  # Yields operands, results, contexts.
        arrays = [a for a in arrays if a[0] not in ("u32", "s32") or a[1]]
        arrays = arrays[len(arrays) // 2 :]
    shapes = tuple(tuple(int(n) for n in dims.split(",") if n) for _, dims in arrays)
    size = sum(
        _BYTES[dtype] * math.prod(shape) for (dtype, _), shape in zip(arrays, shapes, strict=True)
    )
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
