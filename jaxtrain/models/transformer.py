"""Decoder-only transformer in Flax Linen, configurable as the families of `config.FAMILIES`.

Parameters are float32 and stacked over layers, `[L, ...]`, whether the loop over layers is scanned or unrolled. The
forward pass computes in the dtype of the parameters it receives; norms, softmax and rotary angles are always float32.

Inside `jax.shard_map` the same code runs on each device's shard of the parameters and the batch. `Parallel` holds the
number of shards; each device then has its share of the heads and hidden channels. The collectives are in parallel.py.

Shape suffixes: B batch, T tokens, S cached tokens, D d_model, F d_ff, H query heads, G key and value heads, K head_dim,
V vocabulary, L layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.config import ModelConfig
from jaxtrain.losses import LossSums, linear_cross_entropy
from jaxtrain.models.kernels.attention import attend, rope_tables, rotate
from jaxtrain.models.kernels.linear import Weights, linear
from jaxtrain.models.kernels.pointwise import gelu, norm, swiglu
from jaxtrain.models.layout import gather_layer
from jaxtrain.models.masters import WithMasters, cast_masters
from jaxtrain.models.parallel import Parallel, barrier_gradients, enter_tensor, gather, look_up, take_rows
from jaxtrain.models.remat import BLOCK_INPUT, checkpoint_name, rematerialize

Params = dict[str, Any]
Rope = tuple[jax.Array, jax.Array]

_INIT_STD = 0.02  # Radford et al., 2019


class Cache(NamedTuple):
    """Keys and values of the previous tokens, `[L, B, S, G, K]` (without L inside a layer)."""

    key: jax.Array
    value: jax.Array

    def write(self, new: "Cache", start: jax.Array | None) -> "Cache":
        """Returns one layer's cache with the new tokens `[B, T, G, K]` at position `start`, or `[B]`, or 0."""

        def put(old: jax.Array, new: jax.Array, start: jax.typing.ArrayLike) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=old.ndim - 3)

        start = 0 if start is None else start
        put = jax.vmap(put) if jnp.ndim(start) else put
        return jax.tree.map(lambda old, new: put(old, new, start), self, new)


