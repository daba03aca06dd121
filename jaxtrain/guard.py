"""Skips bad steps around any optax optimizer: non-finite ones always, spikes of the loss and the gradient norm.

A skip leaves parameters and optimizer state as they were, bit for bit. The decision is made on the device, from scalars
that are the same on every host, and nothing waits for it. The state is a small pytree of arrays, to be checkpointed
with the rest.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.checks import check_count, check_number, check_transformation, with_extra_args
from jaxtrain.sums import update_sums
from jaxtrain.trees import as_float32, float32_if_array, global_norm, squared, state_fields

# Reasons for a skip: `GuardState.skip_reason`.
NOT_SKIPPED, NOT_FINITE, LOSS_SPIKE, GRAD_NORM_SPIKE = range(4)

# The deviation counts as at least this fraction of the mean: the deviation of a loss that hardly changes is next to
# nothing, and any change would be a spike.
DEVIATION_FLOOR = 0.01
# A gradient-norm spike exceeds the clip threshold by this factor. Three healthy runs of the quickstart (Python
# 3.12) had 13 gradient-norm spikes of 6 to 16 deviations, the largest 4.7 times the threshold, and no loss spike.
SPIKE_FACTOR = 10.0
# Time constant, in steps, of the recent share of skipped steps.
SHARE_STEPS = 1000


class GuardState(NamedTuple):
    """State of `skip_bad_steps`; the scalars describe the last update."""

    inner: optax.OptState  # state of the wrapped optimizer
    # losses, grad_norms: last accepted values, float32 [window], as ring buffers
    losses: jax.Array
    grad_norms: jax.Array
    accepted: jax.Array  # number of accepted updates, int32
    skipped: jax.Array  # 1 if the update was skipped, float32
    skip_reason: jax.Array  # one of the codes above, int32
    consecutive: jax.Array  # number of skipped updates in a row, int32
    share: jax.Array  # share of skipped updates among the recent ones, float32: an exponential mean over SHARE_STEPS
    give_up: jax.Array  # 1 if too many were skipped, float32: end the run


def skip_bad_steps(
    inner: optax.GradientTransformation,
    *,
    window: int = 128,
    sigmas: float | None = 6.0,
    clip_norm: float | None = None,
    max_consecutive: int = 10,
    max_share: float = 0.05,
    check_updates: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that bad updates are not applied.

    An update is bad if the gradient norm, the loss, the updates or the new inner state are not finite. It is also bad
    if the loss or the gradient norm lies more than `sigmas` deviations above its mean over the last `window` accepted
    values, once half of the window is filled. With `clip_norm`, a gradient-norm spike must also exceed SPIKE_FACTOR
    times that threshold: clipping bounds the effect of smaller ones.

    A bad update leaves the inner state as it was, except for a `learning_rate`, which follows the schedule.
    The updates become -0.0, which adds to any number without changing its bits. With `step=`, a skip does not delay the
    schedule of `clipped_adamw`.

    Args:
      inner: any optax transformation.
      window: number of accepted values for mean and deviation, at least 2.
      sigmas: deviations above the mean that make a spike, above 0; None skips non-finite updates only.
      clip_norm: clip threshold of the wrapped optimizer; None judges gradient norms by the window alone.
      max_consecutive: `give_up` becomes 1 when more updates than this are skipped in a row.
      max_share: `give_up` becomes 1 when a larger share of the recent updates is skipped, in (0, 1].
      check_updates: False for an optimizer such as `clipped_adamw`, whose updates are finite if gradient norm and state
        are: the decision then waits for no update. Should a moment be NaN all the same, its parameter keeps its value,
        and `give_up` becomes 1, because no later step could heal the state.

    Returns:
      An optax transformation with the state `GuardState`; `update` takes the loss as `loss=` or `value=` (without
      either, only norms are watched). All extra arguments reach an inner transformation that takes them.

    Raises:
      TypeError: `inner` is no optax transformation.
      ValueError: an argument out of range.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxtrain.guard import skip_bad_steps
      >>> optimizer, params = skip_bad_steps(optax.sgd(0.1)), {"w": jnp.ones(2)}
      >>> updates, state = optimizer.update({"w": jnp.array([1.0, jnp.nan])}, optimizer.init(params), params)
      >>> print(optax.apply_updates(params, updates)["w"], state.skipped, state.skip_reason)
      [1. 1.] 1.0 1
    """
    check_transformation("inner", inner)
    check_count("window", window, 2)
    if sigmas is not None:
        check_number("sigmas", sigmas, "(0, inf)", "or None to skip non-finite updates only")
    if clip_norm is not None:
        check_number("clip_norm", clip_norm, "(0, inf]", "or None to judge gradient norms by the window alone")
    check_count("max_consecutive", max_consecutive, 1)
    check_number("max_share", max_share, "(0, 1]")
    limits = float32_if_array(sigmas), float32_if_array(clip_norm), max_consecutive, max_share
    guard = _Guard(with_extra_args(inner), window, *limits, check_updates)
    return optax.GradientTransformationExtraArgs(guard.init, guard.update)


