"""Parser of compiled HLO text: the collectives of a program, their mesh axes and the bytes that they carry.

Bytes count the unsharded array on one device: the result of an all-gather, the operand of a reduce-scatter, the array
itself of an all-reduce, all-to-all or collective-permute. A gathered weight or a reduced gradient therefore costs its
own size, for any number of devices.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_OTHER_KINDS = ("ragged-all-to-all", "collective-broadcast")
_REDUCERS = ("all-reduce", "all-reduce-start", "reduce-scatter", "reduce", "reduce-window", "scatter", "sort", "map")
_BITS = {"pred": 8, "c64": 64, "c128": 128}  # other dtypes have their width in their name
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.~-]+) .*\{$|^(ENTRY )?%?([\w.~-]+) \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.~-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|[subfc]f?\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.~-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


class Collective(NamedTuple):
    """Array that a collective moves."""

    kind: str  # one of `KINDS`, or `ragged-all-to-all` or `collective-broadcast`
    axes: tuple[str, ...]  # mesh axes of the collective, in the mesh's order; `("?",)` if its groups match no axes
    dtype: str  # HLO's name of the dtype, such as `bf16`
    shape: tuple[int, ...]  # shape of the unsharded array on one device
    count: int  # executions per step: the product of the trip counts of the enclosing loops
    num_bytes: int  # bytes per step, over all executions
    # True if nothing runs beside it; False for an asynchronous one and for one that is split over the fusions of matrix
    # products
    blocking: bool
    source: str  # operation of the traced program, or `""` if the compiler added the collective


class Instruction(NamedTuple):
    """Line of a computation."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def source(self) -> str:
        """Operation of the traced program, or `""` if the compiler added the instruction."""
        name = re.search(r'op_name="([^"]*)"', self.rest)
        return name.group(1) if name else ""

    @property
    def called(self) -> list[str]:
        branches = _BRANCHES.search(self.rest)
        names = [name.strip().lstrip("%") for name in branches.group(1).split(",")] if branches else []
        return names + _CALLED.findall(self.rest)


