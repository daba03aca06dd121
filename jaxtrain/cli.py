"""The commands of `jaxtrain`.

Errors that a user can correct are one line on standard error; `--debug` shows the traceback. Exit codes: 2 for a wrong
command, argument or input (ValueError), 1 for trouble outside of jaxtrain (a missing package, a full disk), 75 for a
stalled run, 128 + n for a run that signal n stopped after it saved, 130 after Ctrl-C, 141 for closed output.
"""

import contextlib
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal

import absl.logging

from jaxtrain import __version__
from jaxtrain.config import Config
from jaxtrain.fields import (
    Bounds,
    Folder,
    Fraction,
    LocalPath,
    NotNegative,
    Positive,
    RunFolder,
    Section,
    Source,
    TokenizerSpec,
    suggest,
)
from jaxtrain.runtime.config_files import load
from jaxtrain.runtime.flag_help import show_help
from jaxtrain.runtime.flags import Command, parse
from jaxtrain.runtime.terminal import printable, report_error, tolerant_output

_HELP = {"-h", "--help"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    with tolerant_output() as output:
        try:
            code = _run(words, debug)
            output.flush()
        except (Exception, KeyboardInterrupt) as error:
            if debug:
                raise
            code = report_error(error)
        # Training does not depend on its output: a run whose `| tee log` has died continues.
        trains = words[:1] == ["train"] and not _HELP & set(words)
        return 128 + signal.SIGPIPE if output.closed_early and not code and not trains else code


def _run(words: list[str], debug: bool) -> int:
    name, rest = (words[0] if words else "--help"), words[1:]
    if name in _HELP or name == "help":
        print(_overview())
        return 0
    if name in ("-V", "--version"):
        print(f"jaxtrain {__version__}")
        return 0
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}: {suggest(name, list(COMMANDS))}")
    command = COMMANDS[name]
    if _HELP & set(rest):
        print(show_help(command, rest))
        return 0
    options = parse(command, rest)
    if not debug:  # Orbax logs the tracebacks of errors that are reported here in one line
        absl.logging.set_verbosity(absl.logging.FATAL)
    return command.run(options)


def _overview() -> str:
    lines = [f"  {name:10}{(command.run.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return (
        "usage: jaxtrain COMMAND ...\n\n"
        + "\n".join(lines)
        + "\n\n`jaxtrain COMMAND --help` lists the options of a command.\n"
        "`jaxtrain --version` prints the version. `--debug` shows the traceback of an error."
    )


@dataclass(frozen=True)
class TrainOptions(Section):
    """Options of `jaxtrain train`."""

    positional = "config"
    config: Config  # config file: .py with a function config(), or .json
    run_dir: RunFolder | None = None  # run directory; an existing run is resumed; none: runs/NAME for NAME.py
    allow_change: bool = False  # resume with a changed config, such as more steps; the change is recorded
    rewind: Positive[int] | None = None  # resume from the checkpoint of this step; renames later ones; give it once
    profile: Annotated[str, "START:STOP"] | None = None  # steps to trace into RUN/profile, without STOP, such as 10:13
    no_lock: bool = False  # take no lock, for a file system that has none; let no second process train in the folder


def _train(options: TrainOptions) -> int:
    """Trains a config, or resumes the run in --run-dir.

    Every field of the config is a flag. `none` switches off an option that may be absent: --train.eval-every none.
    """
    from jaxtrain.runtime.cluster import session
    from jaxtrain.runtime.compile_cache import compile_cache
    from jaxtrain.runtime.stop import is_stuck, leave
    from jaxtrain.training.train import GAVE_UP, train

    more = {name: getattr(options, name) for name in ("rewind", "profile", "allow_change")}
    try:
        with compile_cache(), session(report_error):
            outcome = train(
                options.config, options.run_dir or "", lock=not options.no_lock, **more
            )  # `parse` fills run_dir in
    except OSError as error:
        if is_stuck():
            leave(report_error(error))
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


@dataclass(frozen=True)
class ReportOptions(Section):
    """Options of `jaxtrain report`."""

    positional = "run"
    run: RunFolder  # run directory
    config: Annotated[str, LocalPath("CONFIG.py")] | None = None  # config file that adds the schedule of the run


def _write_report(options: ReportOptions) -> int:
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


@dataclass(frozen=True)
class ScheduleOptions(Section):
    """Options of `jaxtrain schedule`."""

    positional = "config"
    config: Config  # config file: .py with a function config(), or .json
    png: Annotated[str, LocalPath("FILE.png")] | None = None  # picture to draw

    def __post_init__(self):
        super().__post_init__()
        if self.png is not None and not self.png.endswith(".png"):
            raise ValueError(f"--png {self.png!r} must end in .png")


