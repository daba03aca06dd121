"""Loss of a process: each process keeps a connection to the lead, which the kernel closes when the process dies.

JAX would notice the same by a heartbeat, and end the others in C++. A closed connection shows within a second,
also while the main thread waits in a collective, and keepalive probes find a host that is down within 30 s. A process
that is slow or suspended keeps its connection, so it never counts as lost.
"""

import asyncio
import contextlib
import ctypes
import json
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from jaxtrain.runtime.stop import RESTART, leave
from jaxtrain.runtime.terminal import echo

_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # seconds, seconds, probes
_POLL_SECONDS = 0.2  # until the watch ends
_CLOSE_SECONDS = 2.0
_LEAD_SECONDS = 1.0  # the lead, which serves JAX's store, ends after the others
_FAILURE_SECONDS = 3.0  # for the main thread to end on its own, once another process has failed
_NAME_SECONDS = 10.0  # from the error of a collective until the lost process is known
_MAX_BYTES = 4096  # of a message


class Peers:
    """Thread that ends this process when another one has failed or is lost.

    A process that leaves sends one line of JSON, `{"code": exit code, "text": reason}`; code 0 is the end of the run.
    A connection that closes without such a line is a loss, with code `RESTART`. The lead forwards failures and losses.

    Args:
      connections: sockets by process: on the lead to all others, elsewhere to the lead.
      leave: ends the process with an exit code.
    """

    def __init__(self, connections: Mapping[int, socket.socket], leave: Callable[[int], Any] = leave):
        self._connections, self._leave = connections, leave
        self._done = threading.Event()
        for connection in connections.values():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE.items():
                with contextlib.suppress(OSError, AttributeError):  # not on every system
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch()), name="peers", daemon=True)
        self._thread.start()

    def announce(self, code: int, text: str = "") -> None:
        """Sends the others the exit code of this process and the reason; ends the watch. A second call does nothing."""
        if not self._done.is_set():
            self._done.set()
            self._send(code, text, self._connections)
            self._thread.join(_CLOSE_SECONDS)

    def wait(self, seconds: float) -> None:
        self._done.wait(seconds)

    async def _watch(self) -> None:
        streams = [await asyncio.open_connection(sock=each, limit=_MAX_BYTES) for each in self._connections.values()]
        pairs = zip(self._connections, streams, strict=True)
        watches = [asyncio.create_task(self._read(process, reader)) for process, (reader, _) in pairs]
        while not self._done.is_set():
            await asyncio.sleep(_POLL_SECONDS)
        for _, writer in streams:
            writer.close()
        await asyncio.wait(watches)

    async def _read(self, process: int, reader: asyncio.StreamReader) -> None:
        """Waits until a process leaves, and judges how it ended."""
        try:
            message = json.loads(await reader.readline())
            code, text = int(message["code"]), str(message["text"])
        except (OSError, ValueError, TypeError, KeyError):  # closed or reset without a message
            text = f"process {process} is lost: it was killed, or its host is down; see its log; "
            code, text = RESTART, text + "the same command resumes the run"
        self._judge(process, code, text)

    def _judge(self, process: int, code: int, text: str) -> None:
        """Ends this process if another one did not end well."""
        if not code or self._done.is_set():
            return
        self._send(code, text, [other for other in self._connections if other != process])
        is_lead = 0 not in self._connections
        if self._done.wait((_LEAD_SECONDS if is_lead else 0.0) + (0.0 if code == RESTART else _FAILURE_SECONDS)):
            return
        with contextlib.suppress(OSError, ValueError):  # standard error is closed
            echo(f"error: {text}", file=sys.stderr, flush=True)
        self._leave(code)

    def _send(self, code: int, text: str, processes: Any) -> None:
        message = json.dumps({"code": code, "text": text[: _MAX_BYTES // 8]}).encode() + b"\n"
        for process in processes:
            with contextlib.suppress(OSError):  # it is gone, too
                self._connections[process].send(message)


_watched: Peers | None = None
_libc = ctypes.CDLL(None)
_on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: wait_for_loss())  # Python's own would run too late


def watch(connections: Mapping[int, socket.socket]) -> None:
    """Starts to watch the other processes of this one's run.

    A collective that loses a process may call abort() in C++ (gloo does). Then the watch has time to end this process
    first, with the reason in one line and `RESTART`; an abort for another reason ends the process after 10 s.
    """
    global _watched
    _watched = Peers(connections)
    _libc.signal(signal.SIGABRT, _on_abort)


def announce(code: int, text: str = "") -> None:
    """Announces the end of this process to the processes that watch it, if any; see `Peers.announce`."""
    if _watched is not None:
        _watched.announce(code, text)


def wait_for_loss() -> None:
    """Waits up to 10 s for the watch to end this process, after an error that says that another one is gone."""
    if _watched is not None:
        _watched.wait(_NAME_SECONDS)
