"""Causal attention on TPUs with JAX's Pallas kernel "splash": block-sparse flash attention (arXiv:2205.14135).

Shape suffixes: B batch, T tokens, H query heads, G key and value heads, K channels per head.
"""

import jax
import jax.numpy as jnp

from jaxtrain.models.remat import ATTENTION

LANES = 128  # block sizes of the kernel are multiples of this


def splash_attention(
    query_BTHK: jax.Array,
    key_BTGK: jax.Array,
    value_BTGK: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes causal attention, `[B, T, H, K]`, T a multiple of LANES; see `attention.attend`.

    Blocks outside the window are not computed. `interpret` runs the kernel in Python on any backend; slow, for tests.
    """
    # Imported here: Pallas takes a third of a second that starts on other devices should not pay.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    _, length, num_heads, width = query_BTHK.shape
    block = _largest(length, 512)
    # Long blocks of keys and values, above all in the backward pass, which stores one partial gradient of the queries
    # for each: with 4,096, what runs around the kernel takes 0.53 of the cycles at 4,096 tokens of 128 channels (v5p).
    # 8,192 do not fit the memory on a v5p; half of 4,096 is for keys of more than 512 bytes.
    most = 4096 if width * key_BTGK.dtype.itemsize <= 512 else 2048
    blocks = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=_largest(length, 2048),
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=_largest(length, most),
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    shape = (length, length)
    mask = splash_attention_mask.CausalMask(shape)
    if window is not None:
        mask = splash_attention_mask.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * num_heads),
        block_sizes=blocks,
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    ids = None
    if segment_ids is not None:
        segment_ids = segment_ids.astype(jnp.int32)
        ids = splash_attention_kernel.SegmentIds(q=segment_ids, kv=segment_ids)
    scaled_BTHK = query_BTHK * width**-0.5
    mixed_BHTK = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (scaled_BTHK, key_BTGK, value_BTGK)), ids)
    return mixed_BHTK.swapaxes(1, 2)


def _largest(length: int, limit: int) -> int:
    """Returns the largest power-of-two multiple of LANES up to `limit` that divides the length."""
    block = LANES
    while 2 * block <= limit and length % (2 * block) == 0:
        block *= 2
    return block
