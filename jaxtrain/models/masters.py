"""Float32 master weights that are cast to the compute dtype layer by layer instead of all at once."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


class WithMasters(NamedTuple):
    """Parameters in the compute dtype, which are differentiated, and their float32 masters."""

    params: Any
    masters: Any


def cast_per_layer(gradients: Callable, dtype: str) -> Callable:
    """Wraps `gradients(params, batch, *loss_factor) -> (sums, gradients)` to cast float32 parameters in each layer.

    A layer casts its slice of the masters, so that no cast copy of all layers lives through the step. Gradients are in
    the compute dtype.
    """

    def wrapped(masters: Any, batch: Any, *loss_factor: jax.Array):
        params = jax.tree.map(lambda x: x.astype(dtype), masters)
        sums, grads = gradients(WithMasters(params, masters), batch, *loss_factor)
        return sums, grads.params

    return wrapped


def cast_masters(params: Any, masters: Any, layer: Any, carry: jax.Array) -> Any:
    """Casts the `masters` of a layer to the dtypes of `params`. The gradient goes to `params`.

    Args:
      params: parameters of the layer.
      masters: parameters of all layers, `[L, ...]`.
      layer: number of the layer.
      carry: a value that depends on the loop over layers. A zero derived from it is added; otherwise the TPU compiler
        moves the cast out of the loop and stores all layers twice.
    """
    corner = jax.lax.slice(carry, (0,) * carry.ndim, (1,) * carry.ndim).reshape(())  # a reshape of all copies all
    zero = jnp.where(corner > 0, 0.0, -0.0)

    def cast(copy, stack):
        return _cast_master(copy, jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False), zero)

    return jax.tree.map(cast, params, masters)


def split_layers(params: Any, cuts: list[int]) -> list[Any]:
    """Returns the parameters of the layers from each cut to the next, of stacks `[L, ...]`."""
    return [params] if len(cuts) == 2 else _split(params, tuple(cuts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _split(params: Any, cuts: tuple[int, ...]) -> list[Any]:
    return [jax.tree.map(lambda x, own=slice(*own): x[own], params) for own in itertools.pairwise(cuts)]


def _join_gradients(cuts: tuple[int, ...], _, gradients: list[Any]):
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *gradients)
    # The optimizer would join them in float32, and read and write 6 bytes per parameter more.
    return (jax.lax.optimization_barrier(joined),)


_split.defvjp(lambda params, cuts: (_split(params, cuts), None), _join_gradients)


@jax.custom_vjp
def _cast_master(copy: jax.Array, master: jax.Array, zero: jax.Array) -> jax.Array:
    rows = jax.lax.platform_dependent(master, tpu=_row_major, default=lambda x: x)
    return (rows + zero).astype(copy.dtype)


def _row_major(x: jax.Array) -> jax.Array:
    """Pins the layout: a product that prefers another one would have the masters of all layers copied."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


_cast_master.defvjp(lambda *arrays: (_cast_master(*arrays), None), lambda _, gradient: (gradient, None, None))
