"""One layer of the decoder: attention and feed-forward, with their norms.

Shape suffixes: B batch, T tokens, S cached tokens, D d_model, H query heads, G key and value heads, K head_dim,
L layers.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.config import ModelConfig
from jaxtrain.models.feed_forward import INIT_STD, Experts, FeedForward, RouterSums, residual_std
from jaxtrain.models.kernels.attention import attend, rotate
from jaxtrain.models.kernels.linear import Weights, merge_heads, project_heads
from jaxtrain.models.kernels.pointwise import norm
from jaxtrain.models.lora import add_lora
from jaxtrain.models.parallel import Parallel, enter_tensor
from jaxtrain.models.remat import checkpoint_name

Rope = tuple[jax.Array, jax.Array]


class Cache(NamedTuple):
    """Keys and values of the previous tokens in one layer, `[B, G, S, K]`: products need no transpose."""

    key: jax.Array
    value: jax.Array

    def write(self, key_BTGK: jax.Array, value_BTGK: jax.Array, start: jax.Array | None) -> "Cache":
        """Returns the cache with new tokens at position `start`, or `[B]`, or 0."""

        def put(old_GSK: jax.Array, new_TGK: jax.Array, start: jax.typing.ArrayLike) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old_GSK, new_TGK.swapaxes(0, 1), start, axis=1)

        start = jnp.int32(0) if start is None else start
        put = jax.vmap(put, (0, 0, 0 if start.ndim else None))
        return Cache(put(self.key, key_BTGK, start), put(self.value, value_BTGK, start))

    def read(self) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values, `[B, S, G, K]`."""
        return self.key.swapaxes(1, 2), self.value.swapaxes(1, 2)


