"""Decoder-only transformer in Flax Linen, configurable as the families of `config.FAMILIES`.

Parameters are float32 and stacked over layers, `[L, ...]`, whether the loop over layers is scanned or unrolled. The
forward pass computes in the dtype of the parameters it receives; norms, softmax and rotary angles are always float32.

Inside `jax.shard_map` the same code runs on each device's shard of the parameters and the batch. `Parallel` holds the
number of shards; each device then has its share of the heads and hidden channels. The collectives are in parallel.py.

Shape suffixes: B batch, T tokens, D d_model, V vocabulary, L layers.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxtrain.config import ModelConfig
from jaxtrain.loss_head import softcap
from jaxtrain.models.block import Block, Cache, Norm, TokenContext
from jaxtrain.models.feed_forward import INIT_STD, RouterSums
from jaxtrain.models.kernels.attention import rope_tables
from jaxtrain.models.layout import gather_layer
from jaxtrain.models.masters import cast_masters, split_layers
from jaxtrain.models.parallel import Parallel, look_up, take_rows
from jaxtrain.models.remat import BLOCK_INPUT, checkpoint_name, rematerialize

Params = dict[str, Any]


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
        cache: tuple[Cache, ...] | None = None,
        num_cached: jax.Array | None = None,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        router_weight: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[Cache, ...] | None]:
        """Runs the decoder.

        Args:
          tokens_BT: integer token ids.
          cache: keys and values of the tokens before these (`TransformerModel.init_cache`), or None.
          num_cached: number of tokens in the cache, int32 scalar or `[B]`; the new ones follow. None: it is empty.
          segment_ids: int `[B, T]`. A token attends to its own segment only.
          positions: int `[B, T]`, for the position encoding. None counts from the start of the row, or of the cache.
          router_weight: `[B, T]`, weights of the `RouterSums` sown as `sums` in the collection `router`, or None.

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
            local_rope = c.local_rope_theta and rope_tables(positions_BT, c.channels_per_head, c.local_rope_theta)
        else:
            rows = self.param("positions", nn.initializers.normal(INIT_STD), (c.max_seq_len, c.d_model))
            with jax.named_scope("embed"):
                x_BTD += take_rows(rows, positions_BT)
        if self.is_initializing():  # only the parameters are needed
            self.param("layers", functools.partial(_init_layers, c))
        else:
            params, masters = (self.get_variable(kind, "layers") for kind in ("params", "masters"))
            context = TokenContext(positions_BT, rope, num_cached, segment_ids, router_weight, local_rope)
            x_BTD, cache, sums = decode_layers(c, p, params, masters, x_BTD, context, cache)
            if sums is not None:
                self.sow("router", "sums", sums, reduce_fn=lambda _, new: new)
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
    cache: tuple[Cache, ...] | None,
) -> tuple[jax.Array, tuple[Cache, ...] | None, RouterSums | None]:
    """Runs all layers on embedded tokens; returns the residual stream `[B, T, D]`, the extended cache, and router sums.

    Args:
      params: this device's shards of the stacked parameters, `[L, ...]`.
      masters: the same in float32, to cast in each layer, or None to compute with `params`; see masters.py.
    """
    block = Block(config, parallel, parent=None)

    def layer(x_BTD, inputs):
        params, i, is_global, cache = inputs
        x_BTD = checkpoint_name(x_BTD, BLOCK_INPUT)
        # Cast and gathered inside the rematerialized function, so that no second copy of the weights is stored.
        if masters is not None:
            params = cast_masters(params, masters, i, x_BTD)
        gathered = {"params": gather_layer(params, parallel.fsdp)}
        x_BTD, cache, sums = block.apply(gathered, x_BTD, context.in_layer(is_global), cache)
        return x_BTD, (cache, sums)

    # The program has replaced "auto". Without a program the layers are looped over.
    unroll = {"all": config.num_layers, "auto": 1}.get(config.scan_unroll, config.scan_unroll)
    layer = rematerialize(layer, config.remat, gathered=parallel.fsdp > 1, looped=unroll < config.num_layers)
    is_global_L = None
    if config.global_every:
        is_global_L = jnp.asarray([i not in config.window_layers for i in range(config.num_layers)])
    numbers = jnp.arange(config.num_layers), is_global_L
    if cache is None:
        cuts, sums = _cuts(config, looped=masters is not None and unroll == 1), []
        for part, own in zip(split_layers(params, cuts), itertools.pairwise(cuts), strict=True):
            inputs = part, *jax.tree.map(lambda leaf, own=slice(*own): leaf[own], numbers), None
            x_BTD, (_, more) = jax.lax.scan(layer, x_BTD, inputs, unroll=unroll)
            sums.append(more)
        return x_BTD, None, jax.tree.map(lambda *parts: jnp.concatenate(parts), *sums)
    extended = []
    for i, own in enumerate(cache):  # a scan would copy the whole cache for every token
        weights = jax.tree.map(lambda leaf, i=i: leaf[i], (params, *numbers))
        x_BTD, (own, _) = layer(x_BTD, (*weights, own))
        extended.append(own)
    return x_BTD, tuple(extended), None


def _cuts(config: ModelConfig, looped: bool) -> list[int]:
    """Returns the first layer of each loop over layers, and the number of layers.

    The backward pass starts with the second of two loops, and frees its saved inputs before the gradients of the first
    need memory. One loop would store both in full: 5.32 instead of 4.45 GB for Llama 2 7B on v5p:2x2x2.
    """
    num_layers = config.num_layers
    split = looped and config.remat == "full" and num_layers >= 4
    return [0, round(0.6 * num_layers), num_layers] if split else [0, num_layers]


def _init_layers(c: ModelConfig, key: jax.Array) -> Params:
    """Returns the unsharded parameters of all layers, `[L, ...]`."""
    context = TokenContext(jnp.zeros((1, 1), jnp.int32), rope=None)
    block = Block(c, Parallel(), parent=None)

    def init(key):
        return block.init(key, jnp.zeros((1, 1, c.d_model)), context, None)["params"]

    return jax.vmap(init)(jax.random.split(key, c.num_layers))


def head_kernel(params: Params) -> jax.Array:
    """Returns the output head `[D, V]`: a separate matrix, or the transposed token embedding."""
    return params["head"] if "head" in params else params["embedding"].T


def logits(model: Transformer, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """Returns the float32 logits `[B, T, V]` of hidden states, soft-capped if configured. V excludes padding rows."""
    kernel_DV = head_kernel(params)[:, : model.config.vocab_size]
    raw_BTV = jnp.matmul(hidden_BTD, kernel_DV, preferred_element_type=jnp.float32)
    return softcap(raw_BTV, model.config.logit_softcap)


def _head_std(config: ModelConfig) -> float:
    # Hidden states have unit variance, so logits have standard deviation std * sqrt(D), and the initial loss is ln V
    # plus half the square of that. With 768 channels, 0.02 would start 0.15 above ln V.
    return min(INIT_STD, 0.35 / math.sqrt(config.d_model))
