"""Generation: the cache against whole forward passes, the sampling rules, a full context."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import llama
from jaxtrain.models import decode
from jaxtrain.models.decode import Sampling, generate, sample
from jaxtrain.models.model import TransformerModel

CONFIG = llama(num_layers=2, num_heads=2, d_model=16, d_ff=24, max_seq_len=16, vocab_size=11)
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def model():
    return TransformerModel(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return jax.tree.map(lambda leaf: leaf * 8, jax.jit(model.init)(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def last_token(model, params, padded, length):
    return jnp.argmax(model.decode(params, padded, None, 0)[0][:, length - 1], axis=-1)


def likeliest(model, params, context):
    padded = np.pad(context, ((0, 0), (0, 16 - context.shape[1])))  # causal: padding after the context changes nothing
    return np.asarray(last_token(model, params, padded, context.shape[1]))


@pytest.mark.parametrize("length", [1, 5, 8])
def test_greedy_text_equals_whole_forward_passes(model, params, length):
    context = prompt = np.arange(2 * length).reshape(2, length) % 11
    for _ in range(16 - length):
        context = np.concatenate([context, likeliest(model, params, context)[:, None]], axis=1)
    assert len(set(context[0, length:])) > 1  # a constant would agree by chance
    np.testing.assert_array_equal(generate(model, params, prompt, 16 - length, sampling=GREEDY), context[:, length:])


def test_greedy_text_with_a_window_equals_whole_forward_passes(params):
    model = TransformerModel(dataclasses.replace(CONFIG, attention_window=3, attention_softcap=2.0))
    context = prompt = np.arange(10).reshape(2, 5) % 11
    for _ in range(11):
        context = np.concatenate([context, likeliest(model, params, context)[:, None]], axis=1)
    new = generate(model, params, prompt, 11, sampling=GREEDY)
    np.testing.assert_array_equal(new, context[:, 5:])
    assert np.any(np.array(new) != generate(TransformerModel(CONFIG), params, prompt, 11, sampling=GREEDY))


def test_a_full_context_continues_from_its_newer_half(model, params):
    prompt = np.array([[3, 1, 4]])
    new = generate(model, params, prompt, 40, sampling=GREEDY)
    assert len(new[0]) == 40
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
    assert (first[0] != other[0]).any()


def draws(values, sampling, number=400):
    rows = jnp.tile(jnp.log(jnp.asarray(values))[None], (number, 1))
    return np.bincount(sample(jax.random.key(0), rows, sampling), minlength=len(values)) / number


def test_sampling_follows_the_probabilities_and_their_temperature():
    np.testing.assert_allclose(draws([0.5, 0.3, 0.2], Sampling(1.0)), [0.5, 0.3, 0.2], atol=0.08)
    squared = np.array([0.25, 0.09, 0.04]) / 0.38
    np.testing.assert_allclose(draws([0.5, 0.3, 0.2], Sampling(0.5)), squared, atol=0.08)
    np.testing.assert_array_equal(draws([0.3, 0.5, 0.2], GREEDY), [0, 1, 0])


def test_top_k_top_p_and_min_p_cut_the_tail():
    values = [0.1, 0.4, 0.3, 0.2]
    np.testing.assert_array_equal(draws(values, Sampling(1.0, top_k=2)) > 0, [False, True, True, False])
    # Before the third likeliest stand 0.7 of the probability.
    np.testing.assert_array_equal(draws(values, Sampling(1.0, top_p=0.71)) > 0, [False, True, True, True])
    np.testing.assert_array_equal(draws(values, Sampling(1.0, top_p=0.69)) > 0, [False, True, True, False])
    np.testing.assert_array_equal(draws(values, Sampling(1.0, top_p=0.01)), [0, 1, 0, 0])
    np.testing.assert_array_equal(draws(values, Sampling(1.0, min_p=0.6)) > 0, [False, True, True, False])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
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
        ([[1], []], 3, "at least 1 token"),
        ([], 3, "at least 1 token"),
        (np.array([[11]]), 3, r"outside \[0, 11\)"),
        (np.array([[-1]]), 3, r"outside \[0, 11\)"),
        (np.array([[1]]), 0, "num_tokens"),
    ],
)
def test_bad_prompts(model, params, prompt, number, message):
    with pytest.raises(ValueError, match=message):
        generate(model, params, prompt, number)


def test_rows_end_at_a_stop_id_and_ids_above_the_vocabulary_are_never_drawn(model, params):
    prompt = np.array([[1, 2], [3, 4], [5, 6]])
    hot = {"seed": 3, "streams": [0, 1, 2], "sampling": Sampling(5.0)}
    assert np.max(generate(model, params, prompt, 30, **hot)) > 8
    new = generate(model, params, prompt, 200, **hot, vocab_size=9, stop_ids=[7, 8])
    assert {row[-1] for row in new} <= {7, 8}
    assert all(max(row[:-1]) < 7 for row in new)
    assert len({len(row) for row in new}) > 1


PROMPTS = [[3], [1, 4, 1, 5, 9, 2, 6], [5, 3, 5], [8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6]]


def test_rows_of_different_lengths_give_the_text_of_whole_forward_passes(model, params):
    """Also past the end of the context, which the rows reach at different times."""
    new = generate(model, params, PROMPTS, 20, sampling=GREEDY)
    for prompt, row in zip(PROMPTS, new, strict=True):
        context, expected = list(prompt), []
        for _ in range(20):
            context = context[-8:] if len(context) == 16 else context
            expected.append(int(likeliest(model, params, np.array([context]))[0]))
            context.append(expected[-1])
        assert row.tolist() == expected


def test_a_row_draws_the_same_tokens_in_any_batch_and_however_often_it_is_looked_at(model, params):
    options = {"seed": 5, "sampling": Sampling(1.5, repetition_penalty=1.3)}
    rows = generate(model, params, PROMPTS, 25, **options)
    for i in (1, 2):
        assert rows[i].tolist() == generate(model, params, [PROMPTS[i]], 25, **options)[0].tolist()
    seen = []
    again = generate(
        model, params, PROMPTS[::-1], 25, **options, every=3, on_tokens=lambda i, row: seen.append((i, len(row)))
    )
    assert [row.tolist() for row in again[::-1]] == [row.tolist() for row in rows]
    lengths = np.array([length for i, length in seen if i == 3])
    assert lengths[-1] == 25
    assert set(np.diff(lengths)) <= {1, 2, 3}
    twice = generate(model, params, [[1, 2], [1, 2]], 25, **options, streams=[0, 1])
    assert twice[0].tolist() != twice[1].tolist()


def test_a_call_may_end_a_row(model, params):
    rows = generate(model, params, PROMPTS, 12, every=2, on_tokens=lambda row, tokens: len(tokens) >= 2 * row + 2)
    assert [len(row) for row in rows] == [2, 4, 6, 8]


def test_one_bucket_is_one_program(model, params):
    decode._extend.clear_cache()
    for length, rows in ((1, 3), (2, 4), (3, 3)):
        generate(model, params, np.ones((rows, length), int), 5, every=2, on_tokens=lambda *_: False, seed=length)
    assert decode._extend._cache_size() == 1


def test_a_repetition_penalty_follows_its_definition(model, params):
    """HF's RepetitionPenaltyLogitsProcessor, over the prompt and the new tokens."""
    context, expected = [1, 4, 1], []
    for _ in range(12):
        padded = np.pad(np.array([context]), ((0, 0), (0, 16 - len(context))))
        logits = np.array(model.logits(params, padded)[0, len(context) - 1])
        for token in set(context):
            logits[token] = logits[token] / 1.7 if logits[token] > 0 else logits[token] * 1.7
        expected.append(int(logits.argmax()))
        context.append(expected[-1])
    greedy = Sampling(0, repetition_penalty=1.7)
    assert generate(model, params, [[1, 4, 1]], 12, sampling=greedy)[0].tolist() == expected
    assert expected != generate(model, params, [[1, 4, 1]], 12, sampling=GREEDY)[0].tolist()


def test_tokens_and_seconds_are_counted(model, params):
    timing = decode.Timing()
    generate(model, params, PROMPTS, 3, timing=timing)
    assert (timing.prompt_tokens, timing.new_tokens) == (sum(map(len, PROMPTS)), 12)
    assert min(timing.prompt_seconds, timing.new_seconds) > 0
    assert "decode: 12 tokens" in str(timing)


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


class Window(TransformerModel):
    """Transformer behind the older interface: one number of cached tokens for all rows."""

    init_cache = None

    def decode(self, params, tokens, cache, num_cached):
        assert jnp.ndim(num_cached) == 0
        cache = cache or TransformerModel(CONFIG).init_cache(params, len(tokens), 16)
        return super().decode(params, tokens, cache, num_cached)


def test_a_model_with_one_number_of_cached_tokens_may_have_rows_of_different_lengths(model, params):
    expected = [row.tolist() for row in generate(model, params, PROMPTS, 12, sampling=GREEDY)]
    assert [row.tolist() for row in generate(Window(CONFIG), params, PROMPTS, 12, sampling=GREEDY)] == expected


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
