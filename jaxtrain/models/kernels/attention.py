"""Causal grouped-query attention with a choice of kernels, and rotary positions.

Shape suffixes: B batch, T queries, S keys, H query heads, G key and value heads, K channels per head.
"""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from jaxtrain.model_config import RopeScaling
from jaxtrain.models.kernels import cudnn
from jaxtrain.models.kernels.causal import causal_attention
from jaxtrain.models.kernels.splash import LANES, splash_attention
from jaxtrain.models.remat import ATTENTION, checkpoint_name


def attend(
    query_BTHK: jax.Array,
    key_BSGK: jax.Array,
    value_BSGK: jax.Array,
    positions_BT: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Computes causal attention (arXiv:1706.03762) with a float32 softmax.

    Works on one device's rows and heads. With several devices, call it inside `jax.shard_map` over both.

    Args:
      query_BTHK: queries; H is a multiple of G (arXiv:2305.13245).
      key_BSGK, value_BSGK: keys and values of positions 0 to S - 1.
      positions_BT: int position of each query among the keys. None requires T = S and puts query t at position t.
      segment_ids: int `[B, S]`, segment of each position. A query attends to keys of its own segment only.
      window: number of newest keys that a query attends to, itself included (arXiv:2004.05150). None means all keys.
      softcap: replaces scores by softcap * tanh(scores / softcap) (arXiv:2408.00118). None disables it.
      kernel: "xla" supports all arguments. "splash" (TPUs) does not support positions. "cudnn" (NVIDIA GPUs) does not
        support positions, segments or a soft-cap. "auto" takes the fastest kernel of the default backend that
        supports the arguments.

    Returns:
      `[B, T, H, K]`, in the queries' dtype.

    Raises:
      ValueError: an argument that the kernel does not support.
      AssertionError: arrays whose shapes do not fit.
    """
    chex.assert_rank([query_BTHK, key_BSGK, value_BSGK], 4)
    chex.assert_equal_shape([key_BSGK, value_BSGK])
    chex.assert_equal_shape([query_BTHK, key_BSGK], dims=(0, 1, 3) if positions_BT is None else (0, 3))
    if segment_ids is not None:
        chex.assert_shape(segment_ids, key_BSGK.shape[:2])
    _, length, _, width = query_BTHK.shape
    device = jax.local_devices()[0]
    given: dict[str, Any] = {"positions": positions_BT is not None, "segments": segment_ids is not None}
    given |= {"softcap": softcap, "capability": cudnn.capability(device)}
    kernel = choose_kernel(kernel, device.platform, query_BTHK.dtype, length, width, **given)
    if window is not None and window >= key_BSGK.shape[1]:
        window = None
    arrays = query_BTHK, key_BSGK, value_BSGK
    if kernel == "splash":
        return splash_attention(*arrays, segment_ids=segment_ids, window=window, softcap=softcap)
    if kernel == "cudnn":
        return cudnn.cudnn_attention(*arrays, window=window)
    if positions_BT is None and window is None and softcap is None:
        return causal_attention(*arrays, segment_ids)
    visible_BTS = _visible(length, key_BSGK.shape[1], positions_BT, segment_ids, window)
    # The other kernels name their residuals themselves; this name would save their results twice.
    return checkpoint_name(_attend_xla(query_BTHK, key_BSGK, value_BSGK, visible_BTS, softcap), ATTENTION)


def choose_kernel(
    kernel: str,
    platform: str,
    dtype: jax.typing.DTypeLike,
    seq_len: int,
    head_dim: int,
    *,
    positions: bool = False,
    segments: bool = False,
    softcap: float | None = None,
    capability: tuple[int, int] | None = None,
) -> str:
    """Returns the kernel, and for "auto" the fastest that supports the arguments.

    Args:
      kernel: "auto", "xla", "splash" or "cudnn".
      platform: "cpu", "gpu" or "tpu".
      dtype: dtype of queries, keys and values.
      seq_len, head_dim: tokens, and channels per head.
      positions, segments: True if given.
      softcap: soft-cap of the scores.
      capability: the GPU's (`cudnn.capability`); None for another device.

    Raises:
      ValueError: an unknown kernel, or one that does not support the arguments.
    """
    chosen = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla") if kernel == "auto" else kernel
    if chosen not in ("xla", "splash", "cudnn"):
        raise ValueError(f"unknown attention kernel {kernel!r}: choose auto, xla, splash or cudnn")
    if chosen == "xla":
        return chosen
    if positions:
        reason = "takes no positions"
    elif chosen == "splash":
        reason = f"needs a multiple of {LANES} tokens, got {seq_len}" if seq_len % LANES else None
    else:
        reason = cudnn.unsupported(dtype, head_dim, segments=segments, softcap=softcap, capability=capability)
    if reason and kernel != "auto":
        raise ValueError(f'attention "{kernel}" {reason}: use "xla"')
    return "xla" if reason else chosen


def _visible(
    length: int, num_keys: int, positions_BT: jax.Array | None, segment_ids: jax.Array | None, window: int | None
) -> jax.Array:
    """Returns the mask of the keys that each query attends to, bool `[B, T, S]`, or `[1, T, S]` if rows are equal."""
    queries_BT = jnp.arange(length)[None, :] if positions_BT is None else positions_BT
    keys_11S = jnp.arange(num_keys)[None, None, :]
    visible_BTS = keys_11S <= queries_BT[:, :, None]
    if window is not None:
        visible_BTS &= keys_11S > queries_BT[:, :, None] - window
    if segment_ids is not None:
        own_BT = segment_ids if positions_BT is None else jnp.take_along_axis(segment_ids, positions_BT, axis=1)
        visible_BTS &= own_BT[:, :, None] == segment_ids[:, None, :]
    return visible_BTS


def _attend_xla(
    query_BTHK: jax.Array, key_BSGK: jax.Array, value_BSGK: jax.Array, visible_BTS: jax.Array, softcap: float | None
) -> jax.Array:
    batch, length, num_heads, width = query_BTHK.shape
    num_groups = key_BSGK.shape[2]
    grouped = query_BTHK.reshape(batch, length, num_groups, num_heads // num_groups, width)
    scores = jnp.einsum("btghk,bsgk->bghts", grouped, key_BSGK, preferred_element_type=jnp.float32) * width**-0.5
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible_BTS[:, None, None], scores, -jnp.inf)
    # Normalized after the product with the values: T x K divisions instead of T x S.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    mixed = jnp.einsum(
        "bghts,bsgk->btghk", weights.astype(value_BSGK.dtype), value_BSGK, preferred_element_type=jnp.float32
    )
    total_BTGH = jnp.einsum("bghts->btgh", weights)
    return (mixed / total_BTGH[..., None]).astype(query_BTHK.dtype).reshape(query_BTHK.shape)


def rope_tables(
    positions_BT: jax.Array, head_dim: int, theta: float, stretch: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines of the rotary angles (arXiv:2104.09864), float32 `[B, T, 1, K / 2]`.

    bfloat16 cannot distinguish positions 256 and 257.
    """
    frequency_K = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if stretch is not None and stretch.kind == "linear":
        frequency_K /= stretch.factor
    elif stretch is not None:
        turns_K = stretch.length * frequency_K / (2 * math.pi)  # within the context of the pretraining
        kept_K = jnp.clip((turns_K - stretch.low) / (stretch.high - stretch.low), 0, 1)
        frequency_K *= kept_K + (1 - kept_K) / stretch.factor
    angle_BTK = positions_BT.astype(jnp.float32)[:, :, None] * frequency_K[None, None, :]
    return jnp.cos(angle_BTK)[:, :, None], jnp.sin(angle_BTK)[:, :, None]


@jax.custom_vjp
def rotate(x_BTHK: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates channel pairs (i, i + K / 2) by the angles of `rope_tables`, in float32. Returns the dtype of x.

    TPUs form x cos + swap(x) sin over whole heads: halves of them are layouts of their own, which cost copies.
    """
    return jax.lax.platform_dependent(x_BTHK, tables, tpu=_rotate_heads, default=_rotate_halves)


def _rotate_back(tables: tuple[jax.Array, jax.Array], gradient_BTHK: jax.Array):
    cos, sin = tables

    def transpose(gradient_BTHK):  # of a linear function, whose argument does not matter
        return jax.vjp(lambda x: _rotate_halves(x, tables), gradient_BTHK)[1](gradient_BTHK)[0]

    def turn(gradient_BTHK):  # the barrier keeps the rotation out of the products, which would repeat it
        return jax.lax.optimization_barrier(_rotate_heads(gradient_BTHK, (cos, -sin)))

    return jax.lax.platform_dependent(gradient_BTHK, tpu=turn, default=transpose), None


rotate.defvjp(lambda x_BTHK, tables: (rotate(x_BTHK, tables), tables), _rotate_back)


def _rotate_halves(x_BTHK: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    cos, sin = tables
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHK.dtype)


def _rotate_heads(x_BTHK: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    cos, sin = tables
    cos, sin = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    # A product with a permutation, exact in either dtype, moves half of the bytes of two slices.
    width = x_BTHK.shape[-1]
    swap_KK = jnp.roll(jnp.eye(width, dtype=x_BTHK.dtype), width // 2, axis=1)
    precision = jax.lax.Precision.HIGHEST if x_BTHK.dtype == jnp.float32 else None
    swapped = jnp.matmul(x_BTHK, swap_KK, precision=precision, preferred_element_type=jnp.float32)
    return (x_BTHK.astype(jnp.float32) * cos + swapped * sin).astype(x_BTHK.dtype)
