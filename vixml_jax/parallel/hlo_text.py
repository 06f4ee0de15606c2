"""Reads the text of a compiled program (optimised HLO): computations, instructions, loops."""

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
          "u32": 4, "f64": 8, "s64": 8, "u64": 8}  # fmt: skip
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPERATION = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITIONAL = re.compile(r"(?:true|false)_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Array(NamedTuple):
    """An array in the text.

    Attributes:
      dtype: As XLA writes it: "f32".
      shape: Its sizes.
      space: Memory space: 0 is the memory of the device, 1 the memory on the chip of a TPU, 5 the
        memory of the host.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        """Size in bytes; 0 of tokens and contexts, which have no data."""
        return _BYTES.get(self.dtype, 0) * math.prod(self.shape)


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      name: Its name, unique in its computation.
      operation: "fusion", "custom-call", "all-gather-start" and so on.
      outputs: The arrays that it yields, several for a tuple.
      operands: Names of the instructions that it takes.
      is_root: Whether the computation yields its outputs.
      line: The whole line.
    """

    name: str
    operation: str
    outputs: tuple[Array, ...]
    operands: tuple[str, ...]
    is_root: bool
    line: str


def instruction(line: str) -> Instruction:
    """The instruction in a line of a computation."""
    match = _INSTRUCTION.match(line)
    operation = _OPERATION.search(line, match.start(2) - 1)
    end, depth = operation.end(), 1
    while depth:
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    names = re.findall(r"%([\w.\-]+)", line[operation.end() : end])
    return Instruction(
        match[1],
        operation[1],
        arrays(line[match.start(2) : operation.start()]),
        tuple(names),
        line.lstrip().startswith("ROOT "),
        line,
    )


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays that a type names, in its order."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        shape = tuple(int(n) for n in sizes.split(",") if n)
        found.append(Array(dtype, shape, int(space[1]) if space else 0))
    return tuple(found)


def computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by its name, callees first, and the name of the entry."""
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


def called(line: str) -> list[str]:
    """Names of the computations that an instruction calls."""
    names = _CALLED.findall(line) + _CONDITIONAL.findall(line)
    for branches in _BRANCHES.findall(line):
        names += [part.strip().lstrip("%") for part in branches.split(",")]
    return names


def executions(bodies: dict[str, list[str]], entry: str) -> dict[str, float]:
    """How often each computation is executed in a run of the program.

    In a loop with an unknown number of iterations that is infinite.
    """
    times: dict[str, float] = dict.fromkeys(bodies, 0)
    times[entry] = 1
    # Callees come before their callers in the text.
    for name in reversed(bodies):
        for line in bodies[name]:
            count = iterations(line, bodies) if " while(" in line else 1.0
            for callee in called(line):
                if callee in times and times[name]:
                    times[callee] += times[name] * count
    return times


def iterations(line: str, bodies: dict[str, list[str]]) -> float:
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
    for one in condition:
        below = re.search(r"ROOT .* compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT", one)
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
