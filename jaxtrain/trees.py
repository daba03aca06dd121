"""Pytrees: dataclasses that are pytrees, names of leaves, stacked layers, norms, and fields of optimizer states."""

import dataclasses
import re
import sys
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")
KeyPath = tuple[Any, ...]

# Keys of subtrees whose leaves may have a leading layer axis, see `optim.decay_mask`.
STACKED = ("layers", "blocks")

# Parameters that are vectors by name, even with two dimensions (a bias [heads, head_dim]): q_bias, gamma_1, lambda_q1.
_SUFFIX = r"(_?\d+|_[a-z]{1,2}\d?)*$"
_BIAS = re.compile(rf"(^|_)bias(es)?{_SUFFIX}")
_VECTOR = re.compile(rf"(^|_)(scales?|offset|beta|gamma|gain|lambda){_SUFFIX}")
# Keys of norms: LayerNorm_0, norm1, q_norm, input_layernorm, ln_f, bn1, norm_mlp; norm_proj is none.
_PLACES = "f|final|pre|post|before|after|in|out|input|output|self|cross|attn|attention|mlp|ffn?|moe|[qkv]"
_NORM = re.compile(rf"(norm|normalization|(^|_)(ln|bn|gn|rms))(_?\d+d?|_({_PLACES}))*$")


@typing.dataclass_transform(frozen_default=True)
def dataclass(cls: type[T]) -> type[T]:
    """Makes a class a frozen dataclass and a pytree of all its fields, with `x.replace(field=value)`.

    Importing `flax.struct` for this would take longer than importing the core.
    """
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    made.replace = dataclasses.replace
    _made.append(made)
    return jax.tree_util.register_dataclass(made)


_made: list[type] = []  # by `dataclass`


def register_with_flax() -> None:
    """Lets `flax.serialization` (`to_bytes`, `from_bytes`) write and read these dataclasses, if Flax is imported."""
    flax: Any = sys.modules.get("flax.serialization")
    for cls in _made if flax is not None else ():
        names = [field.name for field in dataclasses.fields(cls)]

        def to_dict(value: Any, names: list[str] = names) -> dict[str, Any]:
            return {name: flax.to_state_dict(getattr(value, name)) for name in names}

        def from_dict(like: Any, state: dict[str, Any], names: list[str] = names) -> Any:
            return like.replace(
                **{name: flax.from_state_dict(getattr(like, name), state[name], name=name) for name in names}
            )

        flax.register_serialization_state(cls, to_dict, from_dict, override=True)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Absent:
    """Place of a parameter that is left out of a tree: its shape, and no leaf."""

    shape: tuple[int, ...]


def path_names(path: KeyPath) -> list[str]:
    """Returns the names along a path of `jax.tree_util`, without that of the array in a wrapper.

    Wrappers are `nnx.Param` and other classes with an attribute `value` or `array`, and classes that are registered
    without names, such as Haliax's `NamedArray`.
    """
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    last = path[-1] if len(path) > 1 else None
    by_attribute = isinstance(last, jax.tree_util.GetAttrKey) and names[-1] in ("value", "array")
    by_place = isinstance(last, jax.tree_util.FlattenedIndexKey) and last.key == 0
    return names[:-1] if by_attribute or by_place else names


def leaf_paths(tree: Any) -> list[str]:
    """Returns the path of each leaf, such as `layers/attention/query`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def shape_of(leaf: Any) -> tuple[int, ...]:
    """Returns the shape of an array, an abstract array or a Python number."""
    return tuple(getattr(leaf, "shape", ()))


def check_params(params: Any) -> None:
    """Raises a ValueError that names the first leaf that is no float array or Python float."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", type(leaf))
        if not isinstance(leaf, float) and not (hasattr(leaf, "dtype") and jnp.issubdtype(dtype, jnp.floating)):
            name = "/".join(path_names(path)) or "params"
            kind = getattr(dtype, "name", None) or getattr(dtype, "__name__", dtype)
            remedy = "nnx.split(model, nnx.Param, ...) or eqx.partition(model, eqx.is_inexact_array)"
            rest = f"Separate the rest first: {remedy}. Store a complex number as two reals"
            raise ValueError(f"{name} is {kind}, and only float arrays are trained. {rest}")


def distinct(tree: Any) -> Any:
    """Copies each array that the tree holds a second time, so that the whole tree can be donated."""
    seen = set()

    def copy(leaf):
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):
            return leaf
        leaf = jnp.copy(leaf) if id(leaf) in seen else leaf
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(copy, tree)


