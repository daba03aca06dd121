"""A progress bar on a terminal; silence elsewhere."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[int], None]  # told the index of a part that is done
Bar = Callable[[str, Sequence[int]], Advance]  # (description, sizes of the parts) to Advance


@contextmanager
def progress_bar(show: bool) -> Iterator[Bar]:
    """Gives a function that adds a bar; the bars are drawn on stderr if `show` and it is a terminal."""
    if not (show and sys.stderr.isatty()):
        yield lambda description, sizes: lambda index: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:

        def add(description: str, sizes: Sequence[int]) -> Advance:
            task = progress.add_task(description, total=sum(sizes))
            return lambda index: progress.advance(task, sizes[index])

        yield add
