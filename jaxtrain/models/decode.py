"""Token generation: one forward pass over the prompts of a batch, then one token a row at a time with a cache.

Prompts of different lengths share a batch: rows are padded on the right, and each row has its own length. The cache
entries of the padding are never visible, because each is overwritten before its position is reached. Shapes are powers
of two, so that few programs are compiled: one for the prompts and one for the new tokens, per shape.

Shape suffixes: B batch, W tokens of the longest prompt, S tokens of the longest context, V vocabulary.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.fields import NotNegative, Positive, PositiveShare, Section, Share
from jaxtrain.models.model import Model

_MIN_LENGTH = 16  # tokens of the smallest bucket


@dataclass(frozen=True)
class Sampling(Section):
    """Rule for drawing the next token."""

    temperature: NotNegative[float] = 0.8  # divides the logits. 0 always takes the likeliest token.
    top_k: Positive[int] | None = None  # draws among the k likeliest tokens. None draws among all.
    # draws among the likeliest tokens that hold this share of the probability (arXiv:1904.09751). 1 keeps all.
    top_p: PositiveShare[float] = 1.0
    # draws among the tokens with at least this share of the likeliest one's probability (arXiv:2407.01082)
    min_p: Share[float] = 0.0
    # divides the positive logits, and multiplies the negative ones, of the tokens in the context (arXiv:1909.05858). 1
    # changes nothing. Stop ids are exempt.
    repetition_penalty: Positive[float] = 1.0


@dataclass
class Timing:
    """Tokens and seconds of generation, without compilation; the prompts (prefill) apart from the new tokens."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    new_seconds: float = 0.0

    def __str__(self) -> str:
        prompt, new = self.prompt_tokens / (self.prompt_seconds or 1), self.new_tokens / (self.new_seconds or 1)
        return (
            f"prefill: {self.prompt_tokens:,} tokens, {prompt:,.0f} tokens/s; "
            f"decode: {self.new_tokens:,} tokens, {new:,.0f} tokens/s"
        )


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
        # Keeps a token while the likelier tokens sum to less than top_p; the likeliest token always stays.
        before = jnp.cumsum(probability, axis=-1) - probability
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled < least, -jnp.inf, scaled)
    if sampling.min_p > 0:
        least = jnp.max(scaled, axis=-1, keepdims=True) + np.log(sampling.min_p)
        scaled = jnp.where(scaled < least, -jnp.inf, scaled)
    return jax.random.categorical(key, scaled, axis=-1).astype(jnp.int32)


def generate(
    model: Model,
    params: chex.ArrayTree,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    num_tokens: int,
    *,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    vocab_size: int | None = None,
    stop_ids: Sequence[int] = (),
    on_tokens: Callable[[int, list[int]], bool] | None = None,
    every: int = 16,
    timing: Timing | None = None,
) -> list[np.ndarray]:
    """Continues a batch of prompts.

    A row's draws depend on the seed, its stream and the number of its new tokens alone, not on the other rows. A full
    context drops its older half, and generation continues from the newer half.

    Args:
      model: a model with `decode` and `max_seq_len`; see `TransformerModel.decode`.
      params: its parameters; they compute in their own dtype.
      prompts: token ids of each row, at least one. Of a prompt that fills the context only the end is used.
      streams: number of each row's random stream. None gives all rows stream 0.
      sampling: how tokens are drawn. None takes the defaults of `Sampling`.
      vocab_size: draws ids below this only, for a model with more rows than the tokenizer has ids. None takes the
        model's `vocab_size`.
      stop_ids: ids that end a row; the id that was drawn is its last token.
      on_tokens: called with a row's number and all its new tokens, after every `every` tokens; True ends the row.
      every: tokens between the calls of `on_tokens`.
      timing: to which tokens and seconds are added; None measures nothing.

    Returns:
      The new tokens of each row, int32.

    Raises:
      ValueError: a model without `decode`, an empty prompt, a token id or a seed out of range, num_tokens below 1.
    """
    rows = check_decodes(model)
    vocab_size = rows if vocab_size is None else min(vocab_size, rows)
    contexts = _check_prompts(prompts, num_tokens, seed, vocab_size)
    rule = _Rule(model.decode, getattr(model, "init_cache", None), sampling or Sampling(), vocab_size, tuple(stop_ids))
    keys = [(seed, stream) for stream in (streams or [0] * len(contexts))]
    every = every if on_tokens else num_tokens
    return _continue_rows(
        rule, params, contexts, num_tokens, keys, model.max_seq_len, on_tokens, every, timing or Timing()
    )


