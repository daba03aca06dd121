#!/usr/bin/env python
"""Time of the train step's operations on a CPU, beside those of the same step in compiled PyTorch.

Traces some steps of both: JAX by the kind of the HLO instruction, torch by the name of the operator. Each moment of a
thread counts for the innermost operation. Milliseconds of JAX are summed over its threads, so that they exceed those of
a step; torch's profiler counts the calling thread alone.

  python scripts/bench_operations.py configs/gpt2_124m.py --peer-python .venv-torch/bin/python --steps 5 \\
      --train.batch-size=8 --train.accumulate=1 --train.precision=float32

Other flags change the config, as those of `jaxtrain train` do.
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from bench_train import peer_spec
from benchmark import Table, parser, report

TORCH = """
import json, sys; sys.path.insert(0, sys.argv[3])
import torch
from peer_torch import Trainer
trainer, steps = Trainer(json.loads(sys.argv[1])), int(sys.argv[2])
trainer.run(3)
with torch.profiler.profile() as profile:
    trainer.run(steps)
print(json.dumps({one.key: one.self_cpu_time_total / 1e3 / (steps + 1) for one in profile.key_averages()}))
"""


def ours_times(config: Any, steps: int) -> tuple[dict[str, float], Any]:
    """Returns milliseconds per step by scope and kind of the instruction, and the built model's config."""
    import jax
    from bench_train import Ours

    from jaxtrain.monitoring.profile import scopes_of
    from jaxtrain.monitoring.trace import OTHER, busy_times, read_lines
    from jaxtrain.runtime.hlo import HloModule

    ours = Ours(config)
    text = ours.text()
    scopes = scopes_of(text)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            ours.run(steps)
        (file,) = Path(folder).rglob("*.xplane.pb")
        busy = busy_times(list(read_lines(file, text.split(",")[0].removeprefix("HloModule "))))
    module = HloModule(text)
    kinds = {line.name: line.opcode for lines in module.computations.values() for line in lines}
    for line in [line for lines in module.computations.values() for line in lines if line.opcode == "fusion"]:
        if any(one.opcode == "dot" for name in line.called for one in module.computations[name]):
            kinds[line.name] = "fusion with dot"
    found: Counter[str] = Counter()
    for name, nanoseconds in busy.items():
        found[f"{scopes.get(name, OTHER)}: {kinds.get(name, name)}"] += nanoseconds / 1e6 / (steps + 1)
    return found, ours.model


def peer_times(python: Path, spec: dict[str, Any], steps: int) -> dict[str, float]:
    """Returns milliseconds per step by operator of compiled PyTorch."""
    command = [str(python), "-c", TORCH, json.dumps(spec), str(steps), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: the peer failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


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
            table_of("jaxtrain", "all threads, added", ours, options.top),
            table_of("torch.compile", "the calling thread", peer, options.top),
        ],
    )


if __name__ == "__main__":
    main()
