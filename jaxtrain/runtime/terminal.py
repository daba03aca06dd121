"""Standard streams that tolerate closed pipes and other encodings, and errors as one line."""

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, TextIO


class Output:
    """Output stream that ignores a closed pipe, and shows `?` for a character outside its encoding."""

    def __init__(self, stream: Any, errors: str):
        self._stream = stream or io.StringIO()  # None: closed before the start
        self.closed_early = False
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors=errors)

    def write(self, text: str) -> int:
        self._call("write", text)
        return len(text)

    def flush(self) -> None:
        self._call("flush")

    def _call(self, method: str, *arguments: str) -> None:
        if not self.closed_early:
            try:
                getattr(self._stream, method)(*arguments)
            except BrokenPipeError:
                self.discard()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def discard(self) -> None:
        """Drops all further output, so that the interpreter can flush the stream when it exits."""
        self.closed_early = True
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._stream.fileno())


@contextlib.contextmanager
def tolerant_output() -> Iterator[Output]:
    """Replaces the standard streams by tolerant ones inside the block; yields standard output."""
    before = sys.stdout, sys.stderr
    output, errors = Output(sys.stdout, "replace"), Output(sys.stderr, "backslashreplace")
    sys.stdout, sys.stderr = output, errors
    try:
        yield output
    finally:
        for stream in (output, errors):
            try:
                stream.flush()
            except OSError:  # such as a full disk
                stream.discard()
        sys.stdout, sys.stderr = before


_interrupted = threading.Event()


@contextlib.contextmanager
def recorded_interrupts() -> Iterator[None]:
    """Records Ctrl-C inside the block, for `raise_interrupt`: Python drops one that a finalizer raises."""
    _interrupted.clear()
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is not signal.default_int_handler:
        yield
        return

    def handle(number: int, frame: Any) -> None:
        _interrupted.set()
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def raise_interrupt() -> None:
    """Raises a KeyboardInterrupt if `recorded_interrupts` has recorded one, which was then dropped."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


# Remedies for errors of the operating system.
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space and repeat the command"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "give a path that this user may use"),
    errno.EROFS: "the file system is read-only: give a path on another",
    errno.ENOTDIR: "a part of the path is a file: give another path",
    errno.EISDIR: "the path is a folder: give the path of a file",
    errno.EEXIST: "a file of this name exists: give another path",
    errno.ENOENT: "give a path that exists",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its symbolic links form a circle: give another path",
}


def printable(text: str, *, encoding: str | None = None) -> str:
    r"""Escapes terminal controls and characters that an encoding lacks; newlines and tabs stay.

    Args:
      text: any text.
      encoding: encoding of the output; characters that it lacks are escaped too. None is UTF-8.

    >>> printable("loss\x1b[2J \u202egnp.exe")
    'loss\\x1b[2J \\u202egnp.exe'
    """
    escaped = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    encoding = encoding or "utf-8"
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def one_line(text: str) -> str:
    r"""Escapes terminal controls, tabs and every line break: for a name or value inside a printed line.

    >>> one_line("a.txt\nerror: all lost")
    'a.txt\\nerror: all lost'
    """
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def echo(
    value: object = "", *, file: TextIO | None = None, end: str = "\n", flush: bool = False, verbatim: bool = False
) -> None:
    """Prints text with its terminal controls escaped, see `printable`. Every print of the package goes through here.

    `verbatim` leaves the text as it is for a pipe or a file, such as JSON or a sample.
    """
    stream, text = sys.stdout if file is None else file, str(value)
    print(text if verbatim and not stream.isatty() else printable(text), end=end, file=stream, flush=flush)


def report_error(error: BaseException, arguments: Sequence[str] = ()) -> int:
    """Prints an error to standard error, without the line breaks of the `arguments`; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        echo("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    text = str(error)
    if isinstance(error, UnicodeEncodeError):  # half of a surrogate pair: bytes of an argument that are not UTF-8
        text = f"{error.object[max(error.start - 100, 0) : error.end + 100]!r} is not Unicode text: give it as UTF-8"
    elif isinstance(error, MemoryError) or (type(error).__name__ == "JaxRuntimeError" and "EXHAUSTED" in text):
        text = f"out of memory: {text.splitlines()[0] if text else 'the host has no more'}\n"
        text += "lower train.batch_size or raise train.accumulate; `jaxtrain plan` says what a run needs"
    elif isinstance(error, OSError) and error.errno in _REMEDIES:
        text += f": {_REMEDIES[error.errno]}"
    elif "nable to initialize backend" in text or _lacks_backend():
        text = f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} names a backend that is not installed or has no device: "
        text += "unset it, set it to cpu, or install jax for this hardware, such as jax[cuda13]"
    elif not isinstance(error, ValueError | ImportError | OSError):
        traceback.print_exception(error)
        return 1
    for word in (part for argument in arguments for part in (argument, *argument.split("=", 1))):
        text = text.replace(word, one_line(word)) if "\n" in word else text
    echo(f"error: {text}", file=sys.stderr)
    return 2 if isinstance(error, ValueError) else 1


def _lacks_backend() -> bool:
    """Returns True if jax cannot start the backends that JAX_PLATFORMS names."""
    jax = sys.modules.get("jax")
    if jax is None or not os.environ.get("JAX_PLATFORMS"):
        return False
    try:
        jax.devices()
    except Exception:
        return True
    return False
