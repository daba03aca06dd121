"""Components of a run, made from its config: schedule, optimizer behind the guard, loss scaling, diagnostics."""

import functools
import math
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.checks import check_transformation
from jaxtrain.clipping import clip_adaptively, clip_by_global_norm, zclip
from jaxtrain.config import Config
from jaxtrain.fields import check_entry
from jaxtrain.guard import skip_bad_steps
from jaxtrain.monitoring.layers import layer_diagnostics
from jaxtrain.optim import OPTIMIZERS
from jaxtrain.precision import LossScaling
from jaxtrain.schedules import SCHEDULES, Schedule
from jaxtrain.training.frozen import freeze_updates

_CLIPPING: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "global_norm": clip_by_global_norm,
    "zclip": lambda clip_norm: zclip(max_norm=clip_norm),
    "adaptive": clip_adaptively,
}


def make_schedule(config: Config) -> Schedule:
    """Returns the learning-rate schedule over `train.steps`."""
    return SCHEDULES[config.optim.schedule].make(config.resolved_optim, config.train.steps)


def describe_schedule(config: Config, last: float) -> str:
    """Describes the schedule in one line; `last` is the learning rate of the last step."""
    optim = config.resolved_optim
    shape = SCHEDULES[optim.schedule].description.format_map(vars(optim))
    return f"{optim.warmup_steps} steps up to {optim.peak_lr:g}, {shape}, {last:g} at step {config.train.steps}"


def check_optimizer(config: Config) -> None:
    """Raises a ValueError if `optim.name` is not in the table, or if the optimizer rejects its settings."""
    check_entry(config.optim.name, OPTIMIZERS, "optim.name", "jaxtrain.optim.OPTIMIZERS")
    if check := OPTIMIZERS[config.optim.name].check:
        check(config.optim)


class Scalars(NamedTuple):
    """Values of a config that are arguments of the compiled step, so that another value needs no compilation."""

    learning_rate: jax.Array
    clip_norm: jax.Array
    weight_decay: jax.Array


def make_scalars(config: Config, step: jax.Array) -> Scalars:
    """Returns the scalars of a step, which counts from 0."""
    optim = config.optim
    return Scalars(make_schedule(config)(step), jnp.float32(optim.clip_norm), jnp.float32(optim.weight_decay))


def make_optimizer(
    config: Config, platform: str = "cpu", scalars: Scalars | None = None, step: jax.Array | None = None
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of the config under the schedule, behind the guard.

    Args:
      platform: of the devices. On CPUs the guard checks all updates of all optimizers. Without the check the compiler
        fuses moments and updates, which changes the last bits of a run.
      scalars: takes these in place of the config's constants; the learning rate where the optimizer asks for `step`.
      step: the current step, the very array that `update` receives as `step=`.
    """
    check_optimizer(config)
    optim, schedule = config.optim, make_schedule(config)
    entry = OPTIMIZERS[optim.name]
    clip_norm = optim.clip_norm if scalars is None else scalars.clip_norm

    def learning_rate(count: jax.Array) -> jax.Array:
        return schedule(count) if scalars is None or count is not step else scalars.learning_rate

    fields: Any = optim
    if scalars is not None and entry.takes_arrays:  # a config takes no arrays
        fields = types.SimpleNamespace(**{**vars(optim), "weight_decay": scalars.weight_decay})
    optimizer = entry.make(fields, learning_rate, _CLIPPING[optim.clipping](clip_norm))
    check_transformation(f"the result of OPTIMIZERS[{optim.name!r}].make", optimizer)
    return skip_bad_steps(
        freeze_updates(optimizer, config.frozen) if config.frozen else optimizer,
        **vars(config.guard),
        # Adaptive clipping bounds every update: no norm is a spike. In 240 healthy steps the guard had skipped one.
        clip_norm=math.inf if optim.clipping == "adaptive" else clip_norm,
        check_updates=platform == "cpu" or not entry.stays_finite,
    )


def make_loss_scaling(config: Config, num_row_shards: int) -> LossScaling | None:
    """Returns loss scaling if `train.precision` needs it, for micro-batches in `num_row_shards` shards."""
    if config.train.precision != "float16":
        return None
    train = config.train
    tokens = train.batch_size * train.seq_len // (train.accumulate * num_row_shards)
    return LossScaling(**vars(config.loss_scale), divisor=2.0 ** math.ceil(math.log2(tokens)))


def make_diagnose(config: Config) -> Callable:
    """Returns the layer diagnostics of the train step. They are computed in every step, logged or not.

    Without them the compiler would fuse the gradients and moments differently, which changes the last bits: observing a
    run would change it.
    """
    return functools.partial(layer_diagnostics, b2=config.optim.b2, eps=config.optim.eps)
