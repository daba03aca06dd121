"""Record of a run, read from its directory: config, steps, events, state and summary."""

import fcntl
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrain.monitoring.curves import clipped_steps, column, covered_steps
from jaxtrain.monitoring.metrics import read_log
from jaxtrain.monitoring.tables import format_seconds
from jaxtrain.runtime.config_files import flatten
from jaxtrain.runtime.files import read_json

Rows = list[tuple[str, str]]

# Facts of the newest start, by type.
_FACTS = {
    int: ("parameters", "vocab_size", "train_tokens", "devices", "processes"),
    str: ("tokenizer", "data", "device", "jax", "jaxtrain", "python", "commit"),
}
_DEPTH = 4  # levels of folders that are searched for runs


@dataclass
class RunRecord:
    """Contents of a run directory, without its checkpoints. Needs no device."""

    folder: Path
    config: dict[str, Any]  # value of each field of config.json by its dotted path
    # lines, events: see `read_metrics`; events of starts that added no step to a finished run are left out
    lines: list[dict[str, Any]]
    events: list[dict[str, Any]]
    damaged: Sequence[int] = ()  # numbers of the lines of metrics.jsonl that could not be read

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def step(self) -> int:
        """The last logged step; 0 without one."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def total_steps(self) -> int:
        steps = self.config.get("train.steps")
        return steps if isinstance(steps, int) else self.step

    def named(self, *names: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] in names]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Evaluations with a loss, one per step, sorted by step; evaluations that a rewind abandoned are left out."""
        found: dict[int, dict[str, Any]] = {}
        for event in self.events:
            if not isinstance(step := event.get("step"), int):
                continue
            if event["event"] in ("start", "resume"):
                found = {at: one for at, one in found.items() if at <= step}
            elif event["event"] == "eval" and isinstance(event.get("nll"), int | float):
                found[step] = event
        return [found[step] for step in sorted(found)]

    @cached_property
    def state(self) -> str:
        """`finished`, `stopped`, `gave up`, `running`, `crashed`, or `new` before the first start."""
        last = [event for event in self.events if event["event"] in ("start", "resume", "stop")]
        # A run writes its report after its `stop`, while it still holds the lock.
        if not last or last[-1]["event"] != "stop":
            return "running" if _is_locked(self.folder / "lock") else "crashed" if last else "new"
        reason = str(last[-1].get("reason"))
        return "finished" if reason == "finished" else "gave up" if reason.startswith("too many") else "stopped"

    def median(self, name: str) -> float:
        """Returns the median of a metric over the lines; NaN without one."""
        values = column(self.lines, name)
        return float(np.median(values[np.isfinite(values)])) if np.isfinite(values).any() else math.nan

    def summary(self) -> dict[str, Any]:
        """Returns the facts of a run as JSON values, None where unknown."""
        finite = [event for event in self.evaluations if math.isfinite(event["nll"])]
        best = min(finite or self.evaluations[:1], key=lambda event: event["nll"], default={})
        last, line = (self.evaluations or [{}])[-1], (self.lines or [{}])[-1]
        starts = self.named("start", "resume")
        covered, clipped = covered_steps(self.lines), clipped_steps(self.lines)
        known = ~np.isnan(clipped)
        facts = {
            "state": self.state,
            "step": self.step,
            "steps": self.total_steps,
            "train_loss": line.get("nll", line.get("loss")),
            "validation_loss": last.get("nll"),
            "validation_step": last.get("step"),
            "bits_per_byte": last.get("bits_per_byte"),
            "best_validation_loss": best.get("nll"),
            "best_validation_step": best.get("step"),
            "tokens_seen": line.get("tokens_seen"),
            "tokens_per_second": self.median("tokens_per_second"),
            "mfu": self.median("mfu"),
            # without compilation, evaluation and saves
            "train_seconds": float(np.nansum(column(self.lines, "step_seconds") * covered)),
            "skipped_steps": int(np.sum(column(self.lines, "skipped") == 1)),
            "clipped_share": float(clipped[known].sum() / covered[known].sum()) if known.any() else None,
            "attempts": len(starts),
        }
        newest = starts[-1] if starts else {}
        for kind, names in _FACTS.items():
            facts |= {name: newest[name] if isinstance(newest.get(name), kind) else None for name in names}
        saved = read_json(self.folder / "tokenizer.json")
        if facts["tokenizer"] is None and isinstance(saved, dict):  # the start of an older run does not name it
            facts["tokenizer"] = "byte" if saved.get("type") == "byte" else "tokenizer.json"
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}