def named_leaves(tree: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the shape of each leaf, and of each `Absent`, by the names along its path, in the order of the leaves."""
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_absent):
        names = tuple(path_names(path))
        if names in shapes:  # two attributes of one wrapper
            names = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        shapes[names] = shape_of(leaf)
    return shapes


def present_names(tree: Any) -> list[tuple[str, ...]]:
    """Returns the names of the leaves, as in `named_leaves`, without those of `Absent`."""
    leaves = jax.tree.leaves(tree, is_leaf=_is_absent)
    return [names for names, leaf in zip(named_leaves(tree), leaves, strict=True) if not _is_absent(leaf)]


def _is_absent(node: Any) -> bool:
    return isinstance(node, Absent)


def is_vector(names: tuple[str, ...], shapes: dict[tuple[str, ...], tuple[int, ...]]) -> bool:
    """Returns True if a leaf is a vector by its name: a bias, `scale` and the like, or part of a norm.

    Args:
      shapes: all leaves of the tree, see `named_leaves`.
    """
    parts = re.split(r"[/.]", "/".join(names).lower())
    is_norm = any(_NORM.search(part) for part in parts[-2:])
    return bool(_VECTOR.search(parts[-1])) or is_norm or _is_bias(names, shapes)


def _is_bias(names: tuple[str, ...], shapes: dict[tuple[str, ...], tuple[int, ...]]) -> bool:
    """Returns True for `q_bias`, a `b` under `bias`, and `b`, `b_Q` or `q_b` beside a larger `w`, `W_Q` or `q_w`.

    See `is_vector` for the arguments.
    """
    *_, above, last = ["", *re.split(r"[/.]", "/".join(names))]
    if _BIAS.search(last.lower()) or (last == "b" and above.lower() == "bias"):
        return True
    head = "".join(names[-1:]).removesuffix(last)
    weights = (shapes.get((*names[:-1], head + re.sub(r"^b|(?<=_)b$", w, last)), ()) for w in "wW")
    return any(len(weight) > len(shapes[names]) for weight in weights)


def stack_of(names: Sequence[str], stacked: tuple[str, ...]) -> tuple[str, ...] | None:
    """Returns the path of the subtree of stacked layers that holds a leaf, or None. A list of layers is not stacked."""
    for i, name in enumerate(names[:-1]):
        if name in stacked and not names[i + 1].isdigit():
            return tuple(names[: i + 1])
    return None


def layer_axes(params: Any, stacked: tuple[str, ...] | None = None) -> list[int | None]:
    """Finds the axis of each leaf that counts stacked layers; see `optim.decay_mask` for the rule.

    Args:
      stacked: keys of the subtrees with a leading layer axis. None: `layers` and `blocks`, if their leaves prove it.

    Returns:
      For each leaf the axis, or None outside a stack.

    Raises:
      ValueError: leaves under one of the keys `stacked` that do not share their leading size; without `stacked`, a
        subtree that may be a stack of vectors or hold matrices.
    """
    shapes = named_leaves(params)
    stacks = {names: stack_of(names, STACKED if stacked is None else stacked) for names in shapes}
    axis_of: dict[tuple[str, ...] | None, int | None] = {None: None}
    for stack in dict.fromkeys(stacks.values()):
        if stack is not None:
            members = [names for names in shapes if stacks[names] == stack]
            find = _proven_axis if stacked is None else _given_axis
            axis_of[stack] = find(stack, members, shapes)
    return [axis_of[stacks[names]] for names in present_names(params)]


def num_dims(shape: tuple[int, ...], layer_axis: int | None) -> int:
    """Counts the dimensions longer than 1 without the layer axis; all dimensions of a single number."""
    sizes = [size for axis, size in enumerate(shape) if axis != layer_axis]
    return sum(size > 1 for size in sizes) or len(sizes)


def _given_axis(stack: tuple[str, ...], members: list[tuple[str, ...]], shapes: dict) -> int:
    first = members[0]
    for names in members:
        if not shapes[names] or shapes[names][:1] != shapes[first][:1]:
            raise ValueError(
                f"{'/'.join(stack)} is named in stacked=, but {'/'.join(first)} has shape {shapes[first]} and "
                f"{'/'.join(names)} has shape {shapes[names]}, which share no leading layer axis: leave "
                f'"{stack[-1]}" out of decay_mask(params, stacked=(...)), or give stacked=() if nothing is stacked'
            )
    return 0


def _proven_axis(stack: tuple[str, ...], members: list[tuple[str, ...]], shapes: dict) -> int | None:
    """Returns the layer axis that the shapes of a subtree `layers` or `blocks` prove, or None."""
    vectors = [names for names in members if is_vector(names, shapes)]
    if any(len(shapes[names]) < 2 for names in vectors):
        return None  # a layer's own bias or scale
    sizes = [{shapes[names][axis] if axis < len(shapes[names]) else None for names in members} for axis in (0, 1)]
    shared = [axis for axis, found in enumerate(sizes) if len(found) == 1 and None not in found]
    proofs = [names for names in vectors if names[-1] != "b" and not _is_bias(names, shapes)]
    layered = any(len(shapes[names]) > 2 for names in members if names not in vectors)
    proven = layered or len(vectors) == len(members)  # else a leaf named as a matrix would be a vector
    if proven and any(num_dims(shapes[names], None) >= 2 for names in proofs):
        return shared[0] if shared else None
    if 0 not in shared:
        return None
    for names in members:
        if names not in vectors and num_dims(shapes[names], None) == 2 and shapes[names][0] > 1:
            raise ValueError(
                f"{'/'.join(names)} {list(shapes[names])} may be a matrix, or a vector in each of {shapes[names][0]} "
                f'stacked layers: give mask=functools.partial(decay_mask, stacked=("{stack[-1]}",)) if the leaves '
                f"under {stack[-1]} have a leading layer axis, or stacked=() if they have none"
            )
    return 0


def is_stacked(path: KeyPath, stacked: tuple[str, ...] = STACKED) -> bool:
    """Returns True if the keys above the leaf at a path of `jax.tree_util` name a stack of layers."""
    return stack_of(path_names(path), stacked) is not None


def as_float32(value: Any) -> jax.Array:
    """Converts an array or a number to a strongly typed float32 array."""
    return jnp.asarray(value, jnp.float32)


def float32_if_array(value: Any) -> Any:
    """Converts an array, which may be traced, to float32; returns a Python number or None as it is."""
    return as_float32(value) if isinstance(value, jax.Array | np.ndarray) else value


def squared(leaf: Any) -> jax.Array:
    """Returns |x|^2 of each element, float32."""
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return squared(leaf.real) + squared(leaf.imag)
    return jnp.square(leaf.astype(jnp.float32))


def layer_squares(leaf: jax.Array, layer_axis: int = 0) -> jax.Array:
    """Returns the sum of squares of each of the L layers that an axis of a leaf counts, float32 `[L]`."""
    sums = jnp.sum(squared(leaf), axis=tuple(axis for axis in range(leaf.ndim) if axis != layer_axis))
    # Without the barrier the compiler sums all squares once more for the norm of the whole tree.
    return jax.lax.optimization_barrier(sums)


def global_norm(tree: Any) -> jax.Array:
    """Returns the Euclidean norm over all leaves of a tree, a float32 scalar computed in float32.

    Above 1.8e19 the sum of squares overflows and the norm is inf: like a NaN, a sign that the gradient is not usable.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxtrain.optim import global_norm
      >>> float(global_norm({"a": jnp.array([3.0]), "b": jnp.array([4.0], jnp.bfloat16)}))
      5.0
    """
    return norm_of_squares(leaf_squares(tree))


def leaf_squares(tree: Any) -> list[jax.Array]:
    """Returns the sum of squares of each leaf, float32: a scalar, or `[L]` for the leaves of a stack of layers."""
    return [
        layer_squares(leaf) if is_stacked(path) and shape_of(leaf) else jnp.sum(squared(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def norm_of_squares(squares: list[jax.Array]) -> jax.Array:
    """Returns the norm that sums of squares make."""
    return jnp.sqrt(sum((jnp.sum(one) if one.ndim else one for one in squares), jnp.float32(0)))


def store_on(platform: str, tree: Any) -> Any:
    """Returns the arrays; the compiler of a platform ("cuda", "tpu") forms all of them before anything reads one."""
    return jax.lax.platform_dependent(
        tree,
        **{platform: jax.lax.optimization_barrier},
        default=lambda tree: tree,  # type: ignore[arg-type]
    )


def state_fields(state: Any, name: str, params: Any) -> dict[KeyPath, jax.Array]:
    """Finds the scalars that an optimizer state holds under a field name.

    A field belongs to a named tuple, or to the `hyperparams` of `optax.inject_hyperparams`. Subtrees with the structure
    of the parameters, such as Adam's moments, are not searched: a parameter may have any name. Neither are subtrees of
    a class that the parameters consist of, which may be moments of some of them (`optax.masked`).

    Args:
      params: the parameters, or a tree of their structure.

    Returns:
      The scalars by path, in the order of the leaves.
    """
    structure: Any = jax.tree.structure(params)
    like_params = None if jax.tree_util.treedef_is_leaf(structure) else lambda x: jax.tree.structure(x) == structure
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=like_params)
    return {
        path: leaf
        for path, leaf in leaves
        if path and getattr(leaf, "shape", None) == () and name == _field_name(state, path, _classes(structure))
    }


def _classes(structure: Any) -> set[type]:
    """Returns the classes of the nodes of a tree, without the builtin containers."""
    node = structure.node_data()
    found = set().union(*map(_classes, structure.children()))
    return found if node is None or node[0] in (dict, list, tuple, type(None)) else found | {node[0]}


def _field_name(tree: Any, path: KeyPath, of_params: set[type]) -> str | None:
    """Returns the name of a named tuple's field, or of a hyperparameter, at the end of a path; otherwise None."""
    *above, last = path
    for key in above:
        if type(tree) in of_params:
            return None
        if isinstance(key, jax.tree_util.GetAttrKey):
            tree = getattr(tree, key.name)
        elif isinstance(key, jax.tree_util.DictKey):
            tree = tree[key.key]
        elif isinstance(key, jax.tree_util.SequenceKey):
            tree = tree[key.idx]
        else:
            return None
    if isinstance(last, jax.tree_util.DictKey):
        injected = bool(above) and getattr(above[-1], "name", None) == "hyperparams"
        return str(last.key) if injected else None
    return getattr(last, "name", None) if hasattr(tree, "_fields") and type(tree) not in of_params else None
