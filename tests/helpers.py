"""Helpers that several test files share."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def user_environment(**more):
    """Returns the environment of a user's shell: one device, no strict modes, this Python's scripts on the path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_NUMPY") and k != "XLA_FLAGS"}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}"} | more


def run(command, *, cwd=None, environment=None, returncode=0):
    """Runs a command as a user would and returns its stdout; fails on another return code, with all output."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment or user_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,
    )
    assert done.returncode == returncode, f"exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def run_python(code, **options):
    """Runs code in a Python process of its own, with warnings as errors; returns its stdout."""
    return run([sys.executable, "-W", "error", "-c", code], **options)
