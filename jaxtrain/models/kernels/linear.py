"""Linear layer with a gradient that is computed as one matrix product, in the layout that is fastest per backend.

Shape suffixes: N tokens of all rows, I inputs, O outputs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxtrain.models.parallel import leave_tensor


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
    return y if bias is None else _add(y, bias)


@jax.custom_vjp
def linear_parts(x: jax.Array, parts: list[tuple[jax.Array, jax.Array | None]]) -> list[jax.Array]:
    """Applies several linear layers to the same x `[..., I]`; returns a `[..., O]` of each.

    One product with the concatenated kernels, except on TPUs: there the concatenation forces layouts that every part
    pays for with a copy (scripts/bench_compiled.py measures it).
    """
    return jax.lax.platform_dependent(x, parts, tpu=_separate, default=_concatenated)


def _linear_parts_backward(inputs: tuple[jax.Array, list], gradients: list[jax.Array]):
    def pull(function):
        return lambda x, parts, gradients: jax.vjp(function, x, parts)[1](gradients)

    return jax.lax.platform_dependent(*inputs, gradients, tpu=pull(_separate), default=pull(_concatenated))


linear_parts.defvjp(lambda x, parts: (linear_parts(x, parts), (x, parts)), _linear_parts_backward)


def _separate(x: jax.Array, parts: list[tuple[jax.Array, jax.Array | None]]) -> list[jax.Array]:
    return [linear(x, weights) for weights in parts]


def _concatenated(x: jax.Array, parts: list[tuple[jax.Array, jax.Array | None]]) -> list[jax.Array]:
    kernels, biases = zip(*parts, strict=True)
    bias = None if biases[0] is None else jnp.concatenate(biases, axis=-1)
    y = linear(x, (jnp.concatenate(kernels, axis=-1), bias))
    return jnp.split(y, np.cumsum([kernel.shape[-1] for kernel in kernels[:-1]]), axis=-1)


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


def _matmul_forward(x_NI: jax.Array, kernel_IO: jax.Array):
    return x_NI @ kernel_IO, (x_NI, kernel_IO)


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


_matmul.defvjp(_matmul_forward, _matmul_backward)
