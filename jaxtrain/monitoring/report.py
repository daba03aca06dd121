"""Report of a run: one HTML file without dependencies."""

import base64
import dataclasses
import html
from pathlib import Path
from typing import Any

from jaxtrain.config import Config
from jaxtrain.monitoring.health import Finding, diagnose
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.monitoring.plots import plot_metrics
from jaxtrain.monitoring.tables import format_seconds
from jaxtrain.monitoring.trace import newest_trace, read_times
from jaxtrain.runtime.config_files import load_run

Rows = list[tuple[str, str]]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: 0.2rem 1.2rem 0.2rem 0; border-bottom: 1px solid #ddd; }
th { font-weight: 600; }
td { overflow-wrap: anywhere; }
td.short { white-space: nowrap; }
img { max-width: 100%; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: 1rem; }
"""

# Units of fields whose names do not tell them.
_UNITS = {"nll": "nats per token", "loss": "nats per token", "z_loss": "nats per token"}
# Config fields that are shown even at their default: most runs differ in these.
_HIGHLIGHTS = {
    *("tokenizer", "num_layers", "num_heads", "d_model", "d_ff", "positions", "norm", "feed_forward"),
    *("peak_lr", "schedule", "warmup_steps", "weight_decay", "clip_norm"),
    *("steps", "batch_size", "seq_len", "precision", "every"),
}


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html`, and the `report.png` in it, to a run directory.

    Args:
      run_dir: run directory with `config.json` and `metrics.jsonl`. The sample named by the last `stop` event is shown.

    Returns:
      Path of the HTML file.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: one of the files is missing, or no step has been logged.
    """
    run_dir = Path(run_dir)
    config = load_run(run_dir)
    picture = plot_metrics(run_dir, clip_norm=norm_threshold(config))
    steps, events = read_metrics(run_dir / "metrics.jsonl")
    name = html.escape(run_dir.resolve().name)
    encoded = base64.b64encode(picture.read_bytes()).decode("ascii")
    evals = [event for event in events if event["event"] == "eval"]
    sections = [
        ("Health", _health_table(diagnose(steps, events, config), len(steps))),
        ("Last step", _table(_last_step_rows(steps, config))),
        ("Last evaluation", _table(_eval_rows(evals[-1]))) if evals else None,
        ("Time by scope", _times_table(run_dir)),
        ("Curves", f'<img alt="loss, learning rate and gradient norm" src="data:image/png;base64,{encoded}">'),
        ("Sample", _sample(run_dir, events)),
        ("Configuration", _table(_config_rows(config))),
        ("Events", _events_table(events)),
    ]
    body = "\n".join(f"<h2>{section[0]}</h2>\n{section[1]}" for section in sections if section and section[1])
    path = run_dir / "report.html"
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>\n{body}\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return path


def norm_threshold(config: Config) -> float | None:
    """Returns the threshold of the global gradient norm; None under adaptive clipping, which has one per unit."""
    return None if config.optim.clipping == "adaptive" else config.optim.clip_norm


def _last_step_rows(steps: list[dict[str, Any]], config: Config) -> Rows:
    step, skipped = steps[-1], sum(line.get("skipped") == 1 for line in steps)
    rows = [("step", f"{step['step']:,} of {config.train.steps:,}")]
    rows += [("skipped steps", f"{skipped:,}")] if skipped else []
    shown = ("nll", "loss", "learning_rate", "grad_norm", "tokens_seen", "tokens_per_second", "mfu", "attempt")
    return rows + [(_label(key), _format(key, step[key])) for key in shown if key in step]


def _eval_rows(event: dict[str, Any]) -> Rows:
    """Returns every field of an `eval` event, those of future evaluations included."""
    return [(_label(key), _format(key, value)) for key, value in event.items() if key not in ("event", "time")]


def _config_rows(config: Config) -> Rows:
    """Returns the highlighted fields and all that differ from their default; `config.json` has the rest."""
    rows = []
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if not dataclasses.is_dataclass(value):
            rows.append((section.name, str(value)))
            continue
        items = [(item, getattr(value, item.name)) for item in dataclasses.fields(value)]
        shown = [(item.name, v) for item, v in items if item.name in _HIGHLIGHTS or v != item.default]
        rows.append((section.name, ", ".join(f"{name}={v}" for name, v in shown)))
    return rows


def _sample(run_dir: Path, events: list[dict[str, Any]]) -> str:
    names = [event["sample"] for event in events if event["event"] == "stop" and event.get("sample")]
    path = run_dir / Path(names[-1]).name if names else None
    if path is None or not path.is_file():
        return ""
    return f"<pre>{html.escape(path.read_text(encoding='utf-8', errors='replace'))}</pre>"


def read_findings(run_dir: str | Path) -> tuple[list[Finding], str]:
    """Returns the findings of a run, and its progress as a line of text.

    Raises:
      ValueError: config or metrics are missing.
    """
    run_dir = Path(run_dir)
    config = load_run(run_dir)
    steps, events = read_metrics(run_dir / "metrics.jsonl")
    last = steps[-1]["step"] if steps else 0
    return diagnose(steps, events, config), f"{run_dir}: step {last:,} of {config.train.steps:,}"


def describe_times(run_dir: str | Path) -> tuple[str, list[tuple[str, str, str]]]:
    """Returns a heading and rows (scope, share, milliseconds a step) of the newest trace; empty without one."""
    folder = newest_trace(run_dir)
    if folder is None:
        return "", []
    try:
        steps, times = read_times(folder)
    except ValueError as error:
        return str(error), []
    total = sum(times.values())
    rows = [(scope, f"{value / total:.1%}", f"{value:.3g}") for scope, value in times.items()]
    return f"steps {steps[0]:,} to {steps[-1]:,}, from {folder.relative_to(run_dir)}", rows


def _times_table(run_dir: Path) -> str:
    heading, rows = describe_times(run_dir)
    table = _columns(("scope", "share", "busy ms a step"), rows, num_short=3) if rows else ""
    return f"<p>{html.escape(heading)}</p>\n{table}" if heading else ""


def _health_table(findings: list[Finding], num_steps: int) -> str:
    if not findings:
        return f"<p>No findings in {num_steps:,} logged steps.</p>"
    rows = [(f.severity, f.name.replace("_", " "), f"{f.step:,}", f.evidence, f.remedy) for f in findings]
    return _columns(("", "finding", "step", "evidence", "remedy"), rows, num_short=3)


def _events_table(events: list[dict[str, Any]]) -> str:
    """Formats all events but the findings, which have a table of their own."""
    rows = []
    for event in events:
        if event["event"] == "finding":
            continue
        details = ", ".join(f"{k}={_format(k, v)}" for k, v in event.items() if k not in ("event", "time"))
        time = str(event.get("time", "")).split(".")[0].replace("T", " ")
        rows.append((time, str(event["event"]), details))
    return _columns(("time (UTC)", "event", "details"), rows, num_short=2) if rows else ""


def _columns(titles: tuple[str, ...], rows: list[tuple[str, ...]], num_short: int) -> str:
    """Formats a table with a head; the first `num_short` columns are never wrapped."""
    lines = ["".join(f"<th>{html.escape(title)}</th>" for title in titles)]
    for row in rows:
        starts = ['<td class="short">'] * num_short + ["<td>"] * (len(row) - num_short)
        lines.append("".join(f"{start}{html.escape(cell)}</td>" for start, cell in zip(starts, row, strict=True)))
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def _table(rows: Rows) -> str:
    lines = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _label(key: str) -> str:
    return key.replace("_", " ") + (f" ({_UNITS[key]})" if key in _UNITS else "")


def _format(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if key.endswith("seconds"):
        return format_seconds(value) if value >= 60 else f"{value:.3g} s"
    if key == "mfu":
        return f"{value:.1%}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
