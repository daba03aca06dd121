#!/usr/bin/env python
"""Time of the train step's operations on a CPU, beside those of the same step in compiled PyTorch.

Traces some steps of both: JAX by the kind of the HLO instruction, torch by the name of the operator. Each moment of a
thread counts for the innermost operation; while fewer threads than cores work, the idle cores count as waiting for the
operations that run. The first table compares both by kind of work. In the other two, milliseconds of JAX are summed
over its threads, so that they exceed those of a step; torch's profiler counts the calling thread alone.

  python scripts/bench_operations.py configs/gpt2_124m.py --peer-python .venv-torch/bin/python --steps 5 \\
      --train.batch-size=8 --train.accumulate=1 --train.precision=float32

Other flags change the config, as those of `jaxtrain train` do.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from bench_train import peer_spec
from benchmark import Table, parser, report

TORCH = """
import json, sys; sys.path.insert(0, sys.argv[3])
import torch
from peer_torch import Trainer
trainer, steps = Trainer(json.loads(sys.argv[1])), int(sys.argv[2])
trainer.run(3)
plain = trainer.run(steps)
with torch.profiler.profile() as profile:
    traced = trainer.run(steps)
times = {one.key: one.self_cpu_time_total / 1e3 / (steps + 1) for one in profile.key_averages()}
print(json.dumps([times, traced, plain]))
"""
# Kinds of work, and what XLA does on a CPU that PyTorch does not.
KINDS = {
    "matrix products": "YNNPACK and Eigen multiply, where PyTorch has MKL",
    "attention": "every product and every pass over the scores is an operation that reads and writes memory, where "
    "PyTorch has one kernel that holds a block of scores in the cache",
    "optimizer": "the guard reads all updates before it decides, and each moment, update and parameter takes passes of "
    "its own, where PyTorch's fused AdamW has one",
    "norms, activations, loss": "sums are operations of their own",
    "copies, norms for the record": "weights are stored stacked over layers, and the step reports norms by layer",
}
*_, POINTWISE, RECORD = KINDS
BETWEEN = "between operations"
# Parts of attention, which PyTorch's kernel does not have as operations of their own.
ATTENTION = ("its products", "its passes over the scores", "its copies to other layouts")
_LAYOUT = {"parameter", "copy", "transpose", "bitcast", "slice", "concatenate", "reshape", "pad", "constant", "fusion"}
_LAYOUT |= {"add", "broadcast"}  # of biases, and of the blocks' gradients


class Times(NamedTuple):
    """Milliseconds per step.

    Attributes:
      by_name: By operation.
      by_kind: By kind of work, one of `KINDS` or `ATTENTION`; as a share of the step, so over all threads at once.
      waiting: Of idle cores, by operation, all cores added.
      waiting_by_kind: Of idle cores, as a share of the step, by kind of the operations that run meanwhile.
      traced, plain: Of the step under the profiler and without it, median.
    """

    by_name: dict[str, float]
    by_kind: Counter[str]
    waiting: Counter[str]
    waiting_by_kind: Counter[str]
    traced: float
    plain: float


def ours_times(config: Any, steps: int) -> tuple[Times, Any]:
    """Returns the times by scope and kind of the instruction, and the built model's config."""
    import jax
    from bench_train import Ours

    from jaxtrain.monitoring.trace import busy_parts, read_lines

    ours = Ours(config)
    text = ours.text()
    plain = ours.run(steps)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            traced = ours.run(steps)
        (file,) = Path(folder).rglob("*.xplane.pb")
        parts = busy_parts(list(read_lines(file, text.split(",")[0].removeprefix("HloModule "))))
    busy: Counter[str] = Counter()
    for start, end, name in parts:
        busy[name] += end - start
    labels, cores = labels_of(text), os.cpu_count()
    sums = []
    for times in (busy, waiting_times(parts, cores)):
        by_name: Counter[str] = Counter()
        by_kind: Counter[str] = Counter()
        for name, nanoseconds in times.items():
            operation, *kinds = labels.get(name, (name, RECORD))
            by_name[operation] += nanoseconds / 1e6 / (steps + 1)
            for kind in kinds if name != BETWEEN else [BETWEEN]:
                by_kind[kind] += nanoseconds / 1e6 / (steps + 1) / cores
        sums += [by_name, by_kind]
    return Times(*sums, *(1e3 * statistics.median(seconds) for seconds in (traced, plain))), ours.model


def labels_of(text: str) -> dict[str, tuple[str, ...]]:
    """Returns scope and opcode of each instruction of a compiled program, its kind, and its part of attention."""
    from jaxtrain.monitoring.profile import scopes_of
    from jaxtrain.monitoring.trace import OTHER
    from jaxtrain.runtime.hlo import HloModule

    scopes, module = scopes_of(text), HloModule(text)
    labels: dict[str, tuple[str, ...]] = {}
    for line in (line for lines in module.computations.values() for line in lines):
        called = line.called if line.opcode == "fusion" else ()
        inside = [line, *(one for name in called for one in module.computations[name])]
        scope, has_dot = scopes.get(line.name, OTHER), any(one.opcode == "dot" for one in inside)
        operation = f"{scope}: {line.opcode}{' with dot' * (line.opcode == 'fusion' and has_dot)}"
        if any("_attend" in one.source for one in inside):
            layout = all(one.opcode in _LAYOUT for one in inside)
            labels[line.name] = operation, "attention", ATTENTION[0 if has_dot else 2 if layout else 1]
        elif has_dot:
            labels[line.name] = operation, "matrix products"
        else:
            labels[line.name] = operation, {"optimizer": "optimizer", OTHER: RECORD}.get(scope, POINTWISE)
    return labels


