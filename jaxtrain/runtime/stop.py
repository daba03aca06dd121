"""Early end of a run: signals, abandoned threads, and an exit that does not wait for them."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

import jax

from jaxtrain.runtime.terminal import raise_interrupt

T = TypeVar("T")

# Slurm warns with SIGTERM or SIGUSR1, a closed SSH session sends SIGHUP.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
RESTART = 75  # exit code, EX_TEMPFAIL of sysexits.h: the same command may succeed later
_POLL_SECONDS = 0.05  # delay until a signal stops work on a thread
_abandoned: list[threading.Thread] = []


class Stopped(Exception):
    """A stop was requested during work that need not be finished."""


class Stop:
    """Request to stop, from a signal. The loop polls it after each step.

    Attributes:
      reason: name of the first signal, or None.
    """

    def __init__(self, grace_seconds: float = 1.0):
        """A signal within `grace_seconds` of the first repeats the request; a later one ends the process at once.

        Launchers and schedulers often send several signals at the same moment, and each would otherwise count.
        """
        self.reason: str | None = None
        self._grace_seconds = grace_seconds

    @contextlib.contextmanager
    def listen(self) -> Iterator["Stop"]:
        """Handles `SIGNALS` inside the block, on the main thread only. An ignored SIGHUP (nohup) stays ignored."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.getsignal(number) for number in SIGNALS}
        if previous[signal.SIGHUP] == signal.SIG_IGN:
            del previous[signal.SIGHUP]
        timer = threading.Timer(self._grace_seconds, _restore_defaults, [list(previous)])
        timer.daemon = True

        def handle(number, frame):
            del frame
            if self.reason is None:
                self.reason = signal.Signals(number).name
                timer.start()

        for number in previous:
            signal.signal(number, handle)
        try:
            raise_interrupt()
            yield self
        finally:
            timer.cancel()
            if self.reason is not None:
                timer.join()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def asked(self) -> bool:
        return self.reason is not None

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """Runs `function` on a thread. On a signal, abandons it and raises `Stopped`.

        With several processes the function runs to its end, because all processes stop after the same step.
        """
        if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
            return function(*args)
        if self.asked():
            raise Stopped
        outcome: Future[T] = Future()

        def work() -> None:
            try:
                outcome.set_result(function(*args))
            except BaseException as error:
                outcome.set_exception(error)

        thread = threading.Thread(target=work, name="work", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
            if self.asked() and thread.is_alive():
                abandon(thread)
                raise Stopped
        return outcome.result()


def abandon(thread: threading.Thread) -> None:
    """Records a thread that nobody waits for any more and that may be in any state."""
    _abandoned.append(thread)


def is_stuck() -> bool:
    """Returns True if an abandoned thread is alive. It would block the interpreter's exit, or crash in it."""
    return any(thread.is_alive() for thread in _abandoned)


def leave(code: int) -> NoReturn:
    """Exits at once, after flushing the standard streams."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            stream.flush()
    os._exit(code)


def _restore_defaults(numbers: list[int]) -> None:
    # Python sets handlers on the main thread only, which may be the one that hangs.
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    for number in numbers:
        library.signal(number, None)  # SIG_DFL is the null pointer
