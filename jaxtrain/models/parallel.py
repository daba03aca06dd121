"""Collectives of the model, for code that runs on each device of a mesh (inside `jax.shard_map`).

Each function defines its own derivative and does nothing if its mesh axis has one device. Tensor parallelism follows
Megatron (arXiv:1909.08053), weight gathering follows ZeRO (arXiv:1910.02054).

Shape suffixes: B batch, T tokens, D d_model, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxtrain.trees import store_on


@dataclass(frozen=True)
class Parallel:
    """Number of devices that shard the model's matrices, per mesh axis."""

    fsdp: int = 1
    tensor: int = 1
    data: int = 1  # replicas of the matrices


def gather(x: jax.Array, dim: int, num_devices: int) -> jax.Array:
    """All-gathers the shards of a matrix along `dim` over `fsdp`. The gradient is reduce-scattered."""
    if num_devices == 1:
        return x
    return jax.lax.all_gather(x, "fsdp", axis=dim, tiled=True)


def sum_rows(x: jax.Array, parallel: Parallel) -> jax.Array:
    """Adds over the devices that share the rows of the batch. Has no gradient."""
    axes = tuple(axis for axis in ("data", "fsdp") if getattr(parallel, axis) > 1)
    x = jax.lax.stop_gradient(x)
    return jax.lax.psum(x, axes) if axes else x


def enter_tensor(x: jax.Array, num_devices: int) -> jax.Array:
    """Identity in the forward pass, all-reduce of the gradient over `tensor` (Megatron's f)."""
    return _enter(x) if num_devices > 1 else x


def leave_tensor(x: jax.Array, num_devices: int) -> jax.Array:
    """All-reduce of partial results over `tensor` in the forward pass, identity for the gradient (Megatron's g)."""
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
    """Looks up tokens in an embedding table whose vocabulary is sharded over `tensor` and channels over `fsdp`.

    The table is not gathered over `fsdp`. Every device looks up the tokens of all devices in its own channels, and an
    all-to-all exchanges the results. The traffic is the size of the tokens' embeddings, once in each direction, and the
    gradient of the table needs no communication.

    Args:
      table_VD: this device's shard, `[V / tensor, D / fsdp]`.

    Returns:
      Embeddings `[B, T, D]` of this device's tokens, in the table's dtype.
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
    """Takes rows of a table, `[B, T, D]`. The gradient of each row is accumulated in float32.

    Accumulated in bfloat16, the many small gradients of a frequent token would be rounded away.
    """
    return jnp.take(table_VD, rows_BT, axis=0)


def _take_rows_backward(residuals: tuple[jax.Array, jax.Array], gradient_BTD: jax.Array):
    empty_V0, rows_BT = residuals
    zeros_VD = jnp.zeros((empty_V0.shape[0], gradient_BTD.shape[-1]), jnp.float32)
    return zeros_VD.at[rows_BT].add(gradient_BTD.astype(jnp.float32)).astype(empty_V0.dtype), None


# The empty slice keeps the height and the dtype of the table only.
take_rows.defvjp(lambda table, rows: (take_rows(table, rows), (table[:, :0], rows)), _take_rows_backward)


@jax.custom_vjp
def barrier_gradients(*arrays):
    """Identity with a barrier on the gradients: all of them are complete before any of them is used.

    Without it the gradient of the output head stays unreduced until the layers' backward pass ends.
    """
    return arrays


barrier_gradients.defvjp(lambda *arrays: (arrays, None), lambda _, gradients: jax.lax.optimization_barrier(gradients))


@jax.custom_vjp
def free_early(x, weights):
    """Identity. On TPUs the backward pass waits until the gradients of x and of the weights are complete.

    For a linear layer: the compiler would postpone the gradient of the weights, and store x for it until then.
    """
    return x, weights


def _free_early_backward(_, gradients):
    return store_on("tpu", gradients)


free_early.defvjp(lambda x, weights: ((x, weights), None), _free_early_backward)
