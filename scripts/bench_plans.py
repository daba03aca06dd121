#!/usr/bin/env python
"""Memory and collectives of a config compiled for several topologies, none of which need exist.

Tables what `jaxtrain plan --topology` reports; needs the compiler of the chips (extra `plan` or `plan-gpu`).

  python scripts/bench_plans.py configs/llama3_8b.py --topology a100:8 h100:8 --rows 1 --mesh.fsdp 8
  python scripts/bench_plans.py configs/llama2_7b.py --topology v5p:4x4x4 v5p:4x8x8 --rows 2

Other flags change the config, as those of `jaxtrain train` do.
"""

import json
import subprocess
import sys
from typing import Any

from benchmark import Table, parser, report

from jaxtrain.runtime.chips import parse_topology

KINDS = ("all-gather", "reduce-scatter", "all-reduce")


def plan(config: str, topology: str, rows: int, flags: list[str]) -> dict[str, Any]:
    """Compiles the config for a topology; returns the answer of `jaxtrain plan --json`."""
    batch_size = rows * parse_topology(topology)[1]
    command = [sys.executable, "-m", "jaxtrain.cli", "plan", config, "--topology", topology, *flags]
    command += [f"--train.batch-size={batch_size}", "--train.accumulate=1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: no plan for {topology}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def row_of(topology: str, found: dict[str, Any]) -> list[Any]:
    """Returns the row of a plan: GB per chip and step, and whether the compiler replaces gathers."""

    def moved(key: str, *kinds: str) -> float:
        return sum(one[key] for one in found["collectives"] if one["kind"] in kinds) / 1e9

    memory = [found[f"{name}_bytes_per_device"] / 1e9 for name in ("argument", "temporary")]
    amounts = [moved("bytes", kind) for kind in KINDS]
    mesh = " x ".join(f"{name} {size}" for name, size in found["mesh"].items() if size > 1)
    return [topology, mesh, *memory, *amounts, moved("blocking_bytes", *KINDS), "yes" if found["warning"] else "no"]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("config", help="config file")
    arguments.add_argument("--topology", nargs="+", required=True, help="TPU slices or GPUs")
    arguments.add_argument("--rows", type=int, required=True, help="sequences per chip")
    options, flags = arguments.parse_known_args()
    columns = {"topology": "", "mesh": "", "state": ".2f", "temporaries": ".2f"}
    columns |= {f"{kind}s": ".2f" for kind in KINDS} | {"of these, blocking": ".2f", "gathers replaced": ""}
    table = Table(
        f"Plans of {options.config}, {options.rows} sequences per chip: {' '.join(flags) or 'as it is'}", columns
    )
    for topology in options.topology:
        table.rows.append(row_of(topology, plan(options.config, topology, options.rows, flags)))
    table.notes.append("GB per chip and step. A collective blocks if nothing runs beside it. Compiled, not run.")
    report(options, [table])


if __name__ == "__main__":
    main()
