"""Commands on a config: train, schedule, plan."""

import signal
import sys
from dataclasses import dataclass
from typing import Annotated

from jaxtrain.config import Config
from jaxtrain.fields import LocalPath, NotNegative, Positive, PositiveShare, RunOrUrl, Section
from jaxtrain.runtime.flags import Command
from jaxtrain.runtime.terminal import echo, report_error


@dataclass(frozen=True)
class TrainOptions(Section):
    """Options of `jaxtrain train`."""

    positional = "config"
    config: Config  # config file: .py with a function config(), or .json
    run_dir: RunOrUrl | None = None  # run directory or its URL; an existing run is resumed; none: runs/NAME for NAME.py
    allow_change: bool = False  # resume with a changed config, such as more steps; the change is recorded
    rewind: Positive[int] | None = None  # resume from the checkpoint of this step; renames later ones; give it once
    profile: Annotated[str, "START:STOP"] | None = None  # steps to trace into RUN/profile, without STOP, such as 10:13
    track: tuple[Annotated[str, "TRACKER"], ...] = ()  # of tensorboard, wandb, mlflow and trackio
    no_lock: bool = False  # take no lock, for a file system that has none; let no second process train in the folder


def run_train(options: TrainOptions) -> int:
    """Trains a config, or resumes the run in --run-dir.

    Every field of the config is a flag. `none` switches off an option that may be absent: --train.eval-every none.
    """
    from jaxtrain.plan.formulas import has_large_matrix
    from jaxtrain.runtime.cluster import session
    from jaxtrain.runtime.compile_cache import compile_cache
    from jaxtrain.runtime.stop import is_stuck, leave
    from jaxtrain.training.train import GAVE_UP, train

    more = {name: getattr(options, name) for name in ("rewind", "profile", "allow_change", "track")}
    run_dir = options.run_dir or ""  # `parse` has filled it in
    try:
        with compile_cache(), session(report_error, large_matrices=has_large_matrix(options.config)):
            outcome = train(options.config, run_dir, lock=not options.no_lock, **more)
    except OSError as error:
        if is_stuck():
            leave(report_error(error))
        raise
    code, reason = 0, outcome["reason"]
    if reason == GAVE_UP:
        text = f"gave up at step {outcome['step']} after too many bad steps (see guard.max_consecutive and max_share)"
        echo(f"error: {text}; the state is saved, and {run_dir} has a report", file=sys.stderr)
        code = 1
    elif reason.startswith("SIG"):
        code = 128 + signal.Signals[reason]
    return leave(code) if is_stuck() else code


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


def run_schedule(options: ScheduleOptions) -> int:
    """Draws the learning rate of a config."""
    import jax
    import jax.numpy as jnp

    from jaxtrain.monitoring.plots import draw_curve, plot_schedule
    from jaxtrain.training.components import describe_schedule, make_schedule

    steps = options.config.train.steps
    schedule = make_schedule(options.config)
    values = jax.vmap(schedule)(jnp.arange(steps)).tolist()
    echo(describe_schedule(options.config, values[-1]))
    echo(draw_curve(values, label="learning rate"))
    if options.png:
        echo(f"drawn to {plot_schedule(schedule, steps, options.png)}")
    return 0


@dataclass(frozen=True)
class PlanOptions(Section):
    """Options of `jaxtrain plan`."""

    positional = "config"
    config: Config  # config file: .py with a function config(), or .json
    topology: Annotated[str, "CHIP:SHAPE"] | None = None  # chips to compile for: v5p:2x2x2, v6e:4x4, h100:8 ...
    devices: Positive[int] | None = None  # number of devices without --topology; None takes the product of the mesh
    chip: Annotated[str, "CHIP"] | None = None  # v5e, v5p, v6e, a100, h100, h200 or b200, without --topology
    mfu: PositiveShare[float] = 0.4  # assumed share of the peak
    price: NotNegative[float] | None = None  # of one chip for one hour, in any currency
    max_batch: bool = False  # search for the largest train.batch_size that fits; needs --topology
    timeout: Positive[float] = 3600.0  # seconds that one compilation may take
    json: bool = False  # print one JSON object


def run_plan(options: PlanOptions) -> int:
    """Estimates memory, traffic, time and cost of a config before it runs."""
    from jaxtrain.plan.view import plan

    plan(options.config, options)
    return 0


COMMANDS = [
    Command("train", TrainOptions, run_train, "train configs/quickstart.py --run-dir runs/first --train.steps 300"),
    Command("plan", PlanOptions, run_plan, "plan configs/llama2_7b.py --topology v5p:2x2x2"),
    Command("schedule", ScheduleOptions, run_schedule, "schedule configs/quickstart.py --optim.schedule cosine"),
]