class TokenContext(NamedTuple):
    """Facts about the tokens that all layers share: positions, rotary tables, cache length, segments.

    `is_global`, bool scalar, differs between layers: True in a layer that attends to all keys. None if all are alike.
    """

    positions_BT: jax.Array
    rope: Rope | None
    num_cached: jax.Array | None = None
    segment_ids_BT: jax.Array | None = None
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
            cache = cache.write(Cache(key_BTGK, value_BTGK), context.num_cached)
        if cache is None or context.num_cached is None:
            query_BTHK, key_BTGK = checkpoint_name(query_BTHK, "query"), checkpoint_name(key_BTGK, "key")
            value_BTGK = checkpoint_name(value_BTGK, "value")
            kernel = c.attention if cache is None or c.attention == "xla" else "auto"  # a prompt may have any length
            more = {"segment_ids": context.segment_ids_BT, "kernel": kernel}
            mixed_BTHK = self._attend((query_BTHK, key_BTGK, value_BTGK), context, **more)
        else:
            mixed_BTHK = self._attend((query_BTHK, *cache, context.positions_BT), context, kernel="xla")
        mixed_BTF = mixed_BTHK.reshape(*x_BTD.shape[:-1], -1)
        out = Weights(c.d_model, _residual_std(c), c.use_bias, name="out")
        return checkpoint_name(linear(mixed_BTF, out(mixed_BTF.shape[-1]), shards), "attention_out"), cache

    def _attend(self, arrays: tuple[jax.Array, ...], context: TokenContext, **more: Any) -> jax.Array:
        """Calls `attend` with the window of the layer, which depends on its number if some layers have none."""
        attend_to = functools.partial(attend, softcap=self.config.attention_softcap, **more)
        within = functools.partial(attend_to, window=self.config.attention_window)
        return (
            within(*arrays)
            if context.is_global is None
            else jax.lax.cond(context.is_global, attend_to, within, *arrays)
        )

    def _norm(self, name: str, x_BTHK: jax.Array) -> jax.Array:
        """Applies RMSNorm to each head, or to the channels of all heads together."""
        norm = Norm(self.config, rms=True, num_shards=self.parallel.tensor, name=name)
        if self.config.qk_norm != "projection":
            return norm(x_BTHK)
        return norm(x_BTHK.reshape(*x_BTHK.shape[:2], -1)).reshape(x_BTHK.shape)

    def _project(self, x_BTD: jax.Array) -> list[jax.Array]:
        """Returns queries, keys and values from one matrix product."""
        c, width = self.config, self.config.channels_per_head
        use_bias = c.use_bias or c.qkv_bias
        heads = {"query": c.num_heads, "key": c.kv_heads, "value": c.kv_heads}
        sizes = [num_heads * width // self.parallel.tensor for num_heads in heads.values()]
        weights = [
            Weights(size, _INIT_STD, use_bias, name=name)(x_BTD.shape[-1])
            for name, size in zip(heads, sizes, strict=True)
        ]
        kernels, biases = zip(*weights, strict=True)
        kernel = jnp.concatenate(kernels, axis=-1)
        bias = jnp.concatenate(biases, axis=-1) if use_bias else None
        y_BTF = linear(x_BTD, (kernel, bias))
        split = jnp.split(y_BTF, [sizes[0], sizes[0] + sizes[1]], axis=-1)
        return [y.reshape(*y.shape[:-1], -1, width) for y in split]


class FeedForward(nn.Module):
    """GELU (arXiv:1606.08415, tanh form), or SwiGLU or GeGLU (arXiv:2002.05202). F counts this device's channels."""

    config: ModelConfig
    parallel: Parallel

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c, shards = self.config, self.parallel.tensor
        x_BTD = enter_tensor(x_BTD, shards)

        def project(name):
            weights = Weights(c.d_ff // shards, _INIT_STD, c.use_bias, name=name)
            return checkpoint_name(linear(x_BTD, weights(x_BTD.shape[-1])), name)

        hidden_BTF = project("up")
        if c.feed_forward == "swiglu":
            hidden_BTF = swiglu(hidden_BTF, project("gate"))
        else:
            hidden_BTF = hidden_BTF * gelu(project("gate")) if c.gated else gelu(hidden_BTF)
        down = Weights(c.d_model, _residual_std(c), c.use_bias, name="down")
        return linear(hidden_BTF, down(hidden_BTF.shape[-1]), shards)


class Block(nn.Module):
    """One layer: attention and feed-forward, each normalized and added to the residual stream."""

    config: ModelConfig
    parallel: Parallel

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: TokenContext, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        c = self.config

        def norm(order, name, x_BTD):
            return Norm(c, c.norm == "rmsnorm", name=name)(x_BTD) if c.norm_order in (order, "both") else x_BTD

        with jax.named_scope("attention"):
            attention = Attention(c, self.parallel, name="attention")
            mixed_BTD, cache = attention(norm("pre", "attention_norm", x_BTD), context, cache)
            x_BTD += norm("post", "attention_post_norm", mixed_BTD)
        with jax.named_scope("mlp"):
            feed_forward = FeedForward(c, self.parallel, name="feed_forward")
            mixed_BTD = feed_forward(norm("pre", "feed_forward_norm", x_BTD))
            x_BTD += norm("post", "feed_forward_post_norm", mixed_BTD)
        return x_BTD, cache


class Transformer(nn.Module):
    """Decoder from tokens to final hidden states.

    The output head is separate (`head_kernel`, `logits`), so that training can leave the logits to
    `linear_cross_entropy`.
    """

    config: ModelConfig
    parallel: Parallel = Parallel()

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        cache: Cache | None = None,
        num_cached: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the decoder.

        Args:
          tokens_BT: integer token ids.
          cache: keys and values of the tokens before these (`empty_cache`), or None.
          num_cached: number of valid tokens in the cache, int32 scalar or `[B]`. The new tokens are written after them.
            None: the cache is empty.
          segment_ids: int `[B, T]`. A token attends to its own segment only.
          positions: int `[B, T]`, for the position encoding. None counts from the start of the row, or of the cache.

        Returns:
          Hidden states `[B, T, D]` after the final norm, in the parameters' dtype, and the extended cache.

        Raises:
          ValueError: more tokens than `max_seq_len`, or segments together with a cache.
        """
        c, p = self.config, self.parallel
        if cache is not None and segment_ids is not None:
            raise ValueError("a cache holds one segment per row: leave out segment_ids, or run without the cache")
        if tokens_BT.shape[1] > c.max_seq_len:
            raise ValueError(f"{tokens_BT.shape[1]} tokens exceed model.max_seq_len {c.max_seq_len}")
        shard_VD = (c.vocab_rows // p.tensor, c.d_model // p.fsdp)
        table_VD = self.param("embedding", nn.initializers.normal(_head_std(c)), shard_VD)
        with jax.named_scope("embed"):
            x_BTD = look_up(table_VD, tokens_BT, p)
        start = jnp.zeros((), jnp.int32) if num_cached is None else num_cached
        positions_BT = jnp.broadcast_to(start.reshape(-1, 1) + jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        positions_BT = positions_BT if positions is None else positions
        if c.scale_embeddings:
            x_BTD *= jnp.asarray(math.sqrt(c.d_model), x_BTD.dtype)
        rope = local_rope = None
        if c.positions == "rope":
            rope = rope_tables(positions_BT, c.channels_per_head, c.rope_theta, c.rope_stretch)
            if c.local_rope_theta:
                local_rope = rope_tables(positions_BT, c.channels_per_head, c.local_rope_theta)
        else:
            rows = self.param("positions", nn.initializers.normal(_INIT_STD), (c.max_seq_len, c.d_model))
            with jax.named_scope("embed"):
                x_BTD += take_rows(rows, positions_BT)
        if self.is_initializing():
            self.param("layers", functools.partial(_init_layers, c))
        params, masters = (self.get_variable(kind, "layers") for kind in ("params", "masters"))
        context = TokenContext(positions_BT, rope, num_cached, segment_ids, local_rope)
        x_BTD, cache = decode_layers(c, p, params, masters, x_BTD, context, cache)
        if not c.tie_embeddings:
            self.param("head", nn.initializers.normal(_head_std(c)), shard_VD[::-1])
        with jax.named_scope("head"):
            return Norm(c, c.norm == "rmsnorm", name="final_norm")(x_BTD), cache


def decode_layers(
    config: ModelConfig,
    parallel: Parallel,
    params: Params,
    masters: Params | None,
    x_BTD: jax.Array,
    context: TokenContext,
    cache: Cache | None,
) -> tuple[jax.Array, Cache | None]:
    """Runs all layers.

    Args:
      config, parallel: sizes and number of shards.
      params: this device's shards of the stacked parameters, `[L, ...]`.
      masters: float32 masters to cast in each layer, or None to compute with `params`; see masters.py.
      x_BTD: embedded tokens.
      context: positions, rotary tables, cache length and segments of the tokens.
      cache: keys and values of the previous tokens, or None.

    Returns:
      The residual stream `[B, T, D]` and the extended cache.
    """
    block = Block(config, parallel, parent=None)

    def layer(x_BTD, inputs):
        (params, masters), cache, is_global = inputs
        x_BTD = checkpoint_name(x_BTD, BLOCK_INPUT)
        # Cast and gathered inside the rematerialized function, so that no second copy of the weights is stored.
        if masters is not None:
            params = cast_masters(params, masters, x_BTD)
        return block.apply({"params": gather_layer(params, parallel.fsdp)}, x_BTD, context.in_layer(is_global), cache)

    # The program has replaced "auto". Without a program the layers are looped over.
    unroll = {"all": config.num_layers, "auto": 1}.get(config.scan_unroll, config.scan_unroll)
    layer = rematerialize(layer, config.remat, gathered=parallel.fsdp > 1, looped=unroll < config.num_layers)
    is_global_L = None
    if config.global_every:
        is_global_L = jnp.asarray([i not in config.window_layers for i in range(config.num_layers)])
    return jax.lax.scan(layer, x_BTD, ((params, masters), cache, is_global_L), unroll=unroll)


def _init_layers(c: ModelConfig, key: jax.Array) -> Params:
    """Returns the unsharded parameters of all layers, `[L, ...]`."""
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    rope = rope_tables(tokens_BT, c.channels_per_head, c.rope_theta) if c.positions == "rope" else None
    block = Block(c, Parallel(), parent=None)

    def init(key):
        return block.init(key, jnp.zeros((1, 1, c.d_model)), TokenContext(tokens_BT, rope), None)["params"]

    return jax.vmap(init)(jax.random.split(key, c.num_layers))


def init_params(model: Transformer, key: jax.Array) -> Params:
    """Returns the initial parameters, float32 and unsharded. Raises a ValueError if `vocab_size` is not set."""
    if model.config.vocab_size is None:
        raise ValueError("model.vocab_size is None: set it to the size of the tokenizer's vocabulary")
    # One token suffices for the shapes, but not for an attention kernel that works in blocks.
    unsharded = Transformer(dataclasses.replace(model.config, attention="xla"))
    return unsharded.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def head_kernel(params: Params) -> jax.Array:
    """Returns the output head `[D, V]`: a separate matrix, or the transposed token embedding."""
    return params["head"] if "head" in params else params["embedding"].T


def logits(model: Transformer, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """Returns the float32 logits `[B, T, V]` of hidden states, soft-capped if configured. V excludes padding rows."""
    kernel_DV = head_kernel(params)[:, : model.config.vocab_size]
    raw_BTV = jnp.matmul(hidden_BTD, kernel_DV, preferred_element_type=jnp.float32)
    cap = model.config.logit_softcap
    return cap * jnp.tanh(raw_BTV / cap) if cap else raw_BTV


def empty_cache(config: ModelConfig, batch_size: int, length: int, dtype: jax.typing.DTypeLike) -> Cache:
    """Allocates a cache for `length` tokens a row."""
    shape = (config.num_layers, batch_size, length, config.kv_heads, config.channels_per_head)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def make_loss_fn(
    model: Transformer, *, z_loss: float = 0.0, label_smoothing: float = 0.0, chunk_size: int | None = None
) -> Callable[[Params, dict[str, jax.Array]], LossSums]:
    """Makes `loss_fn(params, batch) -> LossSums` for next-token prediction.

    Args:
      model: the transformer. If `model.parallel` has several shards, the function runs inside `jax.shard_map` on one
        device's shard of the parameters and the batch, and returns that shard's sums; see `mesh.map_gradients`.
      z_loss, label_smoothing, chunk_size: see `linear_cross_entropy`.

    Returns:
      The loss function. Its batch holds `inputs` and `labels` int32 `[B, T]`, `where` bool `[B, T]`, and optionally
      `segment_ids` and `positions` int32 `[B, T]`; see `Transformer`. Its parameters may be `WithMasters`.
    """
    c, p = model.config, model.parallel

    def loss_fn(params: Params, batch: dict[str, jax.Array]) -> LossSums:
        params, masters = params if isinstance(params, WithMasters) else (params, None)
        variables = {"params": params} | ({"masters": {"layers": masters["layers"]}} if masters else {})
        documents = {name: batch.get(name) for name in ("segment_ids", "positions")}
        hidden_BTD, _ = model.apply(variables, batch["inputs"], **documents)
        with jax.named_scope("head"):
            hidden_BTD, kernel_DV = barrier_gradients(hidden_BTD, head_kernel(params))
            return linear_cross_entropy(
                hidden_BTD,
                gather(kernel_DV, 0, p.fsdp),
                batch["labels"],
                where=batch["where"],
                z_loss=z_loss,
                label_smoothing=label_smoothing,
                logit_softcap=c.logit_softcap,
                chunk_size=chunk_size,
                num_classes=c.vocab_size,
                vocab_axis="tensor" if p.tensor > 1 else None,
                check_labels=False,  # the loader checks them; here the check would slow down the dispatch of each step
            )

    return loss_fn


def _residual_std(config: ModelConfig) -> float:
    # The residual stream adds up 2 L branches; this scale keeps its variance (Radford et al., 2019).
    return _INIT_STD / math.sqrt(2 * config.num_layers)


def _head_std(config: ModelConfig) -> float:
    # Hidden states have unit variance, so logits have standard deviation std * sqrt(D), and the initial loss is ln V
    # plus half the square of that. With 768 channels, 0.02 would start 0.15 above ln V.
    return min(_INIT_STD, 0.35 / math.sqrt(config.d_model))
