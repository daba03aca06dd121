"""Text for people: tables, bytes and durations."""

import io
import math
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
from rich.text import Text

from jaxtrain.runtime.terminal import one_line

_WIDTH = 120  # characters, where standard output is not a terminal


def format_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str] = (), cut: Sequence[str] = ()
) -> str:
    """Formats a table as wide as the terminal, or 120 characters elsewhere.

    Args:
      left: titles of the columns that are aligned to the left; the first column always is.
      cut: titles of the columns whose cells are cut to one line; other cells are wrapped.

    >>> print(format_table(("schedule", "steps"), [("cosine", "1,000"), ("linear", "20")]))
    schedule   steps
    ────────────────
    cosine     1,000
    linear        20
    """
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in head:
        justify = "left" if name == head[0] or name in left else "right"
        overflow = "ellipsis" if name in cut else "fold"
        table.add_column(Text(one_line(name)), justify=justify, no_wrap=name in cut, overflow=overflow)
    for row in rows:
        table.add_row(*(Text(one_line(cell)) for cell in row))
    width = shutil.get_terminal_size((_WIDTH, 24)).columns if sys.stdout.isatty() else _WIDTH
    console = rich.console.Console(file=io.StringIO(), width=width, color_system=None, highlight=False, markup=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip("\n").split("\n"))


def format_value(value: Any) -> str:
    """Formats a JSON value for people: numbers in six digits, a list by its items, None and an empty list as `none`."""
    if isinstance(value, list):
        return " ".join(map(format_value, value)) or "none"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "none" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def format_bytes(size: float) -> str:
    """Formats bytes in the largest unit (of 10^3, 10^6, 10^9) that leaves at least 0.1.

    >>> format_bytes(5e9), format_bytes(1.5e8), format_bytes(2_000_000), format_bytes(99)
    ('5.00 GB', '0.15 GB', '2.00 MB', '99 B')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale / 10:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:.0f} B"


def format_seconds(seconds: float) -> str:
    """Formats a duration; `?` if it is not finite.

    >>> format_seconds(12.4), format_seconds(200), format_seconds(3725), format_seconds(183600)
    ('12s', '3m20s', '1h02m', '2d03h')
    """
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
