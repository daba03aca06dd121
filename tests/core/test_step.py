"""The train step: exact sums over any split of a batch, one clip, the rate it logs, one trace, any kind of model."""

import functools
import itertools
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.guard import skip_bad_steps
from jaxtrain.losses import LossSums, cross_entropy, linear_cross_entropy
from jaxtrain.optim import clip_by_global_norm, clipped_adamw, scale_by_adam
from jaxtrain.precision import LossScaling, Policy
from jaxtrain.schedules import warmup_cosine
from jaxtrain.step import TrainState, make_eval_step, make_train_step, pmap_train_step, replicate

VOCAB, WIDTH, ROWS, LENGTH = 13, 5, 32, 16
METRICS = {
    *("loss", "nll", "z_loss", "grad_norm", "clip_factor"),
    *("update_norm", "param_norm", "learning_rate", "tokens", "skipped"),
}
# The large eps makes Adam's direction a smooth function of the gradient, which noise cannot turn round.
adamw = functools.partial(clipped_adamw, eps=1e-2, clip_norm=0.2)


def lm_loss(params, batch):
    """The smallest language model: a table of embeddings and a head."""
    mesh = jax.typeof(batch["tokens"]).sharding.mesh
    told = NamedSharding(mesh, P("data")) if mesh.explicit_axes else None  # explicit axes need a sharding
    hidden = params["embed"].at[batch["tokens"]].get(out_sharding=told)
    return linear_cross_entropy(
        hidden, params["head"], batch["labels"], where=batch["mask"], chunk_size=24, z_loss=1e-3
    )


def lm_params():
    rng = np.random.default_rng(0)
    shapes = {"embed": (VOCAB, WIDTH), "head": (WIDTH, VOCAB)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def lm_batch(counts=(1, 9, 0, 128)):
    """Rows i, i + 4, ... hold counts[i % 4] tokens that count."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    mask = np.zeros((ROWS // 4, 4, LENGTH), bool)
    for micro_batch, count in enumerate(counts):
        mask[:, micro_batch] = (np.arange(mask[:, 0].size) < count).reshape(-1, LENGTH)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "mask": mask.reshape(ROWS, LENGTH)}


def assert_close(actual, expected, rtol=1e-6):
    """The largest difference in a leaf is at most rtol of its largest number."""

    def check(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max(initial=0))

    jax.tree.map(check, actual, expected)


def mesh_of(num_devices, kind="Auto"):
    types = (jax.sharding.AxisType[kind],)
    return jax.make_mesh((num_devices,), ("data",), axis_types=types, devices=jax.devices()[:num_devices])


def two_steps(road, accumulate, num_devices):
    """Returns the metrics of two steps and the parameters after them, for one way to use many devices."""
    optimizer, batch = adamw(0.1), lm_batch()
    state = TrainState.create(lm_params(), optimizer)
    mesh = mesh_of(num_devices, "Explicit" if road == "jit_explicit" else "Auto")
    if road == "pmap":
        devices = jax.devices()[:num_devices]
        step = pmap_train_step(lm_loss, optimizer, accumulate=accumulate, devices=devices)
        state = replicate(state, devices)
        batch = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)
    else:
        axis_name = None if road.startswith("jit") else "data"
        step = make_train_step(lm_loss, optimizer, accumulate=accumulate, axis_name=axis_name)
        if axis_name:
            specs = {"in_specs": (P(), P("data")), "out_specs": (P(), P())}
            step = jax.shard_map(step, mesh=mesh, check_vma=road == "shard_map", **specs)
        step = jax.jit(step, donate_argnums=0)
        state = jax.device_put(state, NamedSharding(mesh, P()))
        batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    state, first = step(state, batch)
    state, second = step(state, batch)
    result = jax.tree.map(np.asarray, ((first, second), state.params))
    if road == "pmap":
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), result)
        result = jax.tree.map(lambda x: x[0], result)
    return result


@functools.cache
def one_batch_one_device():
    return two_steps("jit", 1, 1)


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


QUICK_SPLITS = {(1, 8), (2, 2), (4, 4)}


@pytest.mark.parametrize(
    ("road", "accumulate", "num_devices"),
    [
        pytest.param(road, *split, marks=[] if split in QUICK_SPLITS else pytest.mark.slow)
        for road, *split in itertools.product(ROADS, (1, 2, 4), (1, 2, 4, 8))
        for split in [tuple(split)]
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


def sums_of(nll, weight=1.0):
    zero = jnp.zeros((), jnp.float32)
    return LossSums(nll=nll, z_loss=zero, smoothing=zero, weight=jnp.asarray(weight, jnp.float32))


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


@pytest.mark.parametrize("policy", [None, Policy(compute="bfloat16")], ids=["float32", "bfloat16"])
def test_metrics_are_float32_scalars(policy):
    optimizer = adamw(0.1)
    state = TrainState.create(lm_params(), optimizer)
    _, metrics = jax.eval_shape(make_train_step(lm_loss, optimizer, policy=policy), state, lm_batch())
    assert {name: (value.shape, value.dtype.name, value.weak_type) for name, value in metrics.items()} == {
        name: ((), "float32", False) for name in METRICS
    }


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


def test_errors():
    optimizer = adamw(0.1)
    with pytest.raises(ValueError, match="accumulate must be at least 1 micro-batch, got 0"):
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
        state, _ = step(state, batch)
    assert len(calls) == 1


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
        drawn = [dropout_loss(state.params, part, first_bits(seed, 1, i)) for i, part in enumerate(parts)]
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
    drawn = [
        dropout_loss(lm_params(), jax.tree.map(lambda x, i=i: x[i], split), first_bits(3, 0, 0, i)) for i in range(2)
    ]
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
def test_which_losses_take_a_key(loss_fn, takes):
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
    for i in range(4):
        part = jax.tree.map(lambda x, i=i: x[i::4], batch)
        one = make_train_step(lm_loss, optimizer, micro_batch_terms=True)
        _, expected = one(TrainState.create(lm_params(), optimizer), part)
        for name in ("loss", "nll", "tokens", "grad_norm"):
            np.testing.assert_allclose(metrics[f"micro_batch_{name}"][i], expected[name], rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(expected[f"micro_batch_{name}"], expected[name][None], rtol=1e-6)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            jnp.float32(1),
            r"must return LossSums, .* not an array of shape \(\): return jaxtrain.losses",
        ),
        ((sums_of(jnp.float32(1)), jnp.float32(1)), "must return LossSums"),
        ((jnp.float32(1), {}), "must return LossSums"),
        ((sums_of(jnp.float32(1)), {"loss": 1.0, "nll": 2.0}), "loss_fn returns loss, nll, which the train step"),
    ],
)
def test_what_a_loss_may_return(result, message):
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
