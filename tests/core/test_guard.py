"""Bad steps: what is skipped, that a skip changes not a bit, and when the guard gives up."""

import dataclasses
import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain import guard
from jaxtrain.guard import (
    DEVIATION_FLOOR,
    GRAD_NORM_SPIKE,
    LOSS_SPIKE,
    NOT_FINITE,
    NOT_SKIPPED,
    GuardState,
    skip_bad_steps,
)
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.optim import clipped_adamw
from jaxtrain.schedules import warmup_cosine

SMALLEST = np.float32(1e-45)  # subnormal: an addition may flush it


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's own transformations need it
        yield


def make_params(dtype=jnp.float32):
    return {"w": jnp.array([[1.0, -2.0], [0.0, -0.0]], dtype), "b": jnp.array([3.0, SMALLEST], dtype)}


def grads_of(scale):
    return jax.tree.map(lambda p: jnp.full(p.shape, scale, p.dtype), make_params())


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def without_rate(state):
    """Returns the state without `learning_rate`, which follows the schedule even where a step is skipped."""
    if not optax.tree_utils.tree_get_all_with_path(state, "learning_rate"):
        return state
    return optax.tree_utils.tree_set(state, learning_rate=jnp.float32(0))


def run(optimizer, steps, params=None):
    """Applies (grads, loss) pairs; returns parameters, state and the reason of each skip."""
    params = make_params() if params is None else params
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    reasons = []
    for grads, loss in steps:
        updates, state = update(grads, state, params, loss=loss)
        params = optax.apply_updates(params, updates)
        reasons.append(int(state.skip_reason))
    return params, state, reasons


def quiet(number, norm=1.0, loss=2.0, noise=0.02):
    """Healthy steps: norms and losses a little above and below."""
    rng = np.random.default_rng(number)
    return [
        (grads_of(norm * (1 + noise * rng.normal()) / np.sqrt(6)), loss * (1 + noise * rng.normal()))
        for _ in range(number)
    ]


bad_grads = {
    "nan": lambda: {**grads_of(1.0), "b": jnp.array([np.nan, 1.0])},
    "inf": lambda: {**grads_of(1.0), "b": jnp.array([np.inf, 1.0])},
    "norm overflows": lambda: grads_of(1e20),
}


@pytest.mark.parametrize("inner", ["clipped_adamw", "clipped_adamw by scalars", "adamw", "sgd", "lion"])
@pytest.mark.parametrize("kind", bad_grads)
@pytest.mark.parametrize("first", [True, False])
def test_a_skip_changes_no_bit(inner, kind, first):
    """Around any optimizer, from the first step, with -0.0 and subnormal parameters."""
    make = {"clipped_adamw": clipped_adamw, "adamw": optax.adamw, "sgd": functools.partial(optax.sgd, momentum=0.9)}
    name, by_scalars, _ = inner.partition(" by scalars")
    optimizer = skip_bad_steps(make.get(name, optax.lion)(1e-2), check_updates=not by_scalars)
    params = make_params()
    state = optimizer.init(params)
    if not first:
        updates, state = optimizer.update(grads_of(0.1), state, params, loss=1.0)
        params = optax.apply_updates(params, updates)
    updates, after = jax.jit(optimizer.update)(bad_grads[kind](), state, params, loss=1.0)
    assert all(np.all(np.asarray(u) == 0) and np.all(np.signbit(u)) for u in jax.tree.leaves(updates))
    # Added by NumPy, which keeps subnormal numbers; some devices flush them.
    added = jax.tree.map(lambda p, u: np.asarray(p) + np.asarray(u), params, updates)
    assert bits(added) == bits(params)
    assert bits(without_rate(after.inner)) == bits(without_rate(state.inner))
    assert (int(after.skip_reason), int(after.accepted)) == (NOT_FINITE, int(not first))
    assert bits((after.losses, after.grad_norms)) == bits((state.losses, state.grad_norms))


