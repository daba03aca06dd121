"""Generation: the cache against whole forward passes, the sampling rules, a full context."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import llama
from jaxtrain.models.decode import Sampling, generate, sample
from jaxtrain.models.model import TransformerModel

CONFIG = llama(num_layers=2, num_heads=2, d_model=16, d_ff=24, max_seq_len=16, vocab_size=11)
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model():
    return TransformerModel(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return jax.tree.map(lambda leaf: leaf * 8, model.init(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def last_token(model, params, padded, length):
    return jnp.argmax(model.decode(params, padded, None, 0)[0][:, length - 1], axis=-1)


def likeliest(model, params, context):
    padded = np.pad(context, ((0, 0), (0, 16 - context.shape[1])))  # causal: padding after the context changes nothing
    return np.asarray(last_token(model, params, padded, context.shape[1]))


@pytest.mark.parametrize("length", [1, 5, 8])
def test_greedy_text_is_that_of_whole_forward_passes(model, params, length):
    context = prompt = np.arange(2 * length).reshape(2, length) % 11
    for _ in range(16 - length):
        context = np.concatenate([context, likeliest(model, params, context)[:, None]], axis=1)
    assert len(set(context[0, length:])) > 1  # a constant would agree by chance
    np.testing.assert_array_equal(generate(model, params, prompt, 16 - length, sampling=GREEDY), context[:, length:])


def test_greedy_text_with_a_window_is_that_of_whole_forward_passes(params):
    model = TransformerModel(dataclasses.replace(CONFIG, attention_window=3, attention_softcap=2.0))
    context = prompt = np.arange(10).reshape(2, 5) % 11
    for _ in range(11):
        context = np.concatenate([context, likeliest(model, params, context)[:, None]], axis=1)
    new = generate(model, params, prompt, 11, sampling=GREEDY)
    np.testing.assert_array_equal(new, context[:, 5:])
    assert (new != generate(TransformerModel(CONFIG), params, prompt, 11, sampling=GREEDY)).any()


def test_a_full_context_continues_from_its_newer_half(model, params):
    prompt = np.array([[3, 1, 4]])
    new = generate(model, params, prompt, 40, sampling=GREEDY)
    assert new.shape == (1, 40)
    text = np.concatenate([prompt, new], axis=1)
    # 16 places fill after 13 tokens; the last 8 are read again, and the next token follows from those alone.
    np.testing.assert_array_equal(text[:, 16], likeliest(model, params, text[:, 8:16]))
    np.testing.assert_array_equal(text[:, 24], likeliest(model, params, text[:, 16:24]))


def test_a_prompt_longer_than_the_context_is_seen_from_its_end(model, params):
    prompt = np.arange(100)[None] % 11
    expected = generate(model, params, prompt[:, -8:], 5, sampling=GREEDY)
    np.testing.assert_array_equal(generate(model, params, prompt, 5, sampling=GREEDY), expected)


def test_a_seed_gives_the_same_text_and_another_one_another(model, params):
    prompt = np.array([[1, 2]])
    first, again, other = (generate(model, params, prompt, 12, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def draws(values, sampling, number=400):
    rows = jnp.tile(jnp.log(jnp.asarray(values))[None], (number, 1))
    return np.bincount(sample(jax.random.key(0), rows, sampling), minlength=len(values)) / number


def test_sampling_follows_the_probabilities_and_their_temperature():
    np.testing.assert_allclose(draws([0.5, 0.3, 0.2], Sampling(1.0)), [0.5, 0.3, 0.2], atol=0.08)
    squared = np.array([0.25, 0.09, 0.04]) / 0.38
    np.testing.assert_allclose(draws([0.5, 0.3, 0.2], Sampling(0.5)), squared, atol=0.08)
    np.testing.assert_array_equal(draws([0.3, 0.5, 0.2], GREEDY), [0, 1, 0])


def test_top_k_and_top_p_cut_the_tail():
    values = [0.1, 0.4, 0.3, 0.2]
    np.testing.assert_array_equal(draws(values, Sampling(1.0, top_k=2)) > 0, [False, True, True, False])
    # Before the third likeliest stand 0.7 of the probability.
    np.testing.assert_array_equal(draws(values, Sampling(1.0, top_p=0.71)) > 0, [False, True, True, True])
    np.testing.assert_array_equal(draws(values, Sampling(1.0, top_p=0.69)) > 0, [False, True, True, False])
    np.testing.assert_array_equal(draws(values, Sampling(1.0, top_p=0.01)), [0, 1, 0, 0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_sampling_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)


@pytest.mark.parametrize(
    ("prompt", "number", "message"),
    [
        (np.zeros((1, 0)), 3, "at least 1 token"),
        (np.zeros(3), 3, "batch"),
        (np.array([[11]]), 3, r"outside \[0, 11\)"),
        (np.array([[-1]]), 3, r"outside \[0, 11\)"),
        (np.array([[1]]), 0, "num_tokens"),
    ],
)
def test_bad_prompts(model, params, prompt, number, message):
    with pytest.raises(ValueError, match=message):
        generate(model, params, prompt, number)


def test_rows_end_at_the_stop_id_and_ids_above_the_vocabulary_are_never_drawn(model, params):
    prompt = np.array([[1, 2], [3, 4], [5, 6]])
    free = generate(model, params, prompt, 30, seed=3, sampling=Sampling(5.0))
    assert free.max() > 7
    new = generate(model, params, prompt, 200, seed=3, sampling=Sampling(5.0), vocab_size=8, stop_id=7)
    assert new.max() == 7
    assert new.shape[1] < 200
    ends = [row.tolist().index(7) for row in new]
    assert max(ends) == new.shape[1] - 1
    assert all((row[end:] == 7).all() for row, end in zip(new, ends, strict=True))
    assert len(set(ends)) > 1


def test_a_model_without_decode_names_the_missing_members(params):
    class Bigram:
        vocab_size = 11

    with pytest.raises(ValueError, match="Bigram generates no text without decode and max_seq_len"):
        generate(Bigram(), params, np.array([[1]]), 3)


class Successor:
    """Counts up, without parameters: its cache is the number of tokens."""

    vocab_size, max_seq_len = 11, 8

    def decode(self, params, tokens, cache, num_cached):
        cache = jnp.int32(0) if cache is None else cache + 1
        return jax.nn.one_hot((tokens + 1) % 11, 11), cache


def test_any_model_with_decode_generates():
    new = generate(Successor(), {}, np.array([[1], [5]]), 12, sampling=GREEDY)
    np.testing.assert_array_equal(new, (np.arange(2, 14)[None] + np.array([[0], [4]])) % 11)


@pytest.mark.parametrize(("wrong", "message"), [("logits", "assert_shape"), ("cache", "float32 != int32")])
def test_a_decode_with_other_shapes_or_dtypes_is_an_error(wrong, message):
    class Wrong(Successor):
        def decode(self, params, tokens, cache, num_cached):
            logits, extended = super().decode(params, tokens, cache, num_cached)
            if wrong == "logits":
                return logits[:, 0], extended
            return logits, extended if cache is None else extended.astype(jnp.float32)

    with pytest.raises(AssertionError, match=message):
        generate(Wrong(), {}, np.array([[1]]), 3, sampling=GREEDY)
