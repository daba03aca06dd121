#!/usr/bin/env python
"""Time to a loss of 1.914 nats per character on Shakespeare's plays, beside nanoGPT's CPU recipe in PyTorch.

Times whole processes, from their start until the validation loss over the last tenth of the text is known: imports,
reading the text, compilation and evaluation included. Runs are interleaved. Ours starts with an empty compile cache.

  python scripts/bench_quality.py tinyshakespeare.txt --peer-python .venv-torch/bin/python
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmark import Table, parser, report

ROOT = Path(__file__).parent.parent
GOAL = 1.914  # nats per character: the loss of the CPU recipe in nanoGPT's README


def ours(text: Path, config: Path) -> dict[str, Any]:
    """Runs `jaxtrain train`; the time ends with the event of its last evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "jaxtrain.cli", "train", str(config), "--run-dir", f"{folder}/run"]
        command += ["--data.sources", str(text.absolute())]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        begin = time.time()
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in Path(folder, "run/metrics.jsonl").read_text().splitlines()]
        evaluation = [line for line in lines if line.get("event") == "eval"][-1]
        seconds = datetime.fromisoformat(evaluation["time"]).timestamp() - begin
        compiling = next(line["seconds"] for line in lines if line.get("event") == "compile")
    return {"nll": evaluation["nll"], "seconds": seconds, "compile_seconds": compiling, "steps": evaluation["step"]}


def theirs(text: Path, python: Path, steps: int) -> dict[str, Any]:
    """Runs scripts/peer_quality.py."""
    command = [str(python), str(ROOT / "scripts/peer_quality.py"), str(text), str(steps)]
    begin = time.perf_counter()
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(printed.splitlines()[-1]) | {"seconds": time.perf_counter() - begin}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("text", type=Path, help="path of tinyshakespeare.txt")
    arguments.add_argument("--config", type=Path, default=ROOT / "configs/shakespeare.py")
    arguments.add_argument("--peer-python", type=Path, default=Path(".venv-torch/bin/python"))
    arguments.add_argument("--peer-steps", type=int, default=2000)
    arguments.add_argument("--repeats", type=int, default=1)
    options = arguments.parse_args()
    for path in (options.text, options.peer_python):
        if not path.exists():
            sys.exit(f"error: {path} does not exist; see --help")
    runs: dict[str, list[dict[str, Any]]] = {"nanoGPT's recipe, torch": [], "jaxtrain": []}
    for _ in range(options.repeats):
        runs["nanoGPT's recipe, torch"].append(theirs(options.text, options.peer_python, options.peer_steps))
        runs["jaxtrain"].append(ours(options.text, options.config))
    compiling = statistics.median(run["compile_seconds"] for run in runs["jaxtrain"])
    table = Table(
        f"Time to quality: {options.text.name}, the last tenth held out",
        {"": "", "steps": ",d", "nll": ".3f", "seconds": ".1f", "/ peer": ".2f"},
        notes=[
            f"The goal is {GOAL} nats per character. Whole processes until the loss over the whole held-out text is "
            f"known; medians of {options.repeats}. Ours compiles for {compiling:.1f} s of it.",
        ],
    )
    pairs = zip(runs["jaxtrain"], runs["nanoGPT's recipe, torch"], strict=True)
    ratio = statistics.median(mine["seconds"] / peer["seconds"] for mine, peer in pairs)
    for name, outcomes in runs.items():
        nll, seconds = (statistics.median(outcome[key] for outcome in outcomes) for key in ("nll", "seconds"))
        table.rows.append([name, outcomes[0]["steps"], nll, seconds, ratio if name == "jaxtrain" else None])
    report(options, [table], runs=runs, peer_versions=runs["nanoGPT's recipe, torch"][0]["versions"])


if __name__ == "__main__":
    main()