def _schedule(options: ScheduleOptions) -> int:
    """Draws the learning rate of a config."""
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


@dataclass(frozen=True)
class PlanOptions(Section):
    """Options of `jaxtrain plan`."""

    positional = "config"
    config: Config  # config file: .py with a function config(), or .json
    topology: Annotated[str, "CHIP:SHAPE"] | None = None  # TPU slice to compile for: v5p:2x2x2, v5e:4x4, v6e:4x4 ...
    devices: Positive[int] | None = None  # number of devices without --topology; None takes the product of the mesh
    chip: Annotated[str, "CHIP"] | None = None  # v5e, v5p, v6e, a100, h100 or h200, without --topology
    mfu: Annotated[float, Bounds("above 0 and at most 1", 0, 1, includes_high=True)] = 0.4  # assumed share of the peak
    price: NotNegative[float] | None = None  # of one chip for one hour, in any currency
    max_batch: bool = False  # search for the largest train.batch_size that fits; needs --topology
    timeout: Positive[float] = 3600.0  # seconds that one compilation may take
    json: bool = False  # print one JSON object


def _plan(options: PlanOptions) -> int:
    """Estimates memory, traffic, time and cost of a config before it runs."""
    from jaxtrain.plan.view import Question, plan

    question = {item.name: getattr(options, item.name) for item in fields(options) if item.name != "config"}
    plan(options.config, Question(**question))
    return 0


@dataclass(frozen=True)
class PrepareOptions(Section):
    """Options of `jaxtrain prepare`."""

    positional = "sources"
    sources: tuple[Source, ...]  # files, folders or globs of text or records, or python-stdlib
    out: Folder  # folder of the new token store
    tokenizer: TokenizerSpec = "byte"  # bpe is trained on the sources; hf is a tokenizer.json
    validation_fraction: Fraction[float] = 0.02  # share of the documents, chosen by hash
    eot: str | None = None  # end-of-text token of hf:FILE; none looks for the usual names
    text_field: str = "text"  # field or column that holds the text of a record
    # Python file that adds to jaxtrain.data.prepare.formats.FORMATS
    formats: Annotated[str, LocalPath("FILE.py")] | None = None
    num_workers: Positive[int] | None = None  # processes; none starts one per core
    no_lock: bool = False  # take no lock, for a file system that has none


def _prepare(options: PrepareOptions) -> int:
    """Tokenizes text into a token store, which `--data.store` of a config names."""
    from jaxtrain.data.prepare.prepare import prepare

    more = dict(vars(options))
    store = prepare(lock=not more.pop("no_lock"), **more)
    for name, split in (("train", store.train), ("validation", store.validation)):
        print(
            f"{name}: {split.num_tokens:,} tokens, {split.num_documents:,} documents, {split.num_bytes:,} bytes "
            f"({(split.num_bytes or 0) / split.num_tokens:.2f} bytes per token)"
        )
    print(printable(f"store: {store.path}") + f" ({store.vocab_size:,} tokens in the vocabulary)")
    return 0


@dataclass(frozen=True, kw_only=True)
class RunOptions(Section):
    """Options of the commands that open a run."""

    positional = "run"
    run: RunFolder  # run directory
    # config file of the run, if it defines a model, schedule or optimizer
    config: Annotated[str, LocalPath("CONFIG.py")] | None = None
    data_store: Folder | None = None  # path of the token store, if it has moved


@dataclass(frozen=True, kw_only=True)
class EvalOptions(RunOptions):
    """Options of `jaxtrain eval`."""

    split: Literal["validation", "train"] = "validation"  # part of the token store
    step: NotNegative[int] | None = None  # checkpoint; none takes the newest
    batches: Positive[int] | None = None  # batches from the start of the split; none takes all
    compare: bool = False  # compress the same text with gzip -9 and xz -9
    json: bool = False  # print one JSON object


