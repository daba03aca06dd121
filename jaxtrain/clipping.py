"""Gradient clipping: by the global norm, by an adaptive threshold (ZClip), or per unit; for `clipped_adamw(clip=...)`.

The state of each holds `grad_norm` before clipping and `clip_factor`, the remaining norm as a fraction of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.checks import check_count, check_number
from jaxtrain.trees import float32_if_array, global_norm, layer_axes, squared


class ClipState(NamedTuple):
    """Norm of the last gradient before clipping and the factor applied to it, float32 scalars."""

    grad_norm: jax.Array
    clip_factor: jax.Array


def clip_by_global_norm(max_norm: float | None) -> optax.GradientTransformation:
    """Scales the gradient to `max_norm` where its global norm is larger (arXiv:1211.5063).

    At or below the threshold the gradient passes bit for bit. A norm that is not finite makes every leaf NaN: optax
    would let the finite leaves through as zeros.

    Args:
      max_norm: threshold, above 0; None measures without clipping.

    Raises:
      ValueError: a threshold out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtrain.optim import clip_by_global_norm
      >>> clip = clip_by_global_norm(1.0)
      >>> clipped, state = clip.update(jnp.array([3.0, 4.0]), clip.init(None))
      >>> print(clipped, state.grad_norm, state.clip_factor)
      [0.6 0.8] 5.0 0.2
    """
    _check_threshold("clip_norm", max_norm)
    max_norm = float32_if_array(max_norm)

    def update(grads, state, params=None):
        del state, params
        norm = global_norm(grads)
        if max_norm is None:
            return grads, ClipState(norm, jnp.ones((), jnp.float32))
        factor = _factor(norm, max_norm)
        return scale_to_factor(grads, factor), ClipState(norm, factor)

    return optax.GradientTransformation(_init_clip_state, update)


def scale_to_factor(grads: optax.Updates, factor: jax.Array) -> optax.Updates:
    """Multiplies gradients by a float32 factor; by 1 they pass bit for bit."""

    def scale(grad):
        grad = jnp.asarray(grad)
        # The product is float32, because a small factor would underflow in float16. A select rather than a product with
        # 1, which flushes subnormal numbers.
        wide = jnp.complex64 if jnp.issubdtype(grad.dtype, jnp.complexfloating) else jnp.float32
        return jnp.where(factor == 1, grad, (grad.astype(wide) * factor.astype(wide)).astype(grad.dtype))

    return jax.tree.map(scale, grads)


class ZClipState(NamedTuple):
    """State of `zclip`."""

    grad_norm: jax.Array  # norm of the last gradient before clipping, float32
    clip_factor: jax.Array  # factor applied to it, float32
    # mean, variance: moving mean and variance of the clipped norms, float32
    mean: jax.Array
    variance: jax.Array
    count: jax.Array  # type: ignore[assignment]  # number of clipped norms, int32; hides tuple.count


def zclip(
    *, max_norm: float | None = None, z_threshold: float = 2.5, decay: float = 0.97, warmup_steps: int = 25
) -> optax.GradientTransformation:
    """Clips a gradient whose norm is an outlier among the recent ones (ZClip, arXiv:2504.02507).

    With mean m and deviation s of the recent norms, a norm whose z = (norm - m) / s is above the threshold is clipped
    to m + s * z_threshold^2 / z: the larger the spike, the smaller the remaining norm. The averages take the clipped
    norm.

    Args:
      max_norm: additional fixed threshold, active from the first step; None disables it.
      z_threshold: deviations above the mean that make an outlier, above 0.
      decay: decay of the moving averages, in (0, 1).
      warmup_steps: number of norms that enter plain averages before outliers are clipped, at least 2.

    Returns:
      An optax transformation. A norm that is not finite makes every leaf NaN and enters no average.

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtrain.clipping import zclip
      >>> clip = zclip(warmup_steps=4)
      >>> state = clip.init(None)
      >>> for norm in (1.0, 1.1, 0.9, 1.0, 9.0):
      ...     clipped, state = clip.update(jnp.array([norm]), state)
      >>> print(f"{clipped[0]:.3f}")
      1.004
    """
    _check_threshold("max_norm", max_norm)
    max_norm = float32_if_array(max_norm)
    check_number("z_threshold", z_threshold, "(0, inf)")
    check_number("decay", decay, "(0, 1)")
    check_count("warmup_steps", warmup_steps, 2)  # one norm has no deviation

    def init(params):
        del params
        zero = lambda: jnp.zeros((), jnp.float32)  # noqa: E731
        return ZClipState(zero(), jnp.ones((), jnp.float32), zero(), zero(), jnp.zeros((), jnp.int32))

    def update(grads, state, params=None):
        del params
        norm = global_norm(grads)
        deviation = jnp.sqrt(state.variance)
        z = (norm - state.mean) / jnp.maximum(deviation, 1e-6)
        outlier = (state.count >= warmup_steps) & (z > z_threshold)
        limit = jnp.where(outlier, state.mean + deviation * (z_threshold**2) / jnp.where(outlier, z, 1.0), jnp.inf)
        limit = limit if max_norm is None else jnp.minimum(limit, max_norm)
        factor = _factor(norm, limit)
        averages = _moving_averages(state, norm, limit, decay, warmup_steps)
        return scale_to_factor(grads, factor), ZClipState(norm, factor, *averages)

    return optax.GradientTransformation(init, update)


def _moving_averages(state: ZClipState, norm: jax.Array, limit: jax.Array, decay: float, warmup_steps: int):
    """Returns mean, variance and count with the clipped norm; as they were if the norm is not finite."""
    count = optax.safe_increment(state.count)
    # 1 / count gives the plain mean and variance of the first norms.
    rate = jnp.where(count <= warmup_steps, 1 / count.astype(jnp.float32), 1 - decay)
    change = jnp.minimum(norm, limit) - state.mean
    mean = state.mean + rate * change
    variance = (1 - rate) * (state.variance + rate * jnp.square(change))
    return jax.tree.map(
        lambda new, old: jnp.where(jnp.isfinite(norm), new, old),
        (mean, variance, count),
        (state.mean, state.variance, state.count),
    )


def clip_adaptively(
    ratio: float = 0.01, *, eps: float = 1e-3, stacked: tuple[str, ...] | None = None
) -> optax.GradientTransformation:
    """Clips each unit (column of a matrix, or vector) to a fraction of its weights' norm (AGC, arXiv:2102.06171).

    The same as `optax.adaptive_grad_clip`, applied to each layer where layers are stacked.

    Args:
      ratio: largest norm of a unit's gradient as a fraction of the norm of its weights, above 0.
      eps: lower bound of the norm of the weights: a bias that begins at 0 could never move without it.
      stacked: keys of the subtrees whose leaves have a leading layer axis; None: as `decay_mask` finds them.

    Returns:
      An optax transformation; `update` needs `params`.

    Raises:
      ValueError: an argument out of range; `update` without `params`; layers as in `decay_mask`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtrain.clipping import clip_adaptively
      >>> clip = clip_adaptively(0.1)
      >>> params = {"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
      >>> clipped, state = clip.update({"w": jnp.array([[3.0, 0.0], [4.0, 0.05]])}, clip.init(params), params)
      >>> print(clipped["w"])
      [[0.06 0.  ]
       [0.08 0.05]]
    """
    check_number("ratio", ratio, "(0, inf)")
    check_number("eps", eps, "(0, inf)")

    def update(grads, state, params=None):
        del state
        if params is None:
            raise ValueError("adaptive clipping needs the parameters: call update(grads, state, params)")

        def clip(grad, param, layer_axis):
            wide = jnp.asarray(grad, jnp.float32)
            limit = ratio * jnp.maximum(_unit_norm(param, layer_axis), eps)
            norm = _unit_norm(wide, layer_axis)
            clipped = wide * (limit / jnp.maximum(norm, 1e-6))
            return jnp.where(norm < limit, wide, clipped).astype(jnp.asarray(grad).dtype)

        leaves, structure = jax.tree.flatten(grads)
        clipped = jax.tree.unflatten(structure, map(clip, leaves, jax.tree.leaves(params), layer_axes(params, stacked)))
        norm, remaining = global_norm(grads), global_norm(clipped)
        return clipped, ClipState(norm, jnp.where(norm == 0, 1.0, remaining / jnp.where(norm == 0, 1.0, norm)))

    return optax.GradientTransformation(_init_clip_state, update)


def _unit_norm(x: Any, layer_axis: int | None) -> jax.Array:
    """Returns the norm of each unit, float32, with reduced axes of size 1; a unit is what one output sums over."""
    x = jnp.asarray(x)
    axes = [axis for axis in range(x.ndim) if axis != layer_axis]
    if sum(x.shape[axis] > 1 for axis in axes) > 1:
        axes = axes[:1] if len(axes) < 4 else axes[:-1]
    return jnp.sqrt(jnp.sum(squared(x), axis=tuple(axes), keepdims=True))


def _init_clip_state(params: optax.Params) -> ClipState:
    del params
    return ClipState(jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32))


def _check_threshold(name: str, value: Any) -> None:
    if value is not None:
        check_number(name, value, "(0, inf]", "or None for no clipping")


def _factor(norm: jax.Array, limit: Any) -> jax.Array:
    """Returns the factor that brings a norm down to a limit, float32; NaN for a norm that is not finite."""
    factor = jnp.where(norm > limit, limit / norm, 1.0)
    return jnp.where(jnp.isfinite(norm), factor, jnp.nan)
