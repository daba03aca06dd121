"""Product of rows, sorted by group, with the matrix of each group.

On TPUs, XLA has a kernel for `jax.lax.ragged_dot`. On CPUs and GPUs it multiplies every row by all matrices (jax 0.12):
there, a loop multiplies one block of rows after another by the matrix of their group.

Shape suffixes: S rows, M rows of a block, D inputs, F outputs, E groups.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_MOST_ROWS = 256  # of a block


@jax.custom_vjp
def grouped_matmul(x_SD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns `[S, F]`: the rows of group e times `kernel[e]`.

    Args:
      x_SD: rows, those of group 0 first.
      kernel_EDF: a matrix for each group.
      sizes_E: number of rows of each group, int32, with sum S.
    """
    return jax.lax.platform_dependent(x_SD, kernel_EDF, sizes_E, tpu=_ragged, default=_multiply)


# `jax.vmap` fails on `ragged_dot` even if nothing is mapped that it depends on.
@jax.custom_batching.sequential_vmap
def _ragged(x_SD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(x_SD, kernel_EDF, sizes_E)


def _multiply(x_SD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, transposed: bool = False) -> jax.Array:
    def body(e: jax.Array, cut: Callable, mine_M1: jax.Array, y_SF: jax.Array) -> jax.Array:
        product_MF = cut(x_SD) @ (kernel_EDF[e].T if transposed else kernel_EDF[e])
        return cut(y_SF, jnp.where(mine_M1, product_MF, cut(y_SF)))

    num_outputs = kernel_EDF.shape[1 if transposed else 2]
    return _loop_over_blocks(body, jnp.zeros((len(x_SD), num_outputs), x_SD.dtype), len(x_SD), sizes_E)


def _gradients(x_SD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, gradient_SF: jax.Array):
    def body(e: jax.Array, cut: Callable, mine_M1: jax.Array, total_EDF: jax.Array) -> jax.Array:
        mine_MD = jnp.where(mine_M1, cut(x_SD), 0)
        return total_EDF.at[e].add(jnp.matmul(mine_MD.T, cut(gradient_SF), preferred_element_type=jnp.float32))

    total_EDF = _loop_over_blocks(body, jnp.zeros(kernel_EDF.shape, jnp.float32), len(x_SD), sizes_E)
    return _multiply(gradient_SF, kernel_EDF, sizes_E, transposed=True), total_EDF.astype(kernel_EDF.dtype)


@jax.custom_batching.sequential_vmap
def _ragged_gradients(x_SD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array, gradient_SF: jax.Array):
    return jax.vjp(lambda x, kernel: jax.lax.ragged_dot(x, kernel, sizes_E), x_SD, kernel_EDF)[1](gradient_SF)


def _backward(residuals: tuple[jax.Array, ...], gradient_SF: jax.Array):
    grads = jax.lax.platform_dependent(*residuals, gradient_SF, tpu=_ragged_gradients, default=_gradients)
    return *grads, None


grouped_matmul.defvjp(lambda *arguments: (grouped_matmul(*arguments), arguments), _backward)


def _loop_over_blocks(body: Callable, init: Any, num_rows: int, sizes_E: jax.Array) -> Any:
    """Runs `body(group, cut, mine_M1, carry) -> carry` for each block: at most M consecutive rows of a group.

    `cut(array)` returns M rows of which the block is part, and `cut(array, rows)` replaces them; `mine_M1` is True for
    the rows of the block. The number of iterations is constant, and the last ones have no rows.
    """
    num_groups = len(sizes_E)
    size = min(max(num_rows // (2 * num_groups) // 16 * 16, 16), _MOST_ROWS, num_rows)
    blocks_E = -(-sizes_E // size)
    ends_E, last_E = jnp.cumsum(sizes_E), jnp.cumsum(blocks_E)

    def step(block: jax.Array, carry: Any) -> Any:
        e = jnp.minimum(jnp.searchsorted(last_E, block, side="right"), num_groups - 1)
        first = ends_E[e] - sizes_E[e] + (block - last_E[e] + blocks_E[e]) * size
        start = jnp.minimum(first, num_rows - size)
        row_M = start + jnp.arange(size)

        def cut(array: jax.Array, rows: jax.Array | None = None) -> jax.Array:
            if rows is None:
                return jax.lax.dynamic_slice_in_dim(array, start, size)
            return jax.lax.dynamic_update_slice_in_dim(array, rows, start, axis=0)

        return body(e, cut, ((row_M >= first) & (row_M < ends_E[e]))[:, None], carry)

    return jax.lax.fori_loop(0, num_rows // size + min(num_groups, num_rows), step, init)
