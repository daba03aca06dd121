"""Watchdog: ends a run that makes no progress, with the stacks of all threads and the process that is behind."""

import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from jaxtrain.runtime import processes
from jaxtrain.runtime.stop import RESTART, leave
from jaxtrain.runtime.terminal import echo

_STEPS = 20  # median step times that are a stall, where they are longer than the limit
_FIRST = 4  # factor of the limit until the step time is known
_KNOWN = 3  # steps until the step time is known: a launch returns before its step has ended
_POLL_SECONDS = 5.0
_GATHER_SECONDS = 30.0  # for the other processes to print their stacks
_REPORT_SECONDS = 5.0


class Watchdog:
    """Thread that ends the process, with exit code 75, when the training loop makes no progress.

    The limit is the largest of `minutes`, 20 median step times and, with several processes, twice the time-out for
    them; four times as long until the step time is known. Pauses do not count, nor does time in which the whole process
    was stopped (SIGSTOP, a suspended machine). Under several processes the first stall ends all, and each prints its
    stacks. A thread that hangs while it holds Python's lock stops the watchdog too.

    Args:
      minutes: limit; None disables the watchdog.
      report: called with the problem, on the thread of the watchdog, before the process ends.
      clock: monotonic seconds.
      leave: ends the process with an exit code.
    """

    def __init__(
        self,
        minutes: float | None,
        *,
        report: Callable[[str], None] = lambda problem: None,
        clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], Any] = leave,
    ):
        others = 0.0 if processes.is_alone() else 2 * processes.time_limit()
        self._floor = None if minutes is None else max(60 * minutes, others)
        self._poll = min(_POLL_SECONDS, (self._floor or 0.0) / 10)
        self._report, self._clock, self._leave = report, clock, leave
        self._progress, self._stall = processes.Board("progress"), processes.Board("stall")
        self._step = 0  # of the loop; the watchdog waits for the first one
        self._launched = 0  # last step whose program was called
        self._pauses = 0
        self._since = self._checked = clock()
        self._seconds: deque[float] = deque(maxlen=100)  # of the last steps
        self._quiet = 0.0  # seconds without progress
        self._done, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._floor is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        if self._ended.is_set():  # the thread ends the process; an error of the loop is only a consequence
            self._thread.join()

    def step(self, step: int) -> None:
        """Records that the loop has reached a step, counted from 1."""
        now = self._clock()
        if self._step:
            self._seconds.append(now - self._since)
        self._step, self._since = step, now
        self.beat()

    def launch(self) -> None:
        """Records that the program of the step is called, in which processes wait for one another."""
        self._launched = self._step

    def beat(self) -> None:
        """Records progress of other work, such as a batch of an evaluation."""
        self._quiet = 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Suspends the watchdog inside the block, for work that has another limit or none."""
        self._pauses += 1
        try:
            yield
        finally:
            self.beat()
            self._pauses -= 1

    @property
    def limit(self) -> float:
        """Seconds without progress that are a stall."""
        if len(self._seconds) < _KNOWN:
            return _FIRST * self._floor
        return max(self._floor, _STEPS * statistics.median(self._seconds))

    def check(self) -> bool:
        """Ends the process if it has made no progress for too long, or if another one has. Returns False otherwise."""
        now = self._clock()
        passed, self._checked = now - self._checked, now
        if self._step and not self._pauses:
            self._quiet += min(passed, 2 * self._poll)  # a later poll shows that the process was stopped meanwhile
        self._progress.write(str(self._launched))
        if self._quiet < self.limit and not self._stall.read():
            return False
        self._ended.set()
        with contextlib.suppress(OSError, ValueError):  # standard error is closed
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        problem = next(iter(self._stall.read().values()), "") or (
            f"step {self._step} has made no progress for {self._quiet / 60:.2g} min{self._behind()}"
        )
        self._stall.write(problem)
        with contextlib.suppress(OSError, ValueError):
            text = f"error: {problem}; all stacks of this process are above; the same command resumes the run"
            echo(text, file=sys.stderr, flush=True)
        thread = threading.Thread(target=self._report, args=(problem,), daemon=True)
        thread.start()
        thread.join(_REPORT_SECONDS)  # the loop may hang with the lock of a file
        processes.wait_to_leave("stall", _GATHER_SECONDS)
        self._leave(RESTART)
        return True

    def _watch(self) -> None:
        while not self._done.wait(self._poll) and not self.check():
            pass

    def _behind(self) -> str:
        """Names the processes that have launched fewer steps than others."""
        steps = {process: int(text) for process, text in self._progress.read().items()}
        last = max(steps.values(), default=0)
        if late := [process for process, step in sorted(steps.items()) if step < last]:
            verb, first = "is" if len(late) == 1 else "are", min(steps[process] for process in late)
            return f": {processes.name_processes(late)} {verb} behind, with step {first} launched, others with {last}"
        return f": all {len(steps)} processes have launched step {last}" if steps else ""
