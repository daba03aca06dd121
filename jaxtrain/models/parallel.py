"""The model's collectives, for code that runs on each device of a mesh (inside `jax.shard_map`).

Each one carries its own derivative, and is nothing at all where its axis has one device. Tensor parallelism is
Megatron's (arXiv:1909.08053), gathering of weights is ZeRO's (arXiv:1910.02054).

Shape suffixes: B batch, T tokens, D d_model, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Parallel:
    """How many devices share the model's matrices along two axes of the mesh."""

    fsdp: int = 1
    tensor: int = 1


def gather(x: jax.Array, dim: int, num_devices: int) -> jax.Array:
    """Puts the parts of a matrix together along a dimension; its gradient is added and cut into the parts again."""
    if num_devices == 1:
        return x
    return jax.lax.all_gather(x, "fsdp", axis=dim, tiled=True)


def enter_tensor(x: jax.Array, num_devices: int) -> jax.Array:
    """Where a value that all devices have is used by each for its own part; adds up the gradients."""
    return _enter(x) if num_devices > 1 else x


def leave_tensor(x: jax.Array, num_devices: int) -> jax.Array:
    """Adds up the devices' partial results; the gradient is the same for all of them."""
    return _leave(x) if num_devices > 1 else x


@jax.custom_vjp
def _enter(x):
    return x


_enter.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.psum(gradient, "tensor"),))


@jax.custom_vjp
def _leave(x):
    return jax.lax.psum(x, "tensor")


_leave.defvjp(lambda x: (jax.lax.psum(x, "tensor"), None), lambda _, gradient: (gradient,))


def look_up(table_VD: jax.Array, tokens_BT: jax.Array, parallel: Parallel) -> jax.Array:
    """Rows of an embedding table that is in parts, vocabulary over `tensor` and channels over `fsdp`.

    Over `fsdp` no table is gathered: every device looks up everybody's tokens in its own channels, and the results
    change places. What moves is the tokens' own size, once each way, and the table's gradient stays where it belongs.

    Args:
      table_VD: this device's part, `[V / tensor, D / fsdp]`.
      tokens_BT: this device's tokens.

    Returns:
      `[B, T, D]` of this device's tokens, in the table's dtype.
    """
    if parallel.fsdp > 1:
        tokens_BT = jax.lax.all_gather(tokens_BT, "fsdp", axis=0, tiled=True)
    if parallel.tensor == 1:
        rows_BTD = take_rows(table_VD, tokens_BT)
    else:
        num_rows = table_VD.shape[0]
        local_BT = tokens_BT - jax.lax.axis_index("tensor") * num_rows
        here_BT = (local_BT >= 0) & (local_BT < num_rows)
        rows_BTD = jnp.where(here_BT[..., None], take_rows(table_VD, jnp.where(here_BT, local_BT, 0)), 0)
    if parallel.fsdp > 1:
        rows_BTD = jax.lax.all_to_all(rows_BTD, "fsdp", split_axis=0, concat_axis=2, tiled=True)
    return leave_tensor(rows_BTD, parallel.tensor)


@jax.custom_vjp
def take_rows(table_VD: jax.Array, rows_BT: jax.Array) -> jax.Array:
    """Rows of a table, `[B, T, D]`. The gradient adds up in float32 what a row gets from all its tokens.

    Added up in bfloat16, the many gradients of a frequent token would be lost on their sum.
    """
    return jnp.take(table_VD, rows_BT, axis=0)


def _take_rows_forward(table_VD: jax.Array, rows_BT: jax.Array):
    return take_rows(table_VD, rows_BT), (table_VD[:, :0], rows_BT)  # of the table its height and dtype


def _take_rows_backward(residuals: tuple[jax.Array, jax.Array], gradient_BTD: jax.Array):
    empty_V0, rows_BT = residuals
    zeros_VD = jnp.zeros((empty_V0.shape[0], gradient_BTD.shape[-1]), jnp.float32)
    return zeros_VD.at[rows_BT].add(gradient_BTD.astype(jnp.float32)).astype(empty_V0.dtype), None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


@jax.custom_vjp
def together(*arrays):
    """The arrays themselves; their gradients are all complete before any of them is used further.

    Without it the head's whole gradient waits, unreduced, for the end of the layers' backward pass.
    """
    return arrays


together.defvjp(lambda *arrays: (arrays, None), lambda _, gradients: jax.lax.optimization_barrier(gradients))
