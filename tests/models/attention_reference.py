"""Attention written down plainly, in float64: what the kernels' tests compare with.

Shape suffixes: B batch, T queries, S keys, H query heads, G key and value heads, K channels a head.
"""

import jax
import jax.numpy as jnp
import numpy as np


def inputs(length, num_heads, num_groups, *, num_keys=None, batch_size=2, width=8, dtype=np.float32):
    """Returns queries, keys, values and a cotangent of the output."""
    rng = np.random.default_rng(length)
    num_keys = num_keys or length
    sizes = ((length, num_heads), (num_keys, num_groups), (num_keys, num_groups), (length, num_heads))
    return [rng.normal(size=(batch_size, *size, width)).astype(dtype) for size in sizes]


def segments_of(batch_size, num_keys, seed=0):
    """Segment ids `[B, S]`: three segments a row, of other lengths in each, whose ids do not count up."""
    rng = np.random.default_rng(seed)
    ends = np.stack([np.sort(rng.choice(np.arange(1, num_keys), 2, replace=False)) for _ in range(batch_size)])
    return np.array([7, 0, 3], np.int32)[(np.arange(num_keys)[None, :, None] >= ends[:, None, :]).sum(axis=-1)]


def visible(batch_size, length, num_keys, positions=None, segment_ids=None, window=None):
    """Returns which keys each query sees, `[B, T, S]`, one at a time."""
    seen = np.zeros((batch_size, length, num_keys), bool)
    for b, t, s in np.ndindex(seen.shape):
        place = t if positions is None else positions[b, t]
        near = place - window < s if window else True
        same = segment_ids is None or segment_ids[b, place] == segment_ids[b, s]
        seen[b, t, s] = s <= place and near and same
    return seen


def output_and_gradients(query, key, value, cotangent, positions=None, *, segment_ids=None, window=None, softcap=None):
    """Returns the output and the gradients of queries, keys and values, all float64."""
    with jax.enable_x64(True):
        query, key, value, cotangent = (np.asarray(x, np.float64) for x in (query, key, value, cotangent))
        seen_BTS = visible(*query.shape[:2], key.shape[1], positions, segment_ids, window)
        copies = query.shape[2] // key.shape[2]

        def attention(query, key, value):
            key_BSHK, value_BSHK = (jnp.repeat(x, copies, axis=2) for x in (key, value))
            scores = jnp.einsum("bthk,bshk->bhts", query, key_BSHK) / query.shape[-1] ** 0.5
            if softcap:
                scores = softcap * jnp.tanh(scores / softcap)
            weights = jax.nn.softmax(jnp.where(seen_BTS[:, None], scores, -jnp.inf), axis=-1)
            return jnp.einsum("bhts,bshk->bthk", weights, value_BSHK)

        # Not jitted: its operations are compiled once for all cases.
        output, pullback = jax.vjp(attention, query, key, value)
        return [np.asarray(x) for x in (output, *pullback(cotangent))]


def run(function, query, key, value, cotangent, *arguments):
    """Returns output and gradients of a jitted kernel `function(query, key, value, *arguments)`."""

    @jax.jit
    def both(query, key, value, cotangent, *arguments):
        output, pullback = jax.vjp(lambda *qkv: function(*qkv, *arguments), query, key, value)
        return output, *pullback(cotangent)

    return both(query, key, value, cotangent, *arguments)


def distance(actual, expected):
    """The largest difference of each pair of arrays, relative to the second's largest number; the worst of them."""
    worst = [
        np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max() for a, b in zip(actual, expected, strict=True)
    ]
    return max(worst)
