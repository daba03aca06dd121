#!/usr/bin/env python
"""What a start costs: importing the core against JAX and optax alone, and the time to the first step.

The first step is that of the whole command in a process of its own, until it is on record: `cold` in a new run with an
empty compile cache, `warm` in another new run with what the first has compiled, `resumed` going on with that one.

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
    "all of jaxtrain train": "import jaxtrain.cli, jaxtrain.train",
}


def importing(code: str) -> Callable[[], None]:
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)


def first_step(config: str, run: Path, cache: Path, stop_after: int) -> None:
    """Runs `jaxtrain train` until the line of its first step, and then lets it end."""
    own = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "JAX_ENABLE_COMPILATION_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in own}
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
    forms = {name: importing(code) for name, code in {"python": "pass", **IMPORTS}.items()}
    imports = interleave(forms, options.repeats + 1)
    both = zip(imports["jaxtrain's core"][1:], imports["jax, optax"][1:], strict=True)
    more = statistics.median(core - base for core, base in both)
    table = Table(
        "Importing",
        {"what": "", "seconds": ".3f"},
        notes=[
            f"Medians of {options.repeats} interleaved processes, the interpreter's start in them.",
            f"The core takes {more:+.3f} s on top of jax and optax (median of the pairs' differences).",
        ],
    )
    table.rows += [[name, statistics.median(seconds[1:])] for name, seconds in imports.items()]
    first = starts(options.config, options.repeats)
    to_step = Table(
        f"To the first step of {options.config}",
        {"start": "", "seconds": ".2f", "/ cold": ".3f"},
        notes=[f"Medians of {options.repeats} interleaved rounds; ratios are medians of the rounds' ratios."],
    )
    for name, seconds in first.items():
        ratios = [value / cold for value, cold in zip(seconds, first["cold"], strict=True)]
        to_step.rows.append([name, statistics.median(seconds), statistics.median(ratios)])
    report(options, [table, to_step], imports=imports, first_step=first)


if __name__ == "__main__":
    main()
