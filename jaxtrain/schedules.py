"""Learning-rate schedules: pure functions from an optimizer step (0, 1, 2, ...) to a float32 learning rate.

They are optax schedules, exact at the corners. With t = step + 1 the warm-up is `peak * t / warmup_steps`, so the first
step moves, a warm-up reaches the peak once (at step warmup_steps - 1) and the last executed step (total_steps - 1) is
exactly at the floor; past the end the rate stays there. With and without jit the corners are the same bits; between
them the compiler may fuse a multiply and an add, a few units in the last place.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]
Shape = Callable[[jax.Array], jax.Array]


def warmup_cosine(peak: float, total_steps: int, warmup_steps: int, floor: float = 0.1) -> Schedule:
    """Linear warm-up, then half a cosine down to `floor * peak` (arXiv:1608.03983).

    Args:
      peak: highest learning rate, above 0.
      total_steps: optimizer steps of the run, warm-up included.
      warmup_steps: optimizer steps of the warm-up; 0: none, and the first step is already on the decay.
      floor: last learning rate as a fraction of the peak, in [0, 1].

    Returns:
      step -> learning rate, float32; `step` is an integer or an array of integers, traced or not.

    Raises:
      ValueError: an argument out of range, or no step left to decay in.
    """
    # cos^2 of half the angle is the cosine written without the cancellation of 1 + cos near the end.
    return _decay(peak, total_steps, warmup_steps, total_steps - warmup_steps, floor, _half_cosine)


def warmup_linear(peak: float, total_steps: int, warmup_steps: int, floor: float = 0.1) -> Schedule:
    """Linear warm-up, then linear decay to `floor * peak`. Arguments, result and errors as for `warmup_cosine`."""
    return _decay(peak, total_steps, warmup_steps, total_steps - warmup_steps, floor, lambda remaining: remaining)


def warmup_stable_decay(
    peak: float, total_steps: int, warmup_steps: int, decay_steps: int, floor: float = 0.0
) -> Schedule:
    """Trapezoid (WSD, arXiv:2404.06395): linear warm-up, the peak held, linear decay over the last `decay_steps`.

    The held part may be lengthened in the middle of a run, which a cosine does not allow. Other arguments, result and
    errors as for `warmup_cosine`; `warmup_steps + decay_steps` may not exceed `total_steps`.
    """
    return _decay(peak, total_steps, warmup_steps, decay_steps, floor, lambda remaining: remaining)


def sgdr(
    peak: float, cycle_steps: int, warmup_steps: int, cycles: int, decay: float = 1.0, floor: float = 0.1
) -> Schedule:
    """Warm restarts (arXiv:1608.03983): `cycles` cosine cycles one after the other, each with its own warm-up.

    Args:
      peak: highest learning rate of the first cycle.
      cycle_steps: optimizer steps of a cycle, its warm-up included.
      warmup_steps: optimizer steps of the warm-up that starts each cycle.
      cycles: number of cycles; afterwards the rate stays at the last one's floor.
      decay: factor on the peak from one cycle to the next, in (0, 1].
      floor: last learning rate of a cycle as a fraction of that cycle's peak.

    Returns:
      step -> learning rate, float32.

    Raises:
      ValueError: an argument out of range.
    """
    if cycles < 1:
        raise ValueError(f"cycles must be at least 1, got {cycles}")
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}")
    _check_rates(peak, floor)
    _check_steps(cycle_steps, warmup_steps, cycle_steps - warmup_steps)
    peaks = peak * decay ** np.arange(cycles)

    def schedule(step):
        step = jnp.asarray(step).astype(jnp.int32)
        cycle = jnp.clip(step // cycle_steps, 0, cycles - 1)
        high, low = (jnp.asarray(rates, jnp.float32)[cycle] for rates in (peaks, peaks * floor))
        within = step - cycle * cycle_steps
        return _rate(within, high, low, cycle_steps, warmup_steps, cycle_steps - warmup_steps, _half_cosine)

    return schedule


def warmup_constant(peak: float, warmup_steps: int) -> Schedule:
    """Linear warm-up, then the peak for ever. Arguments, result and errors as for `warmup_cosine`."""
    _check_rates(peak, 0.0)
    _check_count("warmup_steps", warmup_steps)

    def schedule(step):
        t = jnp.minimum(jnp.asarray(step).astype(jnp.int32), warmup_steps) + 1
        return _warm_up(t, jnp.float32(peak), warmup_steps, jnp.float32(peak))

    return schedule


def _half_cosine(remaining: jax.Array) -> jax.Array:
    return jnp.square(jnp.sin(jnp.float32(math.pi / 2) * remaining))


def _decay(peak: float, total_steps: int, warmup_steps: int, decay_steps: int, floor: float, shape: Shape) -> Schedule:
    _check_rates(peak, floor)
    _check_steps(total_steps, warmup_steps, decay_steps)

    def schedule(step):
        high, low = jnp.float32(peak), jnp.float32(peak * floor)
        return _rate(jnp.asarray(step).astype(jnp.int32), high, low, total_steps, warmup_steps, decay_steps, shape)

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
    """Warm-up, plateau, then from peak to low by `shape` of the remaining share (1 to 0) of the last `decay_steps`."""
    # Integers up to the one division: exact for any number of steps, where float32 counts only to 2**24.
    t = jnp.minimum(step, total_steps) + 1
    left = jnp.clip(total_steps - t, 0, decay_steps)
    rate = low + (peak - low) * shape(left.astype(jnp.float32) / decay_steps)
    return _warm_up(t, peak, warmup_steps, jnp.where(left == decay_steps, peak, rate))


def _warm_up(t: jax.Array, peak: jax.Array, warmup_steps: int, after: jax.Array) -> jax.Array:
    return jnp.where(t < warmup_steps, peak * (t.astype(jnp.float32) / max(warmup_steps, 1)), after)


def _check_rates(peak: float, floor: float) -> None:
    if not 0 < peak < math.inf:
        raise ValueError(f"peak must be a finite learning rate above 0, got {peak}")
    if not 0 <= floor <= 1:
        raise ValueError(f"floor is a fraction of the peak, from 0 to 1; got {floor}")


def _check_steps(total_steps: int, warmup_steps: int, decay_steps: int) -> None:
    _check_count("total_steps", total_steps)
    _check_count("warmup_steps", warmup_steps)
    if decay_steps < 1 or warmup_steps + decay_steps > total_steps:
        raise ValueError(
            f"total_steps {total_steps} must hold warmup_steps {warmup_steps} and at least one step of decay "
            f"(decay_steps {decay_steps}): shorten the warm-up or the decay, or train longer"
        )


def _check_count(name: str, count: int) -> None:
    if int(count) != count or not 0 <= count < 2**31 - 1:
        raise ValueError(f"{name} must be a whole number from 0 to 2**31 - 2, got {count}")