class TokenContext(NamedTuple):
    """Facts about the tokens that all layers share: positions, rotary tables, cache length, segments, weights.

    `is_global`, bool scalar, differs between layers: True in a layer that attends to all keys. None if all are alike.
    """

    positions_BT: jax.Array
    rope: Rope | None
    num_cached: jax.Array | None = None
    segment_ids_BT: jax.Array | None = None
    weight_BT: jax.Array | None = None  # of each token in the sums of the routers; None forms no sums
    local_rope: Rope | None = None  # tables of the layers with a window, if they differ
    is_global: jax.Array | None = None

    def in_layer(self, is_global: jax.Array | None) -> "TokenContext":
        """Returns the context of one layer, with its rotary tables in `rope`."""
        rope = self.rope
        if self.local_rope is not None:
            rope = jax.tree.map(lambda a, b: jnp.where(is_global, a, b), rope, self.local_rope)
        return self._replace(rope=rope, is_global=is_global)


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the last dimension, in float32."""

    config: ModelConfig
    rms: bool
    num_shards: int = 1  # devices that share the normalized heads

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        first = nn.initializers.zeros if self.config.norm_offset else nn.initializers.ones
        scale = enter_tensor(self.param("scale", first, (x.shape[-1],)), self.num_shards)
        if self.config.norm_offset:
            scale = 1 + scale.astype(jnp.float32)
        center = not self.rms
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],)) if self.config.use_bias and center else None
        return norm(x, scale, bias, self.config.norm_eps, center)


class Attention(nn.Module):
    """Causal self-attention, over the cached tokens too if there is a cache. H and G count this device's heads."""

    config: ModelConfig
    parallel: Parallel

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: TokenContext, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        c, shards = self.config, self.parallel.tensor
        x_BTD = enter_tensor(x_BTD, shards)

        query_BTHK, key_BTGK, value_BTGK = self._project(x_BTD)
        if c.qk_norm:  # arXiv:2302.05442
            query_BTHK, key_BTGK = self._norm("query_norm", query_BTHK), self._norm("key_norm", key_BTGK)
        if context.rope is not None:
            query_BTHK, key_BTGK = rotate(query_BTHK, context.rope), rotate(key_BTGK, context.rope)
        if c.query_scalar is not None:
            factor = math.sqrt(c.channels_per_head / c.query_scalar)  # `attend` divides by the root of the former
            query_BTHK = (query_BTHK.astype(jnp.float32) * factor).astype(query_BTHK.dtype)
        if cache is not None:
            cache = cache.write(key_BTGK, value_BTGK, context.num_cached)
        if cache is None or context.num_cached is None:
            query_BTHK, key_BTGK = checkpoint_name(query_BTHK, "query"), checkpoint_name(key_BTGK, "key")
            value_BTGK = checkpoint_name(value_BTGK, "value")
            kernel = c.attention if cache is None or c.attention == "xla" else "auto"  # a prompt may have any length
            more = {"segment_ids": context.segment_ids_BT, "kernel": kernel}
            mixed_BTHK = self._attend((query_BTHK, key_BTGK, value_BTGK), context, **more)
        else:
            mixed_BTHK = self._attend((query_BTHK, *cache.read(), context.positions_BT), context, kernel="xla")
        out = Weights(c.d_model, residual_std(c), c.use_bias, name="out")(math.prod(mixed_BTHK.shape[2:]))
        out_BTD = add_lora(c, "out", mixed_BTHK, merge_heads(mixed_BTHK, out, shards), shards, row=True)
        return checkpoint_name(out_BTD, "attention_out"), cache

    def _attend(self, arrays: tuple[jax.Array, ...], context: TokenContext, **more: Any) -> jax.Array:
        """Calls `attend` with the window of the layer, which depends on its number if some layers have none."""
        if self.is_initializing():
            return arrays[0]  # parameters do not depend on it
        attend_to = functools.partial(attend, softcap=self.config.attention_softcap, **more)
        within = functools.partial(attend_to, window=self.config.attention_window)
        if context.is_global is None:
            return within(*arrays)
        return jax.lax.cond(context.is_global, attend_to, within, *arrays)

    def _norm(self, name: str, x_BTHK: jax.Array) -> jax.Array:
        """Applies RMSNorm to each head, or to the channels of all heads at once."""
        norm = Norm(self.config, rms=True, num_shards=self.parallel.tensor, name=name)
        if self.config.qk_norm != "projection":
            return norm(x_BTHK)
        return norm(x_BTHK.reshape(*x_BTHK.shape[:2], -1)).reshape(x_BTHK.shape)

    def _project(self, x_BTD: jax.Array) -> list[jax.Array]:
        """Returns queries, keys and values, each `[B, T, heads, K]`."""
        c, width = self.config, self.config.channels_per_head
        use_bias = c.use_bias or c.qkv_bias
        heads = {"query": c.num_heads, "key": c.kv_heads, "value": c.kv_heads}
        weights = [
            Weights(num_heads * width // self.parallel.tensor, INIT_STD, use_bias, name=name)(x_BTD.shape[-1])
            for name, num_heads in heads.items()
        ]
        results = zip(heads, project_heads(x_BTD, weights, width), strict=True)
        return [add_lora(c, name, x_BTD, y, self.parallel.tensor, row=False) for name, y in results]


class Block(nn.Module):
    """One layer: attention and feed-forward, each normalized and added to the residual stream."""

    config: ModelConfig
    parallel: Parallel

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: TokenContext, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None, RouterSums | None]:
        c, sums = self.config, None

        def norm(order, name, x_BTD):
            return Norm(c, c.norm == "rmsnorm", name=name)(x_BTD) if c.norm_order in (order, "both") else x_BTD

        with jax.named_scope("attention"):
            attention = Attention(c, self.parallel, name="attention")
            mixed_BTD, cache = attention(norm("pre", "attention_norm", x_BTD), context, cache)
            x_BTD += norm("post", "attention_post_norm", mixed_BTD)
        with jax.named_scope("mlp"):
            mixed_BTD = norm("pre", "feed_forward_norm", x_BTD)
            if c.num_experts:
                mixed_BTD, sums = Experts(c, self.parallel, name="feed_forward")(mixed_BTD, context.weight_BT)
            else:
                mixed_BTD = FeedForward(c, self.parallel, name="feed_forward")(mixed_BTD)
            x_BTD += norm("post", "feed_forward_post_norm", mixed_BTD)
        return x_BTD, cache, sums
