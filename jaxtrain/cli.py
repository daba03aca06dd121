"""The commands of `jaxtrain`.

Errors that a user can correct are one line on standard error; `--debug` shows the traceback. Exit codes: 2 for a wrong
command, argument or input (ValueError), 1 for trouble outside of jaxtrain (a missing package, a full disk), 75 for a
stalled run, 128 + n for a run that signal n stopped after it saved, 130 after Ctrl-C, 141 for closed output.
"""

import signal
import sys
from collections.abc import Sequence

import absl.logging

from jaxtrain.commands import compress, data, exchange, generate, model, report, train
from jaxtrain.fields import suggest
from jaxtrain.runtime.flag_help import show_help
from jaxtrain.runtime.flags import parse
from jaxtrain.runtime.terminal import echo, recorded_interrupts, report_error, tolerant_output
from jaxtrain.version import __version__

_HELP = {"-h", "--help"}
_FLAGS = (
    "`jaxtrain COMMAND --help` lists the options of a command.",
    "`jaxtrain --version` prints the version. `--debug` shows the traceback of an error.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    with tolerant_output() as output, recorded_interrupts():
        try:
            code = _run(words, debug)
            output.flush()
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                raise
            code = report_error(error, words)
        # Training does not depend on its output: a run whose `| tee log` has died continues.
        trains = words[:1] == ["train"] and not _HELP & set(words)
        return 128 + signal.SIGPIPE if output.closed_early and not code and not trains else code


def _run(words: list[str], debug: bool) -> int:
    name, rest = (words[0] if words else "--help"), words[1:]
    if name in {*_HELP, "help"} and rest[:1] and rest[0] in COMMANDS:  # help of a command
        name, rest = rest[0], [*rest[1:], "--help"]
    if name in {*_HELP, "help"}:
        lines = [f"  {name:12}{(command.run.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
        echo("\n".join(["usage: jaxtrain COMMAND ...", "", *lines, "", *_FLAGS]))
        return 0
    if name in ("-V", "--version"):
        echo(f"jaxtrain {__version__}")
        return 0
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}: {suggest(name, [*COMMANDS, '--version', '--help'])}")
    command = COMMANDS[name]
    if _HELP & set(rest):
        echo(show_help(command, rest))
        return 0
    options = parse(command, rest)
    if not debug:  # Orbax logs the tracebacks of errors that are reported here in one line
        absl.logging.set_verbosity(absl.logging.FATAL)
    return command.run(options)


_SUBJECTS = (train, model, generate, compress, report, data, exchange)
COMMANDS = {command.name: command for subject in _SUBJECTS for command in subject.COMMANDS}


if __name__ == "__main__":
    sys.exit(main())
