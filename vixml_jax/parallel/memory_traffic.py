"""Bytes that a compiled program reads from and writes to device memory, from its HLO text.

Each operation of the program reads its operands and writes its outputs, loops included. What
happens inside a fusion stays on the chip. Of an array that an operation only slices, gathers from
or updates in place, the rows concerned count. Caches are ignored, so small arrays that stay in one
count too often.
"""

import math
from collections.abc import Sequence

from vixml_jax.parallel import hlo_text
from vixml_jax.parallel.hlo_text import Array, Instruction

# Operations that move nothing: names for what exists, or the end of what has started.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
    "replica-id", "opt-barrier", "add-dependency",
}  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")
# Operand that is written in place -> operand that is written to it.
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}


def read_traffic(text: str) -> float:
    """Bytes that a run of the program with this text moves on each device.

    Raises:
      ValueError: If a loop has an unknown number of iterations.
    """
    bodies, entry = hlo_text.computations(text)
    return _Program(bodies).traffic(entry)


class _Program:
    def __init__(self, bodies: dict[str, list[str]]):
        self._lines = bodies
        self._read: dict[str, dict[str, Instruction]] = {}

    def _body(self, name: str) -> dict[str, Instruction]:
        """Instructions of a computation, by name."""
        if name not in self._read:
            found = map(hlo_text.instruction, self._lines[name])
            self._read[name] = {one.name: one for one in found}
        return self._read[name]

    def traffic(self, name: str) -> float:
        """Bytes moved by one execution of a computation."""
        return sum(self._moved(one, self._body(name)) for one in self._body(name).values())

    def _moved(self, one: Instruction, body: dict[str, Instruction]) -> float:
        if one.operation in _FREE or one.operation.endswith(("-done", "-update")):
            return 0.0
        called = [name for name in hlo_text.called(one.line) if name in self._lines]
        if one.operation == "while":
            times = hlo_text.iterations(one.line, self._lines)
            if math.isinf(times):
                raise ValueError(f"unknown number of iterations: {one.line.strip()[:200]}")
            return times * sum(map(self.traffic, called))
        if one.operation == "conditional":
            return max(map(self.traffic, called))
        if one.operation in ("call", "async-start"):
            return sum(map(self.traffic, called))
        operands = [body[name].outputs if name in body else () for name in one.operands]
        if one.operation in _SLICES or one.operation == "slice-start":
            # The result is the smallest array that a start of a slice yields.
            return 2 * min(map(_in_memory, _results(one)))
        if one.operation in _UPDATES:
            return 2 * _sum(operands[_UPDATES[one.operation]])
        if one.operation.endswith("-start") and "all-reduce" not in one.operation:
            return _sum(one.outputs)  # Operands are among the outputs.
        if one.operation == "fusion":
            read = sum(
                min(_sum(arrays), self._read_bytes(called[0], index, arrays))
                for index, arrays in enumerate(operands)
            )
            return read + self._written(called[0], one.outputs)
        # cuBLAS names its workspace as an output; it need not be used.
        outputs = [x for x in one.outputs if "__cublas" not in one.line or x.dtype != "s8"]
        return sum(map(_sum, operands)) + _sum(outputs)

    def _read_bytes(self, name: str, index: int, arrays: Sequence[Array]) -> float:
        """Bytes that a fused computation reads of its parameter `index`, which has these arrays."""
        body = self._body(name)
        marker = f" parameter({index})"
        parameter = next((one.name for one in body.values() if marker in one.line), None)
        if parameter is None or not _sum(arrays):
            return 0.0
        return self._uses(name, parameter, arrays)

    def _uses(self, name: str, value: str, arrays: Sequence[Array]) -> float:
        """Bytes that the instructions of a fused computation read of one of its values."""
        total = 0.0
        for one in self._body(name).values():
            for at in (i for i, operand in enumerate(one.operands) if operand == value):
                if one.operation in _SLICES and at == 0:
                    total += _sum(one.outputs)
                elif one.operation in _UPDATES and at == 0:
                    continue  # Written in place.
                elif one.operation == "bitcast":
                    total += self._uses(name, one.name, arrays)
                elif one.operation == "fusion":
                    total += self._read_bytes(hlo_text.called(one.line)[0], at, arrays)
                else:
                    return _sum(arrays)
        return total

    def _written(self, name: str, outputs: Sequence[Array]) -> float:
        """Bytes that a fusion writes, whose outputs are these."""
        body = self._body(name)
        root = next(one for one in body.values() if one.is_root)
        results = [body[x] for x in root.operands] if root.operation == "tuple" else [root]
        if len(results) != len(outputs):  # A root that yields several arrays itself.
            return _sum(outputs)
        return sum(
            min(_in_memory(array), self._updated(body, result, array))
            for result, array in zip(results, outputs, strict=True)
        )

    def _updated(self, body: dict[str, Instruction], result: Instruction, array: Array) -> float:
        """Bytes of an output that a fused computation changes."""
        while result.operation == "bitcast" and result.operands[0] in body:
            result = body[result.operands[0]]
        if result.operation in _UPDATES:
            return _sum(body[result.operands[_UPDATES[result.operation]]].outputs)
        if result.operation == "fusion" and len(result.outputs) == 1:
            return self._written(hlo_text.called(result.line)[0], [array])
        return _in_memory(array)


def _results(one: Instruction) -> Sequence[Array]:
    return [array for array in one.outputs if array.shape] or one.outputs


def _in_memory(array: Array) -> int:
    """Bytes of an array in the memory of the device; 0 if it is elsewhere."""
    return array.size if array.space == 0 else 0


def _sum(arrays: Sequence[Array]) -> float:
    return float(sum(map(_in_memory, arrays)))