@pytest.mark.parametrize("mu_dtype", [None, "bfloat16"])
def test_a_decision_by_scalars_equals_the_whole_check(mu_dtype):
    """With every kind of bad step; two programs round alike up to the last bits."""
    steps = [
        *quiet(70),
        *((make(), 1.0) for make in bad_grads.values()),
        (grads_of(1.0), np.nan),
        (grads_of(30.0), 9.0),
    ]
    steps += [(grads_of(1e-30), 2.0), (grads_of(0.0), 2.0), *quiet(2)]
    results = [
        run(skip_bad_steps(clipped_adamw(warmup_cosine(1e-2, 90, 9), mu_dtype=mu_dtype), check_updates=check), steps)
        for check in (True, False)
    ]
    assert results[0][2] == results[1][2]
    assert {NOT_SKIPPED, NOT_FINITE, LOSS_SPIKE} == set(results[0][2])
    for slow, fast in zip(*(jax.tree.leaves(result) for result in results), strict=True):
        np.testing.assert_allclose(np.float32(slow), np.float32(fast), rtol=1e-2 if mu_dtype else 1e-5, atol=1e-30)


@pytest.mark.parametrize("field", ["mu", "nu"])
def test_a_spoiled_state_ends_the_run_and_spares_the_parameters(field):
    """A moment that is NaN, as a broken memory may leave it: no later step could heal it."""
    optimizer, params = skip_bad_steps(clipped_adamw(1e-2), check_updates=False), make_params()
    state = optimizer.init(params)
    adam = state.inner[1]
    spoiled = adam._replace(**{field: {**getattr(adam, field), "w": jnp.array([[jnp.nan, 0.0], [0.0, 0.0]])}})
    state = state._replace(inner=(state.inner[0], spoiled, *state.inner[2:]))
    updates, after = jax.jit(optimizer.update)(grads_of(0.1), state, params, loss=1.0)
    assert (float(after.give_up), int(after.skip_reason), float(after.skipped)) == (1, NOT_FINITE, 0)
    assert updates["w"][0, 0] == 0
    assert np.all(np.asarray(updates["w"]).ravel()[1:] != 0)
    _, healthy = optimizer.update(grads_of(0.1), optimizer.init(params), params, loss=1.0)
    assert (float(healthy.give_up), int(healthy.skip_reason)) == (0, NOT_SKIPPED)
    _, skipped = optimizer.update(grads_of(jnp.nan), state, params, loss=1.0)
    assert (float(skipped.give_up), float(skipped.skipped)) == (0, 1)  # a skipped step writes nothing


def test_a_loss_that_is_not_finite_is_skipped_though_the_gradient_is_fine():
    _, state, reasons = run(skip_bad_steps(clipped_adamw(1e-2)), [(grads_of(1.0), np.nan), (grads_of(1.0), np.inf)])
    assert reasons == [NOT_FINITE, NOT_FINITE]
    assert int(state.inner[1].count) == 0


def test_an_update_that_is_not_finite_is_skipped_though_the_gradient_is_fine():
    """The guard also checks the update and the new moments: here a NaN learning rate and NaN moments."""
    steps = quiet(3)
    schedule = lambda count: jnp.where(count == 1, jnp.nan, 1e-2)  # noqa: E731
    params, state, reasons = run(skip_bad_steps(optax.adam(schedule)), steps)
    assert reasons == [NOT_SKIPPED, NOT_FINITE, NOT_FINITE]  # the inner count stays at 1
    assert np.isfinite(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])).all()

    def spoil(updates, state, params=None):
        return updates, state + jnp.nan

    spoiler = optax.GradientTransformation(lambda params: jnp.zeros(2), spoil)
    _, state, reasons = run(skip_bad_steps(optax.chain(optax.sgd(0.1), spoiler)), steps)
    assert reasons == [NOT_FINITE] * 3
    np.testing.assert_array_equal(state.inner[1], jnp.zeros(2))


