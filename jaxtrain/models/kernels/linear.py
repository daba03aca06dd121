"""Linear layer with a gradient that is computed as one matrix product, in the layout that is fastest per backend.

Shape suffixes: B batch, T tokens, N tokens of all rows, I inputs, O outputs, H heads, K channels per head.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxtrain.models.parallel import leave_tensor
from jaxtrain.trees import store_on


class Weights(nn.Module):
    """Kernel `[num_inputs, features]` and bias `[features]`, or None without a bias."""

    features: int
    std: float
    use_bias: bool

    @nn.compact
    def __call__(self, num_inputs: int) -> tuple[jax.Array, jax.Array | None]:
        kernel = self.param("kernel", nn.initializers.normal(self.std), (num_inputs, self.features))
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else None


def linear(x: jax.Array, weights: tuple[jax.Array, jax.Array | None], num_shards: int = 1) -> jax.Array:
    """Multiplies the last dimension of x by a kernel and adds a bias.

    Args:
      x: `[..., I]`.
      weights: kernel `[I, O]` and bias `[O]` or None.
      num_shards: number of devices over which the contraction is sharded. The partial results are all-reduced.
    """
    kernel, bias = weights
    # With all tokens in one dimension, the gradient of the kernel is one matrix product.
    y = leave_tensor(_matmul(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1), num_shards)
    return add_bias(y, bias)


def project_heads(x_BTI: jax.Array, parts: list[tuple[jax.Array, jax.Array | None]], width: int) -> list[jax.Array]:
    """Applies several linear layers to the same x; returns `[B, T, O / width, width]` of each.

    One product with the concatenated kernels, except on TPUs: there concatenated kernels, and products of flattened
    heads, take layouts that cost copies (docs/benchmarks.md, bench_compiled.py).

    Args:
      x_BTI: input.
      parts: kernel `[I, O]` and bias `[O]` or None of each layer.
      width: channels per head.
    """
    forms = (functools.partial(form, width=width) for form in (_separate, _concatenated))
    return _by_platform(*forms)(x_BTI, parts)


def merge_heads(x_BTHK: jax.Array, weights: tuple[jax.Array, jax.Array | None], num_shards: int = 1) -> jax.Array:
    """Applies a linear layer to all channels of all heads; returns `[B, T, O]`. See `linear` and `project_heads`."""
    kernel, bias = weights
    y_BTO = leave_tensor(_by_platform(_merge, _merge_flat)(x_BTHK, kernel), num_shards)
    return add_bias(y_BTO, bias)


def _by_platform(tpu: Callable, default: Callable) -> Callable:
    """Returns a function with two forms. It saves its arguments, and the gradient is that of the platform's form."""

    @jax.custom_vjp
    def function(*arguments):
        return jax.lax.platform_dependent(*arguments, tpu=tpu, default=default)

    def pull(form):
        return lambda arguments, gradient: jax.vjp(form, *arguments)[1](gradient)

    def backward(arguments, gradient):
        return jax.lax.platform_dependent(arguments, gradient, tpu=pull(tpu), default=pull(default))

    function.defvjp(lambda *arguments: (function(*arguments), arguments), backward)
    return function


def _separate(x_BTI: jax.Array, parts: list[tuple[jax.Array, jax.Array | None]], width: int) -> list[jax.Array]:
    def project(kernel_IO, bias):
        y_BTHK = jnp.einsum("bti,ihk->bthk", x_BTI, kernel_IO.reshape(kernel_IO.shape[0], -1, width))
        return y_BTHK if bias is None else _add(y_BTHK.reshape(*x_BTI.shape[:-1], -1), bias).reshape(y_BTHK.shape)

    return [project(*weights) for weights in parts]


def _concatenated(x_BTI: jax.Array, parts: list[tuple[jax.Array, jax.Array | None]], width: int) -> list[jax.Array]:
    kernels, biases = zip(*parts, strict=True)
    bias = None if biases[0] is None else jnp.concatenate(biases, axis=-1)
    y_BTO = _store_gradient(linear(x_BTI, (jnp.concatenate(kernels, axis=-1), bias)))
    split = jnp.split(y_BTO, np.cumsum([kernel.shape[-1] for kernel in kernels[:-1]]), axis=-1)
    return [y.reshape(*y.shape[:-1], -1, width) for y in split]


def _merge(x_BTHK: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    return jnp.einsum("bthk,hko->bto", x_BTHK, kernel_IO.reshape(*x_BTHK.shape[2:], -1))


def _merge_flat(x_BTHK: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    return linear(x_BTHK.reshape(*x_BTHK.shape[:2], -1), (kernel_IO, None))


@jax.custom_vjp
def _store_gradient(y: jax.Array) -> jax.Array:
    """Returns y. Its gradient is stored once for all that reads it: a GPU would concatenate once for each."""
    return y


_store_gradient.defvjp(lambda y: (y, None), lambda _, gradient: (store_on("cuda", gradient),))


def add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Adds a bias `[O]` to y `[..., O]`; None adds nothing."""
    return y if bias is None else _add(y, bias)


@jax.custom_vjp
def _add(y: jax.Array, bias: jax.Array) -> jax.Array:
    return y + jnp.expand_dims(bias, tuple(range(y.ndim - 1)))


def _add_backward(_, gradient: jax.Array):
    # jnp.sum accumulates in float32. A sum in bfloat16 would stop growing after a few hundred tokens.
    return gradient, jnp.sum(gradient, axis=tuple(range(gradient.ndim - 1)))


_add.defvjp(lambda y, bias: (_add(y, bias), None), _add_backward)


@jax.custom_vjp
def _matmul(x_NI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    return x_NI @ kernel_IO


def _matmul_backward(residuals: tuple[jax.Array, jax.Array], gradient_NO: jax.Array):
    x_NI, kernel_IO = residuals
    num_inputs, num_outputs = kernel_IO.shape
    on_kernel = jax.lax.platform_dependent(
        x_NI, gradient_NO, cpu=_wide_last if num_inputs > num_outputs else _plain, default=_plain
    )
    return gradient_NO @ kernel_IO.T, on_kernel


def _plain(x_NI: jax.Array, gradient_NO: jax.Array) -> jax.Array:
    return x_NI.T @ gradient_NO


def _wide_last(x_NI: jax.Array, gradient_NO: jax.Array) -> jax.Array:
    """Computes the same transposed. XLA's CPU product is faster with longer rows of the result."""
    return jax.lax.optimization_barrier(gradient_NO.T @ x_NI).T


_matmul.defvjp(lambda x_NI, kernel_IO: (x_NI @ kernel_IO, (x_NI, kernel_IO)), _matmul_backward)
