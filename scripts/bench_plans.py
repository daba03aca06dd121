#!/usr/bin/env python
"""Memory and collectives of a config compiled for several topologies, none of which need exist.

Tables what `jaxtrain plan --topology` reports; needs the compiler of the chips (extra `plan` or `plan-gpu`). On a
machine with these chips, --run also compiles the config for them, trains some steps, and compares.

  python scripts/bench_plans.py configs/llama3_8b.py --topology a100:8 h100:8 --rows 1 --mesh.fsdp 8
  python scripts/bench_plans.py configs/llama2_7b.py --topology v5p:4x4x4 v5p:4x8x8 --rows 2
  python scripts/bench_plans.py configs/gpt2_124m.py --topology h200:1 --rows 32 --run

Other flags change the config, as those of `jaxtrain train` do.
"""

import json
import subprocess
import sys
from typing import Any

from benchmark import Table, parser, report

from jaxtrain.plan.compiler import analyze
from jaxtrain.runtime.chips import parse_topology
from jaxtrain.runtime.flags import parse_config

KINDS = ("all-gather", "reduce-scatter", "all-reduce")


def arguments_of(config: str, topology: str, rows: int, flags: list[str]) -> list[str]:
    """Returns the config and its flags, with the batch for a topology."""
    return [config, *flags, f"--train.batch-size={rows * parse_topology(topology)[1]}", "--train.accumulate=1"]


def plan(topology: str, arguments: list[str]) -> dict[str, Any]:
    """Compiles a config for a topology; returns the answer of `jaxtrain plan --json`."""
    command = [sys.executable, "-m", "jaxtrain.cli", "plan", *arguments, "--topology", topology, "--json"]
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


def run(topology: str, arguments: list[str]) -> dict[str, Any]:
    """Compiles a config for the chips of this machine and runs it; returns a plan, and the peak of bytes in use."""
    import jax
    from bench_train import Ours

    chip, count = parse_topology(topology)
    if (jax.devices()[0].device_kind, jax.device_count()) != (chip.device_kind, count):
        raise SystemExit(
            f"error: --run needs {topology}; here are {jax.device_count()} x {jax.devices()[0].device_kind}"
        )
    ours = Ours(parse_config(arguments))
    shape = dict(ours.mesh.shape)
    return analyze(ours.executable, shape, chip) | {"mesh": shape, "warning": None, "peak_in_use": ours.peak_bytes()}


def compare(topology: str, planned: dict[str, Any], ran: dict[str, Any]) -> list[Table]:
    """Tables a plan beside the program of the real chips: GB per chip, and the kernels."""
    names = {
        "arguments": "argument_bytes_per_device",
        "temporaries": "temporary_bytes_per_device",
        "total at the peak": "peak_bytes_per_device",
        "peak in use, measured": "peak_in_use",
    }
    memory = Table(
        f"Memory on {topology}, GB per chip", {"": "", "planned": ".3f", "here": ".3f", "planned / here": ".3f"}
    )
    for name, key in names.items():
        there, here = planned.get(key, planned["peak_bytes_per_device"]) / 1e9, ran[key] / 1e9
        memory.rows.append([name, there, here, there / here])
    kernels = Table(f"Kernels in the program for {topology}", {"": "", "planned": "d", "here": "d"})
    for name in sorted(planned["kernels"] | ran["kernels"]):
        kernels.rows.append([name, planned["kernels"].get(name, 0), ran["kernels"].get(name, 0)])
    return [memory, kernels]


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("config", help="config file")
    arguments.add_argument("--topology", nargs="+", required=True, help="TPU slices or GPUs")
    arguments.add_argument("--rows", type=int, required=True, help="sequences per chip")
    arguments.add_argument("--run", action="store_true", help="compare with the chips of this machine")
    options, flags = arguments.parse_known_args()
    columns = {"topology": "", "mesh": "", "state": ".2f", "temporaries": ".2f"}
    columns |= {f"{kind}s": ".2f" for kind in KINDS} | {"of these, blocking": ".2f", "gathers replaced": ""}
    table = Table(
        f"Plans of {options.config}, {options.rows} sequences per chip: {' '.join(flags) or 'as it is'}", columns
    )
    tables = [table]
    for topology in options.topology:
        given = arguments_of(options.config, topology, options.rows, flags)
        planned = plan(topology, given)
        table.rows.append(row_of(topology, planned))
        if options.run:
            ran = run(topology, given)
            table.rows.append(row_of(f"{topology}, here", ran))
            tables += compare(topology, planned, ran)
    table.notes.append(
        "GB per chip and step. A collective blocks if nothing runs beside it. Compiled, not run"
        + ("; here: compiled on these chips, which tunes matrix products, and run." if options.run else ".")
    )
    report(options, tables)


if __name__ == "__main__":
    main()
