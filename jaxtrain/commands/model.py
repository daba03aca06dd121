"""Commands on the model of a run: eval, generate, replay."""

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from jaxtrain.fields import Bounds, Folder, LocalPath, NotNegative, Positive, RunFolder, Section
from jaxtrain.runtime.config_files import load
from jaxtrain.runtime.flags import Command
from jaxtrain.runtime.terminal import printable, report_error


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


def run_evaluate(options: EvalOptions) -> int:
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


def run_generate(options: GenerateOptions) -> int:
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


def run_replay(options: ReplayOptions) -> int:
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


COMMANDS = [
    Command("eval", EvalOptions, run_evaluate, "eval runs/first --compare"),
    Command("generate", GenerateOptions, run_generate, 'generate runs/first --prompt "def " --temperature 0.5'),
    Command("replay", ReplayOptions, run_replay, "replay runs/first --step 120"),
]
