"""Causal attention with grouped queries by one of several kernels, and rotary positions.

Shape suffixes: B batch, T queries, S keys, H query heads, G key and value heads, K channels a head.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.models.kernels import causal, cudnn, splash
from jaxtrain.models.remat import ATTENTION, checkpoint_name


def attend(
    query_BTHK: jax.Array,
    key_BSGK: jax.Array,
    value_BSGK: jax.Array,
    positions_BT: jax.Array | None = None,
    *,
    segment_ids: jax.Array | None = None,
    window: int = 0,
    softcap: float = 0.0,
    kernel: str = "auto",
) -> jax.Array:
    """Attends to the keys up to each query's position (arXiv:1706.03762); softmax in float32.

    It works on one device's rows and heads: with several devices, call it inside `jax.shard_map` over both.

    Args:
      query_BTHK: queries; H is a multiple of G (arXiv:2305.13245).
      key_BSGK, value_BSGK: keys and values, of positions 0 to S - 1.
      positions_BT: position of each query among the keys, int; None: T = S and query t is at position t.
      segment_ids: segment of each position, int `[B, S]`; a query sees the keys of its own position's segment alone.
      window: how many keys a query sees at most, its own and those before it (arXiv:2004.05150); 0: all.
      softcap: scores become softcap * tanh(scores / softcap) (arXiv:2408.00118); 0: they stay.
      kernel: "xla", which does all of this; "splash" on TPUs (`kernels.splash`), which takes no positions;
        "cudnn" on NVIDIA GPUs (`kernels.cudnn`), which takes no positions, segments or soft-cap; "auto": by the
        default backend, the fastest that does what is asked.

    Returns:
      `[B, T, H, K]`, in the queries' dtype.

    Raises:
      ValueError: a kernel that cannot do this; shapes that do not fit together; window or softcap below 0.
    """
    _check_arguments(query_BTHK, key_BSGK, positions_BT, segment_ids, window, softcap)
    _, length, _, width = query_BTHK.shape
    asked: dict[str, Any] = {
        "dtype": query_BTHK.dtype,
        "seq_len": length,
        "head_dim": width,
        "positions": positions_BT is not None,
        "segments": segment_ids is not None,
        "softcap": softcap,
    }
    if kernel in ("auto", "cudnn"):
        device = jax.local_devices()[0]
        asked["capability"] = cudnn.capability(device)
    if kernel == "auto":
        kernel = choose_kernel(device.platform, **asked)
    check_kernel(kernel, **asked)
    if window >= key_BSGK.shape[1]:
        window = 0
    if kernel == "splash":
        return splash.attend(query_BTHK, key_BSGK, value_BSGK, segment_ids=segment_ids, window=window, softcap=softcap)
    if kernel == "cudnn":
        return cudnn.attend(query_BTHK, key_BSGK, value_BSGK, window=window)
    if positions_BT is None and segment_ids is None and not window and not softcap:
        return causal.attend(query_BTHK, key_BSGK, value_BSGK)
    visible_BTS = _visible(length, key_BSGK.shape[1], positions_BT, segment_ids, window)
    # The other kernels' results have names of their own: with this one they would be kept twice.
    return checkpoint_name(_attend_xla(query_BTHK, key_BSGK, value_BSGK, visible_BTS, softcap), ATTENTION)


def choose_kernel(platform: str, dtype: jax.typing.DTypeLike, seq_len: int, head_dim: int, **more: Any) -> str:
    """The fastest kernel that does what is asked.

    Args:
      platform: "cpu", "gpu" or "tpu".
      dtype: of queries, keys and values.
      seq_len, head_dim: tokens, and channels a head.
      more: what else is asked, see `check_kernel`.
    """
    fastest = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")
    return "xla" if _obstacle(fastest, dtype=dtype, seq_len=seq_len, head_dim=head_dim, **more) else fastest


def check_kernel(kernel: str, dtype: jax.typing.DTypeLike, seq_len: int, head_dim: int, **more: Any) -> None:
    """Raises a ValueError if a kernel cannot do what is asked.

    Args:
      kernel: "xla", "splash" or "cudnn".
      dtype, seq_len, head_dim: as for `choose_kernel`.
      more: `positions`, `segments`: whether there are any; `softcap`; `capability`: of the GPU (`cudnn.capability`).
    """
    reason = _obstacle(kernel, dtype=dtype, seq_len=seq_len, head_dim=head_dim, **more)
    if reason:
        raise ValueError(f'attention "{kernel}" {reason}: use "xla"')


def _obstacle(
    kernel: str,
    *,
    dtype: jax.typing.DTypeLike,
    seq_len: int,
    head_dim: int,
    positions: bool = False,
    segments: bool = False,
    softcap: float = 0.0,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """What keeps a kernel from doing this; None: nothing."""
    if kernel == "xla":
        return None
    if kernel not in ("splash", "cudnn"):
        raise ValueError(f"unknown attention kernel {kernel!r}: it is auto, xla, splash or cudnn")
    if positions:
        return "takes no positions"
    if kernel == "splash":
        return splash.obstacle(seq_len)
    return cudnn.obstacle(dtype, head_dim, segments=segments, softcap=softcap, capability=capability)


def _check_arguments(
    query_BTHK: jax.Array,
    key_BSGK: jax.Array,
    positions_BT: jax.Array | None,
    segment_ids: jax.Array | None,
    window: int,
    softcap: float,
) -> None:
    batch, length, num_heads, _ = query_BTHK.shape
    _, num_keys, num_groups, _ = key_BSGK.shape
    if num_heads % num_groups:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_groups} key and value heads")
    if positions_BT is None and length != num_keys:
        raise ValueError(f"{length} queries and {num_keys} keys: give the queries' positions among the keys")
    if segment_ids is not None and segment_ids.shape != (batch, num_keys):
        raise ValueError(f"segment_ids are of all keys, [{batch}, {num_keys}]; got {list(segment_ids.shape)}")
    if window < 0:
        raise ValueError(f"the attention window must be 0 (all keys) or more, got {window}")
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"the attention soft-cap must be 0 (off) or more and finite, got {softcap}")


def _visible(
    length: int, num_keys: int, positions_BT: jax.Array | None, segment_ids: jax.Array | None, window: int
) -> jax.Array:
    """Which keys each query sees, bool `[B, T, S]`, or `[1, T, S]` where all rows are alike."""
    queries_BT = jnp.arange(length)[None, :] if positions_BT is None else positions_BT
    keys_11S = jnp.arange(num_keys)[None, None, :]
    visible_BTS = keys_11S <= queries_BT[:, :, None]
    if window:
        visible_BTS &= keys_11S > queries_BT[:, :, None] - window
    if segment_ids is not None:
        own_BT = segment_ids if positions_BT is None else jnp.take_along_axis(segment_ids, positions_BT, axis=1)
        visible_BTS &= own_BT[:, :, None] == segment_ids[:, None, :]
    return visible_BTS


def _attend_xla(
    query_BTHK: jax.Array, key_BSGK: jax.Array, value_BSGK: jax.Array, visible_BTS: jax.Array, softcap: float
) -> jax.Array:
    batch, length, num_heads, width = query_BTHK.shape
    num_groups = key_BSGK.shape[2]
    grouped = query_BTHK.reshape(batch, length, num_groups, num_heads // num_groups, width)
    scores = jnp.einsum("btghk,bsgk->bghts", grouped, key_BSGK, preferred_element_type=jnp.float32) * width**-0.5
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible_BTS[:, None, None], scores, -jnp.inf)
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
