"""The command line: `jaxtrain train | report | eval | generate | replay | prepare | plan | schedule`.

Errors that a user can mend are one line on standard error: exit code 2 for a wrong command or argument, and for what
jaxtrain refuses with a ValueError; 1 for what goes wrong outside of it (a missing package, a full disk); 128 + n for
a run that signal n stopped, after it saved; 130 for any command that Ctrl-C broke off. `--debug` shows the traceback.
"""

import contextlib
import dataclasses
import difflib
import errno
import io
import json
import os
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import absl.logging
import tyro

from jaxtrain.config import Config, load

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    name, rest = (arguments[0] if arguments else "--help"), arguments[1:]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    try:
        if name not in _COMMANDS:
            near = difflib.get_close_matches(name, _COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(_COMMANDS)}"
            raise ValueError(f"unknown command {name!r}: {hint}")
        if not debug:  # Orbax shows tracebacks of what it raises as well, and what is then said in a line
            absl.logging.set_verbosity(absl.logging.FATAL)
        return _COMMANDS[name](rest)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        return _report(error)


# What to do about the usual troubles outside of jaxtrain.
_REMEDIES = {
    errno.ENOSPC: "free some space and give the same command again",
    errno.EDQUOT: "free some space and give the same command again",
    errno.EACCES: "give a path that this user may use",
    errno.EPERM: "give a path that this user may use",
    errno.EROFS: "the file system is read-only: give a path on another",
    errno.ENOTDIR: "a part of the path is a file: give another path",
    errno.EISDIR: "it is a folder: give the path of a file",
    errno.EEXIST: "something else has this name: give another path",
    errno.ENOENT: "give a path that exists",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links go round in a circle: give another path",
}


def _report(error: BaseException) -> int:
    """Shows an error; returns the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    text = str(error)
    if isinstance(error, UnicodeEncodeError):  # half of a surrogate pair: bytes of an argument that are not UTF-8
        text = f"{error.object!r} is not Unicode text: give it as UTF-8"
    elif isinstance(error, MemoryError) or (type(error).__name__ == "JaxRuntimeError" and "EXHAUSTED" in text):
        text = f"out of memory: {text.splitlines()[0] if text else 'the host has no more'}\n"
        text += "lower train.batch_size or raise train.accumulate; `jaxtrain plan` says what a run needs"
    elif isinstance(error, OSError) and error.errno in _REMEDIES:
        text += f": {_REMEDIES[error.errno]}"
    elif not isinstance(error, ValueError | ImportError | OSError):
        traceback.print_exception(error)
        return 1
    print(f"error: {text}".encode(errors="backslashreplace").decode(), file=sys.stderr)
    return 2 if isinstance(error, ValueError) else 1


def _usage() -> str:
    lines = [f"  {name:10}{command.__doc__.splitlines()[0]}" for name, command in _COMMANDS.items()]
    return "usage: jaxtrain COMMAND ...\n\n" + "\n".join(lines) + "\n\n`jaxtrain COMMAND --help` lists its options."


def _train(arguments: list[str]) -> int:
    """Trains a config, or goes on with the run in --run-dir: `train CONFIG [--run-dir DIR] [--train.steps N] ...`."""
    file, default, rest = _config_argument("train", arguments)

    @dataclasses.dataclass(frozen=True)
    class Options:
        config: Annotated[Config, tyro.conf.arg(name="")]
        run_dir: str = f"runs/{file.stem}"  # where the run is kept, and gone on with
        rewind: int | None = None  # resume from the checkpoint of this step and set aside later ones, this once
        profile: str | None = None  # START:STOP, as in 10:13: trace these steps (without STOP) into RUN/profile

    options = _parse(Options, f"train {file}", rest, Options(default))
    if not options.run_dir:
        raise ValueError("--run-dir is '': give the folder of the run")
    from jaxtrain.runtime.cluster import session
    from jaxtrain.runtime.compile_cache import compile_cache
    from jaxtrain.runtime.stop import is_stuck, leave
    from jaxtrain.training.train import GAVE_UP, train

    if options.rewind is not None and options.rewind < 0:
        raise ValueError(f"--rewind must be the step of a checkpoint, got {options.rewind}")
    try:
        with compile_cache(), session(_report):
            outcome = train(options.config, options.run_dir, rewind=options.rewind, profile=options.profile)
    except OSError as error:
        if is_stuck():
            leave(_report(error))
        raise
    code, reason = 0, outcome["reason"]
    if reason == GAVE_UP:
        print(
            f"error: gave up at step {outcome['step']} after too many bad steps (see guard.max_consecutive and "
            f"guard.max_share); the state is saved, and {options.run_dir} has a report",
            file=sys.stderr,
        )
        code = 1
    elif reason.startswith("SIG"):
        code = 128 + signal.Signals[reason]
    return leave(code) if is_stuck() else code


def _health(arguments: list[str]) -> int:
    """Says what is wrong with a run and rewrites its report.html: `report RUN`; the run may still be going."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        run: tyro.conf.Positional[str]  # run directory

    run = _parse(Options, "report", arguments).run
    from jaxtrain.monitoring.report import describe_times, read_findings, write_report

    findings, progress = read_findings(run)
    print(progress)
    print("\n".join(map(str, findings)) or "no findings")
    heading, rows = describe_times(run)
    if heading:
        print(f"time by scope: {heading}")
    for scope, share, milliseconds in rows:
        print(f"  {scope:10}{share:>7}{milliseconds:>9} ms a step")
    print(f"report: {write_report(run)}")
    return 0


