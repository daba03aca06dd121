"""Causal attention with grouped queries, and rotary positions.

Shape suffixes: B batch, T queries, S keys, H query heads, G key and value heads, K channels a head.
"""

import jax
import jax.numpy as jnp

from jaxtrain.models import causal, splash


def attend(
    query_BTHK: jax.Array,
    key_BSGK: jax.Array,
    value_BSGK: jax.Array,
    positions_BT: jax.Array | None = None,
    *,
    kernel: str = "xla",
) -> jax.Array:
    """Attends to the keys up to each query's position (arXiv:1706.03762); softmax in float32.

    Args:
      query_BTHK: queries; H is a multiple of G (arXiv:2305.13245).
      key_BSGK, value_BSGK: keys and values, of positions 0 to S - 1.
      positions_BT: position of each query among the keys; None: T = S and query t is at position t.
      kernel: "xla", or "splash" on a TPU (jaxtrain.models.splash), which takes no positions; "auto": by the default
        backend and the shapes.

    Returns:
      `[B, T, H, K]`, in the queries' dtype.

    Raises:
      ValueError: a kernel that cannot do this.
    """
    if kernel == "auto":
        kernel = choose_kernel(jax.default_backend(), query_BTHK.shape[1]) if positions_BT is None else "xla"
    if kernel == "splash":
        if positions_BT is not None:
            raise ValueError('the attention kernel "splash" takes no positions: use "xla"')
        return splash.attend(query_BTHK, key_BSGK, value_BSGK)
    if positions_BT is None:
        return causal.attend(query_BTHK, key_BSGK, value_BSGK)
    return _attend_xla(query_BTHK, key_BSGK, value_BSGK, positions_BT)


def choose_kernel(platform: str, seq_len: int) -> str:
    """The kernel for a platform ("cpu", "gpu", "tpu") and a number of tokens."""
    return "splash" if platform == "tpu" and seq_len % splash.LANES == 0 else "xla"


def _attend_xla(
    query_BTHK: jax.Array, key_BSGK: jax.Array, value_BSGK: jax.Array, positions_BT: jax.Array | None
) -> jax.Array:
    batch, length, num_heads, width = query_BTHK.shape
    num_groups = key_BSGK.shape[2]
    if positions_BT is None:
        positions_BT = jnp.arange(length)[None, :]
    visible_BTS = jnp.arange(key_BSGK.shape[1])[None, None, :] <= positions_BT[:, :, None]
    grouped = query_BTHK.reshape(batch, length, num_groups, num_heads // num_groups, width)
    scores = jnp.einsum("btghk,bsgk->bghts", grouped, key_BSGK, preferred_element_type=jnp.float32)
    scores = jnp.where(visible_BTS[:, None, None], scores * width**-0.5, -jnp.inf)
    # Divided by their sum after the product with the values: T x K divisions instead of T x S.
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    mixed = jnp.einsum(
        "bghts,bsgk->btghk", weights.astype(value_BSGK.dtype), value_BSGK, preferred_element_type=jnp.float32
    )
    total_BTGH = jnp.einsum("bghts->btgh", weights)
    return (mixed / total_BTGH[..., None]).astype(query_BTHK.dtype).reshape(query_BTHK.shape)


def rope_tables(positions_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary angles (arXiv:2104.09864), float32 `[B, T, 1, K / 2]`.

    bfloat16 would not even tell position 256 from 257.
    """
    frequency_K = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle_BTK = positions_BT.astype(jnp.float32)[:, :, None] * frequency_K[None, None, :]
    return jnp.cos(angle_BTK)[:, :, None], jnp.sin(angle_BTK)[:, :, None]


def rotate(x_BTHK: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates channel pairs (i, i + K / 2) by the angles of `rope_tables`; float32 inside, same dtype out."""
    cos, sin = tables
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHK.dtype)
