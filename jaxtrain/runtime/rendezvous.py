"""Rendezvous of the processes over TCP before JAX starts, so that a missing process is named.

`jax.distributed.initialize` ends a process in C++ when another one is missing, and does not say which. Here process 0
listens at the address of its future coordinator, the others connect and send their number. When all are present, or at
the deadline, process 0 sends each of them the outcome, and listens no more. The connections stay open for `peers`.

JAXTRAIN_TOKEN, set by the launcher, keeps processes of other runs out.
"""

import contextlib
import hashlib
import ipaddress
import os
import re
import selectors
import socket
import time

_ANSWER_SECONDS = 5.0  # a process may have started its clock later than process 0
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
    deadline = time.monotonic() + timeout
    token = hashlib.sha256(os.environ.get("JAXTRAIN_TOKEN", "").encode()).hexdigest()
    if process_id == 0:
        problem, connections = _receive(host, port, num_processes, token, deadline, timeout)
    else:
        problem, connections = _announce(host, port, f"jaxtrain {process_id} of {num_processes} {token}", deadline)
        if not problem and not connections:
            problem = f"process 0 is missing: no answer at {address} within {timeout:g} s; see the log of process 0"
    if problem:
        raise ValueError(problem)
    return connections


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
    raise ValueError(
        f"the coordinator's address must be host:port, such as node1:8476 or [fd00::1]:8476, got {address!r:.200}: "
        "check JAX_COORDINATOR_ADDRESS and JAX_COORDINATOR_PORT"
    )


def _receive(
    host: str, port: int, num_processes: int, token: str, deadline: float, timeout: float
) -> tuple[str, dict[int, socket.socket]]:
    """Collects the other processes on process 0 and answers them. Returns the problem, or "", and the connections."""
    present: dict[int, socket.socket] = {}
    problem = ""
    with contextlib.ExitStack() as stack, _listen(host, port) as server, selectors.DefaultSelector() as selector:
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ)
        while len(present) < num_processes - 1 and not problem:
            if time.monotonic() >= deadline:
                missing = [process for process in range(1, num_processes) if process not in present]
                problem = (
                    f"{len(missing)} of {num_processes} processes did not come within {timeout:g} s: "
                    f"{name_processes(missing)}; see their logs, or allow more time with JAXTRAIN_TIMEOUT"
                )
            for key, _ in selector.select(max(deadline - time.monotonic(), 0)):
                if selector.get_map().get(key.fd) is not key:
                    continue  # dropped in this round
                if key.fileobj is server:
                    _accept(server, selector, stack, present)
                elif _drop_ended(present, selector, key.fileobj):
                    continue
                elif (line := _read_available(key.fileobj, key.data)) is not None:
                    if not _has_ended(key.fileobj):
                        problem = problem or _register(line, key.fileobj, present, num_processes, token)
                    if key.fileobj not in present.values():
                        selector.unregister(key.fileobj)
        for connection in present.values():
            _send(connection, problem or "go")
        return problem, {} if problem else {process: connection.dup() for process, connection in present.items()}


def _drop_ended(present: dict[int, socket.socket], selector: selectors.BaseSelector, ready: object) -> bool:
    """Drops the processes that have ended: started again, they take their own places. Returns True if `ready` is one.

    Processes that are present wait for the answer: one that can be read has ended.
    """
    ended = [process for process, other in present.items() if other is ready or _has_ended(other)]
    dropped = [present.pop(process) for process in ended]
    for connection in dropped:
        selector.unregister(connection)
    return ready in dropped


def _has_ended(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _accept(
    server: socket.socket,
    selector: selectors.BaseSelector,
    stack: contextlib.ExitStack,
    present: dict[int, socket.socket],
) -> None:
    try:
        connection = stack.enter_context(server.accept()[0])
    except OSError:  # aborted already, or the silent connections hold all file descriptors: processes call again
        for silent in [key.fileobj for key in selector.get_map().values()]:
            if silent is not server and silent not in present.values():
                selector.unregister(silent)
                silent.close()
        time.sleep(_RETRY_SECONDS)
        return
    connection.setblocking(False)
    selector.register(connection, selectors.EVENT_READ, bytearray())


def _read_available(connection: socket.socket, buffer: bytearray) -> bytes | None:
    """Reads the available bytes. Returns the greeting when it is complete or cannot become one, else None."""
    try:
        piece = connection.recv(_MAX_BYTES)
    except BlockingIOError:
        return None
    except OSError:
        return b""
    buffer += piece
    return bytes(buffer) if not piece or b"\n" in buffer or len(buffer) >= _MAX_BYTES else None


def _register(
    line: bytes, connection: socket.socket, present: dict[int, socket.socket], num_processes: int, token: str
) -> str:
    """Adds the sender of a greeting to `present` and returns a problem, if any. Ignores other messages."""
    greeting = _GREETING.fullmatch(line)
    if greeting is None:  # a port scanner
        return ""
    process, count = int(greeting.group(1)), int(greeting.group(2))
    if greeting.group(3).decode() != token:
        _send(connection, f"process {process} has another JAXTRAIN_TOKEN than process 0: it belongs to another run")
        return ""
    if count == num_processes and process >= count:
        return ""
    problem = ""
    if count != num_processes:
        problem = f"process {process} counts {count} processes, and process 0 {num_processes}"
    elif process in present or process == 0:
        problem = f"two processes say that they are process {process}: check JAX_PROCESS_ID"
    present[process if process not in present else -1] = connection
    return problem


def _send(connection: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):  # the process has given up
        connection.settimeout(_ANSWER_SECONDS)
        connection.sendall(f"{text}\n".encode())


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
        raise ValueError(
            f"process 0 cannot listen on port {port} ({error.strerror}): another run may use it; give another port in "
            "JAX_COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT"
        ) from None


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def _announce(host: str, port: int, greeting: str, deadline: float) -> tuple[str, dict[int, socket.socket]]:
    """Greets process 0. Returns its problem, or "" and the connection, if all are present; neither without answer."""
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=left) as connection:
            connection.sendall(f"{greeting}\n".encode())
            answer = _read_line(connection, deadline + _ANSWER_SECONDS)
            if answer:
                return ("", {0: connection.dup()}) if answer == "go" else (answer, {})
        time.sleep(_RETRY_SECONDS)
    return "", {}


def _read_line(connection: socket.socket, deadline: float) -> str:
    """Reads one line, without its end. Returns an empty string if it does not arrive in time."""
    data = b""
    with contextlib.suppress(OSError):
        while not data.endswith(b"\n") and len(data) < 4096:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = connection.recv(4096)
            if not piece:
                break
            data += piece
    return data.decode(errors="replace").rstrip("\n") if data.endswith(b"\n") else ""
