"""A process that fails or dies ends the others at once, and they say which one it was."""

import os
import queue
import signal
import socket
import subprocess
import sys

import pytest
from helpers import LIMIT

from jaxtrain.runtime.peers import Peers
from jaxtrain.runtime.relay import relay
from jaxtrain.runtime.rendezvous import split_address

LOST = "error: process {} is lost: it was killed, or its host is down; see its log; the same command resumes the run\n"


class Three:
    """Three processes of a run as threads of this one; `left` gets (process, exit code) when one ends."""

    def __init__(self):
        self.left = queue.Queue()
        pairs = {process: socket.socketpair() for process in (1, 2)}
        connections = [{process: pair[0] for process, pair in pairs.items()}]
        connections += [{0: pair[1]} for pair in pairs.values()]
        self.sockets = [[*each.values()] for each in connections]
        self.peers = [
            Peers(each, leave=lambda code, process=process: self.left.put((process, code)))
            for process, each in enumerate(connections)
        ]

    def dies(self, process):
        """Closes the process's sockets without a word, as the kernel does."""
        for connection in self.sockets[process]:
            connection.shutdown(socket.SHUT_WR)

    def ends(self, count):
        return sorted(self.left.get(timeout=LIMIT) for _ in range(count))


@pytest.fixture
def three():
    made = Three()
    yield made
    for peers in made.peers:
        peers.announce(0)


@pytest.mark.parametrize("process", [0, 2])
def test_the_others_end_with_the_name_of_a_dead_process(three, capsys, process):
    three.dies(process)
    others = [other for other in range(3) if other != process]
    assert three.ends(2) == [(other, 75) for other in others]
    assert capsys.readouterr().err == LOST.format(process) * 2


def test_the_others_end_with_the_words_and_the_code_of_a_process_that_failed(three, capsys):
    three.peers[1].announce(2, "process 1 failed: the disk is \x1b[2Jfull")
    assert three.ends(2) == [(0, 2), (2, 2)]
    assert capsys.readouterr().err == "error: process 1 failed: the disk is \\x1b[2Jfull\n" * 2


def test_an_end_in_good_order_ends_nobody(three, capsys):
    for peers in three.peers:
        peers.announce(0)
    with pytest.raises(queue.Empty):
        three.left.get(timeout=1.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [b"", b"\n", b"[]\n", b'{"code": "x"}\n', b"\xff\xfe" * 9000])
def test_words_that_are_no_message_are_a_loss(words):
    left = queue.Queue()
    ours, theirs = socket.socketpair()
    peers = Peers({1: ours}, leave=left.put)
    theirs.settimeout(1.0)
    theirs.sendall(words)
    theirs.close()
    assert left.get(timeout=LIMIT) == 75
    peers.announce(0)


SUSPENDED = """
import socket, sys, time
connection = socket.create_connection(("localhost", int(sys.argv[1])))
print("here", flush=True)
time.sleep(1000)
"""


def test_a_suspended_process_is_not_lost_and_a_killed_one_is():
    left = queue.Queue()
    with socket.create_server(("localhost", 0)) as server:
        child = subprocess.Popen([sys.executable, "-c", SUSPENDED, str(server.getsockname()[1])])
        try:
            peers = Peers({1: server.accept()[0]}, leave=left.put)
            os.kill(child.pid, signal.SIGSTOP)
            with pytest.raises(queue.Empty):
                left.get(timeout=1.0)
            child.kill()
            assert left.get(timeout=LIMIT) == 75
            peers.announce(0)
        finally:
            child.kill()
            child.wait(LIMIT)


ABORT = """
import ctypes, os, socket, sys, threading
from jaxtrain.runtime import peers
peers._NAME_SECONDS = 1.0
for is_lost in (True, False):
    if not os.fork():
        ours, theirs = socket.socketpair()
        peers.watch({0: ours})
        if is_lost:
            threading.Timer(0.3, theirs.close).start()
        threading.Thread(target=ctypes.CDLL(None).abort).start()
        threading.Event().wait(60)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_an_abort_in_a_collective_ends_as_a_loss_if_it_is_one():
    """As gloo may abort with three processes or more; another abort stays one."""
    done = subprocess.run([sys.executable, "-c", ABORT], capture_output=True, text=True, timeout=LIMIT, check=True)
    assert done.stdout.split() == ["75", "-6"]
    assert LOST.format(0) in done.stderr


def test_the_relay_forwards_both_ways_and_stays_open_when_the_lead_dies():
    with socket.create_server(("localhost", 0)) as server:
        local = socket.create_connection(split_address(relay(*server.getsockname())), timeout=LIMIT)
        remote = server.accept()[0]
        remote.settimeout(20)
        local.sendall(b"x" * 200_000)
        remote.sendall(b"y")
        assert local.recv(9) == b"y"
        received = 0
        while received < 200_000:
            received += len(remote.recv(1 << 20))
        remote.close()
        local.settimeout(0.5)
        with pytest.raises(TimeoutError):
            local.recv(1)
        local.close()


def test_the_relay_forwards_the_end_of_the_jax_client():
    with socket.create_server(("localhost", 0)) as server:
        local = socket.create_connection(split_address(relay(*server.getsockname())), timeout=LIMIT)
        remote = server.accept()[0]
        remote.settimeout(20)
        local.close()
        assert remote.recv(1) == b""
        remote.close()
