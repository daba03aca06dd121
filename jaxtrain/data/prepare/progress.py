"""Progress of long stages: bars on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
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
    if not show:
        yield lambda description, sizes: lambda index: None
    elif stream.isatty():
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(file=stream)) as progress:
            yield lambda description, sizes: _add_bar(progress, description, sizes)
    else:
        with _Lines(stream, line_seconds) as lines:
            yield lines.start


def _add_bar(progress: Progress, description: str, sizes: Sequence[int] | None) -> Advance:
    task = progress.add_task(printable(description), total=None if sizes is None else sum(sizes))

    def advance(index: int) -> None:
        if sizes is None:
            progress.update(task, total=1, completed=1)
        else:
            progress.advance(task, sizes[index])

    return advance


class _Lines:
    """Prints the newest stage every `seconds` from a thread."""

    def __init__(self, stream: TextIO, seconds: float):
        self._stream, self._seconds, self._ended = stream, seconds, threading.Event()
        self._stage, self._started, self._done, self._total = "", 0.0, 0, 0
        self._thread = threading.Thread(target=self._work, name="progress", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        self._thread.join()

    def start(self, description: str, sizes: Sequence[int] | None) -> Advance:
        self._started, self._done, self._total = time.monotonic(), 0, sum(sizes or ())
        self._stage = description

        def advance(index: int) -> None:
            self._done += sizes[index] if sizes else 0

        return advance

    def _work(self) -> None:
        while not self._ended.wait(self._seconds):
            if self._stage:
                share = f" {self._done / self._total:.0%}," if self._total else ""
                seconds = time.monotonic() - self._started
                echo(f"{self._stage}:{share} {seconds:.0f} s", file=self._stream, flush=True)
