#!/usr/bin/env python
"""Precision and recall of the health rules on short real runs, healthy in many shapes and sick in many ways.

Each run of health_runs.py trains a tiny transformer for 320 steps on the source of Python's standard library, and is
judged as `jaxtrain report` judges it. Constants of the rules may be set on the tuning half alone.

  python scripts/bench_health.py                                     # all runs, a few seconds each
  python scripts/bench_health.py --only cosine 'rate of 1'
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # tiny programs compile three times as fast without LLVM's optimizations
    os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {os.environ.get('XLA_FLAGS', '')}"

from benchmark import Table, parser, report
from health_runs import HEALTHY, SICK, STEPS, Case, Stores, register

from jaxtrain.config import Config
from jaxtrain.monitoring.health import Finding, diagnose
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.training.train import train

Judged = tuple[Case, list[str]]


def judge(case: Case, folder: Path, config: Config) -> list[Finding]:
    """Trains a run, without its output; returns its findings but for those of severity info."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            train(config, folder, hooks=case.hooks())
        except ValueError as error:  # a state that is not finite is not saved
            if "not finite" not in str(error):
                raise
    return [found for found in diagnose(*read_metrics(folder / "metrics.jsonl"), config) if found.severity != "info"]


def score(judged: Iterable[Judged]) -> dict[str, tuple[int, int, int]]:
    """Counts by rule: runs in which it had to come, those in which it came, and those in which it was a false alarm."""
    counts: dict[str, list[int]] = {}
    for case, found in judged:
        for name in {*case.expected[:1], *found}:
            count = counts.setdefault(name, [0, 0, 0])
            count[0] += name in case.expected[:1]
            count[1] += name in case.expected[:1] and name in found
            count[2] += name not in case.expected
    return {name: (due, came, false) for name, (due, came, false) in sorted(counts.items())}


def tables(judged: list[Judged]) -> list[Table]:
    """Returns the figures by half, by rule and by run."""
    halves = Table(
        f"Health rules on {len(judged)} real runs",
        {"half": "", "healthy runs": "d", "silent": "d", "sick runs": "d", "found": "d", "precision": ".2f"}
        | {"recall": ".2f"},
        notes=[
            "Found: the finding that had to come came. Precision counts every finding that neither had to come nor may "
            "follow from the cause as false. Constants were set on the tuning half alone."
        ],
    )
    for half in ("tuning", "report"):
        mine = [(case, found) for case, found in judged if case.half == half]
        healthy = [found for case, found in mine if not case.expected]
        due, came, false = (sum(column) for column in zip(*score(mine).values(), strict=True)) if mine else (0, 0, 0)
        precision, recall = came / (came + false) if came + false else None, came / due if due else None
        halves.rows.append([half, len(healthy), healthy.count([]), due, came, precision, recall])
    rules = Table("By rule", {"rule": "", "runs": "d", "found": "d", "false alarms": "d"})
    rules.rows = [[name, *counts] for name, counts in score(judged).items()]
    runs = Table("By run; other findings that may follow from the cause are in brackets", {"run": ""})
    runs.columns |= {"half": "", "expected": "", "found": ""}
    for case, found in judged:
        shown = [f"({name})" if name in case.expected[1:] else name for name in found]
        runs.rows.append([case.name, case.half, (*case.expected, "-")[0], " ".join(shown) or "-"])
    return [halves, rules, runs]


def main() -> None:
    options = _options()
    register()
    judged, evidence = [], {}
    with tempfile.TemporaryDirectory() as temporary:
        stores = Stores(Path(temporary), options.sources)
        for i, case in enumerate(_chosen(options)):
            found = judge(case, Path(temporary, f"run{i}"), case.config(stores, options.steps))
            print(f"{case.name}: {', '.join(f'{f.name} at step {f.step}' for f in found) or '-'}", flush=True)
            judged.append((case, sorted({finding.name for finding in found})))
            evidence[case.name] = [f"step {finding.step}: {finding.name}: {finding.evidence}" for finding in found]
    report(options, tables(judged), evidence=evidence)


def _chosen(options: argparse.Namespace) -> list[Case]:
    return [
        case
        for case in (*HEALTHY, *SICK)
        if case.name in (options.only or [case.name]) and case.half in (options.half or case.half)
    ]


def _options() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--steps", type=int, default=STEPS, help="of a run")
    arguments.add_argument("--sources", nargs="+", default=["python-stdlib"], help="text for `jaxtrain prepare`")
    arguments.add_argument("--only", nargs="+", metavar="RUN", help="names of runs")
    arguments.add_argument("--half", choices=("tuning", "report"), help="runs of one half")
    options = arguments.parse_args()
    known: list[Any] = [case.name for case in (*HEALTHY, *SICK)]
    if wrong := set(options.only or []) - set(known):
        sys.exit(f"error: no run {', '.join(sorted(wrong))}; the runs are {', '.join(known)}")
    return options


if __name__ == "__main__":
    main()
