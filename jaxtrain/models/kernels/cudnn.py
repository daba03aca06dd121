"""Causal attention on NVIDIA GPUs with cuDNN's fused kernel (flash attention, arXiv:2205.14135), through `jax.nn`.

The order of additions in its backward pass varies from run to run, unless XLA_FLAGS contains
--xla_gpu_deterministic_ops=true or --xla_gpu_exclude_nondeterministic_ops=true.

Shape suffixes: B batch, T tokens, H query heads, G key and value heads, K channels per head.
"""

import jax
import jax.numpy as jnp

KERNEL_DTYPES = ("bfloat16", "float16")
AMPERE, HOPPER = (8, 0), (9, 0)  # CUDA compute capabilities


def cudnn_attention(
    query_BTHK: jax.Array, key_BTGK: jax.Array, value_BTGK: jax.Array, *, window: int | None = None
) -> jax.Array:
    """Computes causal attention, `[B, T, H, K]`, in bfloat16 or float16; see `attention.attend`."""
    return jax.nn.dot_product_attention(
        query_BTHK,
        key_BTGK,
        value_BTGK,
        scale=query_BTHK.shape[-1] ** -0.5,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),  # excludes the query's own key
        implementation="cudnn",
    )


def unsupported(
    dtype: jax.typing.DTypeLike,
    head_dim: int,
    *,
    segments: bool = False,
    softcap: float | None = None,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """Returns why the kernel does not support the arguments of `choose_kernel`, as the end of a sentence, or None.

    `jax.nn` supports segments only as a mask `[T, S]`, which is slow, and before jax 0.11.1 it also computes an unused
    gradient of the mask. The private function below it takes offsets of packed segments, but before jax 0.11.1 its
    results for grouped queries are silently wrong.
    """
    if capability is None or capability < AMPERE:
        found = "there is none" if capability is None else f"this one has {capability[0]}.{capability[1]}"
        return f"needs an NVIDIA GPU of compute capability 8.0 or later, and {found}"
    if jnp.dtype(dtype).name not in KERNEL_DTYPES:
        return f"computes in {' or '.join(KERNEL_DTYPES)}, not in {jnp.dtype(dtype).name}"
    most = 256 if capability >= HOPPER else 128
    if head_dim % 8 or head_dim > most:
        return f"needs a head dimension that is a multiple of 8 and at most {most}, got {head_dim}"
    if segments:
        return 'takes no segment ids; "xla" does, at 5 times the time of "cudnn" without (docs/benchmarks.md)'
    if softcap is not None:
        return f"has no soft-cap, got {softcap:g}"
    return None


def capability(device: jax.Device) -> tuple[int, int] | None:
    """Returns the CUDA compute capability of a device, or None if it is not an NVIDIA GPU."""
    found = getattr(device, "compute_capability", None) if device.platform == "gpu" else None
    if found is None or not found[0].isdigit():  # AMD GPUs report names such as gfx942
        return None
    major, minor = found.split(".")
    return int(major), int(minor)
