"""What travels between devices in a compiled program, read from its text."""

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
    """One instruction by which devices exchange arrays.

    Attributes:
      kind: One of `KINDS`.
      shapes: Of the whole arrays: those that an all-gather makes, that a reduce-scatter takes.
      size: Bytes of these.
      devices: That take part in one group.
      times: How often a step runs it.
      of: Where it comes from: what XLA keeps of the traced names.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    size: int
    devices: int
    times: int
    of: str

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step, around a ring.

        (N - 1) / N of the array where it is gathered, scattered or dealt out, twice that where it
        is summed for all (https://arxiv.org/abs/1802.05799), all of it where it is passed on.
        """
        share = {"all-reduce": 2.0, "collective-permute": 1.0}.get(self.kind, 1.0)
        if self.kind != "collective-permute":
            share *= (self.devices - 1) / self.devices
        return share * self.size * self.times


def collectives(program: jax.stages.Compiled) -> list[Collective]:
    """The collectives of a compiled program, in the order of its text.

    Raises:
      ValueError: If a loop that holds one does not say how often it runs.
    """
    return read_collectives(program.as_text())


def read_collectives(text: str) -> list[Collective]:
    """As `collectives`, from the text of the optimised HLO.

    A loop without a known number of rounds counts as infinite, and is refused where it holds a
    collective.
    """
    bodies, entry = _computations(text)
    times: dict[str, float] = dict.fromkeys(bodies, 0)
    times[entry] = 1
    # Callees stand before their callers.
    for name in reversed(bodies):
        for line in bodies[name]:
            rounds = 1.0
            if " while(" in line:
                rounds = _rounds(line, bodies)
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [part.strip().lstrip("%") for part in branches.split(",")]
            for other in called:
                if other in times and times[name]:
                    times[other] += times[name] * rounds
    found: list[Collective] = []
    at: dict[str, int] = {}  # Channel -> where in `found`.
    for name, lines in bodies.items():
        for line in lines:
            match = _COLLECTIVE.search(line)
            if not match or not times[name]:
                continue
            if math.isinf(times[name]):
                raise ValueError(f"how often does {name} run? It holds: {line.strip()[:200]}")
            one = _parse(line, match, int(times[name]))
            # On TPUs one that runs beside other work stands in each fusion that it runs beside,
            # loops of these among them.
            channel = re.search(r"channel_id=(\d+)", line)
            if channel and ("fused" in name or "fusion" in name):
                if channel[1] in at:
                    before = found[at[channel[1]]]
                    found[at[channel[1]]] = before._replace(times=min(before.times, one.times))
                    continue
                at[channel[1]] = len(found)
            found.append(one)
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
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


def _rounds(line: str, bodies: dict[str, list[str]]) -> float:
    """How often a loop runs; infinity where its text does not say.

    XLA for TPUs leaves it to the condition: a counter, from zero in all loops that JAX and XLA
    make, below a constant. Loops by which it takes a product apart may count by more than one.
    """
    known = _TRIPS.search(line)
    if known:
        return int(known[1])
    condition, body = (
        bodies.get(re.search(rf"{part}=%?([\w.\-]+)", line)[1], [])
        for part in ("condition", "body")
    )
    values, counts = _scalars(condition), _scalars(body)
    for inside in condition:
        below = re.search(r"ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", inside)
        if below and below[2] in values:
            index = next(
                int(found[1])
                for other in condition
                if (found := re.search(rf"%?{re.escape(below[1])} = .*index=(\d+)", other))
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
    """Constants of a computation by name."""
    found = (re.search(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", line) for line in lines)
    return {one[1]: int(one[2]) for one in found if one}


def _parse(line: str, match: re.Match[str], times: int) -> Collective:
    kind, devices = match[1], _group_size(line)
    arrays = _ARRAY.findall(line[: match.start()].split(" = ", 1)[1])
    if match[2] and kind != "all-reduce":  # What is started yields operands, results, contexts.
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
    """Devices of a group, as XLA spells it: {{0,1},{2,3}}, [groups,devices]<=[all], axes of a mesh
    mesh['x'=2,'y'=4] {'y'}, or pairs.

    Raises:
      ValueError: If it is spelled in another way.
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
        part = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])  # Or 'x':(before)size.
        return math.prod(int(size) if size else sizes[name] for name, size in part)
    if "source_target_pairs" in line:
        return 2
    raise ValueError(f"of which devices? {line.strip()[:300]}")
