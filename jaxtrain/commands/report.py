"""Commands on the records of runs: report and runs."""

import json
import sys
import webbrowser
from dataclasses import dataclass
from typing import Annotated, Any

from jaxtrain.fields import LocalPath, RunOrUrl, Section
from jaxtrain.runtime.config_files import load_config, load_run_config
from jaxtrain.runtime.files import read_json, write_text
from jaxtrain.runtime.flags import Command
from jaxtrain.runtime.remote import local_run
from jaxtrain.runtime.terminal import echo, one_line


@dataclass(frozen=True)
class ReportOptions(Section):
    """Options of `jaxtrain report`."""

    positional = "runs"
    runs: tuple[RunOrUrl, ...]  # run directories, or folders of run directories; several are compared in one page
    config: Annotated[str, LocalPath("CONFIG.py")] | None = None  # config file that adds the schedule of the run
    open: bool = False  # show the page in the browser
    json: bool = False  # print what the page shows as one JSON object


def run_report(options: ReportOptions) -> int:
    """Diagnoses runs, finished or not, and writes report.html with their curves."""
    from jaxtrain.monitoring.report import open_records, render, report_data
    from jaxtrain.monitoring.run_record import damaged_lines

    if options.config:
        load_config(options.config)  # adds the entries of its tables
    folders = [local_run(run) for run in options.runs]
    for folder in folders:
        if (folder / "checkpoints").is_dir() and not isinstance(read_json(folder / "config.json"), dict):
            from jaxtrain.training.run_folder import recover_config

            recover_config(folder)
            load_run_config(folder)  # raises if no checkpoint has it
    records, path = open_records(folders)
    data = report_data(records)
    if options.json:
        echo(json.dumps(data), verbatim=True)
    else:
        for record, run in zip(records, data["runs"], strict=True):
            echo(f"{one_line(str(record.folder))}: step {record.step:,} of {record.total_steps:,}, {record.state}")
            if damaged := damaged_lines(record):
                file = one_line(str(record.folder / "metrics.jsonl"))
                echo(f"{file}: damaged lines are left out: {damaged}", file=sys.stderr)
            _show_findings(run)
    write_text(path, render(data))  # after the findings: the folder may be read-only
    if not options.json:
        echo(f"report: {path}")
    if options.open and not webbrowser.open(path.resolve().as_uri()) and not options.json:
        echo("no browser found: open the page by hand")
    return 0


def _show_findings(run: dict[str, Any]) -> None:
    from jaxtrain.monitoring.health import Finding

    echo("\n".join(str(Finding(**one)) for one in run["findings"]) or "no findings")
    if run["times"]["heading"]:
        echo(f"time by scope: {run['times']['heading']}")
    for scope, share, milliseconds in run["times"]["rows"]:
        echo(f"  {scope:10}{share:>7}{milliseconds:>9} ms a step")


@dataclass(frozen=True)
class RunsOptions(Section):
    """Options of `jaxtrain runs`."""

    positional = "folder"
    # folder of run directories; its subfolders are searched too
    folder: Annotated[str, LocalPath("DIR", or_url=True)] = "runs"
    # column of the table, or field of the config that differs, such as peak_lr; -KEY sorts in descending order
    sort: str = "name"
    json: bool = False  # print one JSON object per run


def run_runs(options: RunsOptions) -> int:
    """Lists runs: steps, last validation loss, speed, state, and how their configs differ."""
    from jaxtrain.monitoring.run_table import read_rows, show_rows, sort_key, sort_rows

    rows = read_rows(local_run(options.folder))
    key = sort_key(rows, options.sort.removeprefix("-"))
    rows = sort_rows(rows, key, descending=options.sort.startswith("-"))
    if options.json:
        for row in rows:
            echo(json.dumps(row), verbatim=True)
    else:
        show_rows(rows)
    return 0


COMMANDS = [
    Command("report", ReportOptions, run_report, "report runs/first --open"),
    Command("runs", RunsOptions, run_runs, "runs runs --sort validation"),
]