class HloModule:
    """Parsed HLO module: computations by name, each a list of instructions."""

    def __init__(self, text: str):
        """Parses `compiled.as_text()`. Raises a ValueError for text without an entry computation."""
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        body: list[Instruction] = []
        for line in text.splitlines():
            if not line.startswith(" ") and line.endswith("{") and (head := _COMPUTATION.match(line)):
                name = head.group(2) or head.group(4)
                body = self.computations.setdefault(name, [])
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif found := _INSTRUCTION.match(line):
                body.append(Instruction(*found.groups()))
        if not self.entry:
            raise ValueError("not an HLO module: there is no ENTRY computation")

    def walk(self, name: str = "", times: int = 1) -> Iterator[tuple[str, Instruction, int]]:
        """Yields `(computation, instruction, executions)` from the entry downwards. Every branch counts as taken."""
        name = name or self.entry
        for instruction in self.computations.get(name, ()):
            yield name, instruction, times
            if instruction.opcode.endswith(("-done", "-update")) or instruction.opcode in _REDUCERS:
                continue  # the start has already named the computation; a reducer adds two numbers
            trips = self.trip_count(name, instruction) if instruction.opcode == "while" else 1
            for called in instruction.called:
                yield from self.walk(called, times * trips)

    def overlapped(self) -> set[str]:
        """Returns the names of the computations that run beside others: all that an asynchronous start calls."""
        starts = [one for lines in self.computations.values() for one in lines if one.opcode.endswith("-start")]
        called = [name for one in starts if one.opcode not in _REDUCERS for name in one.called]
        return {*called, *(below for name in called for one in self.walk(name) for below in one[1].called)}

    def trip_count(self, parent: str, loop: Instruction) -> int:
        """Returns the trip count of a while loop: the compiler's, or the bound in its condition, or a ValueError."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if noted:
            return int(noted.group(1))
        condition = re.search(r"condition=%?([\w.~-]+)", loop.rest).group(1)
        lines = {line.name: line for line in self.computations[condition]}
        bounds = [line for line in lines.values() if line.opcode == "constant" and line.shape[:3] in ("s32", "s64")]
        counters = [line for line in lines.values() if line.opcode == "get-tuple-element"]
        below = any("direction=LT" in line.rest for _, line, _ in self.walk(condition))  # also inside of fusions
        if len(bounds) != 1 or len(counters) != 1 or not below:
            raise ValueError(f"the condition of loop %{loop.name} has no readable trip count")
        index = int(re.search(r"index=(\d+)", counters[0].rest).group(1))
        return _constant(bounds[0]) - self._start(parent, loop, index)

    def _start(self, parent: str, loop: Instruction, index: int) -> int:
        """Returns the first value of a loop's counter, 0 if it is not a plain constant."""
        lines = {line.name: line for line in self.computations[parent]}
        state = lines.get(operands_of(loop.rest)[0])
        line = lines.get(operands_of(state.rest)[index]) if state and state.opcode == "tuple" else None
        while line and line.opcode in ("copy", "bitcast", "copy-done", "copy-start", "convert"):
            line = lines.get(operands_of(line.rest)[0])
        return _constant(line) if line and line.opcode == "constant" else 0


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Lists the arrays that the collectives of a compiled program move in one execution.

    Raises a ValueError if the text is no HLO module, or has a loop of unknown length.
    """
    module = HloModule(text)
    overlapped = module.overlapped()
    chains = set()
    found = []
    for computation, line, times in module.walk():
        opcode = line.opcode.removesuffix("-start")
        if not is_collective(line):
            continue
        # TPU compilers split a gather that overlaps matrix products into fusions that all name it: one transfer.
        chain = re.search(r'chain_id="(\d+)"', line.rest)
        if chain and (opcode, chain.group(1)) in chains:
            continue
        chains |= {(opcode, chain.group(1))} if chain else set()
        axes, group_size = _axes(line.rest, mesh_shape)
        if group_size == 1:
            continue
        # TPU compilers fuse an all-reduce and the following slice, which makes a reduce-scatter.
        kind = "reduce-scatter" if computation.startswith("all-reduce-scatter") else opcode
        blocking = not (chain or line.opcode.endswith("-start") or computation in overlapped)
        for dtype, shape in _arrays(line, group_size):
            num_bytes = times * math.prod(shape) * bits_of(dtype) // 8
            found.append(Collective(kind, axes, dtype, shape, times, num_bytes, blocking, line.source))
    return found


def is_collective(line: Instruction) -> bool:
    """Returns True for an operation that moves arrays between devices."""
    return line.opcode.removesuffix("-start") in KINDS + _OTHER_KINDS


def summarize_collectives(found: list[Collective]) -> list[dict]:
    """Sums collectives by kind, axes and dtype: dicts with `count`, `bytes` and `blocking_bytes`, most bytes first."""
    sums: dict[tuple, dict] = {}
    for one in found:
        row = sums.setdefault((one.kind, one.axes, one.dtype), {"count": 0, "bytes": 0, "blocking_bytes": 0})
        row["count"] += one.count
        row["bytes"] += one.num_bytes
        row["blocking_bytes"] += one.num_bytes if one.blocking else 0
    rows = [{"kind": kind, "axes": list(axes), "dtype": dtype} | row for (kind, axes, dtype), row in sums.items()]
    return sorted(rows, key=lambda row: -row["bytes"])


def operands_of(rest: str) -> list[str]:
    """Returns the names of the operands, from an instruction's `rest`."""
    return re.findall(r"%([\w.~-]+)", re.split(r"\)(?:,|$)", rest, maxsplit=1)[0])


def _constant(line: Instruction) -> int:
    return int(line.rest.split(")")[0])


def bits_of(dtype: str) -> int:
    """Returns the width of a dtype in memory."""
    return _BITS.get(dtype) or int(re.search(r"\d+", dtype).group())


