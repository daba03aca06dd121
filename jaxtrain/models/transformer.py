"""One decoder-only transformer in Flax Linen, GPT-2 to Llama by its fields.

Parameters are float32 and stacked over layers, `[L, ...]`, whether the loop over layers is scanned or unrolled. They
compute in the dtype that they are given in, so a bfloat16 copy of the tree makes a bfloat16 forward pass; norms,
softmax and rotary angles are float32 always.

Inside `jax.shard_map` the same code runs on each device's part of the parameters and of the batch: `Parallel` says in
how many parts they are. A layer then has its part of the heads and hidden channels; models/parallel.py has the
collectives.

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
from jaxtrain.models.attention import attend, rope_tables, rotate
from jaxtrain.models.layout import gather_layer
from jaxtrain.models.masters import WithMasters, cast_masters
from jaxtrain.models.parallel import Parallel, enter_tensor, gather, leave_tensor, look_up, together
from jaxtrain.models.remat import ATTENTION, BLOCK_INPUT, checkpoint_name, rematerialize

Params = dict[str, Any]

_INIT_STD = 0.02  # Radford et al., 2019


class Cache(NamedTuple):
    """Keys and values of the tokens seen, `[L, B, S, G, K]` (without L inside a layer)."""

    key: jax.Array
    value: jax.Array


class Place(NamedTuple):
    """Where the tokens are, the same for all layers: positions, their rotary tables, and how many are in the cache."""

    positions_BT: jax.Array
    rope: tuple[jax.Array, jax.Array] | None
    num_cached: jax.Array | None


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the last dimension, in float32."""

    config: ModelConfig
    rms: bool
    per_part: int = 1  # devices among which what is normed is shared out

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = enter_tensor(self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.per_part)
        y = x.astype(jnp.float32)
        if not self.rms:
            y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.config.norm_eps)
        y *= _broadcast(scale.astype(jnp.float32), y)
        if self.config.use_bias and not self.rms:
            y += _broadcast(self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32), y)
        return y.astype(x.dtype)


class Linear(nn.Module):
    """Multiplies the last dimension of x by a kernel `[in, features]`.

    `partial`: x and the kernel have one device's part of the contraction, of as many; the sum is over all of them.
    """

    features: int
    std: float
    use_bias: bool
    partial: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features))
        y = leave_tensor(x @ kernel, self.partial)
        if self.use_bias:
            y += _broadcast(self.param("bias", nn.initializers.zeros, (self.features,)), y)
        return y


def _broadcast(x: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(x, tuple(range(like.ndim - x.ndim)))


class Attention(nn.Module):
    """Causal self-attention; with a cache, over the cached tokens too. H and G are this device's heads."""

    config: ModelConfig
    parallel: Parallel

    @nn.compact
    def __call__(self, x_BTD: jax.Array, place: Place, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        c, parts = self.config, self.parallel.tensor
        x_BTD = enter_tensor(x_BTD, parts)

        def project(name, num_heads):
            features = num_heads * c.channels_per_head // parts
            y = Linear(features, _INIT_STD, c.use_bias, name=name)(x_BTD)
            return y.reshape(*y.shape[:-1], -1, c.channels_per_head)

        query_BTHK, value_BTGK = project("query", c.num_heads), project("value", c.kv_heads)
        key_BTGK = project("key", c.kv_heads)
        if c.qk_norm:  # arXiv:2302.05442
            query_BTHK = Norm(c, rms=True, per_part=parts, name="query_norm")(query_BTHK)
            key_BTGK = Norm(c, rms=True, per_part=parts, name="key_norm")(key_BTGK)
        if place.rope is not None:
            query_BTHK, key_BTGK = rotate(query_BTHK, place.rope), rotate(key_BTGK, place.rope)
        if cache is None:
            query_BTHK, key_BTGK = checkpoint_name(query_BTHK, "query"), checkpoint_name(key_BTGK, "key")
            value_BTGK = checkpoint_name(value_BTGK, "value")
            mixed_BTHK = attend(query_BTHK, key_BTGK, value_BTGK, kernel=c.attention)
            mixed_BTHK = checkpoint_name(mixed_BTHK, ATTENTION)
        else:
            new = Cache(key_BTGK, value_BTGK)
            cache = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, place.num_cached, axis=1), cache, new
            )
            mixed_BTHK = attend(query_BTHK, cache.key, cache.value, place.positions_BT)
        mixed_BTF = mixed_BTHK.reshape(*x_BTD.shape[:-1], -1)
        out = Linear(c.d_model, _residual_std(c), c.use_bias, partial=parts, name="out")
        return checkpoint_name(out(mixed_BTF), "attention_out"), cache


