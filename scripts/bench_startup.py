#!/usr/bin/env python
"""Time of a start: importing the core beside JAX and optax alone, and the time to the first step.

The time to the first step is that of the whole command in a new process, until the step is printed: `cold` in a new run
with an empty compile cache, `warm` in another new run with the cache of the first, `resumed` in that run again.

On a shared machine the CPU time says more than the wall time.

  python scripts/bench_startup.py --repeats 5 --json startup.json
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmark import Table, interleave, parser, report

CORE = ["trees", "losses", "schedules", "precision", "optim", "clipping", "guard", "step"]
IMPORTS = {
    "jax": "import jax",
    "jax, optax": "import jax, optax",
    "jaxtrain's core": "import " + ", ".join(f"jaxtrain.{name}" for name in CORE),
    "all of jaxtrain train": "import jaxtrain.cli, jaxtrain.training.train",
}


def surroundings(*without: str) -> dict[str, str]:
    """Returns the environment of a user, who imports from bytecode: this process's, without some variables."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONDONTWRITEBYTECODE", *without)}


def importing(code: str, cpu_seconds: list[float]) -> Callable[[], None]:
    """Returns a function that imports in a new process and appends the CPU time."""

    def run() -> None:
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True, env=surroundings())
        after = os.times()
        own = (after.children_user + after.children_system) - (before.children_user + before.children_system)
        cpu_seconds.append(own)

    return run


def first_step(config: str, run: Path, cache: Path, stop_after: int) -> float:
    """Returns the seconds until `jaxtrain train` prints its first step; waits for its end."""
    own = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_ENABLE_COMPILATION_CACHE")
    environment = surroundings(*own)
    environment["XDG_CACHE_HOME"] = str(cache)
    command = [sys.executable, "-u", "-m", "jaxtrain.cli", "train", config, "--run-dir", str(run)]
    command += ["--train.log-every", "1", "--train.stop-after", str(stop_after)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    begin, seconds = time.perf_counter(), None
    for line in process.stdout:
        if line.startswith("step ") and seconds is None:
            seconds = time.perf_counter() - begin
    if process.wait() or seconds is None:
        raise SystemExit(f"{' '.join(command)} printed no step; exit code {process.returncode}")
    return seconds


def starts(config: str, repeats: int) -> dict[str, list[float]]:
    """Returns the seconds to the first step, by kind of start."""
    found: dict[str, list[float]] = {"cold": [], "warm": [], "resumed": []}
    with tempfile.TemporaryDirectory() as folder:
        cache, run = Path(folder) / "cache", Path(folder) / "run"
        for _ in range(repeats):
            shutil.rmtree(cache, ignore_errors=True)
            for name, stop_after in (("cold", 1), ("warm", 1), ("resumed", 2)):
                if name != "resumed":
                    shutil.rmtree(run, ignore_errors=True)
                found[name].append(first_step(config, run, cache, stop_after))
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("config", nargs="?", default="configs/quickstart.py")
    arguments.add_argument("--repeats", type=int, default=5)
    options = arguments.parse_args()
    cpu: dict[str, list[float]] = {name: [] for name in ("python", *IMPORTS)}
    forms = {name: importing(code, cpu[name]) for name, code in {"python": "pass", **IMPORTS}.items()}
    wall = interleave(forms, options.repeats + 1)
    more = [
        statistics.median(b - a for a, b in zip(all_["jax, optax"][1:], all_["jaxtrain's core"][1:], strict=True))
        for all_ in (wall, cpu)
    ]
    table = Table(
        "Importing",
        {"what": "", "seconds": ".3f", "CPU seconds": ".3f"},
        notes=[
            f"Medians of {options.repeats} interleaved processes, including the start of the interpreter.",
            f"The core on top of jax and optax: {more[0]:+.3f} s, {more[1]:+.3f} s of CPU (medians of differences).",
        ],
    )
    table.rows += [[name, *(statistics.median(all_[name][1:]) for all_ in (wall, cpu))] for name in wall]
    first = starts(options.config, options.repeats)
    to_step = Table(
        f"To the first step of {options.config}",
        {"start": "", "seconds": ".2f", "/ cold": ".3f"},
        notes=[f"Medians of {options.repeats} interleaved rounds; ratios are medians of the rounds' ratios."],
    )
    for name, seconds in first.items():
        ratios = [value / cold for value, cold in zip(seconds, first["cold"], strict=True)]
        to_step.rows.append([name, statistics.median(seconds), statistics.median(ratios)])
    report(options, [table, to_step], imports=wall, imports_cpu=cpu, first_step=first)


if __name__ == "__main__":
    main()
