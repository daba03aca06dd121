"""The train step: exact sums over any split of a batch, one clip, the rate it logs, one trace."""

import itertools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from optim_reference import assert_close
from step_reference import (
    METRICS,
    ROWS,
    VOCAB,
    WIDTH,
    adamw,
    lm_batch,
    lm_loss,
    lm_params,
    mesh_of,
    one_batch_one_device,
    sums_of,
    two_steps,
)

from jaxtrain.optim import clip_by_global_norm, clipped_adamw
from jaxtrain.schedules import warmup_cosine
from jaxtrain.step import TrainState, make_eval_step, make_train_step, pmap_train_step, replicate


def test_one_batch_matches_float64():
    """Loss, gradient norm, clipping and the first update, by hand."""
    params = jax.tree.map(np.float64, lm_params())
    batch = lm_batch()
    tokens, labels, mask = (batch[name].reshape(-1) for name in ("tokens", "labels", "mask"))
    hidden = params["embed"][tokens]
    logits = hidden @ params["head"]
    lse = np.log(np.exp(logits).sum(-1))
    nll = ((lse - logits[np.arange(len(labels)), labels]) * mask).sum() / mask.sum()
    z_loss = 1e-3 * (lse**2 * mask).sum() / mask.sum()
    softmax = np.exp(logits - lse[:, None])
    on_logits = (softmax * (1 + 2e-3 * lse[:, None]) - np.eye(VOCAB)[labels]) * mask[:, None] / mask.sum()
    grads = {"embed": np.zeros((VOCAB, WIDTH)), "head": hidden.T @ on_logits}
    np.add.at(grads["embed"], tokens, on_logits @ params["head"].T)
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    clipped = {name: g * 0.2 / norm for name, g in grads.items()}
    updates = {name: -0.1 * (g / (np.abs(g) + 1e-2) + 0.1 * params[name]) for name, g in clipped.items()}
    metrics = one_batch_one_device()[0][0]
    expected = {
        "loss": nll + z_loss,
        "nll": nll,
        "z_loss": z_loss,
        "grad_norm": norm,
        "clip_factor": 0.2 / norm,
        "update_norm": np.sqrt(sum((u**2).sum() for u in updates.values())),
        "param_norm": np.sqrt(sum((p**2).sum() for p in params.values())),
        "learning_rate": 0.1,
        "tokens": 138,
        "skipped": 0,
    }
    assert norm > 0.3
    assert metrics.keys() == METRICS == expected.keys()
    for name in METRICS:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-6, err_msg=name)
    optimizer = adamw(0.1)
    after, _ = jax.jit(make_train_step(lm_loss, optimizer))(TrainState.create(lm_params(), optimizer), batch)
    assert_close(after.params, {name: params[name] + updates[name] for name in params})


ROADS = ("jit", "jit_explicit", "shard_map", "shard_map_unchecked", "pmap")


QUICK_SPLITS = {*((road, 4, 4) for road in ROADS), ("jit", 1, 8), ("shard_map", 1, 8)}


