"""Processes find each other over TCP before JAX starts, so that one that never comes is named.

`jax.distributed.initialize` ends a process in C++ when somebody is missing, without saying who. Here process 0 listens
at the address where its coordinator will be; the others connect and say their number; when all are there, or the time
is over, process 0 tells each of them how it went, and the port is free again.
"""

import contextlib
import socket
import time

_HELLO_SECONDS = 5.0  # for a connection to say who it is: it may be a port scanner
_RETRY_SECONDS = 0.2


def meet(address: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Returns when all processes are there.

    Args:
      address: `host:port` of process 0, the same on all.
      num_processes: how many there are, this one included.
      process_id: of this one, from 0.
      timeout: seconds to wait for the others.

    Raises:
      ValueError: somebody is missing, or two have the same number; the same text on all that are there.
    """
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process {process_id} is not one of 0 to {num_processes - 1}: check JAX_PROCESS_ID")
    host, port = _split(address)
    deadline = time.monotonic() + timeout
    if process_id == 0:
        problem = _receive(port, num_processes, deadline, timeout)
    else:
        problem = _announce(host, port, f"jaxtrain {process_id} of {num_processes}", deadline)
        if problem is None:
            problem = f"process 0 is missing: nothing like it answered at {address} within {timeout:g} s; see its log"
    if problem:
        raise ValueError(problem)


def name_processes(processes: list[int]) -> str:
    """`process 1`, `processes 1, 2`, with at most 8 of them listed."""
    listed = ", ".join(str(process) for process in processes[:8])
    more = f" and {len(processes) - 8} more" if len(processes) > 8 else ""
    return f"{'process' if len(processes) == 1 else 'processes'} {listed}{more}"


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"the coordinator's address must be host:port, got {address!r}: check JAX_COORDINATOR_ADDRESS")
    return host.strip("[]"), int(port)


def _receive(port: int, num_processes: int, deadline: float, timeout: float) -> str:
    """Process 0: takes the others in and tells them how it went; returns that too, empty if all are there."""
    there: set[int] = set()
    connections = []
    problem = ""
    with contextlib.ExitStack() as stack, _listen(port) as server:
        while len(there) < num_processes - 1 and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = [process for process in range(1, num_processes) if process not in there]
                problem = (
                    f"{len(missing)} of {num_processes} processes did not come within {timeout:g} s: "
                    f"{name_processes(missing)}; see their logs, or give them longer with JAXTRAIN_TIMEOUT"
                )
                break
            words = _read_line(connection, time.monotonic() + _HELLO_SECONDS).split()
            if len(words) != 4 or words[0] != "jaxtrain" or not words[1].isdigit():
                continue
            process = int(words[1])
            if words[3] != str(num_processes):
                problem = f"process {process} counts {words[3]} processes, and process 0 {num_processes}"
            elif process in there or process == 0:
                problem = f"two processes say that they are process {process}: check JAX_PROCESS_ID"
            there.add(process)
            connections.append(connection)
        for connection in connections:
            with contextlib.suppress(OSError):  # it has given up: it knows
                connection.sendall(f"{problem or 'go'}\n".encode())
    return problem


def _listen(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen on port {port} ({error.strerror}): another run may have it; give another one in "
            "JAX_COORDINATOR_ADDRESS or JAX_COORDINATOR_PORT"
        ) from None


def _announce(host: str, port: int, hello: str, deadline: float) -> str | None:
    """The others: what process 0 answers, empty if all are there; None: it has not answered."""
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=left) as connection:
            connection.sendall(f"{hello}\n".encode())
            # Its time began at another moment than ours: a little longer gets its answer rather than our guess.
            answer = _read_line(connection, deadline + _HELLO_SECONDS)
            if answer:
                return "" if answer == "go" else answer
        time.sleep(_RETRY_SECONDS)
    return None


def _read_line(connection: socket.socket, deadline: float) -> str:
    """A line from the other side, without its end; empty if it does not come in time."""
    data = b""
    with contextlib.suppress(OSError):
        while not data.endswith(b"\n") and len(data) < 4096:
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = connection.recv(4096)
            if not piece:
                break
            data += piece
    return data.decode(errors="replace").rstrip("\n") if data.endswith(b"\n") else ""