def keep(values):
    """An optimizer whose state holds an array, the next of `values` after each update."""

    def update(updates, state, params=None):
        del params
        return updates, (state[0] + 1, jnp.asarray(values)[state[0] + 1])

    return optax.GradientTransformation(lambda params: (jnp.int32(0), jnp.asarray(values)[0]), update)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([[1.0, 2.0], [np.inf, -np.inf]], NOT_FINITE),
        ([[1.0, 2.0], [1.0, np.nan]], NOT_FINITE),
        ([[np.inf, np.inf], [np.inf, 1.0]], NOT_SKIPPED),
        ([[np.inf, 1.0], [np.inf, np.nan]], NOT_FINITE),
        (np.array([[1, 1], [6e4, 6e4]], np.float16), NOT_SKIPPED),  # whose sum is beyond float16
    ],
)
def test_arrays_of_the_inner_state(values, reason):
    _, _, reasons = run(skip_bad_steps(optax.chain(optax.sgd(0.1), keep(values))), [(grads_of(1.0), 1.0)])
    assert reasons == [reason]


def test_the_check_of_finite_numbers_stores_no_flags():
    check = jax.jit(guard._all_finite).lower(jnp.ones((512, 512))).compile()
    assert check.memory_analysis().temp_size_in_bytes < 512 * 512
    for bad in (np.inf, -np.inf, np.nan, 3e38):
        assert bool(check(jnp.ones((512, 512)).at[3, 5].set(bad))) == (bad == 3e38)


def test_an_inner_state_that_begins_at_infinity_is_no_fault():
    optimizer = skip_bad_steps(optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()))
    params = make_params()
    state = optimizer.init(params)
    for _ in range(3):
        _, state = optimizer.update(grads_of(0.1), state, params, value=jnp.float32(jnp.inf), loss=1.0)
        assert int(state.skip_reason) == NOT_SKIPPED


@pytest.mark.parametrize(
    ("spike", "reason"),
    [((1.0, 3.0), LOSS_SPIKE), ((2.0, 2.0), GRAD_NORM_SPIKE), ((2.0, 3.0), LOSS_SPIKE), ((np.inf, 9.0), NOT_FINITE)],
)
def test_spikes_are_skipped(spike, reason):
    norm, loss = spike
    steps = [*quiet(64), (grads_of(norm / np.sqrt(6)), loss), *quiet(3)]
    params, _, reasons = run(skip_bad_steps(clipped_adamw(1e-2)), steps)
    assert reasons == [NOT_SKIPPED] * 64 + [reason] + [NOT_SKIPPED] * 3
    without, _, _ = run(skip_bad_steps(clipped_adamw(1e-2)), [*quiet(64), *quiet(3)])
    assert bits(params) == bits(without)


def test_the_limit_is_mean_and_deviation_over_the_last_accepted_values():
    """Against NumPy in float64: a value below the limit passes, one above is a spike."""
    window, values = 8, 2 + 0.1 * np.random.default_rng(3).normal(size=21)
    last = np.float64(np.float32(values[-window:]))
    limit = last.mean() + 6 * last.std()
    for factor, reason in ((0.999, NOT_SKIPPED), (1.001, LOSS_SPIKE)):
        steps = [(grads_of(1.0), value) for value in [*values, limit * factor]]
        assert run(skip_bad_steps(clipped_adamw(1e-3), window=window), steps)[2][-1] == reason


def test_nothing_below_the_mean_is_a_spike():
    steps = [*quiet(64), (grads_of(1e-6), 0.01), (grads_of(0.0), 0.0)]
    assert run(skip_bad_steps(clipped_adamw(1e-2)), steps)[2] == [NOT_SKIPPED] * 66


def test_no_spike_before_half_the_window():
    steps = [*quiet(63), (grads_of(1.0), 50.0)]
    assert run(skip_bad_steps(clipped_adamw(1e-2)), steps)[2][-1] == NOT_SKIPPED


