"""Skips bad steps around any optax optimizer: what is not finite, always; spikes of loss and gradient norm.

A skip leaves parameters and optimizer state as they were, bit for bit. Whether to skip is decided on the device, from
scalars that are the same on every host, and nothing waits for it. The state is a small pytree of arrays: checkpoint it
with the rest.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.trees import global_norm

# Why a step was skipped: `GuardState.skip_reason`.
NOT_SKIPPED, NOT_FINITE, LOSS_SPIKE, GRAD_NORM_SPIKE = range(4)
REASONS = ("", "not finite", "loss spike", "grad_norm spike")

# The deviation counts as at least this fraction of the mean: of a loss that hardly changes it is next to nothing, and
# any change would be a spike.
DEVIATION_FLOOR = 0.01
# Steps that the recent share of skipped ones looks back over.
SHARE_STEPS = 1000


class GuardState(NamedTuple):
    """State of `skip_bad_steps`; the scalars are about the last update.

    Attributes:
      inner: state of the optimizer inside.
      losses, grad_norms: last accepted values, float32 [window], in a ring.
      accepted: number of accepted updates, int32.
      skipped: whether it was skipped, float32 0 or 1.
      skip_reason: one of the codes above, int32.
      consecutive: number of skipped updates in a row, it included, int32.
      share: share of skipped updates among the recent ones, float32: a mean with weights falling over SHARE_STEPS.
      give_up: whether there were too many, float32 0 or 1: end the run.
    """

    inner: optax.OptState
    losses: jax.Array
    grad_norms: jax.Array
    accepted: jax.Array
    skipped: jax.Array
    skip_reason: jax.Array
    consecutive: jax.Array
    share: jax.Array
    give_up: jax.Array


def skip_bad_steps(
    inner: optax.GradientTransformation,
    *,
    window: int = 128,
    sigmas: float | None = 6.0,
    max_consecutive: int = 10,
    max_share: float = 0.05,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that bad updates are not applied.

    An update is bad if the gradient's norm, the loss, or anything that the optimizer makes of them is not finite: this
    is checked from the first step on. And it is bad if the loss or the gradient's norm lies more than `sigmas`
    deviations above its mean over the last `window` accepted values, once half of the window is filled. Values below
    the mean are never bad, and what is skipped never enters the window.

    Of a bad update nothing remains but what this state says of it: the updates are -0.0, which leaves any number as it
    is when it is added, and the inner state keeps its bits. Only a `learning_rate` in the inner state is that of the
    update, because it tells the schedule's place rather than what was learned. Let the schedule count train steps and
    not updates (`clipped_adamw` does, if it is given `step=`), or every skip delays it.

    Args:
      inner: any optax transformation.
      window: accepted values that mean and deviation are of, at least 2.
      sigmas: deviations above the mean that make a spike, above 0; None: only what is not finite is skipped.
      max_consecutive: `give_up` becomes 1 when more updates than this are skipped in a row: what looked like spikes is
        then the new state of things, or the parameters are lost.
      max_share: and when a larger share than this of the recent updates (about 1,000) is skipped, in (0, 1].

    Returns:
      An optax transformation. `update(grads, state, params, *, loss=None, **extra)`: without `loss` only norms are
      watched. Extra arguments, `loss` included, are handed on to an inner transformation that takes them. `state` is a
      `GuardState`; `optax.tree_utils.tree_get(state, "skipped")` finds its fields inside a larger state.

    Raises:
      ValueError: an argument out of range.
    """
    _check(window, sigmas, max_consecutive, max_share)
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> GuardState:
        values, zero, count = jnp.zeros(window, jnp.float32), jnp.float32(0), jnp.zeros((), jnp.int32)
        return GuardState(inner.init(params), values, values, count, zero, count, count, zero, zero)

    def update(grads, state, params=None, *, loss=None, **extra):
        extra = extra if loss is None else {**extra, "loss": loss}
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        grad_norm = global_norm(grads)
        loss = jnp.float32(0) if loss is None else jnp.asarray(loss, jnp.float32)
        reason = _judge(state, grad_norm, loss, _stays_finite(updates, inner_state, state.inner), window, sigmas)
        bad = reason != NOT_SKIPPED
        consecutive = jnp.where(bad, state.consecutive + 1, 0)
        skipped = bad.astype(jnp.float32)
        share = state.share + (skipped - state.share) / SHARE_STEPS
        place = state.accepted % window
        new_state = GuardState(
            inner=jax.tree_util.tree_map_with_path(
                lambda path, new, old: new if _is_learning_rate(path) else jnp.where(bad, old, new),
                inner_state,
                state.inner,
            ),
            losses=jnp.where(bad, state.losses, state.losses.at[place].set(loss)),
            grad_norms=jnp.where(bad, state.grad_norms, state.grad_norms.at[place].set(grad_norm)),
            accepted=jnp.where(bad, state.accepted, optax.safe_increment(state.accepted)),
            skipped=skipped,
            skip_reason=reason,
            consecutive=consecutive,
            share=share,
            give_up=((consecutive > max_consecutive) | (share > max_share)).astype(jnp.float32),
        )
        return jax.tree.map(lambda u: jnp.where(bad, jnp.zeros_like(u) * -1, u), updates), new_state

    return optax.GradientTransformationExtraArgs(init, update)


