"""The train step in bfloat16 and float16, with loss scaling."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from optim_reference import assert_close
from step_reference import (
    METRICS,
    adamw,
    lm_batch,
    lm_loss,
    lm_params,
    mesh_of,
    one_batch_one_device,
    sums_of,
)

from jaxtrain.guard import skip_bad_steps
from jaxtrain.optim import scale_by_adam
from jaxtrain.precision import LossScaling, Policy
from jaxtrain.step import TrainState, make_eval_step, make_train_step, replicate


@pytest.mark.parametrize("policy", [None, Policy(compute="bfloat16")], ids=["float32", "bfloat16"])
def test_metrics_are_float32_scalars(policy):
    optimizer = adamw(0.1)
    state = TrainState.create(lm_params(), optimizer)
    _, metrics = jax.eval_shape(make_train_step(lm_loss, optimizer, policy=policy), state, lm_batch())
    assert {name: (value.shape, value.dtype.name, value.weak_type) for name, value in metrics.items()} == {
        name: ((), "float32", False) for name in METRICS
    }


def half_step(loss_fn=lm_loss, scaling=LossScaling(divisor=512.0), **arguments):  # noqa: B008 (frozen)
    """A float16 step and its first state."""
    optimizer = skip_bad_steps(adamw(0.1))
    policy = Policy(compute="float16")
    train_step = jax.jit(make_train_step(loss_fn, optimizer, policy=policy, loss_scaling=scaling, **arguments))
    return train_step, TrainState.create(lm_params(), optimizer, scaling.init())


def test_loss_scaling_changes_nothing_but_the_scale():
    """Divided out before the norm. Powers of two are exact, so any scale that fits gives the same bits."""
    results = []
    for initial in (2.0**6, 2.0**15):
        train_step, state = half_step(scaling=LossScaling(initial=initial, divisor=512.0), accumulate=2)
        state, metrics = train_step(state, lm_batch())
        assert metrics.pop("loss_scale") == initial
        results.append((metrics, state.params, state.opt_state))
    jax.tree.map(np.testing.assert_array_equal, *results)
    metrics = results[0][0]
    for name, rtol in (("loss", 1e-3), ("grad_norm", 3e-3), ("clip_factor", 3e-3)):
        np.testing.assert_allclose(metrics[name], one_batch_one_device()[0][0][name], rtol=rtol, err_msg=name)


def test_without_scaling_small_gradients_vanish_in_float16():
    """The purpose of loss scaling: a gradient of 2^-30 times the parameters underflows."""

    def small_loss(params, batch):
        sums = lm_loss(jax.tree.map(lambda p: p * jnp.float16(1), params), batch)
        return jax.tree.map(lambda x: x * 2.0**-30, sums).replace(weight=sums.weight)

    norms = {}
    for initial in (1.0, 2.0**20):
        train_step, state = half_step(small_loss, LossScaling(initial=initial))
        norms[initial] = float(train_step(state, lm_batch())[1]["grad_norm"])
    expected = one_batch_one_device()[0][0]["grad_norm"] * 2.0**-30
    np.testing.assert_allclose(norms[2.0**20], expected, rtol=3e-3)
    assert norms[1.0] < 0.8 * expected


def test_an_overflow_halves_the_scale_and_changes_nothing_else():
    """The step is skipped and counted, the next one is fine."""
    train_step, state = half_step(scaling=LossScaling(initial=2.0**16, divisor=1.0))
    before = jax.tree.map(np.asarray, (state.params, state.opt_state.inner))
    scales, skipped = [], []
    for _ in range(10):
        state, metrics = train_step(state, lm_batch())
        scales.append(float(metrics["loss_scale"]))
        skipped.append(float(metrics["skipped"]))
        if skipped[-1]:
            assert metrics["skip_reason"] == 1
            after = (state.params, optax.tree_utils.tree_set(state.opt_state.inner, learning_rate=jnp.float32(0)))
            jax.tree.map(np.testing.assert_array_equal, after, before)
        else:
            break
    assert len(scales) >= 3
    assert not skipped[-1]
    assert scales == [2.0 ** (16 - i) for i in range(len(scales))]
    assert state.step == len(scales)
    assert state.opt_state.accepted == 1


@pytest.mark.parametrize("road", ["shard_map", "pmap"])
def test_loss_scaling_on_many_devices(road):
    """The same numbers as on one device; the factor reaches every one."""
    scaling, optimizer, policy = LossScaling(divisor=512.0), skip_bad_steps(adamw(0.1)), Policy(compute="float16")
    train_step, state = half_step()
    _, expected = train_step(state, lm_batch())
    devices = jax.devices()[:4]
    if road == "pmap":
        body = make_train_step(lm_loss, optimizer, axis_name="data", policy=policy, loss_scaling=scaling)
        batch = jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), lm_batch())
        _, metrics = jax.pmap(body, axis_name="data", devices=devices)(replicate(state, devices), batch)
        metrics = jax.tree.map(lambda x: x[0], metrics)
    else:
        body = make_train_step(lm_loss, optimizer, axis_name="data", policy=policy, loss_scaling=scaling)
        specs = {"in_specs": (P(), P("data")), "out_specs": (P(), P())}
        _, metrics = jax.jit(jax.shard_map(body, mesh=mesh_of(4), **specs))(state, lm_batch())
    assert metrics["loss_scale"] == 2.0**15
    assert_close(metrics, expected, rtol=2e-3)


def test_float16_needs_its_parts():
    policy, plain, scaling = Policy(compute="float16"), adamw(0.1), LossScaling()
    with pytest.raises(ValueError, match=r"give make_train_step\(loss_scaling"):
        make_train_step(lm_loss, plain, policy=policy)
    step = make_train_step(lm_loss, plain, policy=policy, loss_scaling=scaling)
    with pytest.raises(ValueError, match=r"TrainState\.create\(params, optimizer, loss_scaling\.init\(\)\)"):
        step(TrainState.create(lm_params(), plain), lm_batch())
    with pytest.raises(ValueError, match=r"wrap it in jaxtrain\.guard\.skip_bad_steps"):
        step(TrainState.create(lm_params(), plain, scaling.init()), lm_batch())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_bfloat16_policy(accumulate):
    """The loss sees bfloat16, the state stays float32; integers are left alone."""
    seen = []

    def loss_fn(params, batch):
        seen.append((params["embed"].dtype.name, params["head"].dtype.name))
        return lm_loss(params, batch)

    optimizer, policy = adamw(0.1), Policy(compute="bfloat16")
    state = TrainState.create(lm_params(), optimizer)
    after, metrics = jax.jit(make_train_step(loss_fn, optimizer, accumulate=accumulate, policy=policy))(
        state, lm_batch()
    )
    eval_sums = jax.jit(make_eval_step(loss_fn, policy=policy))(state.params, lm_batch())
    assert set(seen) == {("bfloat16", "bfloat16")}
    assert len(seen) >= 2
    assert {
        x.dtype.name for x in jax.tree.leaves((after.params, optax.tree_utils.tree_get(after.opt_state, "mu")))
    } == {"float32"}
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), lm_params())
    np.testing.assert_allclose(metrics["loss"], lm_loss(rounded, lm_batch()).mean(), rtol=1e-6)
    np.testing.assert_allclose(eval_sums.mean(), metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], one_batch_one_device()[0][0]["grad_norm"], rtol=2**-7)


def test_accumulated_gradients_are_float32():
    """256 bfloat16 gradients of 1 sum to 256 + 256, which bfloat16 could not count to."""
    policy = Policy(compute="bfloat16")
    optimizer = scale_by_adam(0.9, 0.95, 1e-8)
    state = TrainState.create({"w": jnp.ones(())}, optimizer)

    def loss(params, batch):
        return sums_of(params["w"].astype(jnp.float32) * jnp.sum(batch))

    step = make_train_step(loss, optimizer, accumulate=512, policy=policy)
    _, metrics = jax.jit(step)(state, jnp.ones(512))
    assert metrics["grad_norm"] == 1.0
