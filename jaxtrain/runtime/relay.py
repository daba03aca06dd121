"""Relay of the connection to JAX's coordinator, which hides the death of the lead from JAX.

JAX ends a process in C++, with a stack trace and exit code 134, as soon as its connection to the coordinator closes.
Behind a relay that connection stays open, and `peers`, which sees the same death, ends the process in order.
"""

import contextlib
import socket
import threading

_CONNECT_SECONDS = 60.0


def relay(host: str, port: int) -> str:
    """Forwards the connections to a local port, on daemon threads. Returns the local address, `127.0.0.1:PORT`."""
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(server, (host, port)), name="relay", daemon=True).start()
    return f"127.0.0.1:{server.getsockname()[1]}"


def _serve(server: socket.socket, address: tuple[str, int]) -> None:
    while True:
        local = server.accept()[0]
        try:
            remote = socket.create_connection(address, timeout=_CONNECT_SECONDS)
        except OSError:  # the coordinator does not listen yet: JAX tries again
            local.close()
            continue
        remote.settimeout(None)
        for connection in (local, remote):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_forward, args=(local, remote), name="relay", daemon=True).start()
        threading.Thread(target=_receive, args=(remote, local), name="relay", daemon=True).start()


def _receive(remote: socket.socket, local: socket.socket) -> None:
    """Copies until the coordinator closes its side; this side stays open."""
    with contextlib.suppress(OSError):
        while data := remote.recv(1 << 16):
            local.sendall(data)


def _forward(local: socket.socket, remote: socket.socket) -> None:
    """Copies until JAX closes its side, then closes the other one."""
    with contextlib.suppress(OSError):
        while data := local.recv(1 << 16):
            remote.sendall(data)
    for connection in (remote, local):
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # wakes the other thread
        connection.close()
