#!/usr/bin/env python
"""What a start costs: importing the core against JAX and optax alone, and the time to the first step.

The first step is that of the whole command in a process of its own, until it is on record: `cold` in a new run with an
empty compile cache, `warm` in another new run with what the first has compiled, `resumed` going on with that one.

The processor time says more than the clock where others use the machine.

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

CORE = ["struct", "losses", "schedules", "precision", "optim", "clipping", "guard", "step"]
IMPORTS = {
    "jax": "import jax",
    "jax, optax": "import jax, optax",
    "jaxtrain's core": "import " + ", ".join(f"jaxtrain.{name}" for name in CORE),
    "all of jaxtrain train": "import jaxtrain.cli, jaxtrain.training.train",
}


def surroundings(*without: str) -> dict[str, str]:
    """The environment of a user: what is installed has its bytecode, so where it may be written it is."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONDONTWRITEBYTECODE", *without)}


def importing(code: str, cpu_seconds: list[float]) -> Callable[[], None]:
    """Imports in a process of its own, and notes the processor time that it took."""

    def run() -> None:
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True, env=surroundings())
        after = os.times()
        own = (after.children_user + after.children_system) - (before.children_user + before.children_system)
        cpu_seconds.append(own)

    return run


def first_step(config: str, run: Path, cache: Path, stop_after: int) -> float:
    """Seconds until `jaxtrain train` shows its first step; waits for its end."""
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
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode} and no step")
    return seconds


def starts(config: str, repeats: int) -> dict[str, list[float]]:
    """Seconds to the first step."""
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
            f"Medians of {options.repeats} interleaved processes, the interpreter's start in them.",
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
