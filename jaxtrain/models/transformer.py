"""One decoder-only transformer in Flax Linen, GPT-2 to Llama by its fields.

Parameters are float32 and stacked over layers, `[L, ...]`, whether the loop over layers is scanned or unrolled. They
compute in the dtype that they are given in, so a bfloat16 copy of the tree makes a bfloat16 forward pass; norms,
softmax and rotary angles are float32 always.

Shape suffixes: B batch, T tokens, S cached tokens, D d_model, F d_ff, H query heads, G key and value heads, K head_dim,
V vocabulary, L layers.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxtrain.config import ModelConfig
from jaxtrain.losses import LossSums, linear_cross_entropy
from jaxtrain.models.attention import attend, rope_tables, rotate

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

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        y = x.astype(jnp.float32)
        if not self.rms:
            y -= jnp.mean(y, axis=-1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.config.norm_eps)
        y *= _broadcast(scale.astype(jnp.float32), y)
        if self.config.use_bias and not self.rms:
            y += _broadcast(self.param("bias", nn.initializers.zeros, (x.shape[-1],)).astype(jnp.float32), y)
        return y.astype(x.dtype)


class Linear(nn.Module):
    """Contracts the last `num_in_dims` dimensions of x with a kernel `[*in, *features]`."""

    features: tuple[int, ...]
    std: float
    use_bias: bool
    num_in_dims: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[-self.num_in_dims :], *self.features)
        kernel = self.param("kernel", nn.initializers.normal(self.std), shape)
        y = jnp.tensordot(x, kernel, axes=self.num_in_dims)
        if self.use_bias:
            y += _broadcast(self.param("bias", nn.initializers.zeros, self.features), y)
        return y


def _broadcast(x: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(x, tuple(range(like.ndim - x.ndim)))


class Attention(nn.Module):
    """Causal self-attention; with a cache, over the cached tokens too."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, place: Place, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        c = self.config

        def project(name, num_heads):
            return Linear((num_heads, c.channels_per_head), _INIT_STD, c.use_bias, name=name)(x_BTD)

        query_BTHK, value_BTGK = project("query", c.num_heads), project("value", c.kv_heads)
        key_BTGK = project("key", c.kv_heads)
        if c.qk_norm:  # arXiv:2302.05442
            query_BTHK = Norm(c, rms=True, name="query_norm")(query_BTHK)
            key_BTGK = Norm(c, rms=True, name="key_norm")(key_BTGK)
        if place.rope is not None:
            query_BTHK, key_BTGK = rotate(query_BTHK, place.rope), rotate(key_BTGK, place.rope)
        if cache is None:
            mixed_BTHK = attend(query_BTHK, key_BTGK, value_BTGK)
        else:
            new = Cache(key_BTGK, value_BTGK)
            cache = jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, place.num_cached, axis=1), cache, new
            )
            mixed_BTHK = attend(query_BTHK, cache.key, cache.value, place.positions_BT)
        return Linear((c.d_model,), _residual_std(c), c.use_bias, num_in_dims=2, name="out")(mixed_BTHK), cache