class _Guard(NamedTuple):
    """Wrapped optimizer, and the arguments of `skip_bad_steps`."""

    inner: optax.GradientTransformationExtraArgs
    window: int
    sigmas: Any
    clip_norm: Any
    max_consecutive: int
    max_share: float
    check_updates: bool

    def init(self, params: optax.Params) -> GuardState:
        # Each leaf is a separate buffer: a donated state may not hold one twice.
        zeros = lambda dtype, *shape: jnp.zeros(shape, dtype)  # noqa: E731
        return GuardState(
            inner=self.inner.init(params),
            losses=zeros(jnp.float32, self.window),
            grad_norms=zeros(jnp.float32, self.window),
            accepted=zeros(jnp.int32),
            skipped=zeros(jnp.float32),
            skip_reason=zeros(jnp.int32),
            consecutive=zeros(jnp.int32),
            share=zeros(jnp.float32),
            give_up=zeros(jnp.float32),
        )

    def update(self, grads, state, params=None, *, loss=None, **extra):
        if not hasattr(state, "inner"):
            raise TypeError(f"the guard's state is a {type(state).__name__}, not a GuardState: make it with init")
        extra = extra if loss is None else {**extra, "loss": loss}
        updates, inner_state = self.inner.update(grads, state.inner, params, **extra)
        grad_norm = global_norm(grads)
        loss = as_float32(extra.get("value", 0.0) if loss is None else loss)
        if loss.ndim:
            raise ValueError(f"loss must be a scalar, got shape {loss.shape}: give the mean over the tokens")
        finite = _is_usable(updates, inner_state, state.inner, self.check_updates)
        reason = self._judge(state, grad_norm, loss, finite)
        bad = reason != NOT_SKIPPED
        kept = _keep_if(bad, state.inner, inner_state, grads)
        drop = (lambda u: bad) if self.check_updates else (lambda u: bad | ~jnp.isfinite(u))
        updates = jax.tree.map(lambda u: jnp.where(drop(u), jnp.zeros_like(u) * -1, u), updates)
        intact = jnp.bool_(True) if self.check_updates else _is_intact(params, updates, inner_state, kept)
        return updates, self._record(state, kept, reason, ~bad & ~intact, loss, grad_norm)

    def _judge(self, state: GuardState, grad_norm: jax.Array, loss: jax.Array, finite: jax.Array) -> jax.Array:
        """Returns the reason to skip, int32: the first that holds of not finite, loss spike, gradient-norm spike."""
        finite &= jnp.isfinite(grad_norm) & jnp.isfinite(loss)
        reason = jnp.where(finite, jnp.int32(NOT_SKIPPED), jnp.int32(NOT_FINITE))
        if self.sigmas is None:
            return reason
        window = state.losses.shape[0]
        count = jnp.minimum(state.accepted, window)
        floor = 0.0 if self.clip_norm is None else SPIKE_FACTOR * self.clip_norm
        values = (GRAD_NORM_SPIKE, grad_norm, state.grad_norms, floor), (LOSS_SPIKE, loss, state.losses, -jnp.inf)
        for code, value, recent, least in values:
            limit = jnp.maximum(_limit(recent, count, self.sigmas), least)
            spike = finite & (count >= max(window // 2, 2)) & (value > limit)
            reason = jnp.where(spike, jnp.int32(code), reason)
        return reason

    def _record(self, state: GuardState, inner: Any, reason, broken, loss, grad_norm) -> GuardState:
        """Returns the state after an update: accepted values enter the windows, skipped updates are counted.

        `broken` is True if the new inner state is not finite though the step is good.
        """
        bad = reason != NOT_SKIPPED
        consecutive = jnp.where(bad, state.consecutive + 1, 0)
        skipped = bad.astype(jnp.float32)
        share = state.share + (skipped - state.share) / SHARE_STEPS
        place = state.accepted % state.losses.shape[0]
        return GuardState(
            inner=inner,
            losses=jnp.where(bad, state.losses, state.losses.at[place].set(loss)),
            grad_norms=jnp.where(bad, state.grad_norms, state.grad_norms.at[place].set(grad_norm)),
            accepted=jnp.where(bad, state.accepted, optax.safe_increment(state.accepted)),
            skipped=skipped,
            skip_reason=jnp.where(broken, jnp.int32(NOT_FINITE), reason),
            consecutive=consecutive,
            share=share,
            give_up=((consecutive > self.max_consecutive) | (share > self.max_share) | broken).astype(jnp.float32),
        )


def _keep_if(bad: jax.Array, old: Any, new: Any, grads: Any) -> Any:
    """Returns the old inner state where the update is bad, the new one otherwise; always the new learning rate."""
    rates = state_fields(new, "learning_rate", grads)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, before: leaf if path in rates else jnp.where(bad, before, leaf), new, old
    )


def _limit(values: jax.Array, count: jax.Array, sigmas: float) -> jax.Array:
    """Returns mean + `sigmas` deviations of the first `count` values, which are finite."""
    weights = jnp.arange(values.shape[0]) < count
    number = jnp.maximum(count, 1).astype(jnp.float32)
    mean = jnp.sum(jnp.where(weights, values, 0.0)) / number
    # Around the mean: the difference of two means of squares may be negative.
    variance = jnp.sum(jnp.where(weights, jnp.square(values - mean), 0.0)) / number
    return mean + sigmas * jnp.maximum(jnp.sqrt(variance), DEVIATION_FLOOR * jnp.abs(mean))


def _is_usable(updates: Any, new: Any, old: Any, check_updates: bool) -> jax.Array:
    """Returns True if all that the decision waits for is finite."""
    if check_updates:
        return _stays_finite(new, old) & _all_finite(updates)
    return _all_finite([leaf for leaf in jax.tree.leaves(new) if not leaf.ndim])


def _is_intact(params: Any, updates: Any, new: Any, kept: Any) -> jax.Array:
    """Returns True if the new inner state is finite. `kept`, which is stored, equals it unless the step is bad."""
    if params is None:
        return _all_finite(new)

    def by_sums(params, updates, new, kept):
        del new
        return update_sums(params, updates, kept)[2] == 0

    def alone(params, updates, new, kept):
        del params, updates, kept
        return _all_finite(new)

    return jax.lax.platform_dependent(params, updates, new, kept, cuda=by_sums, default=alone)


def _stays_finite(new: Any, old: Any) -> jax.Array:
    """Returns True if the inner state is finite where it was before. Some states start from an infinite value.

    Reads the old state only if the new one is not finite.
    """

    def compare():
        was_finite = lambda leaf, before: jnp.where(jnp.isfinite(before), leaf, 0) if _is_float(leaf) else leaf  # noqa: E731
        return _all_finite(jax.tree.map(was_finite, new, old))

    return jax.lax.cond(_all_finite(new), lambda: jnp.bool_(True), compare)


def _all_finite(tree: Any) -> jax.Array:
    """Returns True if all numbers are finite.

    Counts those that are not in float32, like the sums of squares of a norm: the compiler then forms both in one pass.
    XLA on a CPU would store the flags before it counts them, but it sums squares in one pass; x - x is 0 or NaN.
    """

    def count(leaf):
        return jnp.sum(jnp.where(jnp.isfinite(leaf), 0.0, 1.0), dtype=jnp.float32)

    def sum_differences(leaf):
        return jnp.sum(squared(leaf - leaf))

    counts = [
        jax.lax.platform_dependent(leaf, cpu=sum_differences, default=count)
        for leaf in jax.tree.leaves(tree)
        if _is_float(leaf)
    ]
    return sum(counts, jnp.float32(0)) == 0


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
