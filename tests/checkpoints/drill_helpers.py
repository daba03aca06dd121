"""A driver that kills or stops `jaxtrain train` at a named moment, and comparisons with an undisturbed run."""

import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
from helpers import LIMIT, start

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.restore import restore
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime.config_files import to_json
from jaxtrain.training.run import open_run

TIMES = {"attempt", "tokens_per_second", "step_seconds", "time"}


# Seconds that a process which is sent SIGTERM may take, its start included; unheeded it would sleep for 1000.
GRACE = 200


DRIVER = """
import functools, os, signal, sys, threading, time
from pathlib import Path

import jaxtrain.training.train
from jaxtrain.checkpoints.save import Saver
from jaxtrain.cli import main
from jaxtrain.training.run import Hooks

what, where, *arguments = sys.argv[1:]
run_dir = Path(arguments[arguments.index("--run-dir") + 1])
seen = 0


def kill_at(stage):
    global seen
    seen += stage == where
    if stage != where or seen < 2:  # the first save succeeds, so that each attempt makes progress
        return
    deadline = time.monotonic() + 60
    while stage == "arrays" and not list(run_dir.glob("checkpoints/.*.partial*/*/*")) and time.monotonic() < deadline:
        pass
    if stage == "deleting":
        next(run_dir.glob("checkpoints/.*.deleting/manifest.json")).unlink()
    os.kill(os.getpid(), signal.SIGKILL)


def terminate_at(stage):
    global seen
    seen += stage == where
    if stage == where and seen == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # the loop continues meanwhile


def terminate_twice_at(stage):
    if stage == where:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2)  # past the grace period of the first
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1000)


def stuck(frame, event, argument):
    # A profile of the threads: a call of the function named `where` never returns.
    if event == "call" and frame.f_code.co_name == where and "jaxtrain" in frame.f_code.co_filename:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1000)


stages = {"kill": kill_at, "terminate": terminate_at, "terminate twice": terminate_twice_at}
if what in stages:
    hooks = Hooks(make_saver=functools.partial(Saver, on_stage=stages[what]))
    jaxtrain.training.train.train.__kwdefaults__["hooks"] = hooks
elif what == "stuck":
    threading.setprofile(stuck)
sys.exit(main(arguments))
"""


def with_fields(config, part, **fields):
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **fields)})


def numbers(run_dir):
    """The step lines without what a clock or a restart changes."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(run_dir / "metrics.jsonl")[0]]


def events(run_dir, name):
    return [event for event in read_metrics(run_dir / "metrics.jsonl")[1] if event["event"] == name]


def bits(run_dir):
    run = open_run(run_dir)
    state = restore(CheckpointFolder(run_dir / "checkpoints"), run.program.abstract_state)[0]
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def evaluations(run_dir):
    return {event["step"]: event["nll"] for event in events(run_dir, "eval")}


def assert_undisturbed(run_dir, whole):
    assert numbers(run_dir) == numbers(whole)
    assert bits(run_dir) == bits(whole)
    assert evaluations(run_dir) == evaluations(whole)
    assert (run_dir / "sample.txt").read_text() == (whole / "sample.txt").read_text()
    assert events(run_dir, "stop")[-1]["reason"] == "finished"
    assert not [path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not (run_dir / "lock").exists()


class Command:
    """`jaxtrain train` of a config in a process of its own, with the driver's tricks."""

    def __init__(self, config, folder):
        self.run_dir = folder / "run"
        (folder / "driver.py").write_text(DRIVER)
        (folder / "config.json").write_text(to_json(config))
        self._arguments = ["train", str(folder / "config.json"), "--run-dir", str(self.run_dir)]
        self._driver = [sys.executable, str(folder / "driver.py")]
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
        self._environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONWARNINGS": "default"}

    def start(self, what="", where="", *flags):
        command = [*self._driver, what, where, *self._arguments, *flags]
        return start(command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def __call__(self, what="", where="", *flags):
        """The exit code and what was written to standard error."""
        process = self.start(what, where, *flags)
        _, errors = process.communicate(timeout=LIMIT)
        return process.returncode, errors