def _schedule(arguments: list[str]) -> int:
    """Draws a config's learning rate: `schedule CONFIG [--png FILE] [--optim.peak-lr X] ...`."""
    file, default, rest = _config_argument("schedule", arguments)

    @dataclasses.dataclass(frozen=True)
    class Options:
        config: Annotated[Config, tyro.conf.arg(name="")]
        png: str | None = None  # also draw to this file

    options = _parse(Options, f"schedule {file}", rest, Options(default))
    if options.png is not None and not options.png.endswith(".png"):
        raise ValueError(f"--png {options.png!r} must end in .png")
    import jax
    import jax.numpy as jnp

    from jaxtrain.monitoring.plots import draw_curve, plot_schedule
    from jaxtrain.training.components import describe_schedule, make_schedule

    steps = options.config.train.steps
    schedule = make_schedule(options.config)
    values = jax.vmap(schedule)(jnp.arange(steps)).tolist()
    print(describe_schedule(options.config))
    print(draw_curve(values, label="learning rate"))
    if options.png:
        print(f"drawn to {plot_schedule(schedule, steps, options.png)}")
    return 0


def _plan(arguments: list[str]) -> int:
    """Says what a config needs before it runs: `plan CONFIG [--topology v5p:2x2x2] [--max-batch] [--json] ...`."""
    file, default, rest = _config_argument("plan", arguments)
    from jaxtrain.plan.view import Question, plan

    @dataclasses.dataclass(frozen=True)
    class Options:
        config: Annotated[Config, tyro.conf.arg(name="")]
        question: Annotated[Question, tyro.conf.arg(name="")] = Question()  # noqa: RUF009 (frozen)

    options = _parse(Options, f"plan {file}", rest, Options(default))
    plan(options.config, options.question)
    return 0


