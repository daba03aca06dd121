"""From a config to the pieces of a run: schedule, optimizer, model, data."""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from jaxtrain import schedules
from jaxtrain.clipping import clip_adaptively, zclip
from jaxtrain.config import Config
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.store import TokenStore, open_store
from jaxtrain.guard import skip_bad_steps
from jaxtrain.monitoring.layers import layer_diagnostics
from jaxtrain.optim import clipped_adamw
from jaxtrain.precision import LossScaling, Policy


def make_schedule(config: Config) -> schedules.Schedule:
    """The learning-rate schedule over `train.steps`."""
    optim, steps = config.optim, config.train.steps
    match optim.schedule:
        case "cosine":
            return schedules.warmup_cosine(optim.peak_lr, steps, optim.warmup_steps, optim.floor)
        case "linear":
            return schedules.warmup_linear(optim.peak_lr, steps, optim.warmup_steps, optim.floor)
        case "wsd":
            return schedules.warmup_stable_decay(
                optim.peak_lr, steps, optim.warmup_steps, optim.decay_steps, optim.floor
            )
        case "sgdr":
            cycle_steps = steps // optim.cycles
            return schedules.sgdr(
                optim.peak_lr, cycle_steps, optim.warmup_steps, optim.cycles, optim.cycle_decay, optim.floor
            )
        case "constant":
            return schedules.warmup_constant(optim.peak_lr, optim.warmup_steps)


def describe_schedule(config: Config) -> str:
    """The schedule in one line."""
    optim, schedule = config.optim, make_schedule(config)
    last = float(jax.jit(schedule)(config.train.steps - 1))  # one small program rather than sixteen
    shape = {
        "cosine": "cosine",
        "linear": "linear decay",
        "wsd": f"held, then linear decay over the last {optim.decay_steps} steps",
        "sgdr": f"{optim.cycles} cosine cycles, each peak {optim.cycle_decay:g} x the one before",
        "constant": "held",
    }[optim.schedule]
    return f"{optim.warmup_steps} steps up to {optim.peak_lr:g}, {shape}, {last:g} at step {config.train.steps}"


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Clipped AdamW under the schedule, behind the guard."""
    optim, guard = config.optim, config.guard
    clipped = clipped_adamw(
        make_schedule(config),
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_norm=optim.clip_norm,
        clip=_make_clip(config),
        mu_dtype=jnp.dtype(optim.mu_dtype),
    )
    return skip_bad_steps(
        clipped,
        window=guard.window,
        sigmas=guard.sigmas,
        max_consecutive=guard.max_consecutive,
        max_share=guard.max_share,
    )


def _make_clip(config: Config) -> optax.GradientTransformation | None:
    match config.optim.clipping:
        case "global_norm":
            return None
        case "zclip":
            return zclip(max_norm=config.optim.clip_norm)
        case "adaptive":
            return clip_adaptively(config.optim.clip_norm)


def make_loss_scaling(config: Config, num_row_shards: int) -> LossScaling | None:
    """Loss scaling where `train.precision` needs it, for batches in so many parts."""
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
    """What the train step measures of its layers, in every step, whether it is logged or not.

    A program that did not would have other fusions around the gradients and the moments, and with them other last bits:
    looking into a run would change it.
    """
    return functools.partial(layer_diagnostics, b2=config.optim.b2, eps=config.optim.eps)


def make_policy(config: Config) -> Policy:
    """Float32 masters that compute in `train.precision`."""
    return Policy(compute=config.train.precision)


def prepare_data(config: Config, run_dir: str | Path) -> None:
    """Makes the run's token store from `data.sources`, if that is what the config says."""
    data = config.data
    # Once the run has begun the text is no longer needed.
    if not data.store and not (Path(run_dir) / "metrics.jsonl").exists():
        prepare(
            data.sources,
            Path(run_dir) / "data",
            tokenizer=data.tokenizer,
            validation_fraction=data.validation_fraction,
            text_field=data.text_field,
        )


def open_data(config: Config, run_dir: str | Path) -> TokenStore:
    """Opens the run's token store."""
    return open_store(config.data.store or Path(run_dir) / "data", verify=config.data.verify)
