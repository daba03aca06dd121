#!/usr/bin/env python
"""Time of the train step's operations on a CPU, beside those of the same step in compiled PyTorch.

Traces some steps of both: JAX by the kind of the HLO instruction, torch by the name of the operator. Each moment of a
thread counts for the innermost operation. The first table compares both by kind of work. In the other two, milliseconds
of JAX are summed over its threads, so that they exceed those of a step; torch's profiler counts the calling thread
alone.

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
    "waiting": "one thread works on an operation that is not divided, or both wait for the next one",
}
*_, POINTWISE, RECORD, WAITING = KINDS


class Times(NamedTuple):
    """Milliseconds per step.

    Attributes:
      by_name: By operation.
      by_kind: By kind of work, one of `KINDS`; as a share of the step, so over all threads at once.
      traced, plain: Of the step under the profiler and without it, median.
    """

    by_name: dict[str, float]
    by_kind: Counter[str]
    traced: float
    plain: float


def ours_times(config: Any, steps: int) -> tuple[Times, Any]:
    """Returns the times by scope and kind of the instruction, and the built model's config."""
    import jax
    from bench_train import Ours

    from jaxtrain.monitoring.profile import scopes_of
    from jaxtrain.monitoring.trace import OTHER, busy_times, read_lines
    from jaxtrain.runtime.hlo import HloModule

    ours = Ours(config)
    text = ours.text()
    scopes = scopes_of(text)
    plain = ours.run(steps)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            traced = ours.run(steps)
        (file,) = Path(folder).rglob("*.xplane.pb")
        busy = busy_times(list(read_lines(file, text.split(",")[0].removeprefix("HloModule "))))
    module = HloModule(text)
    lines = {line.name: line for lines in module.computations.values() for line in lines}
    fused = {name: line.called if line.opcode == "fusion" else () for name, line in lines.items()}
    inside = {
        name: [lines[name], *(one for called in names for one in module.computations[called])]
        for name, names in fused.items()
    }
    with_dot = {name for name, parts in inside.items() if any(one.opcode == "dot" for one in parts)}
    attends = {name for name, parts in inside.items() if any("_attend" in one.source for one in parts)}
    by_name: Counter[str] = Counter()
    by_kind: Counter[str] = Counter()
    for name, nanoseconds in busy.items():
        scope, milliseconds = scopes.get(name, OTHER), nanoseconds / 1e6 / (steps + 1)
        opcode = lines[name].opcode if name in lines else name
        by_name[f"{scope}: {opcode}{' with dot' * (opcode == 'fusion' and name in with_dot)}"] += milliseconds
        if name in attends:
            kind = "attention"
        elif name in with_dot:
            kind = "matrix products"
        else:
            kind = {"optimizer": "optimizer", OTHER: RECORD}.get(scope, POINTWISE)
        by_kind[kind] += milliseconds / os.cpu_count()
    return Times(by_name, by_kind, *(1e3 * statistics.median(seconds) for seconds in (traced, plain))), ours.model


def peer_times(python: Path, spec: dict[str, Any], steps: int) -> Times:
    """Returns the times by operator of compiled PyTorch."""
    command = [str(python), "-c", TORCH, json.dumps(spec), str(steps), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: the peer failed:\n{done.stderr[-2000:]}")
    by_name, *seconds = json.loads(done.stdout.splitlines()[-1])
    return Times(by_name, by_kind_of_peer(by_name), *(1e3 * statistics.median(one) for one in seconds))


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
    table = Table(
        "Both, by kind of work",
        {"": "", "jaxtrain, ms": ".1f", "torch.compile, ms": ".1f", "difference": "+.1f"},
        notes=[
            f"Per step. jaxtrain: time of all threads, divided by {os.cpu_count()} cores; torch: the calling thread. "
            "Waiting: the rest of the step under the profiler."
        ],
    )

    for times in (ours, peer):
        times.by_kind[WAITING] = max(0.0, times.traced - times.by_kind.total())
    rows = {kind: (ours.by_kind[kind], peer.by_kind[kind]) for kind in KINDS}
    rows |= {"step under the profiler": (ours.traced, peer.traced), "step without it": (ours.plain, peer.plain)}
    table.rows += [[name, mine, theirs, mine - theirs] for name, (mine, theirs) in rows.items()]
    for name, _, _, lost in sorted(table.rows[: len(KINDS)], key=lambda row: -row[-1]):
        if lost > 0.01 * peer.plain:
            table.notes.append(f"Slower by {lost:.1f} ms, {name}: {KINDS[name]}.")
    return table


def table_of(title: str, threads: str, times: dict[str, float], top: int) -> Table:
    """Returns the longest operations, and the sum of the others."""
    rows = sorted(times.items(), key=lambda row: -row[1])
    table = Table(title, {"operation": "", "ms / step": ".2f", "share": ".1%"}, notes=[f"Time of {threads}."])
    total, longest = sum(times.values()), rows[:top]
    for name, value in [*longest, ("others", sum(value for _, value in rows[top:])), ("total", total)]:
        table.rows.append([name, value, value / total])
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
            table_of("jaxtrain", "all threads, added", ours.by_name, options.top),
            table_of("torch.compile", "the calling thread", peer.by_name, options.top),
        ],
    )


if __name__ == "__main__":
    main()