def read_record(folder: str | Path) -> RunRecord:
    """Reads a run directory. Raises a ValueError without metrics.jsonl, or without a config.json that is JSON."""
    folder = Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is no run directory (no config.json): give the --run-dir of `jaxtrain train`")
    try:
        config = json.loads(file.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, got {type(config).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: {error}; correct it, or give another run directory") from None
    log = read_log(folder / "metrics.jsonl")
    return RunRecord(folder, flatten(config), log.steps, _with_steps(log.steps, log.events), log.damaged)


def find_runs(folder: str | Path) -> list[Path]:
    """Returns the run directories in a folder and its subfolders, sorted, or the folder itself if it is one.

    A symbolic link to a run counts, unless the run was found itself. Raises a ValueError if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: give a folder of run directories, such as runs")
    found = []
    for path, names, _ in os.walk(folder):
        if _is_run(Path(path)):
            found.append(Path(path))
            names.clear()  # runs are not nested
        found += [link for link in map(Path(path).joinpath, names) if link.is_symlink() and _is_run(link)]
        depth = len(Path(path).relative_to(folder).parts)
        names[:] = sorted(name for name in names if not name.startswith(".") and depth < _DEPTH)
    return sorted({path.resolve(): path for path in sorted(found, key=Path.is_symlink, reverse=True)}.values())


def _is_run(path: Path) -> bool:
    """Returns True for a run directory. Models of transformers and other programs have a config.json too."""
    has = lambda name: os.path.exists(path / name)  # noqa: E731
    return has("metrics.jsonl") or (has("config.json") and has("checkpoints"))


def differing_fields(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Returns the config fields that differ between runs, with the value of each run; None where it is absent."""
    if len(records) < 2:
        return {}
    names = dict.fromkeys(name for record in records for name in record.config)
    values = {name: [record.config.get(name) for record in records] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def _with_steps(lines: list[dict[str, Any]], events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leaves out the events of an attempt that found the run finished and trained no further."""
    attempts: list[list[dict[str, Any]]] = [[]]
    for event in events:
        begins = event["event"] in ("start", "resume")
        if _has(attempts[-1], "stop") or (begins and _has(attempts[-1], "start", "resume")):
            attempts.append([])
        attempts[-1].append(event)
    trained = {str(line.get("attempt")) for line in lines}
    kept, finished = [], False
    for attempt in attempts:
        numbers = {str(event.get("attempt")) for event in attempt if event["event"] in ("start", "resume")}
        if finished and numbers and not numbers & trained and not _has(attempt, "rewind"):
            continue
        kept += attempt
        finished = any(event["event"] == "stop" and event.get("reason") == "finished" for event in attempt)
    return kept


def _has(events: list[dict[str, Any]], *names: str) -> bool:
    return any(event["event"] in names for event in events)


def _is_locked(file: Path) -> bool:
    """Returns True while a process trains in the run directory."""
    if file.is_file():  # opening a FIFO would wait
        try:
            with open(file) as stream:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:  # others: no file any more, or a file system without locks
            return isinstance(error, BlockingIOError)
    return False


def damaged_lines(record: RunRecord) -> str:
    """Returns the numbers of the damaged lines of metrics.jsonl, at most 8 of them; "" if there is none."""
    more = f" and {len(record.damaged) - 8:,} more" if len(record.damaged) > 8 else ""
    return ", ".join(map(str, record.damaged[:8])) + more


def describe_run(record: RunRecord) -> Rows:
    """Returns the summary as rows of names and texts for people."""
    facts = record.summary()
    seen, corpus, clipped = facts["tokens_seen"], facts["train_tokens"], facts["clipped_share"]
    processes = facts["processes"] or 1
    rows = {
        "steps": f"{facts['step']:,} of {facts['steps']:,}",
        "parameters": facts["parameters"] and f"{facts['parameters']:,}",
        "tokens seen": seen and f"{seen:,}" + (f", {seen / corpus:.3g} epochs" if corpus else ""),
        "training time": format_seconds(facts["train_seconds"]),
        "starts": f"{facts['attempts']:,}",
        "skipped steps": f"{facts['skipped_steps']:,}",
        "clipped steps": None if clipped is None else f"{clipped:.1%}",
        "devices": facts["device"]
        and f"{facts['devices']} x {facts['device']}" + f", {processes} processes" * (processes > 1),
        "damaged lines": damaged_lines(record),
        "data": facts["data"],
        "tokenizer": facts["tokenizer"],
        "vocabulary": facts["vocab_size"] and f"{facts['vocab_size']:,} tokens",
        "versions": ", ".join(f"{name} {facts[name]}" for name in ("jaxtrain", "jax", "python") if facts[name]),
        "commit": facts["commit"],
    }
    return [(name, text) for name, text in rows.items() if text]
