"""Clipping other than to a fixed global norm, to compare: each takes that one's place in `clipped_adamw(clip=...)`.

Both report `grad_norm` before clipping and `clip_factor`, the norm that is left as a share of it, in their states.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtrain.trees import STACKED, global_norm, is_stacked


class ClipState(NamedTuple):
    """Norm of the last gradient before clipping and the factor applied to it, float32 scalars."""

    grad_norm: jax.Array
    clip_factor: jax.Array


def clip_by_global_norm(max_norm: float | None) -> optax.GradientTransformation:
    """Scales the gradient to `max_norm` where its global norm is larger (arXiv:1211.5063).

    At or below the threshold the gradient passes bit for bit. A norm that is not finite makes every leaf NaN: optax
    would let the finite leaves through as zeros. None: only measures.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"clip_norm must be above 0, or None for no clipping; got {max_norm}")

    def init(params):
        del params
        return ClipState(jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32))

    def update(grads, state, params=None):
        del state, params
        norm = global_norm(grads)
        if max_norm is None:
            return grads, ClipState(norm, jnp.ones((), jnp.float32))
        factor = jnp.where(norm > max_norm, max_norm / norm, 1.0)
        factor = jnp.where(jnp.isfinite(norm), factor, jnp.nan)
        return scale_to_factor(grads, factor), ClipState(norm, factor)

    return optax.GradientTransformation(init, update)


def scale_to_factor(grads: optax.Updates, factor: jax.Array) -> optax.Updates:
    """Multiplies gradients by a float32 factor; by 1 they pass bit for bit."""

    def scale(grad):
        # A select rather than a product with 1, which flushes subnormal numbers. The product is float32: a small
        # factor would underflow in float16.
        return jnp.where(factor == 1, grad, (grad.astype(jnp.float32) * factor).astype(grad.dtype))

    return jax.tree.map(scale, grads)


class ZClipState(NamedTuple):
    """Norm of the last gradient and its factor; mean and variance of the clipped norms so far, and their number."""

    grad_norm: jax.Array  # float32, as all but the number
    clip_factor: jax.Array
    mean: jax.Array
    variance: jax.Array
    count: jax.Array  # int32


def zclip(
    *, max_norm: float | None = None, z_threshold: float = 2.5, decay: float = 0.97, warmup_steps: int = 25
) -> optax.GradientTransformation:
    """Clips a gradient whose norm is an outlier among the recent ones (ZClip, arXiv:2504.02507).

    With mean m and deviation s of the recent norms, a norm whose z = (norm - m) / s is above the threshold is clipped
    to m + s * z_threshold^2 / z: the larger the spike, the less of it is left. The averages take the clipped norm.

    Args:
      max_norm: a fixed threshold on top, from the first step on; None: none.
      z_threshold: deviations above the mean that make an outlier, above 0.
      decay: of the moving averages, in (0, 1).
      warmup_steps: norms that plain averages are taken of before anything but `max_norm` clips, at least 2.

    Returns:
      An optax transformation. A norm that is not finite makes every leaf NaN and enters no average.

    Raises:
      ValueError: an argument out of range.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, or None; got {max_norm}")
    if not 0 < z_threshold < math.inf:
        raise ValueError(f"z_threshold must be above 0, got {z_threshold}")
    if not 0 < decay < 1:
        raise ValueError(f"decay must be between 0 and 1, got {decay}")
    if warmup_steps < 2:
        raise ValueError(f"warmup_steps must be at least 2: one norm has no deviation; got {warmup_steps}")

    def init(params):
        del params
        zero = jnp.zeros((), jnp.float32)
        return ZClipState(zero, jnp.ones((), jnp.float32), zero, zero, jnp.zeros((), jnp.int32))

    def update(grads, state, params=None):
        del params
        norm = global_norm(grads)
        deviation = jnp.sqrt(state.variance)
        z = (norm - state.mean) / jnp.maximum(deviation, 1e-6)
        outlier = (state.count >= warmup_steps) & (z > z_threshold)
        limit = jnp.where(outlier, state.mean + deviation * (z_threshold**2) / jnp.where(outlier, z, 1.0), jnp.inf)
        limit = limit if max_norm is None else jnp.minimum(limit, max_norm)
        factor = jnp.where(norm > limit, limit / norm, 1.0)
        factor = jnp.where(jnp.isfinite(norm), factor, jnp.nan)
        count = optax.safe_increment(state.count)
        # 1 / count gives the plain mean and variance of the first norms.
        rate = jnp.where(count <= warmup_steps, 1 / count.astype(jnp.float32), 1 - decay)
        change = jnp.minimum(norm, limit) - state.mean
        mean = state.mean + rate * change
        variance = (1 - rate) * (state.variance + rate * jnp.square(change))
        averages = jax.tree.map(
            lambda new, old: jnp.where(jnp.isfinite(norm), new, old),
            (mean, variance, count),
            (state.mean, state.variance, state.count),
        )
        return scale_to_factor(grads, factor), ZClipState(norm, factor, *averages)

    return optax.GradientTransformation(init, update)


def clip_adaptively(
    ratio: float = 0.01, *, eps: float = 1e-3, stacked: tuple[str, ...] = STACKED
) -> optax.GradientTransformation:
    """Clips each unit (column of a matrix, or vector) to a share of its own weights' norm (AGC, arXiv:2102.06171).

    It is `optax.adaptive_grad_clip`, layer by layer where layers are stacked.

    Args:
      ratio: largest norm of a unit's gradient, as a share of the norm of its weights, above 0.
      eps: the least that the norm of the weights counts as: a bias that begins at 0 could never move.
      stacked: names of the subtrees whose leaves have a leading layer axis, see `decay_mask`.

    Returns:
      An optax transformation; `update` needs `params`.

    Raises:
      ValueError: an argument out of range; `update` without `params`.
    """
    if not 0 < ratio < math.inf:
        raise ValueError(f"ratio must be above 0, got {ratio}")
    if not 0 < eps < math.inf:
        raise ValueError(f"eps must be above 0, got {eps}")
    one = optax.adaptive_grad_clip(ratio, eps)

    def init(params):
        del params
        return ClipState(jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32))

    def update(grads, state, params=None):
        del state
        if params is None:
            raise ValueError("adaptive clipping needs the parameters: call update(grads, state, params)")

        def clip(path, grad, param):
            layer = lambda g, p: one.update(g, optax.EmptyState(), p)[0]  # noqa: E731
            layer = jax.vmap(layer) if is_stacked(path, stacked) else layer
            return layer(grad.astype(jnp.float32), param.astype(jnp.float32)).astype(grad.dtype)

        clipped = jax.tree_util.tree_map_with_path(clip, grads, params)
        norm, left = global_norm(grads), global_norm(clipped)
        return clipped, ClipState(norm, jnp.where(norm == 0, 1.0, left / norm))

    return optax.GradientTransformation(init, update)