def _prepare(arguments: list[str]) -> int:
    """Tokenises text into a store: `prepare SOURCE... --out DIR [--tokenizer byte|bpe:VOCAB|hf:PATH] ...`."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        sources: tyro.conf.Positional[tuple[str, ...]]  # files, folders, globs, or python-stdlib
        out: str  # folder of the token store
        tokenizer: str = "byte"  # byte | bpe:VOCAB | hf:PATH
        validation_fraction: float = 0.02  # of the documents, chosen by hash
        eot: str | None = None  # text of the end-of-text token of hf:PATH; None looks for the usual names
        text_field: str = "text"  # field or column that holds the text of a record
        formats: str | None = None  # Python file that adds to jaxtrain.data.prepare.formats.FORMATS
        num_workers: int | None = None  # processes; None starts one per core

    options = _parse(Options, "prepare", arguments)
    if not options.out:
        raise ValueError("--out is '': give the folder of the token store")
    from jaxtrain.data.prepare.prepare import prepare

    store = prepare(
        options.sources,
        options.out,
        tokenizer=options.tokenizer,
        validation_fraction=options.validation_fraction,
        eot=options.eot,
        text_field=options.text_field,
        formats=options.formats,
        num_workers=options.num_workers,
    )
    for name, split in (("train", store.train), ("validation", store.validation)):
        print(
            f"{name}: {split.num_tokens:,} tokens, {split.num_documents:,} documents, {split.num_bytes:,} bytes "
            f"({split.num_bytes / split.num_tokens:.2f} bytes per token)"
        )
    print(f"store: {store.path} ({store.vocab_size:,} tokens in the vocabulary)")
    return 0


def _eval(arguments: list[str]) -> int:
    """Measures a run on a whole split: `eval RUN [--split validation|train] [--step N] [--json]`."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        run: tyro.conf.Positional[str]  # run directory
        split: Literal["validation", "train"] = "validation"
        step: int | None = None  # of the checkpoint; None takes the newest
        batches: int | None = None  # from the start of the split; None takes all
        compare: bool = False  # compress the same text with gzip -9 and xz -9 too
        json: bool = False  # print one JSON object

    options = _parse(Options, "eval", arguments)
    from jaxtrain.runtime.cluster import session
    from jaxtrain.runtime.compile_cache import compile_cache
    from jaxtrain.runtime.processes import is_lead
    from jaxtrain.training.evaluate import compressor_bits_per_byte, evaluate_split, split_text

    with compile_cache(), session(_report):
        run, params, step = _trained(options)
        split = run.store.train if options.split == "train" else run.store.validation
        result = {"step": step, "split": options.split}
        result |= evaluate_split(run, params, split, num_batches=options.batches)
    if not is_lead():
        return 0
    if options.compare:
        text = split_text(split, run.store.tokenizer)
        result |= {f"{name}_bits_per_byte": value for name, value in compressor_bits_per_byte(text).items()}
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:22}{value:.6g}" if isinstance(value, float) else f"{name:22}{value}")
    return 0