def _eval(options: EvalOptions) -> int:
    """Evaluates a run on a split of its data: loss, perplexity, bits per byte."""
    from jaxtrain.monitoring.console import Console
    from jaxtrain.runtime.cluster import session
    from jaxtrain.runtime.compile_cache import compile_cache
    from jaxtrain.runtime.processes import is_lead
    from jaxtrain.training.evaluation import compressor_bits_per_byte, evaluate_split, split_text

    console = Console(0, sys.stderr)
    with compile_cache(), session(report_error):
        run, params, step = _trained(options)
        split = run.store.train if options.split == "train" else run.store.validation
        result: dict[str, Any] = {"step": step, "split": options.split}
        with console.busy("evaluating") if is_lead() else contextlib.nullcontext():
            result |= evaluate_split(run, params, split, num_batches=options.batches)
    if not is_lead():
        return 0
    if options.compare:
        with console.busy("compressing the same text with gzip and xz"):
            compressed = compressor_bits_per_byte(split_text(split, run.store.tokenizer))
        result |= {f"{name}_bits_per_byte": value for name, value in compressed.items()}
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:22}{value:.6g}" if isinstance(value, float) else f"{name:22}{value}")
    return 0


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunOptions):
    """Options of `jaxtrain generate`."""

    prompt: str = ""  # text to continue
    num_tokens: Positive[int] = 256  # tokens to add
    temperature: NotNegative[float] = 0.8  # divides the logits; 0 takes the likeliest token
    top_k: Positive[int] | None = None  # draws among the k likeliest tokens; none draws among all
    # draws among the likeliest tokens that hold this share of the probability
    top_p: Annotated[float, Bounds("in (0, 1]", 0, 1, includes_high=True)] = 1.0
    seed: NotNegative[int] = 0  # of the random numbers
    step: NotNegative[int] | None = None  # checkpoint; none takes the newest
    past_end: bool = False  # continues after the end-of-text token


def _generate(options: GenerateOptions) -> int:
    """Continues a text with the model of a run."""
    from jaxtrain.models.decode import Sampling
    from jaxtrain.runtime.cluster import session
    from jaxtrain.runtime.compile_cache import compile_cache
    from jaxtrain.runtime.processes import is_lead
    from jaxtrain.training.generate import continue_text

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    with compile_cache(), session(report_error):
        run, params, _ = _trained(options, data=False)
        text = continue_text(
            run,
            params,
            options.prompt,
            options.num_tokens,
            seed=options.seed,
            sampling=sampling,
            stop=not options.past_end,
        )
    if is_lead():
        text = options.prompt + text
        print(printable(text) if sys.stdout.isatty() else text)  # a file gets the text as it is
    return 0


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(RunOptions):
    """Options of `jaxtrain replay`."""

    step: NotNegative[int]  # step, counted from 1 as in metrics.jsonl
    json: bool = False  # print one JSON object with all rows


def _replay(options: ReplayOptions) -> int:
    """Runs a step of a run again, and shows it by micro-batch, layer and row."""
    from jaxtrain.monitoring.metrics import encode
    from jaxtrain.monitoring.replay_view import show
    from jaxtrain.runtime.cluster import session
    from jaxtrain.runtime.compile_cache import compile_cache
    from jaxtrain.runtime.processes import agree, is_lead
    from jaxtrain.training.replay import replay

    with compile_cache(), session(report_error):
        agree("the command", asdict(options), remedy="start them with the same one")
        result = replay(options.run, options.step, store=options.data_store, model=_model(options))
    if is_lead():
        print(json.dumps(encode(result))) if options.json else show(result)
    return 0


def _model(options: RunOptions) -> Any:
    return load(options.config).model if options.config else None


def _trained(options: EvalOptions | GenerateOptions, data: bool = True) -> tuple[Any, Any, int]:
    """Opens a run; returns it with the parameters of a checkpoint and its step, the same on every process."""
    from jaxtrain.runtime.processes import agree
    from jaxtrain.training.run import open_run, restore_params

    agree("the command", asdict(options), remedy="start them with the same one")
    run = open_run(options.run, store=options.data_store, model=_model(options), data=data)
    params, step = restore_params(run, options.step)
    agree("the checkpoint", {"step": step}, remedy="the run must be on a file system that they share")
    return run, params, step


COMMANDS = {
    command.name: command
    for command in (
        Command("train", TrainOptions, _train, "train configs/quickstart.py --run-dir runs/first --train.steps 300"),
        Command("report", ReportOptions, _write_report, "report runs/first"),
        Command("eval", EvalOptions, _eval, "eval runs/first --compare"),
        Command("generate", GenerateOptions, _generate, 'generate runs/first --prompt "def " --temperature 0.5'),
        Command("replay", ReplayOptions, _replay, "replay runs/first --step 120"),
        Command("prepare", PrepareOptions, _prepare, "prepare texts/ --tokenizer bpe:8192 --out stores/texts"),
        Command("plan", PlanOptions, _plan, "plan configs/llama2_7b.py --topology v5p:2x2x2"),
        Command("schedule", ScheduleOptions, _schedule, "schedule configs/quickstart.py --optim.schedule cosine"),
    )
}


if __name__ == "__main__":
    sys.exit(main())
