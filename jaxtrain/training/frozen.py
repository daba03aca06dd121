"""Frozen parameters: patterns of their paths, and an optimizer and a loss that leave them alone."""

import fnmatch
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtrain.checks import with_extra_args
from jaxtrain.fields import nearest
from jaxtrain.models.masters import WithMasters
from jaxtrain.trees import Absent, leaf_paths


def frozen_mask(params: Any, patterns: Sequence[str]) -> Any:
    """Returns a tree of bools with the structure of `params`: True where the path matches a pattern.

    Args:
      params: a tree of arrays or of `jax.ShapeDtypeStruct`.
      patterns: such as `embedding` or `layers/attention/*`; a `*` spans `/`. `!PATTERN` selects all others.

    Raises:
      ValueError: a pattern that matches no parameter, or patterns that leave none to train.
    """
    paths = leaf_paths(params)
    frozen = set()
    for pattern in patterns:
        matching = set(fnmatch.filter(paths, pattern.removeprefix("!")))
        if not matching:
            near = nearest(pattern, paths)
            hint = f"did you mean {near}?" if near else f"the parameters are {', '.join(paths)}"
            raise ValueError(f"optim.frozen: {pattern!r} matches no parameter: {hint}")
        frozen |= set(paths) - matching if pattern.startswith("!") else matching
    if len(frozen) == len(paths):
        raise ValueError(f"optim.frozen {' '.join(patterns)} matches every parameter: leave one to train")
    return jax.tree.unflatten(jax.tree.structure(params), [path in frozen for path in paths])


def freeze_updates(
    optimizer: optax.GradientTransformation, patterns: Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    """Restricts an optimizer to the other parameters: it holds no state for the frozen ones, and clips without them."""
    inner = with_extra_args(optimizer)

    def trained(tree: Any) -> Any:
        mask = frozen_mask(tree, patterns)
        return jax.tree.map(lambda leaf, frozen: Absent(leaf.shape) if frozen else leaf, tree, mask)

    def init(params: Any) -> Any:
        return inner.init(trained(params))

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        some, state = inner.update(trained(grads), state, None if params is None else trained(params), **extra)
        rest, frozen = iter(jax.tree.leaves(some)), frozen_mask(grads, patterns)
        return jax.tree.map(lambda g, is_frozen: jnp.zeros_like(g) if is_frozen else next(rest), grads, frozen), state

    return optax.GradientTransformationExtraArgs(init, update)


def freeze_gradients(loss_fn: Callable, patterns: Sequence[str]) -> Callable:
    """Returns the loss with a gradient of 0 for the frozen parameters, so that it is not computed."""

    def stop(params: Any) -> Any:
        mask = frozen_mask(params, patterns)
        return jax.tree.map(lambda leaf, frozen: jax.lax.stop_gradient(leaf) if frozen else leaf, params, mask)

    @functools.wraps(loss_fn)
    def frozen_loss(params: Any, batch: Any, *key: Any) -> Any:
        if isinstance(params, WithMasters):
            return loss_fn(params._replace(params=stop(params.params)), batch, *key)
        return loss_fn(stop(params), batch, *key)

    return frozen_loss


def describe_frozen(params: Any, patterns: Sequence[str]) -> str:
    """Returns a line with the number of frozen parameters and of their numbers."""
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(params)]
    frozen = jax.tree.leaves(frozen_mask(params, patterns))
    total = sum(size for size, is_frozen in zip(sizes, frozen, strict=True) if is_frozen)
    return f"{sum(frozen)} parameters of {total:,} numbers are frozen, {sum(sizes) - total:,} numbers are trained"
