"""Float32 masters of weights that compute in another dtype, cast in each layer rather than all at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class WithMasters(NamedTuple):
    """Parameters in the compute dtype, which gradients refer to, and the float32 masters that they are cast from."""

    params: Any
    masters: Any


def with_masters(gradients: Callable, dtype: str) -> Callable:
    """Wraps `(params, batch, *loss_factor) -> (sums, gradients)` to cast float32 parameters where they are used.

    A layer casts its own slice of the masters, so that no copy of all layers is held through the step, and yet the
    gradients are in the compute dtype.
    """

    def wrapped(masters: Any, batch: Any, *loss_factor: jax.Array):
        params = jax.tree.map(lambda x: x.astype(dtype), masters)
        sums, grads = gradients(WithMasters(params, masters), batch, *loss_factor)
        return sums, grads.params

    return wrapped


def cast_masters(params: Any, masters: Any, carry: jax.Array) -> Any:
    """The values of `masters` in the dtypes of `params`; the gradient goes to `params`.

    Args:
      params, masters: one layer's.
      carry: a value of the loop over layers. A zero is made of it and added: otherwise the TPU compiler moves the cast
        out of the loop and keeps all layers in both forms.
    """
    zero = jnp.where(carry.reshape(-1)[0] > 0, 0.0, -0.0)
    return jax.tree.map(lambda copy, master: _cast_master(copy, master, zero), params, masters)


@jax.custom_vjp
def _cast_master(copy: jax.Array, master: jax.Array, zero: jax.Array) -> jax.Array:
    return (master + zero).astype(copy.dtype)


def _cast_master_forward(copy: jax.Array, master: jax.Array, zero: jax.Array):
    return _cast_master(copy, master, zero), None


_cast_master.defvjp(_cast_master_forward, lambda _, gradient: (gradient, None, None))