def _continue_rows(
    rule: "_Rule",
    params: Any,
    contexts: list[np.ndarray],
    num_tokens: int,
    keys: list[tuple[int, int]],
    longest: int,
    on_tokens: Callable[[int, list[int]], bool] | None,
    every: int,
    timing: Timing,
) -> list[np.ndarray]:
    new: list[list[int]] = [[] for _ in contexts]
    left = np.full(len(contexts), num_tokens)  # tokens to add to each row; 0 once it has ended
    while left.any():
        contexts = [tokens[-max(longest // 2, 1) :] if len(tokens) >= longest else tokens for tokens in contexts]
        length = np.array([len(tokens) for tokens in contexts])
        size = min(bucket(int((length + left).max())), longest)
        now = _start(rule, params, contexts, size, keys, timing)
        while left.any() and (length < size)[left > 0].all():
            count = np.minimum(np.minimum(left, every), size - length)
            drawn = [len(tokens) for tokens in new]
            pad = len(now.length_B) - len(new)
            arrays = [jnp.asarray(np.pad(x, (0, pad)), jnp.int32) for x in (drawn, length + count)]
            now, seconds = _timed(_extend, rule, params, now, *arrays)
            tokens, ends = np.array(now.tokens_BS), np.array(now.length_B)  # copies: `now` is donated
            timing.new_seconds += seconds
            timing.new_tokens += int((ends[: len(new)] - length).sum())
            for row in np.flatnonzero(left):
                new[row] += tokens[row, length[row] : ends[row]].tolist()
                contexts[row], left[row] = tokens[row, : ends[row]], num_tokens - len(new[row])
                asked_to_end = on_tokens is not None and on_tokens(int(row), new[row])
                left[row] *= not (asked_to_end or new[row][-1] in rule.stop_ids)
            length = ends[: len(new)]
    return [np.array(tokens, np.int32) for tokens in new]


def check_decodes(model: Model, refusal: str = "generates no text") -> int:
    """Returns the vocabulary size of a model that can decode; otherwise raises a ValueError with the refusal."""
    if missing := [name for name in ("decode", "max_seq_len", "vocab_size") if not hasattr(model, name)]:
        name, members = type(model).__name__, " and ".join(missing)
        raise ValueError(f"{name} {refusal} without {members}: see TransformerModel.decode")
    return model.vocab_size


def _check_prompts(prompts: Any, num_tokens: int, seed: int, vocab_size: int) -> list[np.ndarray]:
    rows = [np.asarray(prompt) for prompt in prompts]
    if not rows or any(row.ndim != 1 or not row.size for row in rows):
        shapes = [row.shape for row in rows]
        raise ValueError(f"prompts must be rows of at least 1 token, [batch, tokens] or a list; got shapes {shapes}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}")
    if not 0 <= seed < 2**31:
        raise ValueError(f"seed must be 0 or more and below 2^31, got {seed}")
    if min(row.min() for row in rows) < 0 or max(row.max() for row in rows) >= vocab_size:
        raise ValueError(f"prompts have tokens outside [0, {vocab_size})")
    return [row.astype(np.int32) for row in rows]


def bucket(size: int, least: int = _MIN_LENGTH) -> int:
    """Returns the power of two from `size` on."""
    return max(1 << (size - 1).bit_length(), least)


class _Rule(NamedTuple):
    """Static arguments of the programs."""

    decode: Callable
    init_cache: Callable | None  # None: `decode` takes one number of cached tokens, not one a row
    sampling: Sampling
    vocab_size: int
    stop_ids: tuple[int, ...]


class _Decoding(NamedTuple):
    """State of the decoding loop; rows above the number of prompts are padding."""

    # tokens_BS, length_B: tokens of each row and their number
    tokens_BS: jax.Array
    length_B: jax.Array
    cache: Any  # keys and values of all tokens but each row's last
    keys_B: jax.Array  # random key of each row


def _start(
    rule: _Rule, params: Any, contexts: list[np.ndarray], size: int, keys: list[tuple[int, int]], timing: Timing
) -> _Decoding:
    """Reads the contexts into a cache of `size` tokens a row; `keys` are (seed, stream) of each row."""
    rows, width = bucket(len(contexts), 1), min(bucket(max(map(len, contexts))), size)
    tokens, length = np.zeros((rows, size), np.int32), np.ones(rows, np.int32)
    for row, context in enumerate(contexts):
        tokens[row, : len(context)], length[row] = context, len(context)
    seeds = jnp.asarray(keys + [(0, 0)] * (rows - len(keys)), jnp.uint32)
    cache, seconds = _timed(_read_prompts, rule, size, params, jnp.asarray(tokens[:, :width]))
    timing.prompt_tokens += sum(map(len, contexts))
    timing.prompt_seconds += seconds
    return _Decoding(jnp.asarray(tokens), jnp.asarray(length), cache, _row_keys(seeds))


def _timed(program: Any, *arguments: Any) -> tuple[Any, float]:
    """Runs a jitted function; returns its result and its seconds without compilation."""
    program.lower(*arguments).compile()  # JAX reuses the result in the call
    begin = time.perf_counter()
    result = jax.block_until_ready(program(*arguments))
    return result, time.perf_counter() - begin


@jax.jit
def _row_keys(seeds_B2: jax.Array) -> jax.Array:
    return jax.vmap(lambda pair: jax.random.fold_in(jax.random.key(pair[0]), pair[1]))(seeds_B2)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read_prompts(rule: _Rule, size: int, params: Any, tokens_BW: jax.Array) -> Any:
    """Returns the cache of the tokens, with room for `size` tokens a row."""
    if rule.init_cache is not None:
        return rule.decode(params, tokens_BW, rule.init_cache(params, len(tokens_BW), size), None)[1]
    return jax.vmap(lambda row_W: rule.decode(params, row_W[None], None, 0)[1])(tokens_BW)


def _next_logits(rule: _Rule, params: Any, last_B: jax.Array, cache: Any, num_cached_B: jax.Array) -> tuple[Any, Any]:
    """Returns the logits `[B, V]` of the token after each row's last one, and the extended cache."""
    if rule.init_cache is not None:
        logits_B1V, extended = rule.decode(params, last_B[:, None], cache, num_cached_B)
    else:
        one_row = lambda last, cache, count: rule.decode(params, last[None, None], cache, count)  # noqa: E731
        logits_B11V, extended = jax.vmap(one_row)(last_B, cache, num_cached_B)
        chex.assert_shape(logits_B11V, (len(last_B), 1, 1, None))
        logits_B1V = logits_B11V[:, 0]
    chex.assert_shape(logits_B1V, (len(last_B), 1, None))
    chex.assert_trees_all_equal_shapes_and_dtypes(extended, cache)
    logits_BV = logits_B1V[:, 0]
    exists_V = jnp.arange(logits_BV.shape[-1]) < rule.vocab_size
    return jnp.where(exists_V[None], logits_BV, -jnp.inf), extended


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _extend(rule: _Rule, params: Any, now: _Decoding, drawn_B: jax.Array, end_B: jax.Array) -> _Decoding:
    """Adds tokens to each row up to length `end_B` or a stop id. `drawn_B` counts the row's new tokens so far.

    Each iteration runs the last token of every row; the first one repeats the prompt's last. A row that has ended
    repeats its last token at the same position, which changes nothing.
    """
    rows_B, start_B = jnp.arange(len(end_B)), now.length_B
    seen_BV = None
    if rule.sampling.repetition_penalty != 1:
        inside_BS = jnp.arange(now.tokens_BS.shape[1])[None] < now.length_B[:, None]
        ids_BS = jnp.where(inside_BS, now.tokens_BS, rule.vocab_size)
        seen_BV = jnp.zeros((len(end_B), rule.vocab_size), bool).at[rows_B[:, None], ids_BS].set(True, mode="drop")

    def active(now: _Decoding, stopped_B: jax.Array) -> jax.Array:
        return (now.length_B < end_B) & ~stopped_B

    def body(carry):
        now, stopped_B, seen_BV = carry
        active_B, at_B = active(now, stopped_B), now.length_B - 1
        last_B = jnp.take_along_axis(now.tokens_BS, at_B[:, None], axis=1)[:, 0]
        logits_BV, cache = _next_logits(rule, params, last_B, now.cache, at_B)
        if seen_BV is not None:
            logits_BV = _penalize(logits_BV, seen_BV, rule)
        keys_B = jax.vmap(jax.random.fold_in)(now.keys_B, drawn_B + now.length_B - start_B)
        token_B = jax.vmap(lambda key, logits_V: sample(key, logits_V[None], rule.sampling)[0])(keys_B, logits_BV)
        outside = now.tokens_BS.shape[1]  # where writes are dropped
        tokens_BS = now.tokens_BS.at[rows_B, jnp.where(active_B, now.length_B, outside)].set(token_B, mode="drop")
        if seen_BV is not None:
            seen_BV = seen_BV.at[rows_B, token_B].set(True)
        if rule.stop_ids:
            stopped_B |= active_B & jnp.isin(token_B, jnp.array(rule.stop_ids, jnp.int32))
        return _Decoding(tokens_BS, now.length_B + active_B.astype(jnp.int32), cache, now.keys_B), stopped_B, seen_BV

    carry = now, jnp.zeros(len(end_B), bool), seen_BV
    return jax.lax.while_loop(lambda carry: jnp.any(active(*carry[:2])), body, carry)[0]


def _penalize(logits_BV: jax.Array, seen_BV: jax.Array, rule: _Rule) -> jax.Array:
    """Applies the repetition penalty to the tokens in the context, except stop ids."""
    penalty = rule.sampling.repetition_penalty
    seen_BV = jnp.pad(seen_BV, ((0, 0), (0, logits_BV.shape[1] - seen_BV.shape[1])))
    seen_BV = seen_BV.at[:, jnp.array(rule.stop_ids, jnp.int32)].set(False)
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)