def _check(window: int, sigmas: float | None, max_consecutive: int, max_share: float) -> None:
    if window < 2:
        raise ValueError(f"window must be at least 2 accepted values, got {window}")
    if sigmas is not None and not 0 < sigmas < math.inf:
        raise ValueError(f"sigmas must be above 0, or None to skip only what is not finite; got {sigmas}")
    if max_consecutive < 1:
        raise ValueError(f"max_consecutive must be at least 1 step, got {max_consecutive}")
    if not 0 < max_share <= 1:
        raise ValueError(f"max_share must be above 0 and at most 1, got {max_share}")


def _judge(state: GuardState, grad_norm, loss, finite, window: int, sigmas: float | None) -> jax.Array:
    """The reason to skip, int32: the first that holds."""
    finite &= jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    reason = jnp.where(finite, NOT_SKIPPED, NOT_FINITE)
    if sigmas is None:
        return reason
    count = jnp.minimum(state.accepted, window)
    for code, value, values in ((GRAD_NORM_SPIKE, grad_norm, state.grad_norms), (LOSS_SPIKE, loss, state.losses)):
        limit = _limit(values, count, sigmas)
        spike = finite & (count >= max(window // 2, 2)) & (value > limit)
        reason = jnp.where(spike, code, reason)
    return reason.astype(jnp.int32)


def _limit(values: jax.Array, count: jax.Array, sigmas: float) -> jax.Array:
    """Mean and `sigmas` deviations of the first `count` values, which are finite."""
    weights = jnp.arange(values.shape[0]) < count
    number = jnp.maximum(count, 1).astype(jnp.float32)
    mean = jnp.sum(jnp.where(weights, values, 0.0)) / number
    # Around the mean: the difference of two means of squares may be negative.
    variance = jnp.sum(jnp.where(weights, jnp.square(values - mean), 0.0)) / number
    return mean + sigmas * jnp.maximum(jnp.sqrt(variance), DEVIATION_FLOOR * jnp.abs(mean))


def _stays_finite(updates: Any, new: Any, old: Any) -> jax.Array:
    """Whether the updates are finite, and the inner state wherever it was: some begin with an infinite best value."""

    def check(leaf: jax.Array, before: jax.Array | None = None) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return jnp.bool_(True)
        return jnp.all(jnp.isfinite(leaf) if before is None else jnp.isfinite(leaf) | ~jnp.isfinite(before))

    checks = [*jax.tree.leaves(jax.tree.map(check, updates)), *jax.tree.leaves(jax.tree.map(check, new, old))]
    return functools.reduce(jnp.logical_and, checks, jnp.bool_(True))


def _is_learning_rate(path: tuple[Any, ...]) -> bool:
    return bool(path) and jax.tree_util.keystr(path[-1:], simple=True) == "learning_rate"
