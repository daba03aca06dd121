"""Causal attention on NVIDIA GPUs with cuDNN's fused kernel (flash attention, arXiv:2205.14135), through `jax.nn`.

Its backward pass adds in an order that varies from run to run, unless XLA_FLAGS has --xla_gpu_deterministic_ops=true
or --xla_gpu_exclude_nondeterministic_ops=true.

Shape suffixes: B batch, T tokens, H query heads, G key and value heads, K channels a head.
"""

import jax
import jax.numpy as jnp

DTYPES = ("bfloat16", "float16")
AMPERE, HOPPER = (8, 0), (9, 0)  # CUDA compute capabilities


def attend(query_BTHK: jax.Array, key_BTGK: jax.Array, value_BTGK: jax.Array, *, window: int = 0) -> jax.Array:
    """Attends to the keys up to each query's position; `[B, T, H, K]`.

    Args:
      query_BTHK: queries, bfloat16 or float16; H is a multiple of G.
      key_BTGK, value_BTGK: keys and values, of the same dtype.
      window: how many keys a query sees at most, its own included; 0: all.
    """
    return jax.nn.dot_product_attention(
        query_BTHK,
        key_BTGK,
        value_BTGK,
        scale=query_BTHK.shape[-1] ** -0.5,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,  # without the query's own key
        implementation="cudnn",
    )


def obstacle(
    dtype: jax.typing.DTypeLike,
    head_dim: int,
    *,
    segments: bool = False,
    softcap: float = 0.0,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """What keeps the kernel from doing this, as the end of a sentence about it; None: nothing.

    Args:
      dtype: of queries, keys and values.
      head_dim: channels a head.
      segments: whether there are segment ids. `jax.nn` has them as a mask `[T, S]` only, which is slow and, before
        jax 0.11.1, has a gradient computed for it that nobody uses. What lies beneath takes offsets of packed segments,
        but it is private, and before jax 0.11.1 wrong for grouped queries, without a word.
      softcap: of the scores.
      capability: the GPU's CUDA compute capability; None: it is no NVIDIA GPU.
    """
    if capability is None or capability < AMPERE:
        found = "there is none" if capability is None else f"this one has {capability[0]}.{capability[1]}"
        return f"wants an NVIDIA GPU of compute capability 8.0 or later, and {found}"
    if jnp.dtype(dtype).name not in DTYPES:
        return f"computes in {' or '.join(DTYPES)}, not in {jnp.dtype(dtype).name}"
    most = 256 if capability >= HOPPER else 128
    if head_dim % 8 or head_dim > most:
        return f"wants a head dimension that is a multiple of 8 and at most {most}, got {head_dim}"
    if segments:
        return "takes no segment ids"
    if softcap:
        return f"has no soft-cap, got {softcap:g}"
    return None


def capability(device: jax.Device) -> tuple[int, int] | None:
    """CUDA compute capability of a device; None: it is no NVIDIA GPU."""
    found = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    if found is None or not found[0].isdigit():  # AMD's are called gfx942
        return None
    major, minor = found.split(".")
    return int(major), int(minor)
