"""Gradients of the summed loss: over micro-batches and devices, with a key and auxiliary sums for the loss function."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.losses import LossSums
from jaxtrain.trees import store_on

Batch = Any  # a pytree of arrays [B, ...]
Metrics = dict[str, jax.Array]
LossFn = Callable[..., LossSums | tuple[LossSums, Metrics]]
AxisName = str | tuple[str, ...]


def takes_key(loss_fn: LossFn) -> bool:
    """Returns True if the third positional parameter is required or named `rng`."""
    try:
        parameters = list(inspect.signature(loss_fn).parameters.values())
    except (TypeError, ValueError):  # a callable without a signature
        return False
    third = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][2:3]
    return bool(third) and (third[0].default is third[0].empty or third[0].name == "rng")


def micro_batch_keys(seed: int, step: jax.Array, accumulate: int, axis_name: AxisName | None) -> jax.Array:
    """Returns keys `[accumulate]`, one for each micro-batch of this device."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    if axis_name is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(accumulate))


def split_aux(result: Any) -> tuple[LossSums, Metrics]:
    """Splits the result of a loss function into its sums and its auxiliary sums, `{}` if it has none."""
    sums, aux = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(sums, LossSums) or not isinstance(aux, dict):
        raise ValueError(
            f"loss_fn must return LossSums, sums over tokens, or (LossSums, dict of sums), not {_kind(result)}: return "
            "jaxtrain.losses.cross_entropy(logits, labels), or for another loss LossSums(nll=jnp.sum(losses), "
            "z_loss=zero, smoothing=zero, weight=number of tokens) with zero = jnp.float32(0)"
        )
    _check_scalars(vars(sums))
    return sums, aux


def _check_scalars(values: dict[str, Any]) -> None:
    for name, value in values.items():
        dtype = getattr(value, "dtype", type(value))
        is_real = dtype is not type(None) and jnp.issubdtype(dtype, jnp.number) and not jnp.iscomplexobj(value)
        if not is_real or jnp.shape(value):
            problem = f"loss_fn returns {name} as {_kind(value)}"
            raise ValueError(f"{problem}, and each sum is a real scalar, over all tokens: sum it, or name each element")


def _kind(result: Any) -> str:
    parts = result if isinstance(result, tuple) else (result,)
    return ", ".join(
        f"{x.dtype}, an array of shape {x.shape}" if hasattr(x, "shape") else type(x).__name__ for x in parts
    )


def differentiate(
    loss_fn: LossFn, params: Any, micro_batch: Batch, *loss_factor: jax.Array, keys: jax.Array | None = None
) -> tuple[tuple[LossSums, Metrics], Any]:
    """Returns the sums and the float32 gradient of the summed loss (times the factor) of one micro-batch."""

    def total(params):
        sums, aux = split_aux(loss_fn(params, micro_batch, *(() if keys is None else keys)))
        _check_scalars(aux)
        aux = {name: jnp.asarray(value, jnp.float32) for name, value in aux.items()}
        return functools.reduce(jnp.multiply, loss_factor, sums.total()), (sums, aux)

    (_, sums), grads = jax.value_and_grad(total, has_aux=True)(params)
    # Otherwise XLA on a GPU stacks the gradients of unrolled layers within each operation of the optimizer and of the
    # norms, which then select the layer for every number, far below the speed of the memory.
    return sums, jax.tree.map(lambda g: g.astype(jnp.float32), store_on("cuda", grads))


def accumulate_gradients(
    one: Callable,
    params: Any,
    batch: Batch,
    *loss_factor: jax.Array,
    keys: jax.Array | None = None,
    accumulate: int,
    axis_name: AxisName | None,
) -> tuple[tuple[LossSums, Metrics], Any]:
    """Sums the results of `one` over the micro-batches."""
    if accumulate == 1:
        return one(params, batch, *loss_factor, keys=keys)

    def gradients(part):
        return one(params, part[0], *loss_factor, keys=part[1])

    parts = split_batch(batch, keys, accumulate)
    shapes = jax.eval_shape(lambda parts: gradients(jax.tree.map(lambda x: x[0], parts)), parts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def body(carry, part):
        return jax.tree.map(jnp.add, carry, gradients(part)), None

    return jax.lax.scan(body, localize(zeros, axis_name), parts)[0]


def split_batch(batch: Batch, keys: jax.Array | None, accumulate: int) -> tuple[Batch, jax.Array | None]:
    """Returns the micro-batches `[accumulate, B / accumulate, ...]`, and their keys `[accumulate, 1]`."""
    split = jax.tree.map(functools.partial(_split_rows, accumulate=accumulate), batch)
    return split, None if keys is None else keys[:, None]


def _split_rows(leaf: jax.Array, accumulate: int) -> jax.Array:
    """Reshapes `[B, ...]` to `[accumulate, B / accumulate, ...]`; row i goes to micro-batch i % accumulate."""
    split = f"cannot be split into accumulate={accumulate} equal micro-batches"
    if not jnp.shape(leaf):
        raise ValueError(f"a leaf of shape () {split}: give it a row per example, or bind the constant to loss_fn")
    if leaf.shape[0] % accumulate:
        raise ValueError(f"a batch of {leaf.shape[0]} rows (on each device) {split}: change one of them")
    return leaf.reshape((leaf.shape[0] // accumulate, accumulate, *leaf.shape[1:])).swapaxes(0, 1)


def localize(tree: Any, axis_name: AxisName | None) -> Any:
    """Marks replicated values as varying over the mapped axis.

    Where `shard_map` tracks replication, it would reduce the gradient of replicated parameters by itself, and the train
    step's own reduction would count it again.
    """
    return tree if axis_name is None else jax.lax.pcast(tree, axis_name, to="varying")


def sum_over_devices(tree: Any, axis_name: AxisName | None) -> Any:
    """Adds over the mapped axis; None adds nothing."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def mean_gradient(grads: Any, sums: LossSums, factor: tuple[jax.Array, ...]) -> Any:
    """Divides the summed, scaled gradient by the loss scale and by the global weight."""
    # Two divisions: the product of a factor of 2^24 and millions of tokens is not exact.
    divisors = (*factor, sums.divisor())
    return jax.tree.map(lambda g: functools.reduce(jnp.divide, divisors, g), grads)
