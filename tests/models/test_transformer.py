"""The transformer: causality, one parameter tree for every way to run it, sizes by formula."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.config import MeshConfig, family, gpt2, llama
from jaxtrain.losses import cross_entropy
from jaxtrain.models.kernels.attention import rope_tables, rotate
from jaxtrain.models.layout import logical_axes
from jaxtrain.models.masters import WithMasters
from jaxtrain.models.model import TransformerModel
from jaxtrain.models.parallel import Parallel
from jaxtrain.models.size import flops_per_token
from jaxtrain.models.transformer import Transformer, head_kernel, logits
from jaxtrain.optim import decay_mask
from jaxtrain.runtime.mesh import make_mesh, map_gradients, partition_spec

GPT2 = gpt2(num_layers=2, num_heads=4, d_model=32, max_seq_len=16, vocab_size=29)
LLAMA = llama(
    num_layers=3,
    num_heads=4,
    d_model=32,
    d_ff=48,
    max_seq_len=16,
    vocab_size=29,
    num_kv_heads=2,
    qk_norm=True,
    logit_softcap=5.0,
)
STYLES = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])


def slow(*values, **options):
    return pytest.param(*values, marks=pytest.mark.slow, **options)


WINDOW = dataclasses.replace(LLAMA, attention_window=4, attention_softcap=1.5)
SMALL = {"num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "d_model": 32, "d_ff": 48, "max_seq_len": 16}
SMALL |= {"vocab_size": 29}
GEMMA = family(
    "gemma3", **SMALL, head_dim=12, query_scalar=7.0, attention_window=4, global_every=2, attention_softcap=1.5
)
OLMO = family("olmo2", **SMALL, rope_theta=50.0, rope_scaling="llama3:4:1:4:8", qkv_bias=True)


@functools.cache
def make(config, scale=5.0):
    """A model with matrices large enough that every layer matters to the logits."""
    model = Transformer(config)
    params = jax.jit(TransformerModel(model.config).init)(jax.random.key(0))
    return model, jax.tree.map(lambda leaf, matrix: leaf * scale if matrix else leaf, params, decay_mask(params))


def loss_of_module(model, **options):
    return TransformerModel(model.config, model.parallel, **options).loss


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, tokens):
    hidden, _ = model.apply({"params": params}, tokens)
    return logits(model, params, hidden)


def tokens_of(config, batch_size=3, length=12, seed=1):
    return jax.random.randint(jax.random.key(seed), (batch_size, length), 0, config.vocab_size)


@STYLES
@pytest.mark.parametrize("place", [1, 6, 11])
def test_changing_a_token_changes_no_logit_before_it_and_no_other_row(config, place):
    model, params = make(config)
    tokens = tokens_of(config)
    before = run(model, params, tokens)
    after = run(model, params, tokens.at[1, place].set((tokens[1, place] + 1) % config.vocab_size))
    changed = np.asarray((before != after).any(axis=-1))
    assert not changed[[0, 2]].any()
    assert not changed[1, :place].any()
    assert changed[1, place:].all()


@pytest.mark.parametrize("unroll", [1, "all"])
def test_with_a_window_a_token_changes_the_logits_of_that_many_and_more_with_each_layer(unroll):
    """Three layers with a window of four keys: a token depends on the 3 x 3 tokens before it."""
    model, params = make(dataclasses.replace(WINDOW, scan_unroll=unroll))
    tokens = tokens_of(WINDOW, length=16)
    before = run(model, params, tokens)
    after = run(model, params, tokens.at[1, 2].set((tokens[1, 2] + 1) % 29))
    changed = np.asarray((before != after).any(axis=-1))
    assert changed[1].nonzero()[0].tolist() == list(range(2, 2 + 3 * 3 + 1))


def test_the_soft_cap_of_attention_reaches_every_layer():
    """A cap near 0 makes all scores equal, whatever the queries are."""
    config = dataclasses.replace(LLAMA, attention_softcap=1e-6)
    model, params = make(config)
    tokens = tokens_of(config)
    layers = params["layers"]
    for layer in range(config.num_layers):
        query = layers["attention"]["query"]["kernel"]
        other = params | {
            "layers": layers
            | {"attention": layers["attention"] | {"query": {"kernel": query.at[layer].set(-query[layer])}}}
        }
        np.testing.assert_allclose(run(model, params, tokens), run(model, other, tokens), atol=1e-4)
        plain, _ = make(LLAMA)
        assert jnp.abs(run(plain, params, tokens) - run(plain, other, tokens)).max() > 0.1


SEGMENTS = jnp.array([[5] * 7 + [2] * 5, [0] * 12, [1, 2] * 6, [3] + [4] * 11], jnp.int32)


def test_segments_in_a_batch_reach_every_layer_of_the_loss():
    """The loss of the second document has no gradient with respect to the first."""
    model, params = make(GPT2)
    tokens = jnp.arange(12)[None] % 29  # no token twice
    batch = {"inputs": tokens, "labels": tokens, "where": jnp.arange(12)[None] >= 7}

    def gradient(batch):
        loss = lambda table: loss_of_module(model)(params | {"embedding": table, "head": head}, batch).nll  # noqa: E731
        return jax.jit(jax.grad(loss))(params["embedding"])[:7]

    head = jax.random.normal(jax.random.key(5), (32, 29))
    assert (gradient(batch | {"segment_ids": SEGMENTS[:1]}) == 0).all()
    assert (gradient(batch) != 0).any(axis=-1).all()


@STYLES
def test_loss_starts_near_that_of_the_uniform_distribution(config):
    config = dataclasses.replace(config, vocab_size=257, d_model=256, logit_softcap=None)
    model = Transformer(config)
    params = jax.jit(TransformerModel(model.config).init)(jax.random.key(3))
    tokens = tokens_of(config, 64, 16)
    loss = cross_entropy(run(model, params, tokens[:, :-1]), tokens[:, 1:]).mean()
    assert abs(float(loss) - math.log(257)) < 0.1


@pytest.mark.parametrize("d_model", [64, 768, 4096])
def test_initial_logits_stay_small_at_any_width(d_model):
    """GPT-2's 0.02 starts 0.15 above ln V at 768 channels."""
    model = Transformer(llama(1, 4, d_model, 8, 4, vocab_size=1000))
    head = jax.jit(lambda key: TransformerModel(model.config).init(key)["head"])(jax.random.key(0))
    variance = float(jnp.var(head)) * d_model  # of a logit: the hidden states have unit variance
    assert variance / 2 < 0.1


