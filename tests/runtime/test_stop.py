"""Stopping: one signal is a request, the second is not; what takes long is left behind, and nothing else is."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxtrain.runtime import stop
from jaxtrain.runtime.stop import Stop, Stopped


def test_the_first_signal_is_noted_and_the_second_is_the_systems():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Stop().listen() as asked:
        assert not asked.asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.reason == "SIGINT"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_result_or_an_error_comes_back():
    with Stop().listen() as asked:
        assert asked.run(lambda a, b: a + b, 3, 4) == 7
        with pytest.raises(KeyError, match="nothing"):
            asked.run(lambda: {}["nothing"])


def test_a_signal_leaves_work_behind_at_once():
    """R-C9."""
    goes_on = threading.Event()
    with Stop().listen() as asked:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        begin = time.monotonic()
        with pytest.raises(Stopped):
            asked.run(goes_on.wait, 60)
        assert time.monotonic() - begin < 50
        assert stop.is_stuck()
        called = []
        with pytest.raises(Stopped):  # nothing new is begun
            asked.run(called.append, 1)
        assert called == []
    goes_on.set()
    deadline = time.monotonic() + 50
    while stop.is_stuck() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not stop.is_stuck()


def test_other_threads_and_several_processes_run_in_place(monkeypatch):
    """They must not part: under several processes all stop together, after a step."""
    here = []

    def elsewhere():
        with Stop().listen() as asked:
            here.append(asked.run(threading.current_thread) is threading.current_thread())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert here == [True]
    monkeypatch.setattr(stop.jax, "process_count", lambda: 2)
    asked = Stop()
    asked.reason = "SIGTERM"
    assert asked.run(threading.current_thread) is threading.main_thread()


def test_leaving_flushes_and_waits_for_nobody():
    code = (
        "import threading, sys\nfrom jaxtrain import stop\n"
        "threading.Thread(target=threading.Event().wait).start()\n"  # no daemon: would hold the interpreter for ever
        "print('said', end='')\nstop.leave(143)"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=buffered, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout) == (143, "said")
