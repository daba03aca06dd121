"""Stopping: a first signal is a request, a later one ends the process; long work is abandoned."""

import contextlib
import dataclasses
import fcntl
import functools
import os
import pty
import signal
import sys
import termios
import threading
import time

import pytest
from helpers import LIMIT, call, start, wait_until

from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime import stop
from jaxtrain.runtime.config_files import to_json
from jaxtrain.runtime.stop import Stop, Stopped
from jaxtrain.runtime.terminal import recorded_interrupts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_a_request(number, request):
    request.addfinalizer(functools.partial(signal.signal, number, signal.getsignal(number)))
    signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    before = [signal.getsignal(each) for each in stop.SIGNALS]
    with Stop().listen() as asked:
        assert not asked.asked()
        os.kill(os.getpid(), number)
        assert asked.reason == signal.Signals(number).name
    assert [signal.getsignal(each) for each in stop.SIGNALS] == before


def python(code):
    """Runs code in a process of its own; returns its exit status and output."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [
        sys.executable,
        "-c",
        "import os, signal, sys, threading, time\nfrom jaxtrain.runtime import stop\n" + code,
    ]
    done = call(command, env=buffered)
    return done.returncode, done.stdout


def test_signals_at_the_same_moment_are_one_request_and_a_later_one_ends_the_process():
    """A later signal ends the process even while the main thread runs C code."""
    code = """
with stop.Stop(grace_seconds=1.0).listen() as asked:
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    time.sleep(0.1)
    print(asked.reason, flush=True)
    time.sleep(2)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still here", flush=True)
"""
    assert python(code) == (-signal.SIGTERM, "SIGTERM\n")


def test_handlers_are_restored_when_the_block_ends_before_the_grace_period():
    code = """
signal.signal(signal.SIGTERM, lambda *_: print("mine", flush=True))
with stop.Stop(grace_seconds=1.0).listen():
    os.kill(os.getpid(), signal.SIGTERM)
time.sleep(1.5)
os.kill(os.getpid(), signal.SIGTERM)
"""
    assert python(code) == (0, "mine\n")


def test_an_interrupt_that_python_drops_before_the_run_listens_ends_it(request):
    """Python ignores a KeyboardInterrupt that is raised in a finalizer or a callback of the garbage collector."""
    request.addfinalizer(functools.partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    before = signal.default_int_handler  # the tests may run in the background, where a shell ignores it
    signal.signal(signal.SIGINT, before)
    with recorded_interrupts():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), Stop().listen():
            pytest.fail("the run went on")
    with recorded_interrupts(), Stop().listen() as stop:
        assert not stop.asked()
    assert signal.getsignal(signal.SIGINT) is before


def test_nohup_is_respected():
    code = """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with stop.Stop().listen() as asked:
    os.kill(os.getpid(), signal.SIGHUP)
    print(asked.reason)
"""
    assert python(code) == (0, "None\n")


def test_a_result_or_an_error_comes_back():
    with Stop().listen() as asked:
        assert asked.run(lambda a, b: a + b, 3, 4) == 7
        with pytest.raises(KeyError, match="nothing"):
            asked.run(lambda: {}["nothing"])


def test_a_signal_abandons_work_at_once():
    go = threading.Event()
    with Stop().listen() as asked:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        begin = time.monotonic()
        with pytest.raises(Stopped):
            asked.run(go.wait, 60)
        assert time.monotonic() - begin < 50
        assert stop.is_stuck()
        called = []
        with pytest.raises(Stopped):  # nothing new is begun
            asked.run(called.append, 1)
        assert called == []
    go.set()
    wait_until(lambda: not stop.is_stuck())


def test_other_threads_and_several_processes_run_in_place(monkeypatch):
    """Several processes stop after the same step, so a signal does not interrupt one of them."""
    here = []

    def elsewhere():
        with Stop().listen() as asked:
            here.append(asked.run(threading.current_thread) is threading.current_thread())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(60)
    assert here == [True]
    monkeypatch.setattr(stop.jax, "process_count", lambda: 2)
    asked = Stop()
    asked.reason = "SIGTERM"
    assert asked.run(threading.current_thread) is threading.main_thread()


def test_leaving_flushes_and_waits_for_nobody():
    # No daemon: it would hold up the interpreter for ever.
    code = "threading.Thread(target=threading.Event().wait).start()\nprint('said', end='')\nstop.leave(143)"
    assert python(code) == (143, "said")


def test_leaving_a_terminal_that_is_gone():
    assert python("os.close(1)\nprint('lost', end='')\nstop.leave(129)")[0] == 129


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork")  # of jax, if an earlier test of this process has started it
def test_a_closed_terminal_saves_the_run(tiny_config, tmp_path):
    """As a lost SSH session: SIGHUP, and every write to the terminal fails."""
    config = dataclasses.replace(tiny_config, train=dataclasses.replace(tiny_config.train, steps=100_000))
    (tmp_path / "config.json").write_text(to_json(config))
    command = [sys.executable, "-m", "jaxtrain.cli", "train", tmp_path / "config.json", "--run-dir", tmp_path / "run"]
    master, slave = pty.openpty()

    def take_terminal():
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    process = start(command, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_terminal)
    os.close(slave)
    metrics = tmp_path / "run" / "metrics.jsonl"
    os.set_blocking(master, False)

    def has_a_step():
        with contextlib.suppress(BlockingIOError):
            os.read(master, 65536)
        return metrics.exists() and '"loss"' in metrics.read_text()

    wait_until(has_a_step, process)
    os.close(master)
    assert process.wait(timeout=LIMIT) == 128 + signal.SIGHUP
    steps, events = read_metrics(metrics)
    assert (events[-1]["event"], events[-1]["reason"]) == ("stop", "SIGHUP")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(steps[-1]["step"])]
