"""What the benchmarks share: interleaved timing, tables, and the JSON record that BENCHMARKS.md is made of."""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "jaxtrain")


@dataclass
class Table:
    """A table of figures.

    `columns` gives each name the format of its numbers (`.3f`); what is text or None is shown as it is. `notes` are
    lines under the table: what was compared, by which formula.
    """

    title: str
    columns: dict[str, str]
    rows: list[list[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        """Head and rows as text."""
        return [list(self.columns), *([_format(x, self.columns[c]) for c, x in self.pair(row)] for row in self.rows)]

    def pair(self, row: list[Any]) -> Iterable[tuple[str, Any]]:
        """The columns' names with a row's values."""
        return zip(self.columns, row, strict=True)

    def text(self) -> str:
        """The table for a terminal."""
        cells = self.cells()
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(x.rjust(width) for x, width in zip(row[1:], widths[1:], strict=True))]
            )
            for row in cells
        ]
        return "\n".join(["", self.title, *lines, *self.notes])

    def markdown(self) -> str:
        """The table for BENCHMARKS.md."""
        head, *rows = self.cells()
        rule = ["---", *["---:"] * (len(head) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]
        return "\n".join([f"**{self.title}**", "", *lines, *(f"\n{note}" for note in self.notes)])


def _format(value: Any, spec: str) -> str:
    return "-" if value is None else value if isinstance(value, str) else format(value, spec)


def parser(description: str) -> argparse.ArgumentParser:
    """A command line with what every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, help="write the figures, versions, device and command here")
    return made


def interleave(forms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, one of each form and then again, so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, function in forms.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(options: argparse.Namespace, tables: list[Table], **more: Any) -> None:
    """Prints the tables, and writes the record if `--json` asks for it; `more` are figures that no table shows."""
    for table in tables:
        print(table.text(), flush=True)
    if options.json:
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items() if name != "json"}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "benchmark": Path(sys.argv[0]).name,
            "command": shlex.join(["python", *sys.argv]),
            "device": device(),
            "versions": versions(PACKAGES),
            "settings": settings,
            "tables": [asdict(table) for table in tables],
            **more,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def device() -> dict[str, Any]:
    """The machine and what jax runs on."""
    import jax

    first = jax.devices()[0]
    return {
        "kind": first.device_kind,
        "platform": first.platform,
        "count": jax.device_count(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }


def _processor() -> str:
    """The processor's own name and its widest vectors, on which a matrix product depends and names are silent."""
    info = Path("/proc/cpuinfo")  # `platform` has only the family on Linux
    pairs = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in reversed(pairs)}  # the first core's stay
    flags = fields.get("flags", "").split()
    vectors = next((f" with {name}" for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    return fields.get("model name", platform.processor() or platform.machine()) + vectors


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