@pytest.mark.parametrize("config", [slow(GPT2, id="gpt2"), slow(LLAMA, id="llama"), pytest.param(GEMMA, id="gemma")])
def test_scanned_unrolled_and_recomputed_layers_share_a_tree_and_agree(config):
    model, params = make(config)
    batch = batch_of(config)
    reference, gradient = jax.jit(jax.value_and_grad(lambda p: loss_of_module(model)(p, batch).mean()))(params)
    for change in ({"scan_unroll": "all"}, {"remat": "minimal"}, {"remat": "full"}):
        other = Transformer(dataclasses.replace(config, **change))
        shapes = jax.eval_shape(lambda other=other: TransformerModel(other.config).init(jax.random.key(0)))
        assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, params)
        loss_of = lambda p, m=other: loss_of_module(m)(p, batch).mean()  # noqa: E731
        loss, other_gradient = jax.jit(jax.value_and_grad(loss_of))(params)
        np.testing.assert_allclose(loss, reference, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_fully_rematerialized_masters_are_differentiated_in_two_loops():
    """With the numbers of one loop; a layer's window depends on its number. Each loop saves its own inputs."""
    config, batch = dataclasses.replace(GEMMA, num_layers=5), batch_of(GEMMA)
    _, params = make(config)
    like = {**params, "layers": jax.tree.map(jnp.zeros_like, params["layers"])}  # only their gradients count

    def differentiate(num_layers=5, **change):
        model = Transformer(dataclasses.replace(config, num_layers=num_layers, **change))

        def loss(own, masters):
            own, masters = (
                {**one, "layers": jax.tree.map(lambda x: x[:num_layers], one["layers"])} for one in (own, masters)
            )
            return loss_of_module(model)(WithMasters(own, masters), batch).mean()

        return jax.jit(jax.value_and_grad(loss))

    def stacks(*arguments, **options):
        text = str(differentiate(*arguments, **options).trace(like, params).jaxpr)
        return {n for n in range(2, 6) if f"f32[{n},4,12,32]" in text}

    assert [stacks(5, remat="full"), stacks(5, remat="minimal"), stacks(3, remat="full")] == [{3, 2}, {5}, {3}]
    loss, actual = differentiate(remat="full")(like, params)
    expected, gradient = differentiate()(like, params)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def batch_of(config, batch_size=4, length=12):
    tokens = tokens_of(config, batch_size, length + 1)
    where = jnp.arange(length)[None, :] < jnp.asarray([length, 1, 7, 0])[:batch_size, None]
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "where": where}


