"""Reads the traces that `--profile` writes: the time of a step by the named scopes of the program.

A trace has spans named after instructions of the compiled program; a file beside it maps these to scopes. On CPUs an
instruction may leave its work to a thread pool: the time of a task counts for the instruction that scheduled it.
"""

import json
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCOPES = ("embed", "attention", "mlp", "head", "optimizer")
OTHER = "other"  # between the scopes: norms for the record, slices of stacked weights, copies

_WAITS = ("ThunkExecutor::", "SlinkyThreadPool::Await")  # spans of a CPU thread that waits for others
Span = tuple[float, float, str, str]  # start and end in ns; "op", "task" or "wait"; instruction or task number


def newest_trace(run_dir: str | Path) -> Path | None:
    """Returns the folder of a run's newest trace; None if there is none."""
    folders = {path.parent for path in Path(run_dir).glob("profile/plugins/profile/*/*.scopes.json")}
    return max(folders, key=lambda folder: folder.stat().st_mtime, default=None)


def read_times(folder: Path) -> tuple[range, dict[str, float]]:
    """Reads the traces of all processes in a folder.

    Returns the traced steps, and by scope the milliseconds per step, summed over threads, devices and processes. Raises
    a ValueError if a file is missing or damaged, or if the trace has no instruction of the step.
    """
    busy: Counter[str] = Counter()
    for file in sorted(folder.glob("*.scopes.json")):
        try:
            about = json.loads(file.read_text())
            steps, scopes = range(about["first"], about["last"] + 1), about["scopes"]
            lines = list(read_lines(file.with_name(file.name.replace(".scopes.json", ".xplane.pb")), about["module"]))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"the trace in {folder} cannot be read: {error}") from None
        for name, nanoseconds in busy_times(lines).items():
            busy[scopes.get(name, OTHER)] += nanoseconds
    if not busy.total():
        raise ValueError(f"the trace in {folder} has no instruction of the train step")
    return steps, {scope: busy[scope] / 1e6 / len(steps) for scope in (*SCOPES, OTHER)}


def read_lines(file: Path, module: str) -> Iterator[tuple[list[Span], list[tuple[float, str]]]]:
    """Yields the lines of a trace's file, see `read_line`; `module` is the name of the compiled program."""
    from jax.profiler import ProfileData  # takes a second to import

    if not file.is_file():
        raise ValueError(f"no file {file.name}")
    planes = list(ProfileData.from_file(str(file)).planes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # nanobind's, about its own iterators
        for plane in [plane for plane in planes if plane.name.startswith("/device:")] or planes:
            lines = list(plane.lines)
            ops = [line for line in lines if line.name == "XLA Ops"]  # the other lines of a TPU repeat these
            yield from (read_line(line, module, bool(ops)) for line in ops or lines)


def read_line(line: Any, module: str, only_ops: bool) -> tuple[list[Span], list[tuple[float, str]]]:
    """Returns the spans of a thread or stream, and when it scheduled which task."""
    spans, scheduled, begun = [], [], []
    for event in line.events:
        name, start, end = event.name, event.start_ns, event.start_ns + event.duration_ns
        stats = {} if name.startswith("$") else dict(event.stats)  # "$": a Python function
        if (only_ops or "hlo_op" in stats) and not name.startswith("$"):
            if str(stats.get("hlo_module", module)).split("(")[0] == module:
                spans.append((start, end, "op", str(stats.get("hlo_op") or name.split(" = ")[0].lstrip("%"))))
        elif name.startswith(_WAITS):
            spans.append((start, end, "wait", ""))
        elif name == "ThreadpoolListener::Record":
            scheduled.append((start, str(stats.get("_p"))))
        elif name == "ThreadpoolListener::StartRegion":
            begun.append((start, str(stats.get("_c"))))
        elif name == "ThreadpoolListener::StopRegion" and begun:
            begin, number = begun.pop()
            spans.append((begin, start, "task", number))
    return spans, scheduled


def busy_times(lines: list[tuple[list[Span], list[tuple[float, str]]]]) -> Counter[str]:
    """Returns nanoseconds by instruction; each moment of a thread counts for the innermost span around it."""
    busy: Counter[str] = Counter()
    for start, end, name in busy_parts(lines):
        busy[name] += end - start
    return busy


def busy_parts(lines: list[tuple[list[Span], list[tuple[float, str]]]]) -> list[tuple[float, float, str]]:
    """Returns start and end, in ns, of every time that a thread works on one instruction, the innermost, and its name.

    A task that no instruction has scheduled waits for others.
    """
    parts: list[tuple[float, float, Span]] = []
    scheduled_in: dict[str, Span] = {}  # task number: the innermost span that scheduled it
    for spans, scheduled in lines:
        stack: list[Span] = []
        since = 0.0
        moments = [(span[0], -span[1], span, "") for span in spans] + [(at, 0.0, None, n) for at, n in scheduled]
        for start, _, span, number in [*sorted(moments, key=lambda moment: moment[:2]), (math.inf, 0.0, None, "")]:
            while stack and stack[-1][1] <= start:
                parts.append((since, stack[-1][1], stack[-1]))
                since = max(since, stack.pop()[1])
            if span is None:
                scheduled_in |= {number: stack[-1]} if stack else {}
                continue
            if stack:
                parts.append((since, start, stack[-1]))
            stack.append(span)
            since = start
    found = []
    for begin, end, span in parts:
        seen = {span}
        while span[2] == "task" and (earlier := scheduled_in.get(span[3])) and earlier not in seen:
            span = earlier
            seen.add(span)
        if span[2] == "op" and end > begin:
            found.append((begin, end, span[3]))
    return found