def waiting_times(parts: list[tuple[float, float, str]], cores: int) -> Counter[str]:
    """Returns the nanoseconds of idle cores, by the operations that run meanwhile, or `BETWEEN` where none does.

    `parts` are start, end and operation of every time that a thread works on one.
    """
    changes = sorted((at, change, name) for start, end, name in parts for at, change in ((start, 1), (end, -1)))
    waiting: Counter[str] = Counter()
    running: Counter[str] = Counter()
    since = 0.0
    for at, change, name in changes:
        threads = running.total()
        for one in running if threads < cores else ():
            waiting[one] += (at - since) * (cores - threads) * running[one] / threads
        if since and not threads:
            waiting[BETWEEN] += (at - since) * cores
        running[name] += change
        if not running[name]:
            del running[name]
        since = at
    return +waiting  # without those of 0


def peer_times(python: Path, spec: dict[str, Any], steps: int) -> Times:
    """Returns the times by operator of compiled PyTorch."""
    command = [str(python), "-c", TORCH, json.dumps(spec), str(steps), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: the peer failed:\n{done.stderr[-2000:]}")
    by_name, *seconds = json.loads(done.stdout.splitlines()[-1])
    medians = (1e3 * statistics.median(one) for one in seconds)
    return Times(by_name, by_kind_of_peer(by_name), Counter(), Counter(), *medians)


def by_kind_of_peer(by_name: dict[str, float]) -> Counter[str]:
    """Sums the times of torch's operators by kind of work."""
    parts = {
        "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
        "attention": ("scaled_dot_product",),
        "optimizer": ("adamw", "Optimizer.", "linalg_vector_norm", "_foreach", "aten::mul_", "aten::clamp"),
        RECORD: ("aten::copy_", "aten::fill_"),
    }
    sums: Counter[str] = Counter()
    for name, milliseconds in by_name.items():
        found = (kind for kind, names in parts.items() if any(part in name for part in names))
        sums[next(found, POINTWISE)] += milliseconds
    return sums


def comparison(ours: Times, peer: Times) -> Table:
    """Returns the times by kind of work, and of the whole step."""
    cores = os.cpu_count()
    table = Table(
        "Both, by kind of work",
        {"": "", "jaxtrain, ms": ".1f", "waiting, ms": ".1f", "torch.compile, ms": ".1f", "difference": "+.1f"},
        notes=[
            f"Per step. jaxtrain: time of all threads, divided by {cores} cores; torch: the calling thread. Waiting: "
            f"idle cores while an operation of this kind runs, divided by {cores}; part of the difference. A thread "
            "that waits for its own sum may help with another's product: its time counts for the sum."
        ],
    )
    for kind in KINDS:
        mine, idle, theirs = ours.by_kind[kind], ours.waiting_by_kind[kind], peer.by_kind[kind]
        table.rows.append([kind, mine, idle, theirs, mine + idle - theirs])
        if kind == "attention":
            table.rows += [[part, ours.by_kind[part], ours.waiting_by_kind[part], None, None] for part in ATTENTION]
    idle, rest = ours.waiting_by_kind[BETWEEN], max(0.0, peer.traced - peer.by_kind.total())
    table.rows.append([BETWEEN, None, idle, rest, idle - rest])
    for name, mine, theirs in (
        ("step under the profiler", ours.traced, peer.traced),
        ("step without it", ours.plain, peer.plain),
    ):
        table.rows.append([name, mine, None, theirs, mine - theirs])
    for name, _, idle, _, lost in sorted(table.rows[:-2], key=lambda row: -(row[-1] or 0)):
        if name in KINDS and lost > 0.01 * peer.plain:
            table.notes.append(f"Slower by {lost:.1f} ms, {name}, {idle:.1f} of them waiting: {KINDS[name]}.")
    waiting = sum(ours.waiting_by_kind[kind] for kind in (*KINDS, BETWEEN))
    table.notes.append(f"Without waiting the step would take {ours.plain - waiting:.1f} ms.")
    return table


def table_of(title: str, threads: str, times: dict[str, float], top: int, waiting: Counter[str] | None = None) -> Table:
    """Returns the longest operations, and the sum of the others; with the time of cores that are idle meanwhile."""
    names = [name for name, _ in sorted(times.items(), key=lambda row: -row[1])]
    groups = {name: [name] for name in names[:top]} | {"others": names[top:], "total": names}
    table = Table(title, {"operation": "", "ms / step": ".2f", "share": ".1%"}, notes=[f"Time of {threads}."])
    for label, group in groups.items():
        value = sum(times[name] for name in group)
        table.rows.append([label, value, value / sum(times.values())])
    if waiting is not None:
        table.columns["a core idle, ms"] = ".2f"
        for row, group in zip(table.rows, groups.values(), strict=True):
            row.append(sum(waiting[name] for name in group))
    return table


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("config", help="config file")
    arguments.add_argument("--steps", type=int, default=5, help="traced steps")
    arguments.add_argument("--top", type=int, default=14, help="operations to print")
    arguments.add_argument("--peer-python", type=Path, required=True, help="Python with torch and transformers")
    options, flags = arguments.parse_known_args()
    if not options.peer_python.exists():
        sys.exit(f"error: no Python at {options.peer_python}: name one with torch and transformers")
    from jaxtrain.runtime.flags import parse_config

    config = parse_config([options.config, *flags])
    ours, model = ours_times(config, options.steps)
    peer = peer_times(options.peer_python, peer_spec(config, model, compiled=True), options.steps)
    report(
        options,
        [
            comparison(ours, peer),
            table_of("jaxtrain", "all threads, added", ours.by_name, options.top, ours.waiting),
            table_of("torch.compile", "the calling thread", peer.by_name, options.top),
        ],
    )


if __name__ == "__main__":
    main()
