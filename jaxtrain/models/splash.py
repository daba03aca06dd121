"""Causal attention on TPUs with JAX's Pallas kernel ("splash": flash attention, arXiv:2205.14135, sparse by blocks).

Shape suffixes: B batch, T tokens, H query heads, G key and value heads, K channels a head.
"""

import jax

from jaxtrain.models.remat import ATTENTION

LANES = 128  # the kernel's blocks are multiples of this


def attend(query_BTHK: jax.Array, key_BTGK: jax.Array, value_BTGK: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Attends to the keys up to each query's position; `[B, T, H, K]`.

    Args:
      query_BTHK: queries; H is a multiple of G.
      key_BTGK, value_BTGK: keys and values.
      interpret: run the kernel's Python on any backend: slow, for tests.

    Raises:
      ValueError: a number of tokens that does not divide into blocks.
    """
    _, length, num_heads, width = query_BTHK.shape
    if length % LANES:
        raise ValueError(f'attention "splash" wants a multiple of {LANES} tokens, got {length}: use "xla"')
    kernel = _kernel(length, num_heads, interpret)
    scaled_BTHK = query_BTHK * width**-0.5
    mixed_BHTK = jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (scaled_BTHK, key_BTGK, value_BTGK)))
    return mixed_BHTK.swapaxes(1, 2)


def _kernel(length: int, num_heads: int, interpret: bool):
    # Not on top: Pallas is a third of a second that every start on other devices would pay.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    block = _largest(length, 512)
    # Keys and values in long blocks: the backward pass keeps one partial gradient of the queries for each.
    long = _largest(length, 2048)
    blocks = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=long,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=long,
        block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * num_heads)
    return splash_attention_kernel.make_splash_mha(
        mask,
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )


def _largest(length: int, limit: int) -> int:
    """The largest power-of-two multiple of LANES up to a limit that divides the length."""
    block = LANES
    while 2 * block <= limit and length % (2 * block) == 0:
        block *= 2
    return block
