"""What a run shows while it trains: one live line in a terminal, plain lines anywhere else."""

import contextlib
import math
import os
import statistics
import sys
import textwrap
from collections import deque
from types import TracebackType
from typing import Any, TextIO

import rich.box
import rich.console
import rich.live
import rich.table
from rich.text import Text

_RECENT_STEPS = 10  # logged steps that the time left is estimated from
# A log on a full disk, a pipe that nobody reads any more, a terminal that is gone: the run goes on unseen.
_UNSEEN = contextlib.suppress(OSError)


class Console:
    """Shows progress on a stream: redrawn in place if it is a terminal, else one plain line a logged step.

    Use it as a context manager: leaving it keeps the last live line on the screen and gives the terminal back.
    """

    def __init__(self, total_steps: int, clip_norm: float, stream: TextIO | None = None):
        """Chooses how to draw.

        Args:
          total_steps: optimizer steps of the run.
          clip_norm: threshold of the gradient norm; steps above it are marked as clipped.
          stream: where to; None: standard output as it is now.
        """
        self._total_steps = total_steps
        self._clip_norm = clip_norm
        self._stream = sys.stdout if stream is None else stream
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._live: rich.live.Live | None = None
        self._terminal: rich.console.Console | None = None
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._terminal = rich.console.Console(file=self._stream, force_terminal=True)

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            with _UNSEEN:
                self._live.stop()
            self._live = None

    def update(self, fields: dict[str, Any]) -> None:
        """Shows a logged step: the fields of a step line, see `jaxtrain.monitoring.metrics.read_metrics`."""
        self._step_seconds.append(float(fields["step_seconds"]))
        parts = self._parts(fields)
        if self._terminal is None:
            self.print("  ".join(parts))
            return
        text = Text(_wrap(parts, self._terminal.width))
        with _UNSEEN:
            if self._live is None:
                # Not before the first step: until then there would be an empty line to keep below everything printed.
                self._live = rich.live.Live(text, console=self._terminal, auto_refresh=False)
                self._live.start(refresh=True)
            else:
                self._live.update(text, refresh=True)

    def print(self, text: str) -> None:
        """Prints text above the live line."""
        with _UNSEEN:
            if self._terminal is None:
                print(text, file=self._stream, flush=True)
            else:
                self._terminal.print(Text(text), soft_wrap=True)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Prints a table of names and values."""
        if self._terminal is None:
            width = max((len(name) for name, _ in rows), default=0)
            self.print("\n".join([title, *(f"  {name:{width}}  {value}" for name, value in rows)]))
            return
        grid = rich.table.Table(title=Text(title), title_justify="left", show_header=False, box=rich.box.ROUNDED)
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(Text(name), Text(value))
        with _UNSEEN:
            self._terminal.print(grid)

    def _parts(self, fields: dict[str, Any]) -> list[str]:
        step = int(fields["step"])
        left = statistics.median(self._step_seconds) * max(self._total_steps - step, 0)
        grad_norm = float(fields["grad_norm"])
        mark = " skipped" if fields.get("skipped") else " clipped" if grad_norm > self._clip_norm else ""
        return [
            f"step {step}/{self._total_steps} {step / self._total_steps:.1%}",
            f"{float(fields['tokens_per_second']):,.0f} tokens/s",
            f"loss {float(fields['loss']):.4f}",
            f"grad_norm {grad_norm:.3g}{mark}",
            *([f"lr {float(fields['learning_rate']):.2e}"] if "learning_rate" in fields else []),
            f"{format_seconds(left)} left",
        ]


def _wrap(parts: list[str], width: int) -> str:
    """Joins the parts to a line; a terminal too narrow for it gets two, broken between parts."""
    hard_space = "\N{NO-BREAK SPACE}"
    line = "  ".join(part.replace(" ", hard_space) for part in parts)
    return textwrap.fill(line, width).replace(hard_space, " ")


def format_seconds(seconds: float) -> str:
    """A duration for people: 12s, 3m20s, 1h02m, 2d03h; `?` if it is not finite."""
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
