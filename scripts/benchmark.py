"""Shared by the benchmarks: interleaved timing, tables, and the JSON records behind docs/benchmarks.md."""

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
    """Table of figures.

    Attributes:
      columns: Format of the numbers of each column (`.3f`), by the name of the column. Text is copied; None is `-`.
      notes: Lines below the table: the compared forms and the formulas.
    """

    title: str
    columns: dict[str, str]
    rows: list[list[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        """Returns the head and the rows as text."""
        return [list(self.columns), *([_format(x, self.columns[c]) for c, x in self.pair(row)] for row in self.rows)]

    def pair(self, row: list[Any]) -> Iterable[tuple[str, Any]]:
        """Pairs the names of the columns with the values of a row."""
        return zip(self.columns, row, strict=True)

    def text(self) -> str:
        """Returns the table for a terminal."""
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
        """Returns the table in Markdown."""
        head, *rows = self.cells()
        rule = ["---", *["---:"] * (len(head) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]
        return "\n".join([f"**{self.title}**", "", *lines, *(f"\n{note}" for note in self.notes)])


def _format(value: Any, spec: str) -> str:
    return "-" if value is None else value if isinstance(value, str) else format(value, spec)


def parser(description: str) -> argparse.ArgumentParser:
    """Returns a command-line parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="record of the figures, versions, device and command")
    return made


def start_jax(large_matrices: bool = False) -> str:
    """Starts JAX as the commands do; returns its platform."""
    import jax

    from jaxtrain.runtime.memory import execute_inline, keep_freed_memory, share_arena

    execute_inline()
    if large_matrices:
        share_arena()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    return jax.default_backend()


def interleave(forms: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Times the forms in turn, `repeats` times, so that a busy machine slows all forms alike. Returns seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, function in forms.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(options: argparse.Namespace, tables: list[Table], **more: Any) -> None:
    """Prints the tables and, with `--json`, writes the record; `more` are figures beside the tables."""
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
    """Describes the machine and the JAX device."""
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
    """Returns the name of the processor and its widest vector extension, which decides the speed of matrix products."""
    info = Path("/proc/cpuinfo")  # on Linux, `platform` knows only the family
    pairs = [line.partition(":") for line in info.read_text().splitlines()] if info.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in reversed(pairs)}  # the first core wins
    flags = fields.get("flags", "").split()
    vectors = next((f" with {name}" for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in flags), "")
    return fields.get("model name", platform.processor() or platform.machine()) + vectors


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Returns the versions of the installed packages among `packages`."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
