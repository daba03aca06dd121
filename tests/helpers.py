"""Helpers that several test files share."""

import importlib.metadata
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Most of the suite's time is LLVM's: without its optimizations, and in one part, tiny programs compile three times as
# fast. Without fusion emitters, which later versions cannot do without, they do so twice as fast again.
QUICK_XLA = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICK_XLA += " --xla_cpu_use_fusion_emitters=false"
LIMIT = 600  # seconds until a test gives up on a process; each takes a few


def user_environment(**more):
    """Returns the environment of a user's shell: one device, no strict modes, this Python's scripts on the path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_NUMPY") and k != "XLA_FLAGS"}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"} | more


def call(command, **options):
    """Runs a command to its end, LIMIT seconds at most; returns its code and output as text."""
    options = {"capture_output": True, "text": True, "check": False, "timeout": LIMIT, **options}
    return subprocess.run([str(part) for part in command], **options)


def run(command, *, cwd=None, environment=None, returncode=0, timeout=LIMIT):
    """Runs a command as a user would and returns its stdout; fails on another return code, with all output."""
    done = call(command, cwd=cwd, env=environment or user_environment(), timeout=timeout)
    assert done.returncode == returncode, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_python(code, **options):
    """Runs code in a Python process of its own, with warnings as errors; returns its stdout."""
    return run([sys.executable, "-W", "error", "-c", code], **options)


STARTED = []  # tests/conftest.py kills what a test leaves behind


def start(command, **options):
    """Starts a process that ends with the test at the latest; its streams are text."""
    process = subprocess.Popen([str(part) for part in command], text=True, **options)
    STARTED.append(process)
    return process


def wait_until(condition, *processes):
    """Polls until the condition holds; fails after LIMIT seconds, or when one of the processes has ended."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        assert [process.poll() for process in processes] == [None] * len(processes)
        time.sleep(0.01)