def _generate(arguments: list[str]) -> int:
    """Continues a text with a run's model: `generate RUN --prompt TEXT [--num-tokens N] [--temperature T] ...`."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        run: tyro.conf.Positional[str]  # run directory
        prompt: Annotated[str, tyro.conf.arg(help="text to continue")] = ""
        num_tokens: int = 256  # how many to add
        temperature: float = 0.8  # 0: always the likeliest token
        top_k: int | None = None  # draw among the k likeliest; None draws among all
        top_p: float = 1.0  # draw among the likeliest that hold this share of the probability
        seed: int = 0
        step: int | None = None  # of the checkpoint; None takes the newest

    options = _parse(Options, "generate", arguments)
    from jaxtrain.runtime.cluster import session
    from jaxtrain.runtime.compile_cache import compile_cache
    from jaxtrain.runtime.processes import is_lead
    from jaxtrain.training.generate import Sampling, continue_text

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    with compile_cache(), session(_report):
        run, params, _ = _trained(options, data=False)
        text = continue_text(run, params, options.prompt, options.num_tokens, seed=options.seed, sampling=sampling)
    if is_lead():
        print(options.prompt + text)
    return 0


def _replay(arguments: list[str]) -> int:
    """Runs a step of a run again and looks into it: `replay RUN --step S [--json]`."""

    @dataclasses.dataclass(frozen=True)
    class Options:
        run: tyro.conf.Positional[str]  # run directory
        step: int  # counted from 1, as in metrics.jsonl
        json: bool = False  # print one JSON object, with all rows

    options = _parse(Options, "replay", arguments)
    from jaxtrain.monitoring.metrics import encode
    from jaxtrain.monitoring.replay_view import show
    from jaxtrain.runtime.cluster import session
    from jaxtrain.runtime.compile_cache import compile_cache
    from jaxtrain.runtime.processes import agree, is_lead
    from jaxtrain.training.replay import replay

    with compile_cache(), session(_report):
        agree("the command", dataclasses.asdict(options), remedy="start them with the same one")
        result = replay(options.run, options.step)
    if is_lead():
        print(json.dumps(encode(result))) if options.json else show(result)
    return 0


def _trained(options: Any, data: bool = True) -> tuple[Any, Any, int]:
    """The run that a command names, its parameters and their step; the same on every process."""
    from jaxtrain.runtime.processes import agree
    from jaxtrain.training.run import open_run, restore_params

    agree("the command", dataclasses.asdict(options), remedy="start them with the same one")
    run = open_run(options.run, data=data)
    params, step = restore_params(run, options.step)
    agree("the checkpoint", {"step": step}, remedy="the run must be on a file system that they share")
    return run, params, step


def _parse(options: type[T], command: str, arguments: list[str], default: T | None = None) -> T:
    """Reads the flags of a command; an unknown one is a ValueError that names the nearest."""
    known = [*_flags(options, ""), "--help"]
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            near = difflib.get_close_matches(flag, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"`jaxtrain {command} --help` lists the flags"
            raise ValueError(f"unknown flag {argument.split('=')[0]}: {hint}")
    for i, argument in enumerate(arguments):
        if argument.startswith("--") and argument.endswith("=none"):
            arguments[i] = argument.removesuffix("none") + "None"
        elif argument == "none" and i and arguments[i - 1].startswith("--") and not arguments[i - 1].endswith("remat"):
            arguments[i] = "None"
    if {"--help", "-h"} & set(arguments):
        return tyro.cli(options, prog=f"jaxtrain {command}", args=arguments, default=default)
    printed, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "10000"  # tyro draws a box around its errors, whose lines are broken at this width
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(options, prog=f"jaxtrain {command}", args=arguments, default=default)
    except SystemExit:
        text = _without_box(printed.getvalue())
        of_config = re.match(r"Error parsing [a-z.]+: ", text)  # which says itself what is wrong
        if of_config:
            raise ValueError(text[of_config.end() :]) from None
        raise ValueError(
            f"{text.removeprefix('Error parsing ')}; `jaxtrain {command} --help` lists the flags"
        ) from None
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _without_box(text: str) -> str:
    """The first paragraph in a box of tyro's, as one line."""
    words = []
    for line in text.splitlines()[1:]:
        line = line.strip("│╰╯ ")  # where the output is ASCII the box has rules only
        if not line.startswith(("─", "---")):
            words += line.split()
        elif words:
            break
    return " ".join(words)


def _flags(cls: type, prefix: str) -> Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _flags(hint, prefix if name in ("config", "question") else f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}".replace("_", "-")
            if hint is bool:
                yield f"--{prefix}no-{name}".replace("_", "-")


def _config_argument(command: str, arguments: list[str]) -> tuple[Path, Config, list[str]]:
    """Takes the CONFIG that other flags change: its path, what it says, and the rest."""
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"give a config first: jaxtrain {command} CONFIG [flags], such as configs/quickstart.py")
    file = Path(arguments[0])
    return file, load(file), arguments[1:]


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "report": _health,
    "eval": _eval,
    "generate": _generate,
    "replay": _replay,
    "prepare": _prepare,
    "plan": _plan,
    "schedule": _schedule,
}


if __name__ == "__main__":
    sys.exit(main())
