"""Rendezvous of the processes over TCP before JAX starts, so that a missing process is named.

`jax.distributed.initialize` ends a process in C++ when another one is missing, and does not say which. Here process 0
listens at the address of its future coordinator, the others connect and send their number. When all are present, or at
the deadline, process 0 sends each of them the outcome, and listens no more. The connections stay open for `peers`.

JAXTRAIN_TOKEN, set by the launcher, keeps processes of other runs out.
"""

import asyncio
import contextlib
import hashlib
import ipaddress
import os
import re
import socket
import time

_ANSWER_SECONDS = 5.0  # a process may have started its clock later than process 0
_GREETING_SECONDS = 2.0  # a silent connection then gives its file descriptor back
_SETTLE_SECONDS = 0.05  # the end of a process shows so long after its greeting
_RETRY_SECONDS = 0.2
_GREETING = re.compile(rb"jaxtrain (\d{1,9}) of (\d{1,9}) ([0-9a-f]{64})\n")
_MAX_BYTES = 256  # of a greeting
_ADDRESS = re.compile(r"([\w.-]+|\[[^\]]+\]):([1-9][0-9]{0,4})")


def meet(address: str, num_processes: int, process_id: int, timeout: float) -> dict[int, socket.socket]:
    """Returns when all processes are present: open connections to all others on process 0, to process 0 elsewhere.

    Args:
      address: `host:port` of process 0, the same on all processes.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: a process is missing, or two have the same number. All present processes raise the same text.
    """
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process {process_id} is not one of 0 to {num_processes - 1}: check JAX_PROCESS_ID")
    host, port = split_address(address)
    token = hashlib.sha256(os.environ.get("JAXTRAIN_TOKEN", "").encode()).hexdigest()
    if process_id == 0:
        return asyncio.run(_Reception(num_processes, token).gather(host, port, timeout))
    deadline = time.monotonic() + timeout
    answer, connection = _announce(host, port, f"jaxtrain {process_id} of {num_processes} {token}", deadline)
    if connection is None:
        raise ValueError(answer or f"process 0 is missing: no answer at {address} within {timeout:g} s; see its log")
    return {0: connection}


def name_processes(processes: list[int]) -> str:
    """Formats process numbers as `process 1` or `processes 1, 2`; lists at most 8 of them."""
    listed = ", ".join(str(process) for process in processes[:8])
    more = f" and {len(processes) - 8} more" if len(processes) > 8 else ""
    return f"{'process' if len(processes) == 1 else 'processes'} {listed}{more}"


def split_address(address: str) -> tuple[str, int]:
    """Splits `host:port`; an IPv6 address loses its brackets. Raises a ValueError for anything else."""
    if found := _ADDRESS.fullmatch(address):
        with contextlib.suppress(ValueError):  # a UnicodeError is one
            host, port = found[1], int(found[2])
            if host.startswith("["):
                host = str(ipaddress.IPv6Address(host[1:-1]))
            host.encode("idna")  # as the resolver does
            if port < 2**16:
                return host, port
    allowed = f"host:port, such as node1:8476 or [fd00::1]:8476, got {address!r:.200}"
    remedy = "check JAX_COORDINATOR_ADDRESS and JAX_COORDINATOR_PORT"
    raise ValueError(f"the coordinator's address must be {allowed}: {remedy}")


