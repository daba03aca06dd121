"""Commands on the model of a run: eval, replay."""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from jaxtrain.fields import LocalPath, NotNegative, Positive, RunOrUrl, Section, Source, Store
from jaxtrain.runtime.config_files import load_config
from jaxtrain.runtime.flags import Command
from jaxtrain.runtime.remote import local_run
from jaxtrain.runtime.terminal import echo, report_error

Checkpoint = NotNegative[int] | Literal["best"]


@dataclass(frozen=True, kw_only=True)
class RunOptions(Section):
    """Options of the commands that open a run."""

    positional = "run"
    run: RunOrUrl  # run directory
    # config file of the run, if it defines a model, schedule or optimizer
    config: Annotated[str, LocalPath("CONFIG.py")] | None = None
    data_store: Store | None = None  # token store, if it has moved


@dataclass(frozen=True, kw_only=True)
class EvalOptions(RunOptions):
    """Options of `jaxtrain eval`."""

    data: tuple[Source, ...] = ()  # token stores or files of text to evaluate on; none takes the data of the run
    split: Literal["validation", "train"] = "validation"  # part of the token store
    step: Checkpoint | None = None  # checkpoint; best has the lowest validation loss; none takes the newest
    batches: Positive[int] | None = None  # batches from the start of the split; none takes all
    compare: bool = False  # compress the same text with gzip -9 and xz -9
    json: bool = False  # print one JSON object


def run_evaluate(options: EvalOptions) -> int:
    """Evaluates a model on a split of its data or on other text: loss and bits per byte."""
    from jaxtrain.data.compressors import compressor_bits_per_byte
    from jaxtrain.data.texts import open_split
    from jaxtrain.monitoring.console import Console
    from jaxtrain.runtime.processes import is_lead
    from jaxtrain.training.evaluation import evaluate_sources, split_text

    console = Console(0, sys.stderr)
    with on_devices(options):
        run, params, step = _trained(options)
        result: dict[str, Any] = {"step": step} | ({"data": options.data} if options.data else {"split": options.split})
        with console.busy("evaluating") if is_lead() else contextlib.nullcontext():
            splits = {name: open_split(name, options.split, run.tokenizer) for name in options.data}
            counted = {"num_batches": options.batches, "by_position": True}
            result |= evaluate_sources(run, params, splits or options.split, **counted)
    if not is_lead():
        return 0
    if not splits:
        splits = {"": getattr(run.store, options.split)}
    sizes = [split.num_bytes for split in splits.values()]
    if options.batches is None and None not in sizes:
        result["bytes"] = sum(sizes)
    if options.compare:
        with console.busy("compressing the same text with gzip and xz"):
            text = b"".join(split_text(split, run.tokenizer) for split in splits.values())
            compressed = compressor_bits_per_byte(text)
        result |= {f"{name}_bits_per_byte": value for name, value in compressed.items()}
    if options.json:
        echo(json.dumps(result), verbatim=True)
    else:
        _show_evaluation(result)
    return 0


def _show_evaluation(result: dict[str, Any]) -> None:
    positions = result.pop("positions")
    for name, value in result.items():
        text = f"{value:.6g}" if isinstance(value, float) else " ".join(value) if name == "data" else str(value)
        echo(f"{name:21} {text}")
    echo(f"{'position':21} {'nll':10}tokens")
    for row in positions:
        window = f"{row['start'] + 1} to {row['stop']}"
        echo(f"{window:21} {row['nll']:<10.4f}{row['tokens']}")


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(RunOptions):
    """Options of `jaxtrain replay`."""

    step: NotNegative[int]  # step, counted from 1 as in metrics.jsonl
    json: bool = False  # print one JSON object with all rows


def run_replay(options: ReplayOptions) -> int:
    """Runs a step of a run again, and shows it by micro-batch, layer and row."""
    from jaxtrain.monitoring.metrics import encode
    from jaxtrain.monitoring.replay_view import show
    from jaxtrain.runtime.processes import is_lead
    from jaxtrain.training.replay import replay

    with on_devices(options):
        result = replay(options.run, options.step, store=options.data_store, model=model_of(options))
    if is_lead():
        echo(json.dumps(encode(result)), verbatim=True) if options.json else show(result)
    return 0


def model_of(options: RunOptions) -> Any:
    """Returns the model of the config file that the options name, if they do."""
    return load_config(options.config).model if options.config else None


@contextlib.contextmanager
def on_devices(options: RunOptions) -> Iterator[None]:
    """Enables the compile cache and joins the processes of the command, which must agree on its options."""
    from jaxtrain.runtime.cluster import session
    from jaxtrain.runtime.compile_cache import compile_cache
    from jaxtrain.runtime.processes import agree

    with compile_cache(), session(report_error):
        agree("the command", asdict(options), remedy="start them with the same one")
        yield


def _trained(options: EvalOptions) -> tuple[Any, Any, int]:
    """Opens a run; returns it with the parameters of a checkpoint and its step, the same on every process."""
    from jaxtrain.inference.load import find_step
    from jaxtrain.models.hf.read import is_pretrained
    from jaxtrain.runtime.processes import agree
    from jaxtrain.training.run import open_pretrained, open_run, restore_run_params

    folder = local_run(options.run)
    if is_pretrained(folder):
        if not options.data:
            raise ValueError(f"{options.run} is a folder of transformers, without data: give --data STORE or FILES")
        return *open_pretrained(folder), 0
    run = open_run(folder, store=options.data_store, model=model_of(options), data=not options.data)
    params, step = restore_run_params(run, find_step(run.folder, options.step))
    agree("the checkpoint", {"step": step}, remedy="the run must be on a file system that they share")
    return run, params, step


COMMANDS = [
    Command("eval", EvalOptions, run_evaluate, "eval runs/first --compare"),
    Command("replay", ReplayOptions, run_replay, "replay runs/first --step 120"),
]
