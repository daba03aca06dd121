"""Ending a run early: signals, work that is left behind when one comes, and leaving in spite of it."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax

T = TypeVar("T")

_POLL_SECONDS = 0.05  # how soon a signal is heeded while something runs on a thread
_left_behind: list[threading.Thread] = []


class Stopped(Exception):
    """The run was asked to stop while it did something that is not worth finishing."""


class Stop:
    """Remembers that somebody asked the run to stop; the loop looks at each step."""

    def __init__(self):
        self.reason: str | None = None  # name of the signal

    @contextlib.contextmanager
    def listen(self) -> Iterator["Stop"]:
        """Takes SIGTERM and SIGINT for a polite request, once; a second one ends the process at once."""
        numbers = (signal.SIGTERM, signal.SIGINT)
        if threading.current_thread() is not threading.main_thread():
            yield self  # somebody else's signals
            return
        previous = {number: signal.getsignal(number) for number in numbers}

        def handle(number, frame):
            del frame
            self.reason = signal.Signals(number).name
            for each in numbers:  # the system's own way, which needs no interpreter that is free to act
                signal.signal(each, signal.SIG_DFL)

        for number in numbers:
            signal.signal(number, handle)
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether a stop was asked for, of this process."""
        return self.reason is not None

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Calls a function that may take long and that a signal may interrupt: it is left behind then.

        Under several processes it runs to its end: they stop together, after a step.

        Raises:
          Stopped: a stop was asked for; or what the function raises.
        """
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            return function(*args)
        if self.asked():
            raise Stopped
        outcome: list[tuple[T | None, BaseException | None]] = []

        def work() -> None:
            try:
                outcome.append((function(*args), None))
            except BaseException as error:
                outcome.append((None, error))

        thread = threading.Thread(target=work, name="work", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            if self.asked() and thread.is_alive():
                leave_behind(thread)
                raise Stopped
        result, error = outcome[0]
        if error is not None:
            raise error
        return result


def leave_behind(thread: threading.Thread) -> None:
    """Notes a thread that nobody waits for any more, and that may be in the middle of anything."""
    _left_behind.append(thread)


def is_stuck() -> bool:
    """Whether a thread that was left behind is still alive: it would hold up the interpreter's end, or crash in it."""
    return any(thread.is_alive() for thread in _left_behind)


def leave(code: int) -> NoReturn:
    """Ends the process here and now."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