@pytest.mark.parametrize(
    ("road", "accumulate", "num_devices"),
    [
        pytest.param(road, *split, marks=[] if (road, *split) in QUICK_SPLITS else pytest.mark.slow)
        for road, *split in itertools.product(ROADS, (1, 2, 4), (1, 2, 4, 8))
        if (road, *split) != ("jit", 1, 1)  # the reference
    ],
)
def test_any_split_is_the_same_step(road, accumulate, num_devices):
    """Micro-batches of 1, 9, 0 and 128 tokens; a mean of means would be far off."""
    (first, second), params = two_steps(road, accumulate, num_devices)
    (expected_first, expected_second), expected_params = one_batch_one_device()
    assert first["tokens"] == 138
    for name in METRICS:
        np.testing.assert_allclose(first[name], expected_first[name], rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(second[name], expected_second[name], rtol=1e-6, err_msg=name)
    assert_close(params, expected_params)


def test_clips_once_after_accumulation():
    """Micro-gradients [2, 0] and [0, 2] make [1, 1], which is clipped to norm 1."""

    def loss(params, batch):
        return sums_of(jnp.vdot(params["w"], batch[0]))

    optimizer = optax.chain(clip_by_global_norm(1.0), optax.scale(-1.0))
    state = TrainState.create({"w": jnp.zeros(2)}, optimizer)
    state, metrics = jax.jit(make_train_step(loss, optimizer, accumulate=2))(state, jnp.array([[2.0, 0.0], [0.0, 2.0]]))
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(metrics["clip_factor"], np.sqrt(0.5), rtol=1e-6)
    np.testing.assert_allclose(state.params["w"], [-np.sqrt(0.5)] * 2, rtol=1e-6)


def test_logged_learning_rate_is_the_applied_one():
    """A gradient of 1 gives Adam's direction 1, also with `step=` and after a restore."""
    schedule = warmup_cosine(0.5, 10, 3, 0.1)
    optimizer = clipped_adamw(schedule, weight_decay=0.0, clip_norm=None)
    train_step = jax.jit(make_train_step(lambda params, batch: sums_of(jnp.sum(params["w"])), optimizer))

    def rates(state, num_steps):
        for _ in range(num_steps):
            step, before = int(state.step), state.params["w"]
            state, metrics = train_step(state, jnp.zeros(1))
            np.testing.assert_allclose(before - state.params["w"], metrics["learning_rate"], rtol=2e-6)
            np.testing.assert_allclose(metrics["learning_rate"], schedule(step), rtol=5e-7)
            yield float(metrics["learning_rate"]), state

    fresh = TrainState.create({"w": jnp.zeros(2)}, optimizer)
    whole = list(rates(fresh, 12))
    assert whole[2][0] == 0.5
    assert whole[9][0] == whole[11][0] == np.float32(0.05)
    restored = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, whole[3][1]))
    assert [rate for rate, _ in rates(restored, 3)] == [rate for rate, _ in whole[4:7]]
    # An optimizer that lags behind (it skipped steps, or is new) does not delay the schedule.
    late = fresh.replace(step=jnp.int32(5))
    assert [rate for rate, _ in rates(late, 2)] == [whole[5][0], whole[6][0]]


def test_traced_once():
    """100 steps, evaluations between them and a round trip through numpy, as a restore would be."""
    optimizer, batch = adamw(warmup_cosine(0.1, 100, 5)), lm_batch()
    step = make_train_step(lm_loss, optimizer, accumulate=2)
    train_step = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=0)
    eval_step = jax.jit(chex.assert_max_traces(make_eval_step(lm_loss), n=1))
    state = TrainState.create(lm_params(), optimizer)
    nll = []
    for i in range(100):
        state, _ = train_step(state, batch)
        if i % 10 == 0:
            nll.append(float(eval_step(state.params, batch).mean_nll()))
        if i == 50:
            state = jax.device_put(jax.tree.map(np.array, state))
    assert state.step == 100
    assert nll[-1] < nll[0] - 0.5


def test_state_is_donated():
    optimizer = adamw(0.1)
    state = TrainState.create(lm_params(), optimizer)
    old = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 1]
    jax.jit(make_train_step(lm_loss, optimizer), donate_argnums=0)(state, lm_batch())
    assert len(old) == 6
    assert all(leaf.is_deleted() for leaf in old)


def test_the_host_takes_no_part_in_a_step():
    """No transfer in either direction and no callback into Python."""
    optimizer = adamw(warmup_cosine(0.1, 100, 5))
    state, batch = jax.device_put((TrainState.create(lm_params(), optimizer), lm_batch()))
    train_step = jax.jit(make_train_step(lm_loss, optimizer, accumulate=2))
    state, _ = train_step(state, batch)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, _ = train_step(state, batch)
    assert state.step == 4
    assert "callback" not in train_step.lower(state, batch).as_text()
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train_step(state, lm_batch())


def test_all_masked_batch():
    """Loss and gradient are 0, the step counts, nothing is NaN."""
    optimizer = adamw(0.1, weight_decay=0.0)
    state = TrainState.create(lm_params(), optimizer)
    after, metrics = jax.jit(make_train_step(lm_loss, optimizer, accumulate=4))(state, lm_batch((0, 0, 0, 0)))
    zero = {"loss", "nll", "z_loss", "grad_norm", "update_norm", "tokens", "skipped"}
    assert {name for name in METRICS if metrics[name] == 0} == zero
    assert all(np.isfinite(metrics[name]) for name in METRICS)
    assert after.step == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


def test_foreign_optimizers():
    """A metric that the state does not hold is absent; one that it holds is found."""

    def metrics_of(optimizer):
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            state = TrainState.create(lm_params(), optimizer)
            train_step = jax.jit(make_train_step(lm_loss, optimizer))
            for _ in range(2):
                state, metrics = train_step(state, lm_batch())
        assert metrics["grad_norm"] > 0
        assert metrics["update_norm"] > 0
        return metrics

    plain = metrics_of(optax.adamw(0.1))
    assert plain.keys() == METRICS - {"learning_rate", "clip_factor"}
    assert plain["skipped"] == 0
    injected = metrics_of(optax.inject_hyperparams(optax.adamw)(lambda step: 0.5 ** step.astype(jnp.float32)))
    assert injected["learning_rate"] == 0.5


