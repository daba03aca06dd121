"""Text generation: one forward pass over the prompt, then one token at a time with a cache.

Shape suffixes: B batch, S max_seq_len, V vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.models.model import Model


@dataclass(frozen=True)
class Sampling:
    """Rule for drawing the next token.

    Attributes:
      temperature: divides the logits. 0 always takes the likeliest token.
      top_k: draws among the k likeliest tokens. None draws among all.
      top_p: draws among the likeliest tokens that hold this share of the probability (arXiv:1904.09751). 1 keeps all.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be above 0, or None to draw among all tokens; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


def sample(key: jax.Array, logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token per row, int32 `[B]`."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        least = jax.lax.top_k(scaled, sampling.top_k)[0][:, -1:]
        scaled = jnp.where(scaled < least, -jnp.inf, scaled)
    if sampling.top_p < 1:
        ordered = jnp.sort(scaled, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        # Keeps a token while the likelier tokens hold less than top_p, so that the likeliest is always kept.
        before = jnp.cumsum(probability, axis=-1) - probability
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled < least, -jnp.inf, scaled)
    return jax.random.categorical(key, scaled, axis=-1).astype(jnp.int32)


def generate(
    model: Model,
    params: chex.ArrayTree,
    prompt: np.ndarray,
    num_tokens: int,
    *,
    seed: int = 0,
    sampling: Sampling | None = None,
    vocab_size: int | None = None,
    stop_id: int | None = None,
) -> np.ndarray:
    """Continues prompts.

    A full context drops its older half, and generation continues from the newer half.

    Args:
      model: a model with `decode` and `max_seq_len`; see `TransformerModel.decode`.
      params: its parameters; they compute in their own dtype.
      prompt: token ids `[B, P]`, P at least 1. Of a prompt that fills the context only the end is used.
      num_tokens: number of tokens to add.
      seed: seed of the random numbers.
      sampling: how tokens are drawn. None takes the defaults of `Sampling`.
      vocab_size: draws ids below this only, for a model with more rows than the tokenizer has ids. None takes the
        model's `vocab_size`.
      stop_id: ends a row when it draws this id; the row is filled with it. None never stops early.

    Returns:
      The new tokens, int32 `[B, N]`. N is `num_tokens`, or less if all rows have stopped.

    Raises:
      ValueError: a model without `decode`, an empty prompt, a token id or a seed out of range, num_tokens below 1.
    """
    vocab_size = _check_model(model) if vocab_size is None else min(vocab_size, _check_model(model))
    prompt = _check_prompt(np.asarray(prompt, np.int32), num_tokens, seed, vocab_size)
    rule = _Rule(sampling or Sampling(), vocab_size, stop_id)
    key, context, pieces = jax.random.key(seed), prompt, []
    stopped = np.zeros(len(prompt), bool)
    while num_tokens > 0 and not stopped.all():
        if context.shape[1] >= model.max_seq_len:
            context = context[:, -max(model.max_seq_len // 2, 1) :]
        length = context.shape[1]
        # Widths are powers of two, so that few programs are compiled. The cache entries of the padding are never
        # visible, because each is overwritten before its position is reached.
        width = min(1 << (length - 1).bit_length(), model.max_seq_len)
        padded = np.pad(context, ((0, 0), (0, width - length)))
        count = min(num_tokens, model.max_seq_len - length)
        cache = _read_prompt(model.decode, params, padded)
        tokens_BS = np.pad(context, ((0, 0), (0, model.max_seq_len - length)))
        decoding = _Decoding(tokens_BS, jnp.int32(length), cache, key, stopped)
        decoding = _extend(model.decode, rule, params, decoding, jnp.int32(length + count))
        context = np.asarray(decoding.tokens_BS)[:, : int(decoding.length)]
        pieces.append(context[:, length:])
        key, stopped, num_tokens = decoding.key, np.asarray(decoding.stopped_B), num_tokens - count
    return np.concatenate(pieces, axis=1)


def _check_model(model: Model) -> int:
    """Returns the vocabulary size of a model that can generate."""
    if missing := [name for name in ("decode", "max_seq_len", "vocab_size") if not hasattr(model, name)]:
        raise ValueError(
            f"{type(model).__name__} generates no text without {' and '.join(missing)}: see TransformerModel.decode"
        )
    return model.vocab_size


def _check_prompt(prompt: np.ndarray, num_tokens: int, seed: int, vocab_size: int) -> np.ndarray:
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt must be [batch, at least 1 token], got shape {prompt.shape}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed must be 0 or more and below 2^31, got {seed}")
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise ValueError(f"prompt has tokens outside [0, {vocab_size})")
    return prompt


class _Rule(NamedTuple):
    """Static arguments of the decoding loop."""

    sampling: Sampling
    vocab_size: int
    stop_id: int | None


class _Decoding(NamedTuple):
    """State of the decoding loop: tokens so far, their number, the cache of all but the last, key, stopped rows."""

    tokens_BS: jax.Array
    length: jax.Array
    cache: Any
    key: jax.Array
    stopped_B: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def _read_prompt(decode: Callable, params: Any, padded: jax.Array) -> Any:
    return decode(params, padded, None, 0)[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _extend(decode: Callable, rule: _Rule, params: Any, decoding: _Decoding, end: jax.Array) -> _Decoding:
    """Adds tokens up to length `end`. Each iteration runs the last token; the first one repeats the prompt's last."""

    def body(now: _Decoding) -> _Decoding:
        last = jax.lax.dynamic_slice_in_dim(now.tokens_BS, now.length - 1, 1, axis=1)
        logits_B1V, cache = decode(params, last, now.cache, now.length - 1)
        chex.assert_shape(logits_B1V, (*last.shape, None))
        chex.assert_trees_all_equal_shapes_and_dtypes(cache, now.cache)
        key, this_key = jax.random.split(now.key)
        logits_BV = logits_B1V[:, 0]
        if rule.vocab_size < logits_BV.shape[-1]:
            logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1])[None] < rule.vocab_size, logits_BV, -jnp.inf)
        token_B, stopped_B = sample(this_key, logits_BV, rule.sampling), now.stopped_B
        if rule.stop_id is not None:
            token_B = jnp.where(stopped_B, rule.stop_id, token_B)
            stopped_B |= token_B == rule.stop_id
        tokens_BS = jax.lax.dynamic_update_slice_in_dim(now.tokens_BS, token_B[:, None], now.length, axis=1)
        return _Decoding(tokens_BS, now.length + 1, cache, key, stopped_B)

    return jax.lax.while_loop(lambda now: (now.length < end) & ~jnp.all(now.stopped_B), body, decoding)