@STYLES
def test_loss_fn_is_the_cross_entropy_of_the_logits(config):
    """The loss covers the 29 tokens; three more rows of the tables are padding."""
    model, params = make(dataclasses.replace(config, vocab_multiple=8))
    batch = batch_of(config)
    sums = jax.jit(loss_of_module(model, z_loss=1e-3, chunk_size=5))(params, batch)
    expected = cross_entropy(run(model, params, batch["inputs"]), batch["labels"], where=batch["where"], z_loss=1e-3)
    for a, b in zip(jax.tree.leaves(sums), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert sums.weight == 20


@pytest.mark.parametrize(("config", "segments"), [(GPT2, False), slow(LLAMA, False), slow(WINDOW, True), (GEMMA, True)])
def test_loss_and_gradient_are_the_same_on_a_mesh(config, segments):
    """Every matrix in four shards, rows of unequal weight, and a padded vocabulary in two shards."""
    config = dataclasses.replace(config, vocab_multiple=2)
    model, params = make(config)
    batch = batch_of(config)
    if segments:
        batch["segment_ids"] = SEGMENTS
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    specs = jax.tree.map(lambda _, axes: partition_spec(axes), params, logical_axes(params))

    def gradients_of(model):
        def total(params, batch):
            sums = loss_of_module(model)(params, batch)
            return sums.total(), sums

        def gradients(params, batch):
            (_, sums), grads = jax.value_and_grad(total, has_aux=True)(params, batch)
            return sums, grads

        return gradients

    expected = jax.jit(gradients_of(model))(params, batch)
    mapped = map_gradients(mesh, specs)(gradients_of(Transformer(config, Parallel(fsdp=2, tensor=2))))
    actual = jax.jit(mapped)(params, batch)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [GPT2, slow(LLAMA), slow(WINDOW), GEMMA, OLMO])
def test_cache_gives_the_logits_of_the_whole_sequence(config):
    model, params = make(config)
    tokens = tokens_of(config, 2, 16)
    expected = run(model, params, tokens)
    cache = TransformerModel(config).init_cache(params, 2, config.max_seq_len)
    step = jax.jit(lambda tokens, cache, length: model.apply({"params": params}, tokens, cache, length))
    hidden, cache = step(tokens[:, :5], cache, jnp.int32(0))
    pieces = [hidden]
    for i in range(5, 16):
        hidden, cache = step(tokens[:, i : i + 1], cache, jnp.int32(i))
        pieces.append(hidden)
    actual = logits(model, params, jnp.concatenate(pieces, axis=1))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-5)


@STYLES
def test_parameters_and_gradients_follow_the_compute_dtype(config):
    model, params = make(config, scale=1.0)
    batch = batch_of(config)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    hidden, _ = jax.eval_shape(model.apply, {"params": half}, batch["inputs"])
    assert hidden.dtype == jnp.bfloat16
    loss = jax.jit(lambda p: loss_of_module(model)(p, batch).mean())
    np.testing.assert_allclose(loss(half), loss(params), rtol=2e-3)


@pytest.mark.parametrize("config", [GPT2, slow(LLAMA)], ids=["gpt2", "llama"])
def test_bfloat16_gradients_of_many_tokens_add_up(config):
    """4,096 tokens, every third the same. Sums in bfloat16 would be wrong by 2 to 3 %."""
    model, params = make(config, scale=1.0)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    batch = batch_of(config, batch_size=256, length=16) | {"where": jnp.ones((256, 16), bool)}
    batch["inputs"] = jnp.where(jnp.arange(16)[None] % 3 == 0, 7, batch["inputs"])
    gradients = jax.jit(jax.grad(lambda p: loss_of_module(model)(p, batch).total()))
    for (path, ours), exact in zip(
        jax.tree_util.tree_leaves_with_path(gradients(half)), jax.tree.leaves(gradients(rounded)), strict=True
    ):
        assert ours.dtype == jnp.bfloat16
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith(("embedding", "positions", "/bias")) or name.endswith("key/bias"):
            continue  # a product; or nothing but rounding: the softmax takes no notice of the key's bias
        error = jnp.linalg.norm((ours.astype(jnp.float32) - exact).ravel()) / jnp.linalg.norm(exact.ravel())
        assert error < 2**-6, f"{name}: {error}"


