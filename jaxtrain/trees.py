"""Pytrees: dataclasses that are pytrees, names of leaves, stacked layers, norms, and fields of optimizer states."""

import dataclasses
import typing
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")
KeyPath = tuple[Any, ...]

# Keys of subtrees whose leaves may have a leading layer axis, see `optim.decay_mask`.
STACKED = ("layers", "blocks")


@typing.dataclass_transform(frozen_default=True)
def dataclass(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass and a pytree of all its fields, with `x.replace(field=value)`.

    Importing `flax.struct` for this would take longer than importing the core.
    """
    made = dataclasses.dataclass(frozen=True)(cls)
    made.replace = _replace
    names = [field.name for field in dataclasses.fields(made)]
    return jax.tree_util.register_dataclass(made, data_fields=names, meta_fields=[])


def _replace(self: T, **changes: Any) -> T:
    """Returns a copy with other values for some fields."""
    return dataclasses.replace(self, **changes)


def path_names(path: KeyPath) -> list[str]:
    """Returns the names along a path of `jax.tree_util`, without the attribute of a wrapper such as `nnx.Param`."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    wrapped = len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey) and names[-1] == "value"
    return names[:-1] if wrapped else names


def stack_of(names: list[str], stacked: tuple[str, ...]) -> tuple[str, ...] | None:
    """Returns the path of the subtree of stacked layers that holds a leaf, or None. A list of layers is not stacked."""
    for i, name in enumerate(names[:-1]):
        if name in stacked and not names[i + 1].isdigit():
            return tuple(names[: i + 1])
    return None


def is_stacked(path: KeyPath, stacked: tuple[str, ...] = STACKED) -> bool:
    """Returns True if the leaf at a path of `jax.tree_util` has a leading layer axis by the keys above it."""
    return stack_of(path_names(path), stacked) is not None


def layer_squares(leaf: jax.Array) -> jax.Array:
    """Returns the sum of squares of each layer, float32 `[L]`, of a leaf `[L, ...]`."""
    sums = jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=tuple(range(1, leaf.ndim)))
    # Without the barrier the compiler sums all squares once more for the norm of the whole tree.
    return jax.lax.optimization_barrier(sums)


def global_norm(tree: Any) -> jax.Array:
    """Returns the Euclidean norm over all leaves of a tree, a float32 scalar computed in float32.

    Above 1.8e19 the sum of squares overflows and the norm is inf: like a NaN, a sign that the gradient is not usable.
    """
    # The sums of stacked layers are those of `monitoring.layers.layer_diagnostics`, which then cost nothing extra.
    squares = [
        jnp.sum(layer_squares(leaf) if is_stacked(path) else jnp.square(leaf.astype(jnp.float32)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    return jnp.sqrt(sum(squares, jnp.float32(0)))


def state_fields(state: Any, name: str, params: Any) -> dict[KeyPath, jax.Array]:
    """Finds the scalars that an optimizer state holds under a field name.

    A field belongs to a named tuple, or to the `hyperparams` of `optax.inject_hyperparams`. Subtrees with the structure
    of the parameters, such as Adam's moments, are not searched: a parameter may have any name.

    Args:
      state: state of any optax transformation.
      name: name of the field.
      params: the parameters, or a tree of their structure.

    Returns:
      The scalars by path, in the order of the leaves.
    """
    structure = jax.tree.structure(params)
    like_params = None if jax.tree_util.treedef_is_leaf(structure) else lambda x: jax.tree.structure(x) == structure
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=like_params)
    return {
        path: leaf
        for path, leaf in leaves
        if path and getattr(leaf, "shape", None) == () and name == _field_name(state, path)
    }


def _field_name(tree: Any, path: KeyPath) -> str | None:
    """Returns the name of a named tuple's field, or of a hyperparameter, at the end of a path; otherwise None."""
    *above, last = path
    if isinstance(last, jax.tree_util.DictKey):
        injected = bool(above) and getattr(above[-1], "name", None) == "hyperparams"
        return str(last.key) if injected else None
    for key in above:
        if isinstance(key, jax.tree_util.GetAttrKey):
            tree = getattr(tree, key.name)
        elif isinstance(key, jax.tree_util.DictKey):
            tree = tree[key.key]
        elif isinstance(key, jax.tree_util.SequenceKey):
            tree = tree[key.idx]
        else:
            return None
    return getattr(last, "name", None) if hasattr(tree, "_fields") else None