class FeedForward(nn.Module):
    """GELU (arXiv:1606.08415, tanh form) or SwiGLU (arXiv:2002.05202). F are this device's hidden channels."""

    config: ModelConfig
    parallel: Parallel

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        parts = self.parallel.tensor
        x_BTD = enter_tensor(x_BTD, parts)

        def project(name):
            y_BTF = Linear(c.d_ff // parts, _INIT_STD, c.use_bias, name=name)(x_BTD)
            return checkpoint_name(y_BTF, name)

        hidden_BTF = project("up")
        if c.feed_forward == "swiglu":
            hidden_BTF *= jax.nn.silu(project("gate"))
        else:
            hidden_BTF = jax.nn.gelu(hidden_BTF, approximate=True)
        return Linear(c.d_model, _residual_std(c), c.use_bias, partial=parts, name="down")(hidden_BTF)


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to the residual stream behind a norm."""

    config: ModelConfig
    parallel: Parallel

    @nn.compact
    def __call__(self, x_BTD: jax.Array, place: Place, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        c = self.config
        rms = c.norm == "rmsnorm"
        with jax.named_scope("attention"):
            attention = Attention(c, self.parallel, name="attention")
            mixed_BTD, cache = attention(Norm(c, rms, name="attention_norm")(x_BTD), place, cache)
            x_BTD += mixed_BTD
        with jax.named_scope("mlp"):
            feed_forward = FeedForward(c, self.parallel, name="feed_forward")
            x_BTD += feed_forward(Norm(c, rms, name="feed_forward_norm")(x_BTD))
        return x_BTD, cache


class Transformer(nn.Module):
    """Tokens to the final hidden states; `head_kernel` turns those into logits.

    The two are apart so that training can leave the logits to `linear_cross_entropy`.
    """

    config: ModelConfig
    parallel: Parallel = Parallel()

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, cache: Cache | None = None, num_cached: jax.Array | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Runs the decoder.

        Args:
          tokens_BT: token ids, integers.
          cache: keys and values of the tokens before these (`empty_cache`); None: there are none.
          num_cached: how many tokens the cache holds, int32 scalar; the new ones are written behind them.

        Returns:
          Hidden states `[B, T, D]` after the final norm, in the parameters' dtype, and the filled cache.
        """
        c, p = self.config, self.parallel
        if tokens_BT.shape[1] > c.max_seq_len:
            raise ValueError(f"{tokens_BT.shape[1]} tokens exceed model.max_seq_len {c.max_seq_len}")
        part_VD = (c.vocab_rows // p.tensor, c.d_model // p.fsdp)
        table_VD = self.param("embedding", nn.initializers.normal(_head_std(c)), part_VD)
        with jax.named_scope("embed"):
            x_BTD = look_up(table_VD, tokens_BT, p)
        first = jnp.zeros((), jnp.int32) if num_cached is None else num_cached
        positions_BT = jnp.broadcast_to(first + jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
        rope = None
        if c.positions == "rope":
            rope = rope_tables(positions_BT, c.channels_per_head, c.rope_theta)
        else:
            rows = self.param("positions", nn.initializers.normal(_INIT_STD), (c.max_seq_len, c.d_model))
            with jax.named_scope("embed"):
                x_BTD += jnp.take(rows, positions_BT, axis=0)
        if self.is_initializing():
            self.param("layers", functools.partial(_init_layers, c))
        layers = self.get_variable("params", "layers"), self.get_variable("masters", "layers")
        x_BTD, cache = _run_layers(c, p, layers, x_BTD, Place(positions_BT, rope, num_cached), cache)
        if not c.tie_embeddings:
            self.param("head", nn.initializers.normal(_head_std(c)), part_VD[::-1])
        with jax.named_scope("head"):
            return Norm(c, c.norm == "rmsnorm", name="final_norm")(x_BTD), cache


def _init_layers(c: ModelConfig, key: jax.Array) -> Params:
    """Parameters of all layers, whole, `[L, ...]`."""
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    rope = rope_tables(tokens_BT, c.channels_per_head, c.rope_theta) if c.positions == "rope" else None
    block = Block(c, Parallel(), parent=None)

    def init(key):
        return block.init(key, jnp.zeros((1, 1, c.d_model)), Place(tokens_BT, rope, None), None)["params"]

    return jax.vmap(init)(jax.random.split(key, c.num_layers))


def _run_layers(
    c: ModelConfig,
    p: Parallel,
    layers: tuple[Params, Params | None],
    x_BTD: jax.Array,
    place: Place,
    cache: Cache | None,
) -> tuple[jax.Array, Cache | None]:
    """Runs one layer after the other, each with its slice of the parameters (and their masters) and of the cache."""
    block = Block(c, p, parent=None)

    def body(x_BTD, layer):
        (params, masters), cache = layer
        x_BTD = checkpoint_name(x_BTD, BLOCK_INPUT)
        # Cast and gathered in here, where the backward pass does it again: no weights are kept in another form.
        if masters is not None:
            params = cast_masters(params, masters, x_BTD)
        return block.apply({"params": gather_layer(params, p.fsdp)}, x_BTD, place, cache)

    body = rematerialize(body, c.remat, gathered=p.fsdp > 1, looped=c.scan_unroll not in (0, c.num_layers))
    return jax.lax.scan(body, x_BTD, (layers, cache), unroll=c.scan_unroll or c.num_layers)


def init_params(model: Transformer, key: jax.Array) -> Params:
    """Initial parameters, whole, float32. A vocabulary of unknown size is a ValueError."""
    if model.config.vocab_size < 1:
        raise ValueError(f"model.vocab_size must be above 0 to make parameters, got {model.config.vocab_size}")
    # One token is enough to know the shapes, and too few for a kernel that works in blocks.
    whole = Transformer(dataclasses.replace(model.config, attention="xla"))
    return whole.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def head_kernel(params: Params) -> jax.Array:
    """The output head `[D, V]`: its own matrix, or the transposed token embedding."""
    return params["head"] if "head" in params else params["embedding"].T


def logits(model: Transformer, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """Logits `[B, T, V]` of hidden states, float32, soft-capped if the model says so; V without its padding."""
    kernel_DV = head_kernel(params)[:, : model.config.vocab_size]
    raw_BTV = jnp.matmul(hidden_BTD, kernel_DV, preferred_element_type=jnp.float32)
    cap = model.config.logit_softcap
    return cap * jnp.tanh(raw_BTV / cap) if cap else raw_BTV


def empty_cache(config: ModelConfig, batch_size: int, dtype: jax.typing.DTypeLike) -> Cache:
    """A cache for `max_seq_len` tokens."""
    shape = (config.num_layers, batch_size, config.max_seq_len, config.kv_heads, config.channels_per_head)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def make_loss_fn(
    model: Transformer, *, z_loss: float = 0.0, label_smoothing: float = 0.0, chunk_size: int | None = None
) -> Callable[[Params, dict[str, jax.Array]], LossSums]:
    """Makes `loss_fn(params, batch) -> LossSums` for next-token prediction.

    Args:
      model: the transformer. With `model.parallel` the function belongs into `jax.shard_map`, where it sees one
        device's part of the parameters and the batch and returns the sums of that part; see `sharding.map_gradients`.
      z_loss, label_smoothing, chunk_size: see `linear_cross_entropy`.

    Returns:
      The loss function. Its batch holds `inputs` and `labels` `[B, T]` int32 and `where` `[B, T]` bool; its parameters
      may be `WithMasters`.
    """
    c, p = model.config, model.parallel

    def loss_fn(params: Params, batch: dict[str, jax.Array]) -> LossSums:
        params, masters = params if isinstance(params, WithMasters) else (params, None)
        variables = {"params": params} | ({"masters": {"layers": masters["layers"]}} if masters else {})
        hidden_BTD, _ = model.apply(variables, batch["inputs"])
        with jax.named_scope("head"):
            hidden_BTD, kernel_DV = together(hidden_BTD, head_kernel(params))
            return linear_cross_entropy(
                hidden_BTD,
                gather(kernel_DV, 0, p.fsdp),
                batch["labels"],
                where=batch["where"],
                z_loss=z_loss,
                label_smoothing=label_smoothing,
                logit_softcap=c.logit_softcap or None,
                chunk_size=chunk_size,
                num_classes=c.vocab_size,
                vocab_axis="tensor" if p.tensor > 1 else None,
            )

    return loss_fn


def _residual_std(config: ModelConfig) -> float:
    # The residual stream is a sum of 2 L branches: keep its variance (Radford et al., 2019).
    return _INIT_STD / math.sqrt(2 * config.num_layers)


def _head_std(config: ModelConfig) -> float:
    # Hidden states have unit variance, so logits have std * sqrt(D), and the loss starts at ln V plus half its square.
    # 0.02 for 768 channels would start 0.15 above ln V.
    return min(_INIT_STD, 0.35 / math.sqrt(config.d_model))