def test_gpt2_has_its_124_million_parameters():
    shapes = jax.eval_shape(TransformerModel(gpt2(vocab_size=50257)).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_439_808


@STYLES
def test_flops_by_formula_equal_the_count_of_the_compiler(config):
    """Counts the products of the compiled forward pass (a third of all), unrolled, in a wide model."""
    config = dataclasses.replace(config, d_model=128, d_ff=512, vocab_size=1024, scan_unroll="all")
    model = Transformer(config)
    params = jax.eval_shape(TransformerModel(model.config).init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    counted = jax.jit(lambda p, t: run(model, p, t)).lower(params, tokens).compile().cost_analysis()["flops"]
    expected = 2 * 16 * flops_per_token(config, 16, causal=False) / 3
    assert expected < counted < 1.1 * expected


def test_layers_with_and_without_a_window_differ_in_keys_and_wavelengths():
    """The second of three layers attends to all keys; stretching its wavelengths changes no other layer."""
    assert GEMMA.window_layers == [0, 2]
    model, params = make(GEMMA)
    tokens = tokens_of(GEMMA, length=16)
    before = run(model, params, tokens)
    after = run(model, params, tokens.at[1, 0].set((tokens[1, 0] + 1) % 29))
    assert (before != after).any(axis=-1)[1].all()  # windows alone would reach 3 x 3 tokens
    whole, windows = (dataclasses.replace(GEMMA, num_layers=n, rope_scaling="linear:4") for n in (2, 1))
    for config, equal in ((whole, False), (windows, True)):
        model, params = make(config)
        plain = Transformer(dataclasses.replace(config, rope_scaling=None))
        assert bool((run(model, params, tokens) == run(plain, params, tokens)).all()) == equal


@pytest.mark.parametrize("window", [1, 5, 511, 512, 600])
def test_flops_with_a_window_count_the_visible_keys(window):
    one = flops_per_token(dataclasses.replace(LLAMA, attention_window=1), 512)
    keys = np.mean([min(t + 1, window) for t in range(512)])
    actual = flops_per_token(dataclasses.replace(LLAMA, attention_window=window), 512)
    np.testing.assert_allclose(actual - one, 6 * 3 * 2 * 32 * (keys - 1), rtol=1e-12)
    some = flops_per_token(dataclasses.replace(LLAMA, attention_window=window, global_every=3), 512)
    np.testing.assert_allclose(some - actual, 6 * 2 * 32 * (513 / 2 - keys), rtol=1e-9, atol=1e-6)


def test_causal_flops_skip_masked_blocks():
    whole, causal = (flops_per_token(LLAMA, 512, causal=flag) for flag in (False, True))
    attention = 6 * 3 * 2 * 32 * 512  # 6 x layers x (scores and mixture) x heads x head_dim x keys
    np.testing.assert_allclose(whole - causal, attention * (1 - 513 / 1024))


def test_rotation_keeps_length_and_depends_on_distance_alone():
    x, y = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in range(2))

    def product(i, j):
        at = lambda position: rope_tables(jnp.full((1, 1), position), 8, 10_000.0)  # noqa: E731
        return float(jnp.sum(rotate(x, at(i)) * rotate(y, at(j))))

    np.testing.assert_allclose(product(5, 2), product(1003, 1000), rtol=1e-4)
    assert abs(product(5, 2) - product(5, 3)) > 1e-3
    tables = rope_tables(jnp.arange(300)[None], 8, 10_000.0)
    assert len(np.unique(np.asarray(tables[1])[0, 255:258, 0, 0])) == 3  # which bfloat16 positions would merge


def test_head_is_the_embedding_where_tied():
    _, tied = make(GPT2)
    _, untied = make(LLAMA)
    assert "head" not in tied
    np.testing.assert_array_equal(head_kernel(tied), tied["embedding"].T)
    assert head_kernel(untied) is untied["head"]


def test_errors_name_the_values():
    model, params = make(GPT2)
    with pytest.raises(ValueError, match=r"17 tokens exceed model\.max_seq_len 16"):
        model.apply({"params": params}, jnp.zeros((1, 17), jnp.int32))
    with pytest.raises(ValueError, match="a cache holds one segment per row: leave out segment_ids"):
        model.apply(
            {"params": params},
            jnp.zeros((1, 3), jnp.int32),
            TransformerModel(GPT2).init_cache(params, 1, 16),
            0,
            segment_ids=SEGMENTS,
        )
    with pytest.raises(ValueError, match="vocab_size"):
        TransformerModel(dataclasses.replace(GPT2, vocab_size=None)).init(jax.random.key(0))
