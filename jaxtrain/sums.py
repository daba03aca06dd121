"""Sums over parameters, updates and moments, in a form that lets the optimizer write them in place on GPUs.

XLA fuses what an optimizer does to a parameter to one GPU kernel. It writes the new parameter and moments over the old
ones if these reach no reduction of the kernel but the first; else it writes fresh arrays and copies them. `update_sums`
therefore forms all sums in one reduction, and what follows reads the new arrays behind `trees.store_on`: 34 instead of
63 bytes of memory traffic per parameter, without temporaries (scripts/bench_compiled.py --optimizer).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.trees import KeyPath, is_stacked, leaf_squares, shape_of, squared


def update_squares(params: Any, updates: Any, state: Any) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns `leaf_squares` of the parameters and of the updates, from `update_sums` on GPUs.

    Args:
      params: parameters before the update.
      state: state of the optimizer after the update.
    """

    def together(params, updates, state):
        return update_sums(params, updates, state)[:2]

    def apart(params, updates, state):
        del state
        return leaf_squares(params), leaf_squares(updates)

    return jax.lax.platform_dependent(params, updates, state, cuda=together, default=apart)


def update_sums(params: Any, updates: Any, state: Any) -> tuple[list[jax.Array], list[jax.Array], jax.Array]:
    """Sums each parameter, its update and its moments in one reduction.

    Equal calls within a program become one: the guard, the train step and the layer diagnostics each call this.

    Args:
      params: parameters before the update.
      state: state of the optimizer after the update. A leaf with the path and shape of a parameter is its moment.

    Returns:
      `leaf_squares` of the parameters; those of the updates; the number of numbers in the state that are not finite.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    moments, rest = _match(leaves, state)
    param_squares, squares, faults = [], [], [jnp.sum(flag_faults(leaf)) for leaf in rest]
    for (path, param), update, own in zip(leaves, jax.tree.leaves(updates), moments, strict=True):
        flags = [functools.reduce(jnp.add, map(flag_faults, own))] if own else []
        sums = _sum_together((squared(param), squared(update), *flags), is_stacked(path))
        param_squares.append(sums[0])
        squares.append(sums[1])
        faults += map(jnp.sum, sums[2:])
    return param_squares, squares, sum(faults, jnp.float32(0))


def flag_faults(leaf: jax.Array) -> jax.Array:
    """Returns 1 for each number that is not finite and 0 for the others, float32.

    A select between constants would read the zeros that the gradient of an embedding starts from.
    """
    return (~jnp.isfinite(leaf)).astype(jnp.float32)


def _match(leaves: list[tuple[KeyPath, Any]], state: Any) -> tuple[list[list[jax.Array]], list[jax.Array]]:
    """Returns the moments of each parameter, and the other float arrays of the state."""
    places = {path: i for i, (path, _) in enumerate(leaves)}
    moments: list[list[jax.Array]] = [[] for _ in leaves]
    rest = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            suffixes = (path[start:] for start in range(len(path) + 1))
            i = next((places[suffix] for suffix in suffixes if suffix in places), None)
            own = i is not None and leaf.shape == shape_of(leaves[i][1])
            (moments[i] if own else rest).append(leaf)
    return moments, rest


def _sum_together(arrays: tuple[jax.Array, ...], stacked: bool) -> tuple[jax.Array, ...]:
    """Sums float32 arrays of one shape in one reduction, over all axes but the first of a stack of layers."""
    axes = tuple(range(int(stacked and arrays[0].ndim > 0), arrays[0].ndim))
    if not axes:
        return arrays

    def add(sums, values):
        return tuple(map(jax.lax.add, sums, values))

    sums = jax.lax.reduce(arrays, (jnp.float32(0),) * len(arrays), add, axes)
    # Without the barrier the compiler drops sums that a caller does not use, and equal calls would no longer be equal.
    return jax.lax.optimization_barrier(tuple(sums))
