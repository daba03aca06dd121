#!/usr/bin/env python
"""Costs of the compiled train step by part, for several forms of a config or of the code. Needs no accelerator.

Compiles with the compiler of the chips (extra `plan` or `plan-gpu`), which need not exist, and prints temporaries,
memory traffic and, for TPUs, the compiler's cycles (see jaxtrain/plan/costs.py). A form is the config with more flags,
or with the jaxtrain of another checkout. `--optimizer` compiles what follows the gradients, which are then an argument.

  python scripts/bench_compiled.py configs/llama2_7b.py --topology v5p:2x2x2 --train.batch-size 16 \\
      --model.num-layers 4 --form "--train.no-tune-compiler" --form "--model.remat minimal"
  git worktree add ../before HEAD~1
  python scripts/bench_compiled.py configs/llama2_7b.py --topology v5p:2x2x2 --optimizer --checkout ../before
  python scripts/bench_compiled.py configs/llama_1b.py --topology h200:1 --optimizer --checkout ../before

Other flags change the config of all forms, as those of `jaxtrain train` do.
"""

import importlib.util
import inspect
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmark import Table, parser, report

from jaxtrain.plan.compiler import ENVIRONMENT
from jaxtrain.plan.costs import part_costs
from jaxtrain.runtime.chips import parse_topology


def compile_form(arguments: list[str], folder: Path) -> None:
    """Compiles one form in this process; writes the program and its memory into a folder.

    Args:
      arguments: topology, "optimizer" or "step", and the config with its flags.
      folder: receives program.hlo and memory.json.
    """
    import jax
    from jax.experimental import topologies

    from jaxtrain.plan.formulas import plan_vocab
    from jaxtrain.runtime.flags import parse_config
    from jaxtrain.runtime.mesh import make_mesh
    from jaxtrain.training.program import make_program

    topology, what, *words = arguments
    config = parse_config(words)
    chip, _ = parse_topology(topology)
    if chip.platform == "gpu":
        from jaxtrain.plan.gpu import target_devices

        devices = target_devices(chip, topology.partition(":")[2])
    else:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(config.mesh, devices)
    program = make_program(config, mesh, plan_vocab(config))
    if what == "optimizer":
        compiled = lower_optimizer(config, program).compile()
    else:
        arguments = program.abstract_state, program.abstract_batch
        if hasattr(program, "compile"):
            compiled = program.compile(*arguments, print).executable
        else:  # of an older checkout
            compiled = program.train_step.lower(*arguments).compile()
    memory = compiled.memory_analysis()
    (folder / "program.hlo").write_text(compiled.as_text())
    peak = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
    sizes = {
        "temporary_bytes": memory.temp_size_in_bytes if chip.platform == "gpu" else peak,
        "parameters": sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(program.abstract_state.params)
        ),
    }
    (folder / "memory.json").write_text(json.dumps(sizes))


def lower_optimizer(config: Any, program: Any) -> Any:
    """Lowers the part of a train step that follows the gradients, which are an argument in the compute dtype."""
    import jax
    import jax.numpy as jnp

    from jaxtrain.losses import LossSums
    from jaxtrain.runtime.mesh import replicated
    from jaxtrain.step import make_train_step
    from jaxtrain.training import components

    def given(gradients):
        del gradients

        def from_batch(params, batch):
            zero = jnp.float32(0)
            sums = LossSums(batch["loss"], zero, zero, jnp.float32(config.train.batch_size * config.train.seq_len))
            return (sums, {}), jax.tree.map(lambda g: g.astype(jnp.float32), batch["gradients"])

        return from_batch

    # An older checkout's optimizer is the same on every platform.
    given_platform = "platform" in inspect.signature(components.make_optimizer).parameters
    platform = [program.mesh.devices.flat[0].platform] if given_platform else []
    state, optimizer = program.abstract_state, components.make_optimizer(config, *platform)
    step = make_train_step(
        lambda params, batch: None, optimizer, map_gradients=given, diagnose=components.make_diagnose(config)
    )
    gradients = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, config.train.precision, sharding=p.sharding), state.params
    )
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(program.mesh))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(program.mesh)))
    return jitted.lower(state, {"loss": scalar, "gradients": gradients})


def measure(checkout: Path, arguments: list[str]) -> dict[str, Any]:
    """Compiles a form with the jaxtrain of a checkout, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--compile", folder, *arguments]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(checkout)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"error: {shlex.join(arguments)} does not compile:\n{done.stderr[-2000:]}")
        sizes = json.loads(Path(folder, "memory.json").read_text())
        return {**sizes, "costs": part_costs(Path(folder, "program.hlo").read_text())}


def tabulate(title: str, forms: dict[str, dict[str, Any]]) -> Table:
    """Returns a table with a row for each part, and two columns for each form."""
    columns = {"": ""}
    for name in forms:
        columns |= {f"{name}: Mcycles": ",.1f", f"{name}: GB": ",.2f"}
    table = Table(title, columns)
    parts = dict.fromkeys(row["part"] for form in forms.values() for row in form["costs"])
    for part in parts:
        cells = []
        for form in forms.values():
            row = next((row for row in form["costs"] if row["part"] == part), {"cycles": 0, "bytes": 0})
            cells += [row["cycles"] / 1e6, row["bytes"] / 1e9]
        table.rows.append([part, *cells])
    table.rows.append(["total", *(sum(row[i] for row in table.rows) for i in range(1, len(columns)))])
    rest = {"temporaries": lambda form: form["temporary_bytes"] / 1e9}
    rest["bytes per parameter"] = lambda form: sum(row["bytes"] for row in form["costs"]) / form["parameters"]
    for name, value in rest.items():
        table.rows.append([name, *(cell for form in forms.values() for cell in (None, value(form)))])
    table.notes.append("Per chip and step. The compiler estimates no cycles for Pallas kernels and collectives.")
    return table


def main() -> None:
    if sys.argv[1:2] == ["--compile"]:
        return compile_form(sys.argv[3:], Path(sys.argv[2]))
    from jaxtrain.plan.compiler import _COMPILERS  # which an older checkout lacks

    arguments = parser(__doc__)
    arguments.add_argument("config", help="config file")
    arguments.add_argument("--topology", required=True, help="TPU slice or GPUs: v5p:2x2x2, h200:1")
    arguments.add_argument("--optimizer", action="store_true", help="only what follows the gradients")
    arguments.add_argument("--form", action="append", default=[], metavar="FLAGS", help="the config with more flags")
    arguments.add_argument("--checkout", type=Path, help="another checkout, whose jaxtrain compiles the config first")
    options, flags = arguments.parse_known_args()
    try:
        platform = parse_topology(options.topology)[0].platform
    except ValueError as error:
        sys.exit(f"error: {error}")
    modules, extra = _COMPILERS[platform]
    if not any(map(importlib.util.find_spec, modules)):
        sys.exit(f'error: no {platform.upper()} compiler: pip install -e ".[{extra}]"')
    here, what = Path(__file__).resolve().parents[1], "optimizer" if options.optimizer else "step"
    common = [options.topology, what, options.config, *flags]
    forms = {}
    if options.checkout:
        show = ["git", "-C", str(options.checkout), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip()
        forms[commit] = measure(options.checkout.resolve(), common)
    for form in ["", *options.form]:
        forms[form.strip() or "as it is"] = measure(here, [*common, *shlex.split(form)])
    title = f"Compiled {what} of {options.config} for {options.topology}: {' '.join(flags) or 'as it is'}"
    report(options, [tabulate(title, forms)])
    return None


if __name__ == "__main__":
    main()
