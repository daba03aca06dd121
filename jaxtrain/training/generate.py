"""Text from a model: one forward pass over the prompt, then a token at a time with a KV cache.

Shape suffixes: B batch, S max_seq_len, V vocabulary.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.models.transformer import Cache, Transformer, empty_cache, logits
from jaxtrain.runtime.mesh import replicated
from jaxtrain.training.run import Run


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: divides the logits; 0: always the likeliest token.
      top_k: draws among the k likeliest; None draws among all.
      top_p: draw among the likeliest that hold this share of the probability (arXiv:1904.09751); 1: all.
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


def continue_text(
    run: Run, params: Any, prompt: str, num_tokens: int, *, seed: int = 0, sampling: Sampling | None = None
) -> str:
    """Continues a text with a run's model, as the beginning of a document; returns what is new.

    Arguments and errors as for `generate`. The parameters may lie on all the run's devices; one a process is used.
    """
    tokenizer = run.store.tokenizer
    tokens = np.concatenate([[tokenizer.eot_id], tokenizer.encode(prompt)])[None]
    if jax.process_count() > 1:  # what is on other processes' devices comes here only if it is put everywhere
        params = jax.jit(lambda tree: tree, out_shardings=replicated(run.program.mesh))(params)
        params = jax.tree.map(lambda leaf: leaf.addressable_data(0), params)
    else:
        params = jax.device_put(params, run.program.mesh.devices.flat[0])
    model = Transformer(run.program.model.config)
    return tokenizer.decode(generate(model, params, tokens, num_tokens, seed=seed, sampling=sampling)[0])


def sample(key: jax.Array, logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token a row, int32 `[B]`."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scaled.shape[-1]:
        least = jax.lax.top_k(scaled, sampling.top_k)[0][:, -1:]
        scaled = jnp.where(scaled < least, -jnp.inf, scaled)
    if sampling.top_p < 1:
        ordered = jnp.sort(scaled, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered, axis=-1)
        # A token stays while those likelier than it hold less than top_p: the likeliest always does.
        before = jnp.cumsum(probability, axis=-1) - probability
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled < least, -jnp.inf, scaled)
    return jax.random.categorical(key, scaled, axis=-1).astype(jnp.int32)


class _Decoding(NamedTuple):
    """Tokens so far `[B, S]` with their number, the cache of all but the last of them, and the random key."""

    tokens_BS: jax.Array
    length: jax.Array
    cache: Cache
    key: jax.Array


def generate(
    model: Transformer,
    params: Any,
    prompt: np.ndarray,
    num_tokens: int,
    *,
    seed: int = 0,
    sampling: Sampling | None = None,
) -> np.ndarray:
    """Continues prompts.

    When the context is full, the older half of it is forgotten and the text goes on from the rest.

    Args:
      model: the transformer.
      params: its parameters; they compute in their own dtype.
      prompt: token ids `[B, P]`, P at least 1; of a longer prompt than the context only the end is seen.
      num_tokens: how many tokens to add.
      seed: of the random numbers.
      sampling: how tokens are drawn; None: the defaults of `Sampling`.

    Returns:
      The new tokens `[B, num_tokens]`, int32.

    Raises:
      ValueError: an empty prompt, a token outside the vocabulary, num_tokens below 1, a seed out of range.
    """
    prompt = np.asarray(prompt, np.int32)
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt must be [batch, at least 1 token], got shape {prompt.shape}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed must be 0 or more and below 2^31, got {seed}")
    if prompt.min() < 0 or prompt.max() >= model.config.vocab_size:
        raise ValueError(f"prompt has tokens outside [0, {model.config.vocab_size})")

    size = model.config.max_seq_len
    key, context, pieces = jax.random.key(seed), prompt, []
    while num_tokens > 0:
        if context.shape[1] >= size:
            context = context[:, -max(size // 2, 1) :]
        length = context.shape[1]
        # One program for all prompts of up to a power of two; what the padding leaves in the cache is never seen,
        # because a place is written before it is looked at.
        width = min(1 << (length - 1).bit_length(), size)
        padded = np.pad(context, ((0, 0), (0, width - length)))
        count = min(num_tokens, size - length)
        decoding = _read_prompt(model, params, padded, jnp.int32(length), key)
        decoding = _extend(model, sampling or Sampling(), params, decoding, jnp.int32(count))
        context = np.asarray(decoding.tokens_BS)[:, : length + count]
        pieces.append(context[:, length:])
        key, num_tokens = decoding.key, num_tokens - count
    return np.concatenate(pieces, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _read_prompt(model: Transformer, params: Any, padded: jax.Array, length: jax.Array, key: jax.Array) -> _Decoding:
    batch_size, width = padded.shape
    cache = empty_cache(model.config, batch_size, jax.tree.leaves(params)[0].dtype)
    _, cache = model.apply({"params": params}, padded, cache, jnp.int32(0))
    tokens_BS = jnp.zeros((batch_size, model.config.max_seq_len), jnp.int32).at[:, :width].set(padded)
    return _Decoding(tokens_BS, length, cache, key)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _extend(model: Transformer, sampling: Sampling, params: Any, decoding: _Decoding, count: jax.Array) -> _Decoding:
    """Adds `count` tokens. The last known token is run (again, the first time) to get the logits of the next."""

    def body(_, decoding):
        last = jax.lax.dynamic_slice_in_dim(decoding.tokens_BS, decoding.length - 1, 1, axis=1)
        hidden_B1D, cache = model.apply({"params": params}, last, decoding.cache, decoding.length - 1)
        key, this_key = jax.random.split(decoding.key)
        token_B = sample(this_key, logits(model, params, hidden_B1D)[:, 0], sampling)
        tokens_BS = jax.lax.dynamic_update_slice_in_dim(decoding.tokens_BS, token_B[:, None], decoding.length, axis=1)
        return _Decoding(tokens_BS, decoding.length + 1, cache, key)

    return jax.lax.fori_loop(0, count, body, decoding)
