"""Learning-rate schedules: pure functions from an optimizer step (0, 1, 2, ...) to a float32 learning rate.

They are optax schedules, exact at the corners. With t = step + 1 the warm-up is `peak * t / warmup_steps`, so the first
step moves, a warm-up reaches the peak once (at step warmup_steps - 1) and the last executed step (total_steps - 1) is
exactly at the floor. Past the end the rate stays at the floor. The corners are the same bits with and without jit;
between them the compiler may fuse a multiply and an add, a few units in the last place.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.checks import check_count, check_number

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]
Shape = Callable[[jax.Array], jax.Array]


def warmup_cosine(peak: float, total_steps: int, warmup_steps: int, floor: float = 0.1) -> Schedule:
    """Returns a linear warm-up, then half a cosine down to `floor * peak` (arXiv:1608.03983).

    Args:
      peak: highest learning rate, above 0.
      total_steps: optimizer steps of the run, warm-up included.
      warmup_steps: optimizer steps of the warm-up; 0 starts on the decay.
      floor: last learning rate as a fraction of the peak, in [0, 1].

    Returns:
      step -> learning rate, float32; `step` is an integer or an array of integers, traced or not. A negative step
      counts as step 0.

    Raises:
      ValueError: an argument out of range, a count that is no integer, or no step left to decay in.

    Example:
      >>> from jaxtrain.schedules import warmup_cosine
      >>> schedule = warmup_cosine(peak=1.0, total_steps=10, warmup_steps=2, floor=0.1)
      >>> [round(float(schedule(step)), 3) for step in (0, 1, 5, 9, 99)]
      [0.5, 1.0, 0.55, 0.1, 0.1]
    """
    # cos^2 of half the angle is the cosine written without the cancellation of 1 + cos near the end.
    return _decay(peak, total_steps, warmup_steps, None, floor, _half_cosine)


def warmup_linear(peak: float, total_steps: int, warmup_steps: int, floor: float = 0.1) -> Schedule:
    """Returns a linear warm-up, then a linear decay to `floor * peak`.

    Args, returned schedule and errors are those of `warmup_cosine`.

    Example:
      >>> from jaxtrain.schedules import warmup_linear
      >>> schedule = warmup_linear(peak=2.0, total_steps=6, warmup_steps=2, floor=0.5)
      >>> [float(schedule(step)) for step in range(6)]
      [1.0, 2.0, 1.75, 1.5, 1.25, 1.0]
    """
    return _decay(peak, total_steps, warmup_steps, None, floor, lambda remaining: remaining)


def warmup_stable_decay(
    peak: float, total_steps: int, warmup_steps: int, decay_steps: int, floor: float = 0.0
) -> Schedule:
    """Returns a trapezoid (WSD, arXiv:2404.06395): linear warm-up, constant peak, linear decay.

    A run may be extended during its constant part, which a cosine does not allow.

    `decay_steps` at the end, with the warm-up at most `total_steps`, are the decay. The other arguments, the returned
    schedule and the errors are those of `warmup_cosine`.

    Example:
      >>> from jaxtrain.schedules import warmup_stable_decay
      >>> schedule = warmup_stable_decay(peak=1.0, total_steps=8, warmup_steps=2, decay_steps=4)
      >>> [float(schedule(step)) for step in range(8)]
      [0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return _decay(peak, total_steps, warmup_steps, decay_steps, floor, lambda remaining: remaining)


def sgdr(
    peak: float, cycle_steps: int, warmup_steps: int, cycles: int, decay: float = 1.0, floor: float = 0.1
) -> Schedule:
    """Returns warm restarts (arXiv:1608.03983): consecutive cosine cycles, each with its own warm-up.

    Args:
      peak: highest learning rate of the first cycle, above 0.
      cycle_steps: optimizer steps of a cycle, its warm-up included.
      warmup_steps: optimizer steps of the warm-up that starts each cycle.
      cycles: number of cycles; afterwards the rate stays at the last cycle's floor.
      decay: factor on the peak from one cycle to the next, in (0, 1].
      floor: last learning rate of a cycle as a fraction of that cycle's peak, in [0, 1].

    The returned schedule and the errors are those of `warmup_cosine`.

    Example:
      >>> from jaxtrain.schedules import sgdr
      >>> schedule = sgdr(peak=4.0, cycle_steps=4, warmup_steps=1, cycles=2, decay=0.5, floor=0.0)
      >>> [round(float(schedule(step)), 3) for step in range(8)]
      [4.0, 3.0, 1.0, 0.0, 2.0, 1.5, 0.5, 0.0]
    """
    check_count("cycles", cycles, 1)
    check_number("decay", decay, "(0, 1]")
    _check_rates(peak, floor)
    _check_steps("cycle_steps", cycle_steps, warmup_steps, None)
    peaks = peak * decay ** np.arange(cycles)

    def schedule(step):
        step = _count(step)
        cycle = jnp.clip(step // cycle_steps, 0, cycles - 1)
        high, low = (jnp.asarray(rates, jnp.float32)[cycle] for rates in (peaks, peaks * floor))
        within = step - cycle * cycle_steps
        return _rate(within, high, low, cycle_steps, warmup_steps, cycle_steps - warmup_steps, _half_cosine)

    return schedule


def warmup_constant(peak: float, warmup_steps: int) -> Schedule:
    """Returns a linear warm-up, then the peak without end.

    Args, returned schedule and errors are those of `warmup_cosine`.

    Example:
      >>> from jaxtrain.schedules import warmup_constant
      >>> schedule = warmup_constant(peak=1.0, warmup_steps=2)
      >>> [float(schedule(step)) for step in (0, 1, 2, 1000)]
      [0.5, 1.0, 1.0, 1.0]
    """
    _check_rates(peak, 0.0)
    check_count("warmup_steps", warmup_steps)

    def schedule(step):
        t = jnp.minimum(_count(step), warmup_steps) + 1
        return _warm_up(t, jnp.float32(peak), warmup_steps, jnp.float32(peak))

    return schedule


class ScheduleEntry(NamedTuple):
    """Schedule that `optim.schedule` of a config can name; see `SCHEDULES`."""

    # `(optim, total_steps) -> Schedule`, from a `config.OptimConfig` and the steps of the run
    make: Callable[[Any, int], Schedule]
    description: str  # one line; fields of `OptimConfig` in braces are filled in
    # `(optim, total_steps) -> None`, raises a ValueError that names the fields. None: `make` checks.
    check: Callable[[Any, int], None] | None = None


def _check_room(optim: Any, total_steps: int) -> None:
    """Raises a ValueError unless warm-up and decay fit into the run."""
    decay_steps = {"wsd": optim.decay_steps, "constant": 0}.get(optim.schedule, 1)
    if decay_steps is None:
        raise ValueError('optim.schedule "wsd" needs optim.decay_steps above 0: the length of its final decay')
    if optim.warmup_steps + decay_steps > total_steps:
        problem = f"optim.warmup_steps {optim.warmup_steps} leaves no room to decay in train.steps {total_steps}"
        form = f"schedule {optim.schedule}, {decay_steps} steps of decay"
        raise ValueError(f"{problem} ({form}): shorten the warm-up or train longer")


def _check_sgdr(optim: Any, total_steps: int) -> None:
    if total_steps % optim.cycles or optim.warmup_steps >= total_steps // optim.cycles:
        problem = f"optim.cycles {optim.cycles} must divide train.steps {total_steps}"
        raise ValueError(f"{problem} into cycles longer than optim.warmup_steps {optim.warmup_steps}")


# A config file may add an entry: SCHEDULES["name"] = ScheduleEntry(make, description).
SCHEDULES: dict[str, ScheduleEntry] = {
    "cosine": ScheduleEntry(
        lambda optim, steps: warmup_cosine(optim.peak_lr, steps, optim.warmup_steps, optim.floor),
        "cosine decay",
        _check_room,
    ),
    "linear": ScheduleEntry(
        lambda optim, steps: warmup_linear(optim.peak_lr, steps, optim.warmup_steps, optim.floor),
        "linear decay",
        _check_room,
    ),
    "wsd": ScheduleEntry(
        lambda optim, steps: warmup_stable_decay(
            optim.peak_lr, steps, optim.warmup_steps, optim.decay_steps, optim.floor
        ),
        "constant, then linear decay over the last {decay_steps} steps",
        _check_room,
    ),
    "sgdr": ScheduleEntry(
        lambda optim, steps: sgdr(
            optim.peak_lr, steps // optim.cycles, optim.warmup_steps, optim.cycles, optim.cycle_decay, optim.floor
        ),
        "{cycles} cosine cycles, each peak {cycle_decay:g} x the one before",
        _check_sgdr,
    ),
    "constant": ScheduleEntry(
        lambda optim, steps: warmup_constant(optim.peak_lr, optim.warmup_steps), "constant", _check_room
    ),
}


def _half_cosine(remaining: jax.Array) -> jax.Array:
    return jnp.square(jnp.sin(jnp.float32(math.pi / 2) * remaining))


def _count(step: jax.typing.ArrayLike) -> jax.Array:
    """Converts a step to int32; a negative one counts as 0, and one past int32 as the last."""
    if not isinstance(step, jax.Array):  # JAX wraps integers past int32
        step = np.asarray(step)
        if step.dtype == object or step.dtype.itemsize > 4:
            step = np.asarray(np.clip(step, 0, 2**31 - 2), np.int32)
    step = jnp.asarray(step)
    limits = jnp.iinfo(step.dtype) if jnp.issubdtype(step.dtype, jnp.integer) else None
    if limits is not None and limits.max > 2**31 - 1:
        step = jnp.minimum(step, jnp.asarray(2**31 - 2, step.dtype))
    return jnp.maximum(step.astype(jnp.int32), 0)


def _decay(
    peak: float, total_steps: int, warmup_steps: int, decay_steps: int | None, floor: float, shape: Shape
) -> Schedule:
    """Returns warm-up, plateau and decay; decay_steps None decays from the end of the warm-up."""
    _check_rates(peak, floor)
    decay_steps = _check_steps("total_steps", total_steps, warmup_steps, decay_steps)

    def schedule(step):
        high, low = jnp.float32(peak), jnp.float32(peak * floor)
        return _rate(_count(step), high, low, total_steps, warmup_steps, decay_steps, shape)

    return schedule


def _rate(
    step: jax.Array,
    peak: jax.Array,
    low: jax.Array,
    total_steps: int,
    warmup_steps: int,
    decay_steps: int,
    shape: Shape,
) -> jax.Array:
    """Returns warm-up, plateau, then decay from peak to low by `shape` of the remaining share (1 to 0)."""
    # Integers up to the one division: exact for any number of steps, where float32 counts only to 2**24.
    t = jnp.minimum(step, total_steps) + 1
    left = jnp.clip(total_steps - t, 0, decay_steps)
    rate = low + (peak - low) * shape(left.astype(jnp.float32) / decay_steps)
    return _warm_up(t, peak, warmup_steps, jnp.where(left == decay_steps, peak, rate))


def _warm_up(t: jax.Array, peak: jax.Array, warmup_steps: int, after: jax.Array) -> jax.Array:
    return jnp.where(t < warmup_steps, peak * (t.astype(jnp.float32) / max(warmup_steps, 1)), after)


def _check_rates(peak: float, floor: float) -> None:
    check_number("peak", peak, "(0, inf)", "a learning rate")
    check_number("floor", floor, "[0, 1]", "a fraction of the peak")


def _check_steps(total_name: str, total_steps: int, warmup_steps: int, decay_steps: int | None) -> int:
    """Returns the steps of the decay, by default all steps after the warm-up."""
    check_count(total_name, total_steps)
    check_count("warmup_steps", warmup_steps)
    if decay_steps is None:
        decay_steps = total_steps - warmup_steps
    else:
        check_count("decay_steps", decay_steps)
    if decay_steps < 1 or warmup_steps + decay_steps > total_steps:
        needs = f"must hold warmup_steps {warmup_steps} and at least one step of decay (decay_steps {decay_steps})"
        raise ValueError(f"{total_name} {total_steps} {needs}: shorten one of them, or train longer")
    return decay_steps
