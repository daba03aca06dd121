"""Components of a run, made from its config: schedule, optimizer behind the guard, loss scaling, diagnostics."""

import functools
import math
from collections.abc import Callable

import jax
import optax

from jaxtrain.clipping import clip_adaptively, clip_by_global_norm, zclip
from jaxtrain.config import Config
from jaxtrain.fields import check_entry
from jaxtrain.guard import skip_bad_steps
from jaxtrain.monitoring.layers import layer_diagnostics
from jaxtrain.optim import OPTIMIZERS
from jaxtrain.precision import LossScaling
from jaxtrain.schedules import SCHEDULES, Schedule
from jaxtrain.training.frozen import freeze_updates


def make_schedule(config: Config) -> Schedule:
    """Returns the learning-rate schedule over `train.steps`."""
    return SCHEDULES[config.optim.schedule].make(config.resolved_optim, config.train.steps)


def describe_schedule(config: Config) -> str:
    """Describes the schedule in one line."""
    optim, schedule = config.resolved_optim, make_schedule(config)
    last = float(jax.jit(schedule)(config.train.steps - 1))  # compiles one small program instead of sixteen
    shape = SCHEDULES[optim.schedule].description.format_map(vars(optim))
    return f"{optim.warmup_steps} steps up to {optim.peak_lr:g}, {shape}, {last:g} at step {config.train.steps}"


def check_optimizer(config: Config) -> None:
    """Raises a ValueError if `optim.name` is not in the table, or if the optimizer rejects its settings."""
    check_entry(config.optim.name, OPTIMIZERS, "optim.name", "jaxtrain.optim.OPTIMIZERS")
    if check := OPTIMIZERS[config.optim.name].check:
        check(config.optim)


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of the config under the schedule, behind the guard."""
    check_optimizer(config)
    optim, guard = config.optim, config.guard
    optimizer = OPTIMIZERS[optim.name].make(optim, make_schedule(config), _make_clip(config))
    return skip_bad_steps(
        freeze_updates(optimizer, optim.frozen) if optim.frozen else optimizer,
        window=guard.window,
        sigmas=guard.sigmas,
        clip_norm=None if optim.clipping == "adaptive" else optim.clip_norm,  # a ratio if adaptive
        max_consecutive=guard.max_consecutive,
        max_share=guard.max_share,
    )


def _make_clip(config: Config) -> optax.GradientTransformation:
    match config.optim.clipping:
        case "zclip":
            return zclip(max_norm=config.optim.clip_norm)
        case "adaptive":
            return clip_adaptively(config.optim.clip_norm)
        case _:
            return clip_by_global_norm(config.optim.clip_norm)


def make_loss_scaling(config: Config, num_row_shards: int) -> LossScaling | None:
    """Returns loss scaling if `train.precision` needs it, for micro-batches in `num_row_shards` shards."""
    if config.train.precision != "float16":
        return None
    train, scale = config.train, config.loss_scale
    tokens = train.batch_size * train.seq_len // (train.accumulate * num_row_shards)
    return LossScaling(
        initial=scale.initial,
        growth_interval=scale.growth_interval,
        floor=scale.floor,
        ceiling=scale.ceiling,
        divisor=2.0 ** math.ceil(math.log2(tokens)),
    )


def make_diagnose(config: Config) -> Callable:
    """Returns the layer diagnostics of the train step. They are computed in every step, logged or not.

    Without them the compiler would fuse the gradients and moments differently, which changes the last bits: observing a
    run would change it.
    """
    return functools.partial(layer_diagnostics, b2=config.optim.b2, eps=config.optim.eps)
