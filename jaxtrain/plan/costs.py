"""Costs of a compiled program by part of the step: memory traffic and, from the TPU compiler, estimated cycles.

Both are sums over the operations of the optimized program, each times the trip counts of its loops. Bytes are operands
and results in the chip's main memory; of a stack that an operation slices or updates in place, only the slice counts.
The compiler estimates no cycles for Pallas kernels and collectives, so the cycles compare two programs; they are not
seconds.
"""

import math
import re
from collections.abc import Iterator

from jaxtrain.runtime.hlo import HloModule, Instruction, arrays_of, bits_of, is_collective, operands_of

PARTS = ("layers, forward", "layers, backward", "layers, rematerialized", "head", "embedding", "optimizer")
PARTS += ("copies", "collectives", "rest")

_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "iota")
_SLICES = ("dynamic-slice", "slice", "gather")


def part_costs(text: str) -> list[dict]:
    """Sums the costs of a compiled train step (`compiled.as_text()`) by part.

    Returns:
      A dict `part cycles bytes` for each of `PARTS` that occurs; `cycles` is 0 if the compiler estimates none. Copies
      are operations that only change the layout; the optimizer includes norms and metrics.

    Raises:
      ValueError: the text is not an HLO module, or has a loop of unknown length.
    """
    module = HloModule(text)
    sums = {part: [0, 0] for part in PARTS}
    for lines, line, part, times in _executed(module, module.entry, "rest", 1):
        cycles = int((re.findall(r'"estimated_cycles":"(\d+)"', line.rest) or [0])[0])
        sums[part][0] += times * cycles if cycles < 2**62 else 0  # the largest integer means unknown
        sums[part][1] += times * _moved(module, lines, line)
    return [{"part": part, "cycles": c, "bytes": b} for part, (c, b) in sums.items() if c or b]


def _executed(
    module: HloModule, name: str, outer: str, times: int
) -> Iterator[tuple[dict[str, Instruction], Instruction, str, int]]:
    """Yields `(lines of the computation, operation, part, executions)` of the operations that run by themselves.

    An operation without a part, which the compiler has added, belongs to the part of its loop.
    """
    lines = {line.name: line for line in module.computations.get(name, ())}
    for line in lines.values():
        part = _part(line) or outer
        if line.opcode in ("while", "call", "conditional", "call-start", "async-start"):
            trips = module.trip_count(name, line) if line.opcode == "while" else 1
            for called in line.called:
                yield from _executed(module, called, part, times * trips)
        elif line.opcode not in _FREE and not line.opcode.endswith(("-done", "-update")):
            yield lines, line, part, times


def _part(line: Instruction) -> str | None:
    """Returns the part of the step that an operation belongs to, by its opcode and its source; None if unknown."""
    source = line.source
    if line.opcode in ("copy", "transpose"):
        return "copies"
    if is_collective(line):
        return "collectives"
    if "jvp(" not in source:
        return "optimizer" if source and "shard_map" not in source else None
    if "embed" in source:
        return "embedding"
    if "head" in source:
        return "head"
    if "rematted_computation" in source:
        return "layers, rematerialized"
    return "layers, backward" if "transpose(" in source else "layers, forward"


def _moved(module: HloModule, lines: dict[str, Instruction], line: Instruction) -> int:
    """Returns the bytes of main memory that an operation reads and writes."""
    operands = [lines[name] for name in operands_of(line.rest) if name in lines]
    if line.opcode != "fusion":
        if line.opcode in _SLICES:
            return 2 * _bytes(line.shape)
        if line.opcode == "dynamic-update-slice":
            return 2 * _bytes(operands[1].shape)
        # The result of an asynchronous operation is a tuple that names the operand again.
        result = _bytes(line.shape) // (2 if line.opcode.endswith("-start") else 1)
        return result + sum(_bytes(one.shape) for one in operands)
    read = sum(
        min(_bytes(operand.shape), _read_by_fusion(module, line, i)) if _bytes(operand.shape) else 0
        for i, operand in enumerate(operands)
    )
    inside = {one.name: one for one in module.computations[line.called[0]]}
    updated = sum(
        _bytes(one.shape) - _bytes(inside[operands_of(one.rest)[1]].shape)
        for one in inside.values()
        if one.opcode == "dynamic-update-slice" and _bytes(one.shape)
    )
    return read + max(_bytes(line.shape) - updated, 0)


def _read_by_fusion(module: HloModule, fusion: Instruction, index: int) -> int:
    """Returns the bytes that a fusion reads of an operand: the slices, if it is only sliced or updated in place."""
    lines = module.computations[fusion.called[0]]
    parameter = next(one for one in lines if one.opcode == "parameter" and int(one.rest.split(")")[0]) == index)
    names, size = {parameter.name}, 0
    for one in lines:
        operands = operands_of(one.rest)
        at = [i for i, name in enumerate(operands) if name in names]
        if at and one.opcode == "bitcast":
            names.add(one.name)
        elif at and one.opcode == "fusion":
            size += sum(_read_by_fusion(module, one, i) for i in at)
        elif at and one.opcode in _SLICES:
            size += _bytes(one.shape)
        elif at and (one.opcode != "dynamic-update-slice" or at != [0]):
            return _bytes(parameter.shape)
    return size


def _bytes(shape: str) -> int:
    """Returns the bytes of an array or tuple in main memory; on-chip memory, `S(1)` and above, counts as 0."""
    total = 0
    for match in re.finditer(r"\b(\w+)\[([\d,]*)\](\{[^}]*\})?", shape):
        if not re.search(r"S\([1-9]", match.group(3) or ""):
            for dtype, dims in arrays_of(match.group(0)):
                total += math.prod(dims) * bits_of(dtype) // 8
    return total
