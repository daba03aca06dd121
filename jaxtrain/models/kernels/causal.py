"""Causal attention as plain matrix products, without a T x T residual for the backward pass.

The custom derivative saves the output and the log-sum of each row and recomputes the weights (arXiv:2205.14135,
without its kernel). Queries are processed in blocks, each with the keys up to its last query, so that most of the
masked half is never computed. On CPUs, groups of rows are independent of each other.

Shape suffixes: B batch, T tokens (S as keys), H query heads, G key and value heads, M query heads per group
(H = G x M), K channels per head, R rows of a block: its queries for each of the M heads.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.models.remat import ATTENTION, checkpoint_name

# Minimum queries per block, and maximum number of blocks: every further block adds operations and saves less.
_BLOCK, _MAX_BLOCKS = 128, 8
# Up to this many tokens the scores are no larger than the other residuals, so the compiler may save them.
_SHORT = 512


@jax.custom_vjp
def causal_attention(
    query_BTHK: jax.Array, key_BTGK: jax.Array, value_BTGK: jax.Array, segment_ids_BT: jax.Array | None = None
) -> jax.Array:
    """Computes causal attention (arXiv:1706.03762), `[B, T, H, K]` in the queries' dtype.

    With `segment_ids_BT` a query attends to keys of its own segment only. Products and softmax accumulate in float32.
    Supports first-order reverse-mode differentiation only.
    """
    return _forward(query_BTHK, key_BTGK, value_BTGK, segment_ids_BT)[0]


def _forward(query_BTHK: jax.Array, key_BTGK: jax.Array, value_BTGK: jax.Array, segment_ids_BT: jax.Array | None):
    arrays = query_BTHK, key_BTGK, value_BTGK, segment_ids_BT
    *inputs, mixed_BGMTK, log_sum_BGMT1 = _over_rows(_mix, arrays, query_BTHK.shape[1])
    # Named in the layout that the derivative reads, so that rematerialization can save them.
    mixed_BGMTK = checkpoint_name(mixed_BGMTK, ATTENTION)
    log_sum_BGMT1 = checkpoint_name(log_sum_BGMT1, ATTENTION)
    return _by_token(mixed_BGMTK), ((*inputs, mixed_BGMTK, log_sum_BGMT1), segment_ids_BT)


def _mix(query_BTHK: jax.Array, key_BTGK: jax.Array, value_BTGK: jax.Array, segment_ids_BT: jax.Array | None):
    """Returns queries, keys, values, output and log-sum of each row, in the layout that the derivative reads."""
    query_BGMTK = _by_group(query_BTHK, key_BTGK.shape[2])
    key_BGSK, value_BGSK = key_BTGK.swapaxes(1, 2), value_BTGK.swapaxes(1, 2)
    mixed, log_sum = [], []
    for start, stop in _blocks(query_BTHK.shape[1]):
        scores_BGRS = _scores(query_BGMTK, key_BGSK, segment_ids_BT, start, stop)
        top_BGR1 = jnp.max(scores_BGRS, axis=-1, keepdims=True)
        weights_BGRS = jnp.exp(scores_BGRS - top_BGR1)
        total_BGR1 = jnp.sum(weights_BGRS, axis=-1, keepdims=True)
        mixed_BGRK = _product(weights_BGRS.astype(value_BGSK.dtype), value_BGSK[:, :, :stop])
        # Normalized after the product with the values: R x K divisions instead of R x S.
        mixed.append(_from_rows((mixed_BGRK / total_BGR1).astype(query_BTHK.dtype), stop - start))
        log_sum.append(_from_rows(top_BGR1 + jnp.log(total_BGR1), stop - start))
    return query_BGMTK, key_BGSK, value_BGSK, jnp.concatenate(mixed, axis=3), jnp.concatenate(log_sum, axis=3)


def _backward(saved, gradient_BTHK: jax.Array):
    return *_over_rows(_gradients, (*saved, gradient_BTHK), gradient_BTHK.shape[1]), None


def _gradients(residuals: tuple[jax.Array, ...], segment_ids_BT: jax.Array | None, gradient_BTHK: jax.Array):
    """Returns the gradients of queries, keys and values."""
    if gradient_BTHK.shape[1] > _SHORT:
        # Without it the compiler merges both computations of the scores, or starts the second one too early.
        residuals, gradient_BTHK = jax.lax.optimization_barrier((residuals, gradient_BTHK))
    query_BGMTK, key_BGSK, value_BGSK, mixed_BGMTK, log_sum_BGMT1 = residuals
    num_groups, length, width = query_BGMTK.shape[1], *query_BGMTK.shape[3:]
    gradient_BGMTK = _by_group(gradient_BTHK, num_groups)
    # Per row, the sum of weights times their gradients: T x K products instead of T x S.
    sum_BGMT1 = jnp.sum(gradient_BGMTK.astype(jnp.float32) * mixed_BGMTK.astype(jnp.float32), axis=-1, keepdims=True)
    query_parts, key_parts, value_parts = [], [], []
    for start, stop in _blocks(length):
        query_BGRK, gradient_BGRK = _rows(query_BGMTK, start, stop), _rows(gradient_BGMTK, start, stop)
        scores_BGRS = _scores(query_BGMTK, key_BGSK, segment_ids_BT, start, stop)
        weights_BGRS = jnp.exp(scores_BGRS - _rows(log_sum_BGMT1, start, stop))
        on_weights_BGRS = _product(gradient_BGRK, value_BGSK[:, :, :stop].swapaxes(2, 3))
        on_scores_BGRS = weights_BGRS * (on_weights_BGRS - _rows(sum_BGMT1, start, stop)) * width**-0.5
        on_scores_BGRS = on_scores_BGRS.astype(query_BGMTK.dtype)
        query_parts.append(_from_rows(_product(on_scores_BGRS, key_BGSK[:, :, :stop]), stop - start))
        # Transposes the small operands rather than the large ones.
        transposed_BGKR = query_BGRK.swapaxes(2, 3), gradient_BGRK.swapaxes(2, 3)
        if length <= _BLOCK:  # CPUs run faster on copies; for longer rows the copies cost too much
            transposed_BGKR = jax.lax.optimization_barrier(transposed_BGKR)
        key_parts.append(_product(transposed_BGKR[0], on_scores_BGRS))
        value_parts.append(_product(transposed_BGKR[1], weights_BGRS.astype(query_BGMTK.dtype)))
    query_gradient = _by_token(jnp.concatenate(query_parts, axis=3))
    gradients = query_gradient, _sum_blocks(key_parts, length), _sum_blocks(value_parts, length)
    return tuple(gradient.astype(gradient_BTHK.dtype) for gradient in gradients)


causal_attention.defvjp(_forward, _backward)


def _over_rows(function: Callable, arrays: tuple[Any, ...], length: int) -> Any:
    """Calls a function of arrays `[B, ...]`: on CPUs for groups of rows, elsewhere for all at once.

    XLA on a CPU runs a batched product on one core (jax 0.10.2), but independent products on several, and the scores of
    fewer rows stay in the cache. There are at most `_MAX_BLOCKS` blocks in all groups, and one group for a single block
    of queries, which is faster whole.
    """
    batch, num_blocks = jax.tree.leaves(arrays)[0].shape[0], len(_blocks(length))
    size = -(-batch // (_MAX_BLOCKS // num_blocks)) if num_blocks > 1 else batch

    def in_groups(*arrays):
        groups = [jax.tree.map(lambda x: x[i : i + size], arrays) for i in range(0, batch, size)]  # noqa: B023
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *(function(*group) for group in groups))

    if size >= batch:
        return function(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=in_groups, default=function)


def _blocks(length: int) -> list[tuple[int, int]]:
    """Returns the half-open range of queries of each block."""
    size = max(_BLOCK, -(-length // _MAX_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _scores(
    query_BGMTK: jax.Array, key_BGSK: jax.Array, segment_ids_BT: jax.Array | None, start: int, stop: int
) -> jax.Array:
    """Returns the scaled scores of a block, float32 `[B, G, R, stop]`, -inf where a key is not visible to the query."""
    keys_BGKS = key_BGSK[:, :, :stop].swapaxes(2, 3)
    scores_BGRS = _product(_rows(query_BGMTK, start, stop), keys_BGKS) * query_BGMTK.shape[-1] ** -0.5
    positions_R = jnp.tile(jnp.arange(start, stop), query_BGMTK.shape[2])
    visible_RS = jnp.arange(stop)[None, :] <= positions_R[:, None]
    visible_BRS = visible_RS[None]
    if segment_ids_BT is not None:
        own_BR = jnp.tile(segment_ids_BT[:, start:stop], (1, query_BGMTK.shape[2]))
        visible_BRS = visible_BRS & (own_BR[:, :, None] == segment_ids_BT[:, None, :stop])
    return jnp.where(visible_BRS[:, None], scores_BGRS, -jnp.inf)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _by_group(x_BTHK: jax.Array, num_groups: int) -> jax.Array:
    batch, length, num_heads, width = x_BTHK.shape
    return x_BTHK.reshape(batch, length, num_groups, num_heads // num_groups, width).transpose(0, 2, 3, 1, 4)


def _by_token(x_BGMTK: jax.Array) -> jax.Array:
    batch, num_groups, per_group, length, width = x_BGMTK.shape
    return x_BGMTK.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_groups * per_group, width)


def _rows(x_BGMTK: jax.Array, start: int, stop: int) -> jax.Array:
    """Merges a block's queries of all heads of a group into one dimension, for one product with their shared keys."""
    block = x_BGMTK[:, :, :, start:stop]
    return block.reshape(*block.shape[:2], -1, block.shape[-1])


def _from_rows(x_BGRK: jax.Array, length: int) -> jax.Array:
    return x_BGRK.reshape(*x_BGRK.shape[:2], -1, length, x_BGRK.shape[-1])


def _sum_blocks(parts_BGKS: list[jax.Array], length: int) -> jax.Array:
    """Sums the blocks' gradients of keys or values, `[B, T, G, K]`. Each block covers a prefix of the keys."""
    padded = [jnp.pad(x, [(0, 0)] * 3 + [(0, length - x.shape[3])]) for x in parts_BGKS]
    return sum(padded[1:], padded[0]).transpose(0, 3, 1, 2)
