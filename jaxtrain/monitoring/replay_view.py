"""A replayed step as tables."""

import sys
from typing import Any

import rich.box
import rich.console
import rich.table
from rich.text import Text

_SHOWN_ROWS = 10
_SHOWN_DIFFERENCES = 10
_WIDTH = 120  # where the output is no terminal


def show(result: dict[str, Any]) -> None:
    """Prints what `replay` returns."""
    console = rich.console.Console(soft_wrap=not sys.stdout.isatty(), highlight=False, markup=False)
    if not sys.stdout.isatty():
        console.width = _WIDTH
    start = f"the checkpoint of step {result['from_step']}" if result["from_step"] else "the start"
    console.print(f"step {result['step']}, from {start}")
    for note in result["notes"]:
        console.print(note)
    console.print(_verdict(result))
    if result["differences"]:
        rows = [
            (str(one["step"]), one["metric"], _exact(one["logged"]), _exact(one["replayed"]))
            for one in result["differences"][:_SHOWN_DIFFERENCES]
        ]
        console.print(_table(("step", "metric", "logged", "replayed"), rows, left=("metric",)))
    logged = result["logged"] or {}
    metrics = [
        (name, _exact(value), _exact(logged[name]) if name in logged else "")
        for name, value in result["metrics"].items()
    ]
    console.print(_table(("metric", "replayed", "logged"), metrics, left=("metric",)))
    names = ("micro_batch", "loss", "nll", "tokens", "grad_norm")
    console.print(_table(names, [tuple(_short(one[name]) for name in names) for one in result["micro_batches"]]))
    names = ("name", "grad_norm", "param_norm", "update_norm", "update_ratio")
    layers = [(one["name"], *(_short(one[name]) for name in names[1:])) for one in result["layers"]]
    console.print(_table(("layer", *names[1:]), layers, left=("layer",)))
    rows = [
        (
            f"{one['row']}",
            f"{one['micro_batch']}",
            _short(one["nll"]),
            _span(one["documents"][0], one["documents"][1] + 1),
            _span(*one["tokens"]),
            f"{one['repeated_tokens']} of {one['repeated_period']}" if one["repeated_tokens"] else "",
            one["text"],
        )
        for one in result["rows"][:_SHOWN_ROWS]
    ]
    head = ("row", "micro_batch", "nll", "documents", "tokens", "repeats", "text")
    console.print(_table(head, rows, left=("text",)))
    if len(result["rows"]) > _SHOWN_ROWS:
        console.print(f"the {_SHOWN_ROWS} rows of the largest loss, of {len(result['rows'])}; --json has all")


def _verdict(result: dict[str, Any]) -> str:
    steps = result["compared_steps"]
    if not steps:
        return "none of the steps from there on was logged (train.log_every): nothing to compare with"
    which = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} logged steps, {steps[0]} to {steps[-1]}"
    if result["reproduces"]:
        return f"reproduces bit for bit: {which}"
    return f"does not reproduce: {len(result['differences'])} metrics of {which} differ"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], left: tuple[str, ...] = ()) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for name in head:
        no_wrap = name == "text"
        table.add_column(
            name,
            justify="left" if name in left else "right",
            no_wrap=no_wrap,
            overflow="ellipsis" if no_wrap else "fold",
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _exact(value: Any) -> str:
    if isinstance(value, list) or getattr(value, "ndim", 0):
        return " ".join(_exact(item) for item in value)
    # float32 values, with the digits that give the same float32 back
    return str(value) if isinstance(value, int) else f"{float(value):.9g}"


def _short(value: float) -> str:
    return f"{value:,.6g}"


def _span(start: int, stop: int) -> str:
    return f"{start}" if stop == start + 1 else f"{start}:{stop}"
