"""Replayed step as tables."""

from typing import Any

from jaxtrain.monitoring.tables import format_table, format_value
from jaxtrain.runtime.terminal import echo

_SHOWN = 10  # differences and rows


def show(result: dict[str, Any]) -> None:
    """Prints the result of `replay`."""
    start = f"the checkpoint of step {result['from_step']}" if result["from_step"] else "the start"
    echo(f"step {result['step']}, from {start}")
    for note in result["notes"]:
        echo(note)
    echo(_verdict(result), end="\n\n")
    if result["differences"]:
        head = ("step", "metric", "logged", "replayed")
        rows = [[str(one[k]) if k in head[:2] else _exact(one[k]) for k in head] for one in result["differences"]]
        echo(format_table(head, rows[:_SHOWN], left=("metric",)), end="\n\n")
    logged = result["logged"] or {}
    rows = [[k, _exact(value), _exact(logged[k]) if k in logged else ""] for k, value in result["metrics"].items()]
    covered = logged.get("steps", 1)
    title = "logged" if covered == 1 else f"logged for {covered} steps"
    echo(format_table(("metric", "replayed", title), rows), end="\n\n")
    for key, head in (
        ("micro_batches", ("micro_batch", "loss", "nll", "tokens", "grad_norm")),
        ("layers", ("name", "grad_norm", "param_norm", "update_norm", "update_ratio")),
    ):
        rows = [[format_value(one[name]) for name in head] for one in result[key]]
        echo(format_table([name.replace("name", "layer") for name in head], rows), end="\n\n")
    head = ("row", "micro_batch", "nll", "documents", "tokens", "repeats", "text")
    echo(format_table(head, [_row(one) for one in result["rows"][:_SHOWN]], left=("text",), cut=("text",)))
    if len(result["rows"]) > _SHOWN:
        echo(f"the {_SHOWN} rows with the largest loss, of {len(result['rows'])}; --json prints all")


def _verdict(result: dict[str, Any]) -> str:
    steps = result["compared_steps"]
    if not steps:
        return "none of the replayed steps was logged (train.log_every): nothing to compare with"
    which = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} logged steps, {steps[0]} to {steps[-1]}"
    if result["reproduces"]:
        return f"reproduces bit for bit: {which}"
    return f"does not reproduce: {len(result['differences'])} metrics of {which} differ"


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    documents = _span(row["documents"][0], row["documents"][1] + 1)
    repeats = f"{row['repeated_tokens']} of {row['repeated_period']}" if row["repeated_tokens"] else ""
    place = (str(row["row"]), str(row["micro_batch"]), format_value(row["nll"]), documents, _span(*row["tokens"]))
    return (*place, repeats, row["text"])


def _exact(value: Any) -> str:
    if isinstance(value, list) or getattr(value, "ndim", 0):
        return " ".join(_exact(item) for item in value)
    return str(value) if isinstance(value, int) else f"{float(value):.9g}"  # nine digits restore a float32


def _span(start: int, stop: int) -> str:
    return f"{start}" if stop == start + 1 else f"{start}:{stop}"
