"""Rendezvous of the processes: who is missing or a stranger is named, and harms nobody."""

import contextlib
import hashlib
import socket
import threading
import time

import pytest
from helpers import LIMIT, wait_until
from process_helpers import free_address

from jaxtrain.runtime.rendezvous import meet


def meet_all(arguments, timeout=60.0):
    """Calls `meet` for each (number of processes, process) at once; returns the error of each, or those that it met."""
    address, outcome = free_address(), {}

    def one(i, count, process):
        try:
            (outcome[i],) = close(meet(address, count, process, timeout))
        except ValueError as error:
            outcome[i] = str(error)

    threads = [threading.Thread(target=one, args=(i, *each)) for i, each in enumerate(arguments)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    return [outcome[i] for i in range(len(arguments))]


def close(*connections):
    """Closes what `meet` has returned; returns the processes at the other ends."""
    for connection in [connection for each in connections for connection in each.values()]:
        connection.close()
    return [sorted(each) for each in connections]


def test_processes_meet_in_any_order():
    assert meet_all([(3, 2), (3, 0), (3, 1)]) == [[0], [1, 2], [0]]


def test_missing_processes_are_named_to_all_others():
    came = meet_all([(5, 3), (5, 0), (5, 1)], timeout=3.0)
    assert all("2 of 5 processes did not come within 3 s: processes 2, 4;" in text for text in came)


def test_duplicate_numbers_and_other_counts_are_errors():
    same = meet_all([(4, 0), (4, 1), (4, 1)])
    assert "two processes say that they are process 1" in same[0]
    assert same == [same[0]] * 3
    assert "process 1 counts 2 processes, and process 0 3" in meet_all([(3, 0), (2, 1)])[0]
    with pytest.raises(ValueError, match="process 4 is not one of 0 to 1"):
        meet("localhost:1", 2, 4, 1.0)


ZEROS = b"0" * 64


STRANGERS = [
    *(b"", b"\n", b"GET / HTTP/1.1\n", b"jaxtrain one of two\n", b"jaxtrain 1 of 2\n", b"jaxtrain 1 of 2 token\n"),
    *(b"x" * 100_000, b"\xff\xfe\x00\n", b"jaxtrain " + b"9" * 5000 + b" of 2\n", "jaxtrain \u0663 of 2\n".encode()),
    *(b"jaxtrain -1 of 2 " + ZEROS + b"\n", b"jaxtrain 1 of 2 " + ZEROS + b"\n"),  # without the token
    b"jaxtrain 2 of 2 " + hashlib.sha256(b"").hexdigest().encode() + b"\n",  # a process that the run does not have
]


def test_strangers_at_the_port_do_no_harm():
    """Connections that stay silent delay nobody."""
    address = free_address()
    host, port = address.split(":")
    outcome = []
    lead = threading.Thread(target=lambda: outcome.append(meet(address, 2, 0, 60.0)))
    lead.start()

    def connect():
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                return socket.create_connection((host, int(port)), timeout=5)
            except ConnectionRefusedError:
                time.sleep(0.05)

    idle = [connect() for _ in range(20)]
    for greeting in STRANGERS:
        with connect() as stranger, contextlib.suppress(ConnectionError):
            stranger.sendall(greeting)
    begin = time.monotonic()
    outcome.append(meet(address, 2, 1, 60.0))
    lead.join(LIMIT)
    assert sorted(close(*outcome)) == [[0], [1]]
    assert time.monotonic() - begin < 30  # 20 of them one after the other would take 100 s
    for connection in idle:
        connection.close()


def test_a_process_that_was_started_again_replaces_its_old_connection():
    address, outcome = free_address(), []
    host, port = address.split(":")
    others = [threading.Thread(target=lambda i=i: outcome.append(meet(address, 3, i, 60.0))) for i in (0, 1, 2)]
    others[0].start()

    def is_open():
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection((host, int(port))):
            return True

    wait_until(is_open)
    with socket.create_connection((host, int(port))) as dead:
        dead.sendall(b"jaxtrain 1 of 3 " + hashlib.sha256(b"").hexdigest().encode() + b"\n")
    for other in others[1:]:
        other.start()
    for other in others:
        other.join(LIMIT)
    assert sorted(close(*outcome)) == [[0], [0], [1, 2]]


def test_silent_connections_give_their_file_descriptors_back():
    address, outcome = free_address(), []
    host, port = address.split(":")
    lead = threading.Thread(target=lambda: outcome.append(meet(address, 2, 0, 60.0)))
    lead.start()
    silent = []

    def connects():
        with contextlib.suppress(ConnectionRefusedError):
            silent.append(socket.create_connection((host, int(port)), timeout=LIMIT))
        return silent

    wait_until(connects)
    with silent[0] as connection:
        assert connection.recv(1) == b""
    outcome.append(meet(address, 2, 1, 60.0))
    lead.join(LIMIT)
    assert sorted(close(*outcome)) == [[0], [1]]


def test_a_process_of_another_run_is_refused_with_the_reason(monkeypatch):
    address, outcome = free_address(), []
    lead = threading.Thread(target=lambda: outcome.append(meet(address, 2, 0, 60.0)))
    monkeypatch.setenv("JAXTRAIN_TOKEN", "ours")
    lead.start()
    time.sleep(0.5)
    monkeypatch.setenv("JAXTRAIN_TOKEN", "theirs")
    with pytest.raises(ValueError, match="process 1 has another JAXTRAIN_TOKEN than process 0"):
        meet(address, 2, 1, 60.0)
    assert lead.is_alive()
    monkeypatch.setenv("JAXTRAIN_TOKEN", "ours")
    outcome.append(meet(address, 2, 1, 60.0))
    lead.join(LIMIT)
    assert sorted(close(*outcome)) == [[0], [1]]
