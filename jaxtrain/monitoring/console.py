"""Console of a run: one live line on a terminal, plain lines anywhere else."""

import contextlib
import os
import statistics
import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

import rich.box
import rich.console
import rich.live
import rich.table
from rich.text import Text

from jaxtrain.monitoring.tables import format_seconds
from jaxtrain.runtime.terminal import printable

_RECENT_STEPS = 10  # logged steps from which the remaining time is estimated
# A log on a full disk, a pipe without a reader, a terminal that is gone: training continues without output.
_UNSEEN = contextlib.suppress(OSError, ValueError)


class Console:
    """Sink that shows progress on a stream: a line redrawn in place on a terminal, else one line per logged step.

    `close` clears the live line and restores the terminal.
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None):
        """Chooses how to draw.

        Args:
          total_steps: optimizer steps of the run.
          stream: where to print; None is standard output at the time of the call.
        """
        self._total_steps = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._encoding = getattr(self._stream, "encoding", None)
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._line = ""  # the live line; redrawn after other text has replaced it
        self._live: rich.live.Live | None = None
        self._lock = threading.RLock()
        self._terminal: rich.console.Console | None = None
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._terminal = rich.console.Console(file=self._stream, force_terminal=True)

    def step(self, step: int, fields: Mapping[str, Any]) -> None:
        """Shows a logged step; `metrics.read_metrics` lists the fields."""
        self._step_seconds.append(float(fields["step_seconds"]))
        parts = self._parts(step, fields)
        if self._terminal is None:
            self.print("  ".join(parts))
        else:
            self._line = _wrap(parts, self._terminal.width)
            self._draw(self._line)

    def event(self, name: str, text: str, fields: Mapping[str, Any]) -> None:
        """Shows an event's text."""
        if text:
            self.print(text)

    def close(self) -> None:
        """Clears the live line; a second call does nothing."""
        self._line = ""
        self._draw("")

    def print(self, text: str) -> None:
        """Prints text above the live line; on a terminal, wraps it at words."""
        text = printable(text, encoding=self._encoding)
        with _UNSEEN, self._lock:
            if self._terminal is None:
                print(text, file=self._stream, flush=True)
            else:
                lines = [_wrap_words(line, self._terminal.width) for line in text.split("\n")]
                self._terminal.print(Text("\n".join(lines)), soft_wrap=True)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Prints a table of names and values."""
        if self._terminal is None:
            width = max((len(name) for name, _ in rows), default=0)
            self.print("\n".join([title, *(f"  {name:{width}}  {value}" for name, value in rows)]))
            return
        grid = rich.table.Table(
            title=Text(printable(title, encoding=self._encoding)),
            title_justify="left",
            show_header=False,
            box=rich.box.ROUNDED,
        )
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in rows:
            grid.add_row(*(Text(printable(cell, encoding=self._encoding)) for cell in (name, value)))
        with _UNSEEN, self._lock:
            self._terminal.print(grid)

    @contextlib.contextmanager
    def busy(self, activity: str, *, first: float | None = None) -> Iterator[None]:
        """Shows that an activity is running: "compiling ... 12 s".

        Args:
          activity: its name.
          first: seconds until it is first shown. None is 1 s on a terminal, where the text is then redrawn each second,
            and 10 s elsewhere, where a line follows each minute.
        """
        begin, done = time.monotonic(), threading.Event()
        first = (10.0 if self._terminal is None else 1.0) if first is None else first

        def show() -> None:
            pause = first
            while not done.wait(pause):
                text = f"{activity} ... {time.monotonic() - begin:.0f} s"
                if self._terminal is None:
                    self.print(text)
                else:
                    self._draw(text)
                pause = 60.0 if self._terminal is None else 1.0

        thread = threading.Thread(target=show, name=activity, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(timeout=1.0)  # a terminal that blocks (Ctrl-S) must not stop the run
            if self._terminal is not None:
                self._draw(self._line)

    def _draw(self, line: str) -> None:
        """Replaces the live line; an empty one is removed."""
        with _UNSEEN, self._lock:
            live = self._live
            if not line:
                self._live = None
                if live is not None:
                    live.stop()
            elif live is None:
                # Not before there is a line: an empty one would stay below everything that is printed.
                self._live = rich.live.Live(Text(line), console=self._terminal, auto_refresh=False, transient=True)
                self._live.start(refresh=True)
            else:
                live.update(Text(line), refresh=True)

    def _parts(self, step: int, fields: Mapping[str, Any]) -> list[str]:
        left = statistics.median(self._step_seconds) * max(self._total_steps - step, 0)
        clipped = fields.get("clipped", fields.get("clip_factor", 1.0) < 1) / fields.get("steps", 1)
        mark = " skipped" if fields.get("skipped") else f" {clipped:.0%} clipped" if 0 < clipped < 1 else ""
        mark = mark or (" clipped" if clipped else "")
        parts = [
            f"step {step}/{self._total_steps} {step / self._total_steps:.1%}",
            f"{float(fields['tokens_per_second']):,.0f} tokens/s",
            f"loss {float(fields['loss']):.4f}",
        ]
        if "grad_norm" in fields:
            parts.append(f"grad_norm {float(fields['grad_norm']):.3g}{mark}")
        if "learning_rate" in fields:
            parts.append(f"lr {float(fields['learning_rate']):.2e}")
        return [*parts, f"{format_seconds(left)} left"]


def _wrap(parts: list[str], width: int) -> str:
    """Joins the parts to a line; a terminal too narrow for it gets two, broken between parts."""
    hard_space = "\N{NO-BREAK SPACE}"
    line = "  ".join(part.replace(" ", hard_space) for part in parts)
    return textwrap.fill(line, width).replace(hard_space, " ")


def _wrap_words(line: str, width: int) -> str:
    """Breaks a line at words; the following lines keep its indentation. A word longer than a line stays whole."""
    if len(line) <= width:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )
