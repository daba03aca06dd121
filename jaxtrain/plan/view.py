"""`jaxtrain plan`: estimates by formula and the compiler's answer, as tables or as JSON."""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from jaxtrain.config import Config
from jaxtrain.monitoring.tables import format_bytes, format_seconds, format_table
from jaxtrain.plan.compiler import CompilerMissing, compile_step, search_batch
from jaxtrain.plan.formulas import Plan, make_plan, plan_vocab
from jaxtrain.plan.traffic import replaced_gathers
from jaxtrain.runtime.chips import Chip, find_chip, parse_topology
from jaxtrain.runtime.terminal import echo


def plan(config: Config, options: Any) -> None:
    """Prints the plan of a config, with the options of `commands.train.PlanOptions`.

    Raises a ValueError for an unknown chip or a config that does not fit, and an OSError if the compiler fails.
    """
    vocab_size = plan_vocab(config)
    chip, num_devices = _devices(config, options)
    settings = {"mfu": options.mfu, "price": options.price}
    formulas = make_plan(config, vocab_size, num_devices, chip, **settings)
    compiled, note = None, "by formula: give --topology, such as v5p:2x2x2, or h100:8, to ask its compiler"
    if options.topology:
        try:
            compiled, tries = _compile(config, vocab_size, options, formulas)
            note = ""
        except CompilerMissing as missing:
            note = f"by formula only, {missing}"
    if compiled and options.max_batch and compiled["fits"]:
        train = dataclasses.replace(config.train, batch_size=compiled["batch_size"])
        config = dataclasses.replace(config, train=train)
        formulas = make_plan(config, vocab_size, num_devices, chip, **settings)
    result = _result(config, formulas, chip, compiled, note)
    if compiled and options.max_batch:
        fitting = [one["batch_size"] for one in tries if one["fits"]]
        names = ("batch_size", "fits", "peak_bytes_per_device", "needed_bytes_per_device", "compile_seconds")
        shown = [{name: one[name] for name in names if name in one} for one in tries]
        result |= {"max_batch": max(fitting, default=0), "tries": shown}
    if options.json:
        echo(json.dumps(result), verbatim=True)
    else:
        _show(config, formulas, chip, options, result)


def _devices(config: Config, options: Any) -> tuple[Chip | None, int]:
    if options.topology:
        if options.devices or options.chip:
            raise ValueError("--topology already names the chips and their number: leave out --devices and --chip")
        return parse_topology(options.topology)
    if options.max_batch:
        raise ValueError("--max-batch needs the compiler: give a --topology, such as v5p:2x2x2")
    sizes = dataclasses.asdict(config.mesh).values()
    named = math.prod(size for size in sizes if size != -1)
    return find_chip(options.chip) if options.chip else None, named if options.devices is None else options.devices


def _compile(
    config: Config, vocab_size: int, options: Any, formulas: Plan
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the compiler's answer, with --max-batch for the largest batch that fits, and all tries."""
    stream = sys.stderr if options.json else sys.stdout
    arguments = {"vocab_size": vocab_size, "topology": options.topology, "timeout": options.timeout}
    compile_config = functools.partial(compile_step, **arguments)
    if not options.max_batch:
        if not options.json:
            echo(f"compiling the train step for {options.topology}: this takes minutes", flush=True)
        return {"batch_size": config.train.batch_size} | compile_config(config), []
    unit = config.train.accumulate * formulas.mesh["data"] * formulas.mesh["fsdp"]
    tries = []
    for answer in search_batch(config, unit, compile_config):
        tries.append(answer)
        outcome = f"{'fits' if answer['fits'] else 'does not fit'}, {_amount(answer)}"
        echo(f"batch {answer['batch_size']}: {outcome}, {answer['compile_seconds']:.0f} s", file=stream, flush=True)
    fitting = [one for one in tries if one["fits"]]
    return max(fitting, key=lambda one: one["batch_size"], default=tries[-1]), tries


def _result(
    config: Config, formulas: Plan, chip: Chip | None, compiled: dict[str, Any] | None, note: str
) -> dict[str, Any]:
    """Returns the JSON object. By formula, the arguments are the state and the temporaries are the rest."""
    values = formulas._asdict()
    memory, traffic, cost = (values.pop(name) for name in ("memory", "traffic", "cost"))
    result = {
        "compiled": compiled is not None,
        "note": note,
        "chip": chip and chip.name,
        **values,
        "batch_size": config.train.batch_size,
        "formula_bytes_per_device": memory._asdict() | {"peak": memory.peak},
        "cost": cost and cost._asdict(),
    }
    if compiled is not None:
        warning = replaced_gathers(traffic, compiled.get("collectives", []), formulas.mesh)
        return result | compiled | {"warning": warning if compiled["fits"] else None}
    return result | {
        "hbm_bytes": chip and chip.hbm_bytes,
        "fits": memory.peak <= chip.hbm_bytes if chip else None,
        "argument_bytes_per_device": memory.state,
        "temporary_bytes_per_device": memory.peak - memory.state,
        "collectives": [{"kind": o.kind, "axes": list(o.axes), "bytes": o.num_bytes, "what": o.what} for o in traffic],
    }


def _show(config: Config, formulas: Plan, chip: Chip | None, options: Any, result: dict[str, Any]) -> None:
    where = options.topology or (chip.name if chip else "unnamed chips")
    mesh = " x ".join(f"{name} {size}" for name, size in formulas.mesh.items())
    echo(f"{formulas.num_devices} devices ({where}): {mesh}")
    _print_table(("the run", ""), _run_rows(config, formulas, result))
    _print_table(("memory by formula", "per device", "all devices"), _memory_rows(formulas))
    if result["compiled"]:
        _print_table((f"memory by the {chip.compiler}", "per device"), _compiled_rows(result))
        if result["fits"]:
            rows = [
                [row["kind"], ", ".join(row["axes"]), row["dtype"], f"{row['count']:,}"]
                + [format_bytes(row[name]) for name in ("bytes", "blocking_bytes")]
                for row in result["collectives"]
            ]
            _print_table(("collectives", "axes", "dtype", "arrays per step", "per device", "of which block"), rows)
            _print_table(("operations", "compiler's cycles", "memory traffic"), _cost_rows(result["costs"]))
            kernels = result.get("kernels", {})
            _print_table(("kernels", "in the program"), [(name, str(count)) for name, count in kernels.items()])
    else:
        rows = [(one.kind, ", ".join(one.axes), one.what, format_bytes(one.num_bytes)) for one in formulas.traffic]
        _print_table(("collectives by formula", "axes", "of what", "per device and step"), rows)
    if result["fits"] is not None:
        echo(f"{'fits' if result['fits'] else 'does not fit'} {chip.name}: {_amount(result)}")
    more = (result.get("caveat"), result.get("warning"), result["note"])
    for line in filter(None, (*result.get("refused_options", ()), *more)):
        echo(line)


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if rows:
        echo("\n" + format_table(head, rows, left=("axes", "dtype", "of what")) + "\n")


def _run_rows(config: Config, formulas: Plan, result: dict[str, Any]) -> list[tuple[str, ...]]:
    settings, cost = config.train, formulas.cost
    some = formulas.num_active < formulas.num_params
    active = f", of which a token uses {formulas.num_active:,}" if some else ""
    rows = [
        ("parameters", f"{formulas.num_params:,}{active}"),
        ("tokens per step", f"{settings.batch_size} x {settings.seq_len} = {formulas.tokens_per_step:,}"),
        ("tokens in total", f"{settings.steps:,} steps: {formulas.tokens / 1e9:,.4g} billion"),
        ("FLOPs per step", f"{formulas.flops_per_step:.4g}"),
    ]
    if cost is not None:
        rows += [
            (f"tokens per second at {cost.mfu:.0%} MFU", f"{cost.tokens_per_second:,.0f}"),
            ("seconds per step", f"{cost.step_seconds:.3f}"),
            ("time", f"{format_seconds(cost.days * 86400)}, {cost.chip_hours:,.0f} chip-hours"),
        ]
        if cost.price is not None:
            rows.append(("cost", f"{cost.price:,.0f}"))
    if seconds := result.get("estimated_seconds"):
        rows.append(("seconds per step, the compiler's estimate", f"{seconds:.3g}"))
    return rows


def _memory_rows(formulas: Plan) -> list[tuple[str, ...]]:
    names = {
        "parameters": "parameters, float32",
        "optimizer": "both moments",
        "gradients": "gradients",
        "compute_copy": "parameters in the compute dtype",
        "gathered": "gathered weights, gradient of the head",
        "activations": "activations saved for the backward pass",
        "layer": "one layer's backward pass",
        "logits": "logits of one chunk",
    }
    memory = formulas.memory
    sizes = {names[name]: size for name, size in memory._asdict().items()}
    sizes |= {"total": memory.peak, "of which the state": memory.state}
    return [(name, format_bytes(size), format_bytes(size * formulas.num_devices)) for name, size in sizes.items()]


def _compiled_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    if not result["fits"]:
        return [("needed", _amount(result)), ("compiler message", result["message"])]
    sizes = {
        "arguments: the state and a batch": result["argument_bytes_per_device"],
        "temporaries, at the peak": result["temporary_bytes_per_device"],
        "temporaries, the compiler's sum": result["temporary_sum_bytes_per_device"],
        "outputs without a donated argument": result["output_bytes_per_device"] - result["alias_bytes_per_device"],
        "code": result["code_bytes_per_device"],
        "total, at the peak": result["peak_bytes_per_device"],
    }
    host = result["host_bytes_per_device"]
    return [(name, format_bytes(size)) for name, size in (sizes | ({"in host memory": host} if host else {})).items()]


def _cost_rows(costs: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = [(row["part"], row["cycles"], row["bytes"]) for row in costs]
    rows.append(("total", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    return [(part, f"{c / 1e6:,.1f} million" if c else "-", format_bytes(size)) for part, c, size in rows]


def _amount(result: dict[str, Any]) -> str:
    if not result.get("compiled", True):
        needed = result["formula_bytes_per_device"]["peak"]
    else:
        needed = result["peak_bytes_per_device" if result["fits"] else "needed_bytes_per_device"]
    return f"{'more' if needed is None else format_bytes(needed)} of {format_bytes(result['hbm_bytes'])}"
