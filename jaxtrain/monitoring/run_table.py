"""Table of the runs in a folder."""

from pathlib import Path
from typing import Any

from jaxtrain.fields import check_choice
from jaxtrain.monitoring.metrics import encode
from jaxtrain.monitoring.run_record import differing_fields, find_runs, read_record
from jaxtrain.monitoring.tables import format_seconds, format_table
from jaxtrain.runtime.terminal import echo

Row = dict[str, Any]

# Columns of the table, with the fact that each sorts by.
_COLUMNS = {
    "name": "name",
    "state": "state",
    "steps": "step",
    "validation": "validation_loss",
    "tokens/s": "tokens_per_second",
    "time": "train_seconds",
}


def read_rows(folder: str | Path) -> list[Row]:
    """Returns the facts of each run in a folder, as JSON values, with the config fields that differ.

    A directory that cannot be read has the state `broken` and `problem` instead. Raises a ValueError without a run.
    """
    folder = Path(folder)
    paths = find_runs(folder)
    if not paths:
        raise ValueError(f"{folder} holds no run directory: give a folder of `jaxtrain train`, such as runs")
    records, rows = [], []
    for path in paths:
        name = str(path.relative_to(folder)) if path != folder else path.resolve().name
        try:
            record = read_record(path)
            rows.append({"name": name, "folder": str(path), **record.summary()})
            records.append((rows[-1], record))
        except Exception as error:  # one damaged run does not hide the others
            rows.append({"name": name, "folder": str(path), "state": "broken", "problem": str(error)})
    for field, values in differing_fields([record for _, record in records]).items():
        for (row, _), value in zip(records, values, strict=True):
            row.setdefault("config", {})[field] = value
    return encode(rows)


def sort_key(rows: list[Row], key: str) -> str:
    """Returns the column or config field that a key means, also by its last part; a ValueError if it means none."""
    fields = dict.fromkeys(field for row in rows for field in row.get("config", {}))
    meant = [field for field in fields if field.split(".")[-1] == key]
    return meant[0] if len(meant) == 1 else check_choice(key, [*_COLUMNS, *fields], "--sort")


def sort_rows(rows: list[Row], key: str, *, descending: bool = False) -> list[Row]:
    """Sorts rows; those without the value come last."""

    def value(row: Row) -> Any:
        return row.get(_COLUMNS[key]) if key in _COLUMNS else row.get("config", {}).get(key)

    known = [row for row in rows if value(row) is not None]
    numbers = all(isinstance(value(row), int | float) for row in known)
    known.sort(key=value if numbers else lambda row: str(value(row)), reverse=descending)
    return known + [row for row in rows if value(row) is None]


def show_rows(rows: list[Row]) -> None:
    """Prints rows as a table, and the problem of each broken run below it."""
    head = (*_COLUMNS, "config")
    echo(format_table(head, [_cells(row) for row in rows], left=("state", "config")))
    for row in rows:
        if "problem" in row:
            echo(f"{row['name']}: {row['problem']}")


def _cells(row: Row) -> tuple[str, ...]:
    if "problem" in row:
        return (row["name"], row["state"], *[""] * 5)
    loss, speed = row["validation_loss"], row["tokens_per_second"]
    config = " ".join(f"{field.split('.')[-1]}={value}" for field, value in row.get("config", {}).items())
    return (
        row["name"],
        row["state"],
        f"{row['step']:,}/{row['steps']:,}",
        f"{loss:.4f}" if isinstance(loss, float) else "",
        f"{speed:,.0f}" if speed else "",
        format_seconds(row["train_seconds"]),
        config,
    )
