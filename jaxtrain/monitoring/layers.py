"""Diagnostics of each layer, computed inside the train step.

Every step computes them and some steps log them: they fuse with the sums of the norms, while a branch for the logged
steps would keep all its operands in memory (Llama 2 7B on TPU: 1.4 to 4 GB per chip).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrain.sums import update_squares
from jaxtrain.trees import (
    STACKED,
    is_stacked,
    layer_axes,
    layer_squares,
    leaf_squares,
    norm_of_squares,
    path_names,
    store_on,
)

# Below this multiple of eps, eps is a tenth or more of Adam's denominator: the update depends on the gradient's scale.
_NEAR_EPS = 10.0

# Metrics of `layer_diagnostics`.
DIAGNOSTICS = ("layer_grad_norm", "layer_update_ratio", "adam_frozen_share")


def drop_unsampled(metrics: dict[str, Any], step: int, every: int | None) -> dict[str, Any]:
    """Removes the diagnostics from the metrics of a step, unless it is one of every `every`; None removes all."""
    if every and step % every == 0:
        return metrics
    return {name: value for name, value in metrics.items() if name not in DIAGNOSTICS}


def layer_diagnostics(
    params: Any, grads: Any, updates: Any, opt_state: optax.OptState, *, b2: float, eps: float
) -> dict[str, jax.Array]:
    """Measures each of L layers, and the share of parameters that Adam's eps holds back.

    Args:
      params: parameters before the update; their part `layers` or `blocks` is a stack or a list, see `part_norms`.
      grads: gradient before clipping.
      updates: numbers that were added to the parameters.
      opt_state: any optax state, after the update.
      b2, eps: hyperparameters of Adam.

    Returns:
      float32 arrays: `layer_grad_norm` [L]; `layer_update_ratio` [L], norm of the update over norm of the parameters;
      `adam_frozen_share` [], the share of numbers with sqrt(nu_hat) below 10 eps, whose update shrinks with the
      gradient. Only numbers with a gradient count: rows of an embedding that the batch does not use do not. It is NaN
      before the first update and for a gradient with NaN, and absent without Adam. A tree without layers has L = 0.
    """
    squares = *update_squares(params, updates, opt_state), leaf_squares(grads)
    param_norm, update_norm, grad_norm = map(_layer_norms, (params, updates, grads), squares)
    share = _frozen_share(grads, opt_state, b2, eps)
    metrics = {"layer_grad_norm": grad_norm, "layer_update_ratio": update_norm / param_norm}
    return metrics if share is None else metrics | {"adam_frozen_share": share}


def _layer_norms(tree: Any, squares: list[jax.Array]) -> jax.Array:
    """Returns the norm of each layer of the first part that has layers, `[L]`."""
    parts = part_norms(tree, squares)
    return next((parts[name] for name in STACKED if name in parts and parts[name].ndim), jnp.zeros((0,), jnp.float32))


def part_norms(tree: Any, squares: list[jax.Array] | None = None) -> dict[str, jax.Array]:
    """Returns the float32 norm of each top-level part of a tree like the parameters, by its key.

    A stack of L layers (see `trees.layer_axes`), or a list of them, has one norm per layer, `[L]`; other parts one.
    `squares` are the tree's `leaf_squares`; None computes them.
    """
    parts: dict[str, list[tuple[list[str], Any, int | None, jax.Array]]] = {}
    try:
        axes = layer_axes(tree)
    except ValueError:  # matrices, or stacked vectors
        axes = [None] * len(jax.tree.leaves(tree))
    squares = leaf_squares(tree) if squares is None else squares
    for (path, leaf), axis, square in zip(jax.tree_util.tree_leaves_with_path(tree), axes, squares, strict=True):
        names = path_names(path)
        parts.setdefault(names[0] if names else "params", []).append((names[1:], leaf, axis, square))
    return {name: _norms(leaves) for name, leaves in parts.items()}


def _norms(leaves: list[tuple[list[str], Any, int | None, jax.Array]]) -> jax.Array:
    """Returns the norm of a part, `[L]` for layers.

    `leaves` are names below the part, arrays, layer axes and `leaf_squares`, which sum over all axes but axis 0.
    """
    if all(axis is not None for _, _, axis, _ in leaves):
        squares = [layer_squares(leaf, axis) if axis else square for _, leaf, axis, square in leaves]
        return jnp.sqrt(sum(squares[1:], squares[0]))
    if not all(len(names) > 1 and names[0].isdigit() for names, *_ in leaves):
        return norm_of_squares([square for *_, square in leaves])
    layers: dict[int, list[jax.Array]] = {}
    for names, *_, square in leaves:
        layers.setdefault(int(names[0]), []).append(square)
    return jnp.stack([norm_of_squares(layers[number]) for number in sorted(layers)])


def _frozen_share(grads: Any, opt_state: optax.OptState, b2: float, eps: float) -> jax.Array | None:
    """Returns `adam_frozen_share` over all parameters that an Adam updates; None without Adam."""
    is_adam = lambda node: {"nu", "count"} <= set(getattr(node, "_fields", ()))  # noqa: E731
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=is_adam) if is_adam(node)]
    if not states:
        return None
    by_path = dict(jax.tree_util.tree_leaves_with_path(grads))
    correction = -jnp.expm1(states[0].count.astype(jnp.float32) * (math.log(b2) if b2 else -math.inf))
    frozen = moved = jnp.zeros((), jnp.float32)
    for state in states:  # one, or one for each part of a partitioned optimizer
        for path, nu in jax.tree_util.tree_leaves_with_path(store_on("cuda", state.nu)):  # see `sums`
            if path not in by_path or nu.shape != by_path[path].shape:
                continue  # flattened or factored
            grad, stacked = by_path[path], is_stacked(path) and nu.ndim > 0
            moved += _count(jnp.square(jnp.sign(grad)), stacked)  # XLA on a CPU would store flags before it counts them
            frozen += _count((grad != 0) & (jnp.sqrt(nu / correction) < _NEAR_EPS * eps), stacked)
    return jnp.where((moved > 0) & (states[0].count > 0), frozen / jnp.maximum(moved, 1), jnp.nan)


def _count(flags: jax.Array, stacked: bool) -> jax.Array:
    """Counts flags, which are True or 1, float32.

    Sums each layer, or an array that is not stacked, at once: devices with shards of it exchange one number, not one
    for each row. In float32 the compiler adds the sum to a pass that forms norms; beyond 2^24 it rounds.
    """
    return jnp.sum(jnp.sum(flags, axis=tuple(range(int(stacked), flags.ndim)), dtype=jnp.float32))