class ToldState(NamedTuple):
    step: jax.Array
    loss: jax.Array
    value: jax.Array
    skipped: jax.Array


def test_the_optimizer_receives_step_and_loss():
    def update(updates, state, params=None, *, step, loss, value):
        del state, params
        return updates, ToldState(step, loss, value, jnp.ones((), jnp.int32))

    told = optax.GradientTransformationExtraArgs(
        lambda params: ToldState(jnp.int32(0), jnp.float32(0), jnp.float32(0), jnp.int32(0)), update
    )
    state = TrainState.create(lm_params(), told).replace(step=jnp.int32(41))
    state, metrics = jax.jit(make_train_step(lm_loss, told, accumulate=2))(state, lm_batch())
    assert state.opt_state.step == 41
    assert state.step == 42
    assert state.opt_state.loss == state.opt_state.value == metrics["loss"] > 1
    assert metrics["skipped"] == 1


@pytest.mark.parametrize("road", ["jit", "pmap", "shard_map"])
def test_eval_step_sums(road):
    """Sums of any batches, added and divided once, are those of the whole set."""
    params, batch = lm_params(), lm_batch()
    whole = jax.jit(make_eval_step(lm_loss))(params, batch)
    np.testing.assert_allclose(whole.mean_nll(), one_batch_one_device()[0][0]["nll"], rtol=1e-6)
    if road == "jit":
        eval_step = jax.jit(make_eval_step(lm_loss))
        first, second = (jax.tree.map(lambda x, rows=rows: x[rows], batch) for rows in (slice(0, 5), slice(5, ROWS)))
        total = eval_step(params, first) + eval_step(params, second)
    elif road == "pmap":
        eval_step = jax.pmap(make_eval_step(lm_loss, axis_name="devices"), axis_name="devices", in_axes=(None, 0))
        total = eval_step(params, jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch))
        total = jax.tree.map(lambda x: x[3], total)
    else:
        specs = {"in_specs": (P(), P("data")), "out_specs": P()}
        total = jax.jit(jax.shard_map(make_eval_step(lm_loss, axis_name="data"), mesh=mesh_of(8), **specs))(
            params, batch
        )
    assert_close(total, whole)
    assert total.weight == 138


def test_errors():
    optimizer = adamw(0.1)
    with pytest.raises(ValueError, match=r"accumulate must be .* from 1 .* got 0"):
        make_train_step(lm_loss, optimizer, accumulate=0)
    state = TrainState.create(lm_params(), optimizer)
    with pytest.raises(ValueError, match=r"a batch of 32 rows .* accumulate=3 equal"):
        jax.jit(make_train_step(lm_loss, optimizer, accumulate=3))(state, lm_batch())


def test_pmap_traces_once():
    optimizer, devices, calls = adamw(0.1), jax.devices()[:2], []

    def counted_loss(params, batch):
        calls.append(1)
        return lm_loss(params, batch)

    step = pmap_train_step(counted_loss, optimizer, devices=devices)
    state = replicate(TrainState.create(lm_params(), optimizer), devices)
    batch = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), lm_batch())
    for _ in range(3):
        state, _ = jax.block_until_ready(step(state, batch))
    assert len(calls) == 1


@pytest.mark.parametrize(("platform", "barriers"), [("cpu", 0), ("cuda", 1 + 2)])
def test_a_gpu_stores_the_gradients_before_the_optimizer_reads_them(platform, barriers):
    """The sums of the two parameters have barriers too; see `sums`."""
    optimizer = adamw(0.1)
    step = jax.jit(make_train_step(lm_loss, optimizer))
    state = TrainState.create(lm_params(), optimizer)
    text = step.trace(state, lm_batch()).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("optimization_barrier") == barriers


def test_a_step_without_parameters_runs():
    optimizer = optax.sgd(0.1)
    state = TrainState.create({}, optimizer)
    state, metrics = jax.jit(make_train_step(lambda _, batch: sums_of(jnp.sum(batch["x"])), optimizer))(
        state, {"x": jnp.ones(2)}
    )
    assert metrics["grad_norm"] == 0
