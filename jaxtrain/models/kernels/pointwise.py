"""Activations and norms with custom derivatives that save their inputs only.

Automatic differentiation would save intermediates, each as large as the layer: the tanh of a GELU, the sigmoid and the
product of a SwiGLU, the normalized and centered values of a norm. Recomputing them is cheaper than writing and reading
them. The barriers stop the compiler from merging both computations, which would save the intermediates after all, and
from starting the recomputation too early.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jaxtrain.trees import store_on

# (1 + tanh(u)) / 2 equals sigmoid(2 u), which stays accurate where the tanh is near -1.
_GELU_SCALE, _GELU_CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715


@jax.custom_vjp
def gelu(x: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Computes GELU of x + bias in the tanh form (arXiv:1606.08415), in float32. Returns the dtype of x.

    The sum is not saved: with the bias added before, a GPU would write it beside the result.

    Args:
      x: `[..., D]`.
      bias: `[D]`, or None.
    """
    return _gelu_forward(x, bias)[0]


def _gelu_forward(x: jax.Array, bias: jax.Array | None):
    y = _shift(x, bias)
    return (y * jax.nn.sigmoid(_gelu_exponent(y))).astype(x.dtype), (x, bias)


def _gelu_backward(residuals: tuple[jax.Array, jax.Array | None], gradient: jax.Array):
    x, bias = residuals
    x, gradient = jax.lax.optimization_barrier((x, gradient))
    y = _shift(x, bias)
    sigmoid = jax.nn.sigmoid(_gelu_exponent(y))
    exponent_slope = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * jnp.square(y))
    slope = sigmoid * (1 + y * (1 - sigmoid) * exponent_slope)
    on_x = (gradient.astype(jnp.float32) * slope).astype(x.dtype)
    if bias is None:
        return on_x, None
    # For the sum of the bias, a GPU would store the gradient in float32, and once more for the products.
    on_x = store_on("cuda", on_x)
    return on_x, jnp.sum(on_x, axis=tuple(range(x.ndim - 1)))  # accumulated in float32


def _shift(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Returns x + bias in float32."""
    return x.astype(jnp.float32) if bias is None else x.astype(jnp.float32) + _last(bias, x)


def _gelu_exponent(y: jax.Array) -> jax.Array:
    return _GELU_SCALE * (y + _GELU_CUBIC * y * y * y)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def swiglu(x: jax.Array, gate: jax.Array) -> jax.Array:
    """Computes SwiGLU, x * gate * sigmoid(gate) (arXiv:2002.05202), in float32. Returns the dtype of x."""
    return _swiglu_forward(x, gate)[0]


def _swiglu_forward(x: jax.Array, gate: jax.Array):
    y = gate.astype(jnp.float32)
    return (x.astype(jnp.float32) * y * jax.nn.sigmoid(y)).astype(x.dtype), (x, gate)


def _swiglu_backward(residuals: tuple[jax.Array, jax.Array], gradient: jax.Array):
    (x, gate), gradient = jax.lax.optimization_barrier((residuals, gradient))
    y, gradient = gate.astype(jnp.float32), gradient.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(y)
    on_gate = gradient * x.astype(jnp.float32) * sigmoid * (1 + y * (1 - sigmoid))
    gradients = (gradient * y * sigmoid).astype(x.dtype), on_gate.astype(gate.dtype)
    # Two products take each; a TPU would form it again in both.
    return store_on("tpu", gradients)


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float, center: bool) -> jax.Array:
    """Applies LayerNorm (arXiv:1607.06450) or RMSNorm (arXiv:1910.07467) over the last dimension, in float32.

    Args:
      x: `[..., D]`.
      scale, bias: `[D]`; bias may be None.
      eps: added to the variance.
      center: True subtracts the mean first (LayerNorm).

    Returns:
      `[..., D]` in the dtype of x.
    """
    return _norm_forward(x, scale, bias, eps, center)[0]


def _norm_forward(x, scale, bias, eps, center):
    y = x.astype(jnp.float32)
    mean = jnp.mean(y, axis=-1, keepdims=True) if center else None
    centered = y if mean is None else y - mean
    factor = jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + eps)
    result = centered * factor * _last(scale, x)
    if bias is not None:
        result += _last(bias, x)
    return result.astype(x.dtype), (x, mean, factor, scale, bias)


def _norm_backward(eps, center, residuals, gradient):
    x, mean, factor, scale, bias = residuals
    x, gradient = jax.lax.optimization_barrier((x, gradient))
    y, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
    normed = (y - mean if center else y) * factor
    scaled = gradient * _last(scale, x)
    on_x = scaled - normed * jnp.mean(scaled * normed, axis=-1, keepdims=True)
    if center:
        on_x -= jnp.mean(scaled, axis=-1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    on_scale = jnp.sum(gradient * normed, axis=rows).astype(scale.dtype)
    on_bias = None if bias is None else jnp.sum(gradient, axis=rows).astype(bias.dtype)
    return (on_x * factor).astype(x.dtype), on_scale, on_bias


norm.defvjp(_norm_forward, _norm_backward)


def _last(x_D: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(x_D.astype(jnp.float32), tuple(range(like.ndim - 1)))