class FeedForward(nn.Module):
    """GELU (arXiv:1606.08415, tanh form) or SwiGLU (arXiv:2002.05202)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        hidden_BTF = Linear((c.d_ff,), _INIT_STD, c.use_bias, name="up")(x_BTD)
        if c.feed_forward == "swiglu":
            hidden_BTF *= jax.nn.silu(Linear((c.d_ff,), _INIT_STD, c.use_bias, name="gate")(x_BTD))
        else:
            hidden_BTF = jax.nn.gelu(hidden_BTF, approximate=True)
        return Linear((c.d_model,), _residual_std(c), c.use_bias, name="down")(hidden_BTF)


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to the residual stream behind a norm."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, place: Place, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        c = self.config
        rms = c.norm == "rmsnorm"
        mixed_BTD, cache = Attention(c, name="attention")(Norm(c, rms, name="attention_norm")(x_BTD), place, cache)
        x_BTD += mixed_BTD
        x_BTD += FeedForward(c, name="feed_forward")(Norm(c, rms, name="feed_forward_norm")(x_BTD))
        return x_BTD, cache


class Transformer(nn.Module):
    """Tokens to the final hidden states; `head_kernel` turns those into logits.

    The two are apart so that training can leave the logits to `linear_cross_entropy`.
    """

    config: ModelConfig

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
        c = self.config
        if tokens_BT.shape[1] > c.max_seq_len:
            raise ValueError(f"{tokens_BT.shape[1]} tokens exceed model.max_seq_len {c.max_seq_len}")
        table = self.param("embedding", nn.initializers.normal(_head_std(c)), (c.vocab_size, c.d_model))
        x_BTD = jnp.take(table, tokens_BT, axis=0)
        first = jnp.zeros((), jnp.int32) if num_cached is None else num_cached
        positions_BT = jnp.broadcast_to(first + jnp.arange(tokens_BT.shape[1])[None, :], tokens_BT.shape)
        rope = None
        if c.positions == "rope":
            rope = rope_tables(positions_BT, c.channels_per_head, c.rope_theta)
        else:
            rows = self.param("positions", nn.initializers.normal(_INIT_STD), (c.max_seq_len, c.d_model))
            x_BTD += jnp.take(rows, positions_BT, axis=0)
        block = nn.remat(Block, prevent_cse=False) if c.remat else Block
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0),
            length=c.num_layers,
            unroll=c.scan_unroll or c.num_layers,
        )
        x_BTD, cache = layers(c, name="layers")(x_BTD, Place(positions_BT, rope, num_cached), cache)
        if not c.tie_embeddings:
            self.param("head", nn.initializers.normal(_head_std(c)), (c.d_model, c.vocab_size))
        return Norm(c, c.norm == "rmsnorm", name="final_norm")(x_BTD), cache


def init_params(model: Transformer, key: jax.Array) -> Params:
    """Initial parameters, float32. A vocabulary of unknown size is a ValueError."""
    if model.config.vocab_size < 1:
        raise ValueError(f"model.vocab_size must be above 0 to make parameters, got {model.config.vocab_size}")
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def head_kernel(params: Params) -> jax.Array:
    """The output head `[D, V]`: its own matrix, or the transposed token embedding."""
    return params["head"] if "head" in params else params["embedding"].T


def logits(model: Transformer, params: Params, hidden_BTD: jax.Array) -> jax.Array:
    """Logits `[B, T, V]` of hidden states, float32, soft-capped if the model says so."""
    raw_BTV = jnp.matmul(hidden_BTD, head_kernel(params), preferred_element_type=jnp.float32)
    cap = model.config.logit_softcap
    return cap * jnp.tanh(raw_BTV / cap) if cap else raw_BTV


def empty_cache(config: ModelConfig, batch_size: int, dtype: jax.typing.DTypeLike) -> Cache:
    """A cache for `max_seq_len` tokens."""
    shape = (config.num_layers, batch_size, config.max_seq_len, config.kv_heads, config.channels_per_head)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def make_loss_fn(
    model: Transformer,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    mesh: Mesh | None = None,
):
    """Makes `loss_fn(params, batch) -> LossSums` for next-token prediction.

    Args:
      model: the transformer.
      z_loss, label_smoothing, chunk_size: see `linear_cross_entropy`.
      mesh: mesh over whose axis `data` the batch is sharded; None: one device, or a caller that maps devices itself.

    Returns:
      The loss function. Its batch holds `inputs` and `labels` `[B, T]` int32 and `where` `[B, T]` bool.
    """

    def head(hidden_BTD, kernel_DV, labels_BT, where_BT):
        return linear_cross_entropy(
            hidden_BTD,
            kernel_DV,
            labels_BT,
            where=where_BT,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
            logit_softcap=model.config.logit_softcap or None,
            chunk_size=chunk_size,
        )

    if mesh is not None and mesh.size > 1:
        # By hand: each device walks its own rows, and the head's gradient is reduced once, not once a chunk.
        rows = P("data")
        head_of_rows = head
        head = jax.shard_map(
            lambda *args: jax.lax.psum(head_of_rows(*args), "data"),
            mesh=mesh,
            in_specs=(rows, P(), rows, rows),
            out_specs=P(),
        )

    def loss_fn(params: Params, batch: dict[str, jax.Array]) -> LossSums:
        hidden_BTD, _ = model.apply({"params": params}, batch["inputs"])
        with jax.named_scope("head"):
            return head(hidden_BTD, head_kernel(params), batch["labels"], batch["where"])

    return loss_fn


def _residual_std(config: ModelConfig) -> float:
    # The residual stream is a sum of 2 L branches: keep its variance (Radford et al., 2019).
    return _INIT_STD / math.sqrt(2 * config.num_layers)


def _head_std(config: ModelConfig) -> float:
    # Hidden states have unit variance, so logits have std * sqrt(D), and the loss starts at ln V plus half its square.
    # 0.02 for 768 channels would start 0.15 above ln V.
    return min(_INIT_STD, 0.35 / math.sqrt(config.d_model))
