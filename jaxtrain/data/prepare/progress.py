"""Progress of long stages: bars on a terminal, a line now and then elsewhere."""

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxtrain.runtime.terminal import echo, printable

LINE_SECONDS = 15.0  # between lines off a terminal

Advance = Callable[[int], None]  # called with the index of a part that is done
Stages = Callable[[str, Sequence[int] | None], Advance]  # (description, sizes of the parts, None if unknown) to Advance


@contextmanager
def show_progress(show: bool, stream: TextIO | None = None, line_seconds: float = LINE_SECONDS) -> Iterator[Stages]:
    """Yields a function that starts a stage; its progress appears on `stream` (default: stderr) if `show`."""
    stream = stream or sys.stderr
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    has_bars = show and stream.isatty()
    progress = Progress(*columns, TimeRemainingColumn(), console=Console(file=stream), disable=not has_bars)
    ended = threading.Event()
    printer = threading.Thread(target=_print_lines, args=(progress, stream, line_seconds, ended), daemon=True)
    if show and not has_bars:
        printer.start()
    try:
        with progress:
            yield functools.partial(_start, progress)
    finally:
        ended.set()
        if printer.ident is not None:
            printer.join()


def _start(progress: Progress, description: str, sizes: Sequence[int] | None) -> Advance:
    task = progress.add_task(printable(description), total=None if sizes is None else sum(sizes))

    def advance(index: int) -> None:
        if sizes is None:
            progress.update(task, total=1, completed=1)
        else:
            progress.advance(task, sizes[index])

    return advance


def _print_lines(progress: Progress, stream: TextIO, seconds: float, ended: threading.Event) -> None:
    """Prints the newest stage every `seconds`."""
    while not ended.wait(seconds):
        for task in progress.tasks[-1:]:
            share = f" {task.percentage:.0f}%," if task.total else ""
            echo(f"{task.description}:{share} {task.elapsed or 0:.0f} s", file=stream, flush=True)
