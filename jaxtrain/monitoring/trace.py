"""Reads the traces that `--profile` writes: where the time of a step goes, by the named scopes of the program.

A trace has spans named after instructions of the compiled program, which its compiler has fused and renamed; the file
of scopes beside it says which scope each comes from. On CPUs an instruction may leave its work to a pool of threads:
what a task of the pool does counts for the instruction that has scheduled it.
"""

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxtrain.runtime.hlo import Program

SCOPES = ("embed", "attention", "mlp", "head", "optimizer")
OTHER = "other"  # what is between them: norms for the record, slices of stacked weights, copies

_WAITS = ("ThunkExecutor::", "SlinkyThreadPool::Await")  # of CPUs: a thread that looks after others
_OPS_LINE = "XLA Ops"  # where a device has this line, the others say the same again


class Times(NamedTuple):
    """Where the time of some steps went.

    Attributes:
      first, last: the steps, counted from 1.
      milliseconds: by scope (SCOPES, then OTHER): time a step in which a thread or a stream worked on it, added over
        threads, devices and processes.
    """

    first: int
    last: int
    milliseconds: dict[str, float]

    def shares(self) -> dict[str, float]:
        """The fraction of each scope; they add up to 1."""
        whole = sum(self.milliseconds.values())
        return {scope: value / whole for scope, value in self.milliseconds.items()}


class _Span(NamedTuple):
    start: float  # ns
    end: float
    kind: str  # "op", "task" or "wait"
    name: str  # of the instruction, or the number under which the task was scheduled


class _Line(NamedTuple):
    """A thread or a stream: its spans, and the tasks that it has scheduled, with when."""

    spans: list[_Span]
    scheduled: list[tuple[float, str]]


def scopes_of(text: str) -> dict[str, str]:
    """Maps the instructions of a compiled program (`compiled.as_text()`) to the scopes that they come from."""
    program = Program(text)
    own: dict[str, list[str]] = {
        name: [scope for line in lines if (scope := _scope(line.source))]
        for name, lines in program.computations.items()
    }
    found = {}
    for lines in program.computations.values():
        for line in lines:
            # A fusion without a name of its own is what most of it is.
            inside = [scope for name in line.called for scope in own.get(name, ())]
            scope = _scope(line.source) or (Counter(inside).most_common(1)[0][0] if inside else "")
            if scope:
                found[line.name] = scope
    return found


def _scope(source: str) -> str:
    """The innermost scope in a path such as `jit(train_step)/transpose(jvp(head))/while/body/dot_general`."""
    for part in reversed(source.split("/")):
        name = part.rstrip(")").rpartition("(")[2]
        if name in SCOPES:
            return name
    return ""


def newest_trace(run_dir: str | Path) -> Path | None:
    """The folder of a run's newest trace; None: there is none."""
    folders = {path.parent for path in Path(run_dir).glob("profile/plugins/profile/*/*.scopes.json")}
    return max(folders, key=lambda folder: folder.stat().st_mtime, default=None)


def read_times(folder: Path) -> Times:
    """Reads the traces of all processes in a folder.

    Raises:
      ValueError: a file is missing or damaged, or the trace has no instruction of the step.
    """
    busy: Counter[str] = Counter()
    for file in sorted(folder.glob("*.scopes.json")):
        try:
            about = json.loads(file.read_text())
            first, last, scopes, module = about["first"], about["last"], about["scopes"], about["module"]
            planes = _planes(file.with_name(file.name.replace(".scopes.json", ".xplane.pb")))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"the trace in {folder} cannot be read: {error}") from None
        for name, nanoseconds in _busy(_lines(planes, module)).items():
            busy[scopes.get(name, OTHER)] += nanoseconds
    if not sum(busy.values()):
        raise ValueError(f"the trace in {folder} has no instruction of the train step")
    per_step = {scope: busy[scope] / 1e6 / (last - first + 1) for scope in (*SCOPES, OTHER)}
    return Times(first, last, per_step)


def _planes(file: Path) -> list[Any]:
    from jax.profiler import ProfileData  # a second to import, and only reports of runs with a trace need it

    if not file.is_file():
        raise ValueError(f"no file {file.name}")
    planes = list(ProfileData.from_file(str(file)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    return devices or planes  # beside a device, the host's threads show who has called for what


def _lines(planes: Iterable[Any], module: str) -> Iterator[_Line]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # nanobind's, about its own iterators
        for plane in planes:
            lines = list(plane.lines)
            ops = [line for line in lines if line.name == _OPS_LINE]
            for line in ops or lines:
                yield _read_line(line, module, bool(ops))


def _read_line(line: Any, module: str, only_ops: bool) -> _Line:
    spans, scheduled, begun = [], [], []
    for event in line.events:
        name, start = event.name, event.start_ns
        if name.startswith("$"):
            continue  # a Python function
        stats = dict(event.stats)
        if only_ops or "hlo_op" in stats:
            if str(stats.get("hlo_module", module)).split("(")[0] == module:
                op = str(stats.get("hlo_op") or name.split(" = ")[0].lstrip("%"))
                spans.append(_Span(start, start + event.duration_ns, "op", op))
        elif name.startswith(_WAITS):
            spans.append(_Span(start, start + event.duration_ns, "wait", ""))
        elif name == "ThreadpoolListener::Record":
            scheduled.append((start, str(stats.get("_p"))))
        elif name == "ThreadpoolListener::StartRegion":
            begun.append((start, str(stats.get("_c"))))
        elif name == "ThreadpoolListener::StopRegion" and begun:
            begin, number = begun.pop()
            spans.append(_Span(begin, start, "task", number))
    return _Line(spans, scheduled)


def _busy(lines: Iterable[_Line]) -> Counter[str]:
    """Nanoseconds by instruction: of each moment of a thread, for the innermost span around it."""
    own_time: list[tuple[_Span, float]] = []
    scheduled_in: dict[str, _Span] = {}  # task -> the innermost span at that moment
    for line in lines:
        moments = [(span.start, -span.end, span, "") for span in line.spans]
        moments += [(time, 0.0, None, number) for time, number in line.scheduled]
        inner: dict[_Span, float] = {}
        stack: list[_Span] = []
        for time, _, span, number in sorted(moments, key=lambda moment: moment[:2]):
            while stack and stack[-1].end <= time:
                stack.pop()
            if span is None:
                if stack:
                    scheduled_in[number] = stack[-1]
                continue
            if stack:
                inner[stack[-1]] = inner.get(stack[-1], 0.0) + span.end - span.start
            stack.append(span)
        own_time += [(span, max(0.0, span.end - span.start - inner.get(span, 0.0))) for span in line.spans]
    busy: Counter[str] = Counter()
    for span, nanoseconds in own_time:
        seen = {span}
        while span.kind == "task" and (earlier := scheduled_in.get(span.name)) and earlier not in seen:
            span = earlier
            seen.add(span)
        if span.kind == "op":
            busy[span.name] += nanoseconds
    return busy
