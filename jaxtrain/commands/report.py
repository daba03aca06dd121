"""Commands on the records of a run: report."""

from dataclasses import dataclass
from typing import Annotated

from jaxtrain.fields import LocalPath, RunFolder, Section
from jaxtrain.runtime.config_files import load
from jaxtrain.runtime.flags import Command
from jaxtrain.runtime.terminal import printable


@dataclass(frozen=True)
class ReportOptions(Section):
    """Options of `jaxtrain report`."""

    positional = "run"
    run: RunFolder  # run directory
    config: Annotated[str, LocalPath("CONFIG.py")] | None = None  # config file that adds the schedule of the run


def run_report(options: ReportOptions) -> int:
    """Diagnoses a run, finished or not, and rewrites its report.html."""
    from jaxtrain.monitoring.report import describe_times, read_findings, write_report

    if options.config:
        load(options.config)  # adds the entries of its tables
    findings, progress = read_findings(options.run)
    print(printable(progress))
    print(printable("\n".join(map(str, findings)) or "no findings"))
    heading, rows = describe_times(options.run)
    if heading:
        print(printable(f"time by scope: {heading}"))
    for scope, share, milliseconds in rows:
        print(f"  {scope:10}{share:>7}{milliseconds:>9} ms a step")
    print(printable(f"report: {write_report(options.run)}"))
    return 0


COMMANDS = [
    Command("report", ReportOptions, run_report, "report runs/first"),
]