def test_skipped_values_never_enter_the_window():
    """NaN and spikes leave the limit unchanged: the next spike is skipped, a healthy step is not."""
    trouble = [(grads_of(np.nan), np.nan), (grads_of(1.0), 30.0), (grads_of(30.0), 2.0)]
    _, state, reasons = run(skip_bad_steps(clipped_adamw(1e-2)), [*quiet(70), *trouble * 2, *quiet(2), *trouble])
    skipped = [NOT_FINITE, LOSS_SPIKE, GRAD_NORM_SPIKE]
    assert reasons[70:] == skipped * 2 + [NOT_SKIPPED] * 2 + skipped
    assert int(state.accepted) == 72
    assert float(state.losses.max()) < 2.2


def test_a_constant_loss_may_change_a_little():
    """Its deviation is 0, and counts as 1 % of the mean."""
    steps = [(grads_of(1.0), 2.0)] * 64
    for loss, reason in ((2.0 * (1 + 5.9 * DEVIATION_FLOOR), NOT_SKIPPED), (2.0 * (1 + 6.1 * DEVIATION_FLOOR), 2)):
        assert run(skip_bad_steps(clipped_adamw(1e-2)), [*steps, (grads_of(1.0), loss)])[2][-1] == reason


def test_without_sigmas_only_non_finite_steps_are_skipped():
    steps = [*quiet(64), (grads_of(100.0), 100.0), (grads_of(np.nan), 1.0)]
    assert run(skip_bad_steps(clipped_adamw(1e-2), sigmas=None), steps)[2][-2:] == [NOT_SKIPPED, NOT_FINITE]


def test_without_a_loss_only_norms_are_watched():
    optimizer, params = skip_bad_steps(optax.sgd(1e-3), window=4), make_params()
    state = optimizer.init(params)
    reasons = []
    for scale in (1.0, 1.0, 1.0, 1.0, 9.0, np.nan, 1.0):
        _, state = optimizer.update(grads_of(scale), state, params)
        reasons.append(int(state.skip_reason))
    assert reasons == [0, 0, 0, 0, GRAD_NORM_SPIKE, NOT_FINITE, 0]


def test_too_many_in_a_row_give_up_and_a_good_step_resets_the_count():
    bad = (grads_of(np.nan), 1.0)
    optimizer = skip_bad_steps(clipped_adamw(1e-2), max_consecutive=3)
    for steps, expected in ([bad] * 3, 0), ([bad] * 4, 1), ([bad] * 3 + quiet(1) + [bad] * 3, 0):
        assert float(run(optimizer, steps)[1].give_up) == expected
    assert int(run(optimizer, [bad] * 4 + quiet(1))[1].consecutive) == 0


def test_too_large_a_share_gives_up_though_no_two_follow_each_other():
    optimizer = skip_bad_steps(optax.sgd(1e-3), max_share=0.01)
    params = make_params()

    def body(state, i):
        _, state = optimizer.update(grads_of(jnp.where(i % 20 == 0, jnp.nan, 1.0)), state, params)
        return state, state.give_up

    _, give_up = jax.lax.scan(body, optimizer.init(params), jnp.arange(1000))
    # 5 % are bad: the share among recent ones is 0.05 * (1 - exp(-n / 1000)), which passes 0.01 at n = 223.
    first = int(np.argmax(give_up))
    assert 200 <= first <= 240
    rare = jax.lax.scan(body, optimizer.init(params), 1 + jnp.arange(19))[1]
    assert not np.any(rare)


def test_skips_do_not_delay_the_schedule():
    """After three skips the last step still has the floor rate; the reported rate is that of the step."""
    schedule = warmup_cosine(1e-2, 20, 3, 0.1)
    optimizer, params = skip_bad_steps(clipped_adamw(schedule)), make_params()
    state = optimizer.init(params)
    for step in range(20):
        grads = grads_of(np.nan if step in (4, 9, 19) else 1.0)
        _, state = optimizer.update(grads, state, params, step=step, loss=1.0)
        rate = optax.tree_utils.tree_get(state, "learning_rate")
        assert float(rate) == float(schedule(step))
    np.testing.assert_allclose(rate, 1e-3, rtol=1e-6)
    assert int(state.inner[1].count) == 17