def arrays_of(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Parses the arrays of a shape, which may be a tuple, as `(dtype, dimensions)`."""
    return [(dtype, tuple(map(int, filter(None, dims.split(","))))) for dtype, dims in _ARRAY.findall(shape)]


def _arrays(line: Instruction, group_size: int) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the unsharded arrays of a collective, as `(dtype, shape)`."""
    shapes, num_operands = arrays_of(line.shape), len(operands_of(line.rest))
    if line.opcode.endswith("-start"):
        # The result of most is a tuple of operands, results and counters; that of an all-reduce has the results alone.
        arrays = [shape for shape in shapes if shape[1] or shape[0] not in ("u32", "s32")]
        shapes = arrays[num_operands:] if len(arrays) == 2 * num_operands else shapes
    if line.opcode.removesuffix("-start") == "reduce-scatter":
        i = int(re.search(r"dimensions=\{(\d+)\}", line.rest).group(1))
        shapes = [(dtype, (*shape[:i], shape[i] * group_size, *shape[i + 1 :])) for dtype, shape in shapes]
    return shapes


def _axes(rest: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """Returns the mesh axes that vary within a group of devices, and the size of a group."""
    names, sizes = tuple(mesh_shape), tuple(mesh_shape.values())

    def varying_axes(group: list[int]) -> list[int]:
        return [i for i, at in enumerate(np.unravel_index(group, sizes)) if len(set(at.tolist())) > 1]

    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        moved = [group for group in _brace_groups(pairs.group(1)) if group[0] != group[1]]
        return tuple(names[i] for i in sorted({i for group in moved for i in varying_axes(group)})), 2 if moved else 1
    groups = _replica_groups(rest, math.prod(sizes))
    varying = [varying_axes(group) for group in groups]
    whole = math.prod(sizes[i] for i in varying[0]) == len(groups[0])
    alike = all(axes == varying[0] for axes in varying)
    return tuple(names[i] for i in varying[0]) if whole and alike else ("?",), len(groups[0])


def _replica_groups(rest: str, num_devices: int) -> list[list[int]]:
    """Parses groups of device positions in any of HLO's three notations."""
    if mesh := _MESH.search(rest):
        return _mesh_groups(*mesh.groups())
    groups = rest.partition("replica_groups=")[2]
    if iota := _IOTA.match(groups):
        return _transposed(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
    braces = re.match(r"\{(\{.*?\})\}", groups)
    return _brace_groups(braces.group(1)) if braces else [list(range(num_devices))]


def _brace_groups(text: str) -> list[list[int]]:
    return [_numbers(group) for group in re.findall(r"[\d,]+\d|\d", text.replace("},{", " "))]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _transposed(dims: str, order: str | None) -> np.ndarray:
    """Returns the iota of `[4,2]T(1,0)`, given as `4,2` and `1,0`."""
    array = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return array.transpose(_numbers(order)) if order else array


def _mesh_groups(sizes: str, device_ids: str | None, axes: str) -> list[list[int]]:
    """Parses `mesh['data'=2,'fsdp'=4] {'fsdp'}`, with `device_ids=([4,2]T(1,0))` for another device order."""
    mesh = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids or "")
    devices = _transposed(*order.groups()) if order else np.arange(math.prod(mesh.values()))
    named = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes)  # `'fsdp':(2)4` names 4 devices after a factor of 2
    parts = {name: (int(before or 1), int(size or mesh[name])) for name, before, size in named}
    grid: list[int] = []  # each axis as three: before the named part, the part, and after it
    for name, size in mesh.items():
        before, part = parts.get(name, (1, size))
        grid += [before, part, size // (before * part)]
    inside = [3 * i + 1 for i, name in enumerate(mesh) if name in parts]
    outside = [i for i in range(len(grid)) if i not in inside]
    group_size = math.prod(grid[i] for i in inside)
    return devices.reshape(grid).transpose(outside + inside).reshape(-1, group_size).tolist()
