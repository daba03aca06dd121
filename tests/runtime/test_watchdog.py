"""The watchdog ends a run that makes no progress, with its stacks, and leaves every other run alone."""

import functools
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers import LIMIT, start
from runs import QUICK, change, train

from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime.watchdog import Watchdog

FLOOR = 600  # seconds of the 10 minutes


class Run:
    """A watchdog of 10 minutes on a clock of its own, polled every 5 s; `left` holds the exit codes."""

    def __init__(self, minutes=10.0):
        self.now, self.left, self.steps = 0.0, [], 0
        self.watchdog = Watchdog(minutes, clock=lambda: self.now, leave=self.left.append)

    def wait(self, seconds, polls=True):
        end = self.now + seconds
        while polls and self.now + 5 < end:
            self.now += 5
            if self.watchdog.check():
                return
        self.now = end
        self.watchdog.check()

    def run(self, *seconds):
        for each in seconds:
            self.steps += 1
            self.watchdog.step(self.steps)
            self.wait(each)


def evaluate(run):
    for _ in range(20):
        run.watchdog.beat()
        run.wait(500)


def save(run):
    with run.watchdog.pause():
        run.wait(100_000)


HEALTHY = {
    "quick steps": lambda run: run.run(*[1] * 200),
    "nothing has begun": lambda run: run.wait(100_000),
    "a first step that is slow": lambda run: run.run(4 * FLOOR - 10, 1, 1),
    "a step just below the limit": lambda run: run.run(1, 1, 1, 1, FLOOR - 10, 1),
    "slow steps, one of them slower": lambda run: run.run(*[300] * 5, 5000, 300),
    "an evaluation": lambda run: (run.run(1, 1, 1, 1), evaluate(run), run.run(1)),
    "a save": lambda run: (run.run(1, 1, 1, 1), save(run), run.run(1)),
    "a save within a save": lambda run: (run.run(1, 1, 1, 1), nested(run), run.run(1)),
    "SIGSTOP or a suspended machine": lambda run: (run.run(1, 1, 1, 1), run.wait(100_000, polls=False), run.run(1)),
    "stopped many times": lambda run: (run.run(1, 1, 1, 1), [run.wait(9000, polls=False) for _ in range(20)]),
}


def nested(run):
    with run.watchdog.pause():
        save(run)
        run.wait(100_000)


@pytest.mark.parametrize("healthy", HEALTHY.values(), ids=HEALTHY)
def test_a_healthy_run_is_left_alone(healthy):
    run = Run()
    healthy(run)
    assert run.left == []


SICK = {
    "a step that hangs": (lambda run: run.run(1, 1, 1, 1, 100_000), FLOOR),
    "the first step hangs": (lambda run: run.run(100_000), 4 * FLOOR),
    "a slow step hangs": (lambda run: run.run(300, 300, 300, 300, 100_000), 6000),
    "one stall that recovered does not raise the limit": (lambda run: run.run(1, 1, 1, 590, 1, 1, 100_000), FLOOR),
    "an evaluation hangs": (lambda run: (run.run(1, 1, 1, 1), run.watchdog.beat(), run.wait(100_000)), FLOOR),
    "after a save": (lambda run: (run.run(1, 1, 1, 1), save(run), run.run(100_000)), FLOOR),
    "after SIGSTOP": (lambda run: (run.run(1, 1, 1, 1), run.wait(9000, polls=False), run.run(100_000)), FLOOR),
}


@pytest.mark.parametrize(("sick", "seconds"), SICK.values(), ids=SICK)
def test_a_stall_ends_the_run(sick, seconds, capfd):
    run = Run()
    sick(run)
    assert run.left == [75]
    error = capfd.readouterr().err
    assert f"error: step {run.steps} has made no progress for {seconds / 60:.2g} min; all stacks" in error
    assert "most recent call first" in error
    assert __file__ in error


def test_none_disables_it():
    with Watchdog(None, leave=pytest.fail) as watchdog:
        watchdog.step(1)
        assert not watchdog._thread.is_alive()


def test_a_hung_step_of_a_run_is_ended_and_recorded(tiny_config, tmp_path, capfd):
    """Its slow sibling with two processes is in test_processes.py. One process has no time-out for others."""
    left, ended = [], threading.Event()

    def leave(code):
        left.append(code)
        ended.set()

    def hang(train_step):
        def hanging(state, batch):
            if int(state.step) == 5:
                assert ended.wait(60)
            return train_step(state, batch)

        return hanging

    config = change(tiny_config, train={"stall_minutes": 0.04})
    hooks = QUICK._replace(wrap_step=hang, make_watchdog=functools.partial(Watchdog, leave=leave))
    train(config, tmp_path / "run", hooks=hooks)
    assert left == [75]
    assert "in hanging" in capfd.readouterr().err
    (event,) = [event for event in read_metrics(tmp_path / "run" / "metrics.jsonl")[1] if event["event"] == "stalled"]
    assert event["problem"].startswith("step 6 has made no progress for ")


SCRIPT = """
import time
from jaxtrain.runtime.watchdog import Watchdog

with Watchdog(0.01) as watchdog:
    for step in range(1, 40):
        watchdog.step(step)
        print(step, flush=True)
        time.sleep(0.1)
"""


def test_a_process_that_was_stopped_and_continues_is_left_alone(monkeypatch):
    monkeypatch.setenv("JAXTRAIN_TIMEOUT", "0.5")  # seconds; the limit is 2
    command = [sys.executable, "-c", SCRIPT]
    process = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    limit = threading.Timer(LIMIT, process.kill)
    limit.start()
    while process.stdout.readline() not in ("10\n", ""):
        pass
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    _, error = process.communicate()
    limit.cancel()
    assert (process.returncode, error) == (0, "")