def test_the_state_is_a_small_pytree_and_the_decision_the_same_on_any_mesh():
    """Sharded gradients give the same decisions and the same bits as one device; a copied state continues alike."""
    params = {"w": jnp.arange(64.0).reshape(8, 8)}
    optimizer = skip_bad_steps(clipped_adamw(1e-2), window=8)
    rng = np.random.default_rng(5)
    scales = [1.0] * 10 + [40.0, np.nan] + [1.0] * 4
    steps = [{"w": jnp.asarray(s * rng.normal(size=(8, 8)), jnp.float32)} for s in scales]
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    update, results = jax.jit(optimizer.update), []
    for sharding in (NamedSharding(mesh, P()), NamedSharding(mesh, P("x"))):
        p = jax.device_put(params, sharding)
        state = jax.jit(optimizer.init)(p)
        reasons = []
        for grads in steps:
            _, state = update(jax.device_put(grads, sharding), state, p, loss=jnp.float32(1.0))
            state = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), state)  # as through a checkpoint
            reasons.append(int(state.skip_reason))
        results.append(reasons)
    assert results[0] == results[1] == [0] * 10 + [GRAD_NORM_SPIKE, NOT_FINITE] + [0] * 4
    own = state._replace(inner=None)
    assert isinstance(state, GuardState)
    assert sum(leaf.size for leaf in jax.tree.leaves(own)) == 2 * 8 + 6


@pytest.mark.parametrize("wrap", ["chain", "masked", "multi_steps", "partition"])
def test_it_composes_with_optax(wrap):
    """It is a plain transformation: jitted, inside and around others."""
    guarded = skip_bad_steps(optax.adam(1e-1))
    optimizer = {
        "chain": lambda: optax.chain(optax.clip(10.0), guarded),
        "masked": lambda: optax.masked(guarded, {"w": True, "b": False}),
        "multi_steps": lambda: optax.MultiSteps(guarded, 2).gradient_transformation(),
        "partition": lambda: optax.partition({"on": guarded, "off": optax.set_to_zero()}, {"w": "on", "b": "off"}),
    }[wrap]()
    params = make_params()
    state = jax.eval_shape(optimizer.init, params)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for _ in range(4):
        updates, state = update(grads_of(0.5), state, params)
        params = optax.apply_updates(params, updates)
    assert float(jnp.abs(params["w"] - make_params()["w"]).max()) > 0.05
    before = bits(params["w"])
    if wrap != "multi_steps":  # that one averages first: one NaN spoils two
        updates, state = update(grads_of(np.nan), state, params)
        assert bits(optax.apply_updates(params, updates)["w"]) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 1}, "window must be a whole number from 2 .* got 1"),
        ({"sigmas": 0.0}, "sigmas must be above 0, or None"),
        ({"sigmas": float("nan")}, "sigmas must be above 0"),
        ({"max_consecutive": 0}, "max_consecutive must be a whole number from 1 .* got 0"),
        ({"max_share": 0.0}, "max_share must be in .0, 1., got 0.0"),
        ({"max_share": 1.5}, "max_share .* got 1.5"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        skip_bad_steps(optax.sgd(0.1), **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quickstart_skips_no_step(seed, tmp_path):
    """A healthy run says nothing: its norms stay below ten times the clip threshold."""
    from jaxtrain.training.train import train  # takes seconds to import

    config = runpy.run_path(str(Path(__file__).parents[2] / "configs" / "quickstart.py"))["config"]()
    train_config = dataclasses.replace(config.train, log_every=1, eval_every=None, sample_tokens=None, stop_after=450)
    train(dataclasses.replace(config, seed=seed, train=train_config), tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert len(lines) == 450
    assert [line["step"] for line in lines if line["skipped"]] == []
