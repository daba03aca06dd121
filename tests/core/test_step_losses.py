"""Models and losses of any kind in the train step: keys for dropout, auxiliary metrics, and what a loss may return."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from step_reference import VOCAB, WIDTH, adamw, lm_batch, lm_loss, lm_params, sums_of

from jaxtrain.losses import cross_entropy
from jaxtrain.optim import clipped_adamw
from jaxtrain.step import TrainState, make_eval_step, make_train_step, pmap_train_step, replicate


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return nn.Dense(VOCAB)(jnp.tanh(nn.Embed(VOCAB, WIDTH)(tokens)))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        return self.head(jnp.tanh(self.embed(tokens)))


def models():
    """Three ways to write one model, with the same initial values: parameters, and apply(params, tokens) -> logits."""
    linen = LinenModel()
    params = linen.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    table, head = params["Embed_0"]["embedding"], params["Dense_0"]
    graph, state = nnx.split(NnxModel(nnx.Rngs(0)))
    nnx.replace_by_pure_dict(state, {"embed": {"embedding": table}, "head": dict(head)})
    plain = {"table": table, "kernel": head["kernel"], "bias": head["bias"]}
    return {
        "linen": (params, lambda p, tokens: linen.apply({"params": p}, tokens)),
        "nnx": (state, lambda p, tokens: nnx.merge(graph, p)(tokens)),
        "dict": (plain, lambda p, tokens: jnp.tanh(p["table"][tokens]) @ p["kernel"] + p["bias"][None, None]),
    }


def test_linen_nnx_and_plain_parameters_train_alike():
    """The step needs no module class: equal initial values give equal, falling losses."""
    optimizer, batch, losses = clipped_adamw(0.05, clip_norm=0.5), lm_batch((128, 128, 128, 128)), {}
    batch = {**batch, "labels": (batch["tokens"] * 5 + 2) % VOCAB}  # learnable

    for name, (params, apply) in models().items():

        def loss_fn(params, batch, apply=apply):
            return cross_entropy(apply(params, batch["tokens"]), batch["labels"], where=batch["mask"])

        state = TrainState.create(jax.tree.map(jnp.copy, params), optimizer)
        train_step = jax.jit(make_train_step(loss_fn, optimizer, accumulate=2), donate_argnums=0)
        losses[name] = []
        for _ in range(30):
            state, metrics = train_step(state, batch)
            losses[name].append(float(metrics["loss"]))
    np.testing.assert_allclose(losses["nnx"], losses["linen"], rtol=1e-6)
    np.testing.assert_allclose(losses["dict"], losses["linen"], rtol=1e-6)
    np.testing.assert_allclose(losses["linen"][0], np.log(VOCAB), atol=0.5)
    assert losses["linen"][-1] < 0.3 * losses["linen"][0]


def dropout_loss(params, batch, rng):
    """Sums, the bits of the key, and how many positions were kept."""
    bits = jax.random.uniform(rng, batch["labels"].shape)
    kept = batch["mask"] & (bits > 0.5)
    aux = {"kept": jnp.sum(kept), "first_bits": jnp.sum(batch["mask"], dtype=jnp.float32) * bits[0, 0]}
    return lm_loss(params, {**batch, "mask": kept}), aux


def first_bits(seed, step, micro_batch, *device):
    key = jax.random.fold_in(jax.random.key(seed), step)
    for number in (*device, micro_batch):
        key = jax.random.fold_in(key, number)
    return key


def test_the_key_is_a_function_of_seed_step_and_micro_batch():
    """Every run draws the same dropout at a step; micro-batches draw different ones."""
    optimizer, batch = adamw(0.1), lm_batch((128, 128, 128, 128))
    losses = {}
    for seed, accumulate in ((0, 1), (0, 2), (1, 2)):
        step = jax.jit(make_train_step(dropout_loss, optimizer, accumulate=accumulate, seed=seed))
        state = TrainState.create(lm_params(), optimizer)
        state, _ = step(state, batch)
        restored = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, state))
        _, metrics = step(state, batch)
        jax.tree.map(np.testing.assert_array_equal, step(restored, batch)[1], metrics)
        losses[seed, accumulate] = float(metrics["loss"])
        parts = [jax.tree.map(lambda x, i=i: x[i::accumulate], batch) for i in range(accumulate)]  # noqa: B023
        loss = jax.jit(dropout_loss)
        drawn = [loss(state.params, part, first_bits(seed, 1, i)) for i, part in enumerate(parts)]
        weight = sum(float(sums.weight) for sums, _ in drawn)
        assert metrics["tokens"] == weight == sum(float(aux["kept"]) for _, aux in drawn)
        for name in ("kept", "first_bits"):
            expected = sum(float(aux[name]) for _, aux in drawn) / weight
            np.testing.assert_allclose(metrics[name], expected, rtol=1e-6)
    assert len(set(losses.values())) == 3


def test_each_device_has_a_key_and_auxiliary_sums_are_added():
    optimizer, batch = adamw(0.1), lm_batch((128, 128, 128, 128))
    devices = jax.devices()[:2]
    split = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
    step = pmap_train_step(dropout_loss, optimizer, devices=devices, seed=3)
    _, metrics = step(replicate(TrainState.create(lm_params(), optimizer), devices), split)
    loss = jax.jit(dropout_loss)
    drawn = [loss(lm_params(), jax.tree.map(lambda x, i=i: x[i], split), first_bits(3, 0, 0, i)) for i in range(2)]
    weight = sum(float(sums.weight) for sums, _ in drawn)
    assert metrics["tokens"][0] == weight
    expected = sum(float(aux["first_bits"]) for _, aux in drawn) / weight
    np.testing.assert_allclose(metrics["first_bits"], [expected] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss_fn", "takes"),
    [
        (lambda params, batch: None, False),
        (lambda params, batch, rng: None, True),
        (lambda params, batch, key, /: None, True),
        (lambda params, batch, rng=None: None, True),
        (lambda params, batch, scale=1.0: None, False),
        (lambda params, batch, *rest: None, False),
        (lambda params, batch, *, rng=None: None, False),
        (functools.partial(lambda model, params, batch, rng: None, 0), True),
    ],
)
def test_losses_that_take_a_key(loss_fn, takes):
    """A third positional parameter without a default, or named rng; evaluation passes None."""
    seen = []

    @functools.wraps(loss_fn)
    def recorded(params, batch, *key):
        seen.append(key)
        return lm_loss(params, batch), {"ones": batch["mask"]}

    jax.eval_shape(make_eval_step(recorded), lm_params(), lm_batch())
    assert seen == [(None,) if takes else ()]


def test_terms_of_micro_batches_change_no_other_number():
    optimizer, batch, results = adamw(0.1), lm_batch(), {}
    for terms in (False, True):
        step = jax.jit(make_train_step(lm_loss, optimizer, accumulate=4, micro_batch_terms=terms))
        results[terms] = step(TrainState.create(lm_params(), optimizer), batch)
    metrics = results[True][1]
    assert metrics.keys() - results[False][1].keys() == {
        f"micro_batch_{name}" for name in ("loss", "nll", "tokens", "grad_norm")
    }
    jax.tree.map(np.testing.assert_array_equal, results[False][0], results[True][0])
    jax.tree.map(np.testing.assert_array_equal, results[False][1], {n: metrics[n] for n in results[False][1]})
    np.testing.assert_array_equal(metrics["micro_batch_tokens"], [1, 9, 0, 128])
    one = jax.jit(make_train_step(lm_loss, optimizer, micro_batch_terms=True))
    for i in range(4):
        part = jax.tree.map(lambda x, i=i: x[i::4], batch)
        _, expected = one(TrainState.create(lm_params(), optimizer), part)
        for name in ("loss", "nll", "tokens", "grad_norm"):
            np.testing.assert_allclose(metrics[f"micro_batch_{name}"][i], expected[name], rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(expected[f"micro_batch_{name}"], expected[name][None], rtol=1e-6)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            jnp.float32(1),
            r"must return LossSums, .* not float32, an array of shape \(\): return jaxtrain.losses",
        ),
        ((sums_of(jnp.float32(1)), jnp.float32(1)), "must return LossSums"),
        ((jnp.float32(1), {}), "must return LossSums"),
        ((sums_of(jnp.float32(1)), {"loss": 1.0, "nll": 2.0}), "loss_fn returns loss, nll, which the train step"),
    ],
)
def test_results_of_a_loss(result, message):
    optimizer = optax.sgd(0.1)
    step = make_train_step(lambda params, batch: result, optimizer)
    with pytest.raises(ValueError, match=message):
        step(TrainState.create({"w": jnp.ones(2)}, optimizer), jnp.ones(2))


class DroppingModel(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens, rngs):
        return self.head(self.dropout(self.embed(tokens), rngs=rngs))


def test_an_nnx_model_with_dropout():
    """The error for a whole NNX state recommends `nnx.split`, which then works."""
    model, optimizer, batch = DroppingModel(nnx.Rngs(0)), adamw(0.1), lm_batch((128, 128, 128, 128))
    with pytest.raises(ValueError, match=r"dropout/.*only float arrays are trained.*nnx\.split\(model, nnx\.Param"):
        TrainState.create(nnx.state(model), optimizer)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params, batch, rng):
        logits = nnx.merge(graph, params, rest)(batch["tokens"], nnx.Rngs(rng))
        return cross_entropy(logits, batch["labels"], where=batch["mask"])

    state, step = TrainState.create(params, optimizer), jax.jit(make_train_step(loss_fn, optimizer, accumulate=2))
    losses = {float(step(state.replace(step=jnp.int32(i)), batch)[1]["loss"]) for i in (0, 1, 1)}
    assert len(losses) == 2