class _Reception:
    """Process 0 while it waits for the others."""

    def __init__(self, num_processes: int, token: str):
        self._num_processes, self._token = num_processes, token
        self._present: dict[int, tuple[asyncio.StreamReader, asyncio.StreamWriter]] = {}
        self._problem = ""
        self._news = asyncio.Event()  # a process has come, or there is a problem

    async def gather(self, host: str, port: int, timeout: float) -> dict[int, socket.socket]:
        """Sends the outcome to all connected processes; returns the connections, or raises a ValueError."""
        server = await asyncio.start_server(self._serve, sock=_listen(host, port), limit=_MAX_BYTES)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while len(self._present) < self._num_processes - 1 and not self._problem:
                    await self._news.wait()
                    self._news.clear()
                    await asyncio.sleep(_SETTLE_SECONDS)
        server.close()
        missing = [process for process in range(1, self._num_processes) if process not in self._present]
        if missing and not self._problem:
            self._problem = (
                f"{len(missing)} of {self._num_processes} processes did not come within {timeout:g} s: "
                f"{name_processes(missing)}; see their logs, or allow more time with JAXTRAIN_TIMEOUT"
            )
        connections = {}
        for process, (_, writer) in self._present.items():
            writer.transport.pause_reading()  # what follows is for `peers`
            connections[process] = writer.get_extra_info("socket").dup()
            await _send(writer, self._problem or "go")
        if self._problem:
            for connection in connections.values():
                connection.close()
            raise ValueError(self._problem)
        return connections

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Registers the process at a connection, and drops it when it ends, so that it can be started again."""
        try:
            line = await asyncio.wait_for(reader.readline(), _GREETING_SECONDS)
            refusal = await self._register(line, reader, writer)
            if refusal is None:
                await reader.read(1)  # it waits for the answer: one that can be read has ended
            else:
                await _send(writer, refusal)
        except (OSError, ValueError, asyncio.CancelledError):
            pass  # it was killed, or is a port scanner, silent or with a line that is too long; or the end of `gather`
        finally:
            self._present = {process: pair for process, pair in self._present.items() if pair[0] is not reader}
            writer.close()

    async def _register(self, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str | None:
        """Adds the sender of a greeting to those present; returns why it is refused, "" for a stranger."""
        greeting = _GREETING.fullmatch(line)
        if greeting is None:
            return ""
        process, count = int(greeting[1]), int(greeting[2])
        if greeting[3].decode() != self._token:
            return f"process {process} has another JAXTRAIN_TOKEN than process 0: it belongs to another run"
        if count == self._num_processes <= process:
            return ""
        if process in self._present:
            await asyncio.sleep(_RETRY_SECONDS)  # until it is dropped, if it has ended
        if count != self._num_processes:
            self._problem = f"process {process} counts {count} processes, and process 0 {self._num_processes}"
        elif process in self._present or process == 0:
            self._problem = f"two processes say that they are process {process}: check JAX_PROCESS_ID"
        self._present[-1 if process in self._present else process] = reader, writer
        self._news.set()
        return None


async def _send(writer: asyncio.StreamWriter, text: str) -> None:
    with contextlib.suppress(OSError):  # the process has given up
        writer.write(f"{text}\n".encode())
        await asyncio.wait_for(writer.drain(), _ANSWER_SECONDS)


def _listen(host: str, port: int) -> socket.socket:
    """Listens at the address of `host`; on all interfaces where that address does not show which one others use."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    by_name = host != "localhost" and not _is_loopback(host)
    for family, *_, address in found:
        if by_name and _is_loopback(address[0]):
            continue  # some systems map their own name to 127.0.1.1
        with contextlib.suppress(OSError):
            return socket.create_server(address[:2], family=family)
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        remedy = "another run may use it; give another in JAX_COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT"
        raise ValueError(f"process 0 cannot listen on port {port} ({error.strerror}): {remedy}") from None


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _announce(host: str, port: int, greeting: str, deadline: float) -> tuple[str, socket.socket | None]:
    """Greets process 0. Returns its answer, "" if none came, and the connection if all processes are present."""
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=left) as connection:
            connection.sendall(f"{greeting}\n".encode())
            connection.settimeout(max(deadline - time.monotonic(), 0.0) + _ANSWER_SECONDS)
            with connection.makefile("rb", buffering=0) as stream:
                answer = stream.readline(4096).decode(errors="replace")
            if answer.endswith("\n"):
                return answer.strip(), connection.dup() if answer == "go\n" else None
        time.sleep(_RETRY_SECONDS)
    return "", None
