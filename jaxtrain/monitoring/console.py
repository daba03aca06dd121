"""Console of a run: a live panel on a terminal, plain lines anywhere else."""

import contextlib
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import rich.box
import rich.console
import rich.live
import rich.table
from rich.text import Text

from jaxtrain.monitoring.panel import Panel
from jaxtrain.runtime.terminal import one_line, printable

# Styles of rich by the severity of a finding, or by the name of an event.
_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan", "sink_failed": "yellow", "save_failed": "red"}
# A log on a full disk, a pipe without a reader, a terminal that is gone: training continues without output.
_UNSEEN = contextlib.suppress(OSError, ValueError)


class Console:
    """Sink that shows progress on a stream: a panel redrawn in place on a terminal, else one line per logged step.

    `close` clears the panel and restores the terminal.
    """

    def __init__(
        self,
        total_steps: int,
        stream: TextIO | None = None,
        *,
        redraw_seconds: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Prints to `stream`; None is standard output at the time of the call. Drawing takes about a millisecond."""
        self._total_steps, self._redraw_seconds, self._clock = total_steps, redraw_seconds, clock
        self._stream = sys.stdout if stream is None else stream
        self._encoding = getattr(self._stream, "encoding", None)
        self._panel = Panel(total_steps)
        self._drawn = -redraw_seconds  # time of the last panel
        self._live: rich.live.Live | None = None
        self._closed = False
        self._lock = threading.RLock()
        self._terminal: rich.console.Console | None = None
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._terminal = rich.console.Console(file=self._stream, force_terminal=True)

    def step(self, step: int, fields: Mapping[str, Any]) -> None:
        self._panel.step(step, fields)
        if self._terminal is None:
            self.print(self._panel.line())
        else:
            now = self._clock()
            if now - self._drawn >= self._redraw_seconds or step == self._total_steps:
                self._drawn = now
                self._draw(self._panel.render(self._terminal.width))

    def event(self, name: str, text: str, fields: Mapping[str, Any]) -> None:
        """Shows an event's text, a finding in the color of its severity."""
        self._panel.event(name, fields)
        if text:
            self.print(text, _STYLES.get(fields.get("severity", name), ""))

    def close(self) -> None:
        """Clears the panel; a second call does nothing."""
        self._closed = True
        self._draw(Text())

    def print(self, text: str, style: str = "") -> None:
        """Prints text above the panel; on a terminal, in a style of rich, and wrapped at words."""
        text = printable(text, encoding=self._encoding)
        with _UNSEEN, self._lock:
            if self._terminal is None:
                print(text, file=self._stream, flush=True)
            else:
                lines = [_wrap_words(line, self._terminal.width) for line in text.split("\n")]
                self._terminal.print(Text("\n".join(lines), style=style), soft_wrap=True)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        if self._terminal is None:
            width = max((len(name) for name, _ in rows), default=0)
            self.print("\n".join([title, *(f"  {name:{width}}  {one_line(value)}" for name, value in rows)]))
            return
        text = lambda cell: Text(printable(one_line(cell), encoding=self._encoding))  # noqa: E731
        grid = rich.table.Table(title=text(title), title_justify="left", show_header=False, box=rich.box.ROUNDED)
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for row in rows:
            grid.add_row(*map(text, row))
        with _UNSEEN, self._lock:
            self._terminal.print(grid)

    @contextlib.contextmanager
    def busy(self, activity: str, *, first: float | None = None) -> Iterator[None]:
        """Shows that an activity is running: "compiling ... 12 s".

        `first` are the seconds until it is first shown. None is 1 s on a terminal, where the text is then redrawn each
        second, and 10 s elsewhere, where a line follows each minute.
        """
        begin, done = time.monotonic(), threading.Event()
        usual, following = (10.0, 60.0) if self._terminal is None else (1.0, 1.0)

        def show() -> None:
            pause = usual if first is None else first
            while not done.wait(pause):
                text = f"{activity} ... {time.monotonic() - begin:.0f} s"
                self.print(text) if self._terminal is None else self._draw(Text(text))
                pause = following

        thread = threading.Thread(target=show, name=activity, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(timeout=1.0)  # a terminal that blocks (Ctrl-S) must not stop the run
            if self._terminal is not None:
                self._draw(Text() if self._closed else self._panel.render(self._terminal.width))

    def _draw(self, text: Text) -> None:
        """Replaces the live text; an empty one is removed."""
        with _UNSEEN, self._lock:
            if text and self._live:
                self._live.update(text, refresh=True)
            elif text:  # not before there is one: an empty one would stay below everything that is printed
                self._live = rich.live.Live(text, console=self._terminal, auto_refresh=False, transient=True)
                self._live.start(refresh=True)
            elif self._live:
                live, self._live = self._live, None
                live.stop()


def _wrap_words(line: str, width: int) -> str:
    """Breaks a line at words; the following lines keep its indentation. A word longer than a line stays whole."""
    if len(line) <= width:
        return line
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )
