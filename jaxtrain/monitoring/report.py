"""Report of one or several runs: one HTML file that needs no network, drawn with uPlot (MIT, in page/)."""

import base64
import hashlib
import html
import importlib.resources
import json
import math
import os
import string
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jaxtrain.monitoring.curves import POINTS, Axis, run_curves
from jaxtrain.monitoring.health import Finding, diagnose
from jaxtrain.monitoring.metrics import EVENT_KEYS, encode
from jaxtrain.monitoring.run_record import (
    RunRecord,
    damaged_lines,
    describe_run,
    differing_fields,
    find_runs,
    read_record,
)
from jaxtrain.monitoring.sentences import sentence
from jaxtrain.monitoring.tables import format_seconds, format_value
from jaxtrain.monitoring.trace import newest_trace, read_times
from jaxtrain.runtime.config_files import load_run_config
from jaxtrain.runtime.files import write_text

# Rows of the time line, with the events that they show.
_MARKS = {
    "restart": ("resume", "rewind"),
    "stop": ("stop",),
    "save": ("saved", "save_failed", "checkpoint_damaged"),
    "validation": ("eval",),
    "change": ("config_change", "environment_change"),
    "finding": ("finding", "replay_mismatch", "stalled", "sink_failed"),
}
_ROUTINE = {"save", "saved", "verified", "eval", "compile"}
_OF_SOURCES = ("data.sources", "data.tokenizer", "data.eot", "data.text_field")
_MOST = 400  # marks of a kind, and events in the table


def write_report(run_dirs: str | Path | Sequence[str | Path]) -> Path:
    """Writes `report.html` of one run directory, of several, or of all in a folder; returns its path.

    It lies in the run directory, in the folder, or in the folder that the run directories share. Raises a ValueError
    without a run, for a broken one, or if no step has been logged in any.
    """
    records, path = open_records(run_dirs)
    write_text(path, render(report_data(records)))
    return path


def open_records(run_dirs: str | Path | Sequence[str | Path]) -> tuple[list[RunRecord], Path]:
    """Reads the runs of a report; returns them with the path of its file. Raises as `write_report` does."""
    given = [Path(run_dirs)] if isinstance(run_dirs, str | Path) else [Path(one) for one in run_dirs]
    named = [one for one in given if (one / "config.json").is_file() or not one.is_dir()]
    records = []
    for folder in given:
        for found in [folder] if folder in named else find_runs(folder):
            try:
                records.append(read_record(found))
            except ValueError:
                if folder in named:  # a broken run among others does not hide them
                    raise
    if not records:
        raise ValueError(f"{given[0]} is no run directory (no config.json), and holds none: give a --run-dir")
    shown = [record for record in records if record.lines]
    if not shown:
        damaged = f" (damaged lines: {text})" if (text := damaged_lines(records[0])) else ""
        file = records[0].folder / "metrics.jsonl"
        raise ValueError(f"{file} holds no logged step{damaged}: train past train.log_every steps first")
    parent = given[0] if len(given) == 1 else Path(os.path.commonpath([os.path.abspath(one) for one in given]))
    return shown, parent / "report.html"


def findings_of(record: RunRecord) -> list[Finding]:
    """Returns the findings of a run. Raises a ValueError if its config needs a config file, or cannot be read."""
    return diagnose(record.lines, record.events, load_run_config(record.folder))


def report_data(records: Sequence[RunRecord]) -> dict[str, Any]:
    """Returns all that a report shows, as JSON values."""
    names = [record.name for record in records]
    distinct = [str(record.folder) if names.count(record.name) > 1 else record.name for record in records]
    return {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "runs": [_run_data(record, name, len(records)) for record, name in zip(records, distinct, strict=True)],
        "differences": differing_fields(records),
    }


def _run_data(record: RunRecord, name: str, num_runs: int) -> dict[str, Any]:
    try:
        findings = findings_of(record)
    except ValueError:
        if num_runs == 1:
            raise
        findings = []  # one run that needs its config file does not hide the others
    clipping, threshold = record.config.get("optim.clipping"), record.config.get("optim.clip_norm")
    shown = [{**vars(finding), "event": "finding"} for finding in findings]
    events = [event for event in record.events if event["event"] != "finding"]
    heading, times = describe_times(record.folder)
    return encode(
        {
            "name": name,
            "folder": str(record.folder),
            "summary": record.summary(),
            "threshold": None if clipping == "adaptive" else threshold,
            "curves": run_curves(record.lines, record.evaluations, points=max(POINTS // num_runs, 300)),
            "marks": _marks(record, [*events, *shown]),
            "findings": [vars(finding) for finding in findings],
            "evaluation": (record.evaluations or [{}])[-1],
            "times": {"heading": heading, "rows": times},
            "sample": _sample(record),
            "config": record.config,
            "about": describe_run(record),
            "events": [
                (str(event.get("time", "")).split(".")[0].replace("T", " "), event["event"], sentence(event))
                for event in events
            ],
        }
    )


def _marks(record: RunRecord, events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the marks of the time line: kind, text and position."""
    kinds = {event: kind for kind, names in _MARKS.items() for event in names}
    shown = [event for event in events if event["event"] in kinds and isinstance(event.get("step"), int)]
    found = [(kinds[event["event"]], event["step"], sentence(event)) for event in shown]
    found += [("skip", line["step"], "A step was skipped.") for line in record.lines if line.get("skipped")]
    marks: list[tuple[str, int, str]] = []
    for kind in (*_MARKS, "skip"):
        of_kind = sorted(mark for mark in found if mark[0] == kind)
        stride = max(len(of_kind) // _MOST, 1)
        marks += of_kind[::stride]
    places = Axis(record.lines).at([step for _, step, _ in marks])
    return [
        {"kind": kind, "text": text, **{name: values[i] for name, values in places.items()}}
        for i, (kind, _, text) in enumerate(marks)
    ]


def _sample(record: RunRecord) -> str:
    names = [event["sample"] for event in record.named("stop") if event.get("sample")]
    path = record.folder / Path(str(names[-1])).name if names else None
    return path.read_text(encoding="utf-8", errors="replace") if path is not None and path.is_file() else ""


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


# The page.


def render(data: dict[str, Any]) -> str:
    """Returns the HTML of a report. Text of users is escaped, and only the two scripts of page/ may run."""
    runs = data["runs"]
    title = runs[0]["name"] if len(runs) == 1 else f"{len(runs)} runs"
    scripts = [f"/*\n{_asset('uPlot.LICENSE')}*/\n{_asset('uPlot.iife.min.js')}", _asset("report.js")]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    drawn = {"runs": [{k: run[k] for k in ("name", "threshold", "curves", "marks")} for run in runs]}
    embedded = json.dumps(drawn, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # no text can end the script element
        embedded = embedded.replace(character, f"\\u{ord(character):04x}")
    page = string.Template(_asset("report.html")).substitute(
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {hashes}",
        title=html.escape(title),
        styles=f"{_asset('uPlot.min.css')}\n{_asset('report.css')}",
        body=_one_run(runs[0]) if len(runs) == 1 else _several_runs(data),
        made=html.escape(data["made"]),
        data=embedded,
        scripts="\n".join(f"<script>{script}</script>" for script in scripts),
    )
    return page.encode("utf-8", "backslashreplace").decode()  # a path may hold bytes that are no text


def _asset(name: str) -> str:
    return importlib.resources.files("jaxtrain.monitoring").joinpath("page", name).read_text(encoding="utf-8")


_CURVES = """<section><h2>Curves</h2><div id="controls"></div><div id="charts"></div>
<noscript>The curves need JavaScript; the tables do not.</noscript></section>"""


def _one_run(run: dict[str, Any]) -> str:
    facts = run["summary"]
    name, state = html.escape(run["name"]), html.escape(facts["state"])
    fields = {k: v for k, v in run["evaluation"].items() if k not in EVENT_KEYS}
    evaluation = [(k.replace("_", " "), format_value(v)) for k, v in fields.items()]
    return "\n".join(
        [
            f'<header><h1>{name}</h1><span class="state {state.replace(" ", "-")}">{state}</span></header>',
            _cards(facts),
            _section("Findings", _findings(run)),
            _CURVES,
            '<div class="columns">',
            _section("Summary", _table(run["about"])),
            _section("Last evaluation", _table(evaluation)),
            _section("Time by scope", _times(run["times"])),
            "</div>",
            _section("Sample", _pre(run["sample"])),
            _section("Config", _config(run["config"])),
            _section("Events", _events(run["events"])),
        ]
    )


def _several_runs(data: dict[str, Any]) -> str:
    runs, differing = data["runs"], data["differences"]
    head = ("run", "state", "steps", "validation", "best", "bits per byte", "tokens/s", "time", "skipped")
    rows = []
    for run in runs:
        facts = run["summary"]
        numbers = [_number(facts[k]) for k in ("validation_loss", "best_validation_loss", "bits_per_byte")]
        speed, seconds = facts["tokens_per_second"], facts["train_seconds"]
        steps = f"{facts['step']:,} of {facts['steps']:,}"
        more = [f"{speed:,.0f}" if speed else "", format_seconds(seconds), f"{facts['skipped_steps']:,}"]
        rows.append([run["name"], facts["state"], steps, *numbers, *more])
    values = [[name, *map(format_value, found)] for name, found in differing.items()]
    config = _columns(("field", *(run["name"] for run in runs)), values) if values else "<p>All configs are equal.</p>"
    details = [
        f"<details><summary>{html.escape(run['name'])}</summary>{_findings(run)}{_table(run['about'])}"
        f"{_pre(run['sample'])}</details>"
        for run in runs
    ]
    return "\n".join(
        [
            f"<header><h1>{len(runs)} runs</h1></header>",
            _section("Runs", _columns(head, rows, swatches=True)),
            _section("Config, where it differs", config),
            _CURVES,
            _section("Findings, facts and samples", "\n".join(details)),
        ]
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>\n{content}\n</section>" if content else ""


def _pre(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>" if text else ""


def _cards(facts: dict[str, Any]) -> str:
    speed, share = facts["tokens_per_second"], facts["mfu"]
    cards = [
        ("validation loss", _number(facts["validation_loss"]), f"best {_number(facts['best_validation_loss'])}"),
        ("training loss", _number(facts["train_loss"]), "nats per token"),
        ("bits per byte", _number(facts["bits_per_byte"]), "of held-out text"),
        ("step", f"{facts['step']:,}", f"of {facts['steps']:,}"),
        ("tokens per second", f"{speed:,.0f}" if speed else "", f"MFU {share:.1%}" if share else "median"),
        ("training time", format_seconds(facts["train_seconds"]), f"{facts['skipped_steps']:,} steps skipped"),
    ]
    shown = [f"<div><small>{a}</small><strong>{b}</strong><small>{c}</small></div>" for a, b, c in cards if b]
    return f'<div class="cards">{"".join(shown)}</div>'


def _findings(run: dict[str, Any]) -> str:
    items = [
        f'<li class="{html.escape(one["severity"])}"><strong>{html.escape(one["name"].replace("_", " "))}</strong> '
        f"at step {one['step']:,}: {html.escape(one['evidence'])}<br><small>{html.escape(one['remedy'])}</small></li>"
        for one in run["findings"]
    ]
    return f'<ul class="findings">{"".join(items)}</ul>' if items else '<p class="good">No findings.</p>'


def _times(times: dict[str, Any]) -> str:
    table = _columns(("scope", "share", "busy ms a step"), times["rows"]) if times["rows"] else ""
    return f"<p>{html.escape(times['heading'])}</p>{table}" if times["heading"] else ""


def _config(config: dict[str, Any]) -> str:
    """Returns the fields of a config, without the fields of `data.sources` that a token store overrides."""
    overridden = _OF_SOURCES if config.get("data.store") or config.get("data.stores") else ()
    rows = [(name, format_value(value)) for name, value in config.items() if name not in overridden]
    return f"<details><summary>{len(rows)} fields</summary>{_table(rows)}</details>"


def _events(events: list[Sequence[str]]) -> str:
    """Returns all events; the routine ones may be hidden."""
    notable = [(time, text) for time, name, text in events if name not in _ROUTINE]
    head = ("time (UTC)", "event")
    hidden = [(time, text) for time, _, text in events[-_MOST:]]
    more = f"<details><summary>all {len(events):,} events</summary>{_columns(head, hidden)}</details>"
    return _columns(head, notable[-_MOST:]) + more if events else ""


def _columns(titles: Sequence[str], rows: Sequence[Sequence[str]], *, swatches: bool = False) -> str:
    lines = ["".join(f"<th>{html.escape(title)}</th>" for title in titles)]
    for i, row in enumerate(rows):
        mark = f'<i class="swatch s{i % 8}"></i>' if swatches else ""
        cells = [f"<td>{html.escape(str(cell))}</td>" for cell in row]
        lines.append("".join([cells[0].replace("<td>", f"<td>{mark}", 1), *cells[1:]]))
    return '<div class="scroll"><table>' + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table></div>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>\n" for name, value in rows]
    return f"<table>{''.join(lines)}</table>" if lines else ""


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) and math.isfinite(value) else ""
