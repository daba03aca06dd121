"""Schedules: golden numbers, the corners, errors, and float32 accuracy far into a run."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.schedules import sgdr, warmup_constant, warmup_cosine, warmup_linear, warmup_stable_decay

THIRD = 1 / 3
# One half of 1 + cos(pi * k / 7), k = 1..6, to 16 digits.
COSINE_7 = [
    0.9504844339512096, 0.8117449009293667, 0.6112604669781572,
    0.3887395330218428, 0.1882550990706332, 0.0495155660487904,
]  # fmt: skip


def every_schedule(peak, total, warmup, floor):
    """Returns all five schedules over the same run: (name, schedule)."""
    return {
        "cosine": warmup_cosine(peak, total, warmup, floor),
        "linear": warmup_linear(peak, total, warmup, floor),
        "stable_decay": warmup_stable_decay(peak, total, warmup, (total - warmup) // 2, floor),
        "sgdr": sgdr(peak, total // 2, warmup, 2, 0.5, floor),
        "constant": warmup_constant(peak, warmup),
    }


COUNTS = {
    functools.partial(warmup_cosine, 1.0): {"total_steps": 100, "warmup_steps": 3},
    functools.partial(warmup_linear, 1.0): {"total_steps": 100, "warmup_steps": 3},
    functools.partial(warmup_stable_decay, 1.0): {"total_steps": 200, "warmup_steps": 3, "decay_steps": 5},
    functools.partial(sgdr, 1.0): {"cycle_steps": 100, "warmup_steps": 3, "cycles": 2},
    functools.partial(warmup_constant, 1.0): {"warmup_steps": 3},
}
NAMES = ["cosine", "linear", "stable_decay", "sgdr", "constant"]


def reference(name, peak, total, warmup, floor, step):
    """The definitions in float64, one step at a time."""
    if name == "constant":
        return peak * min((step + 1) / warmup, 1)
    if name == "sgdr":
        cycle = min(step // (total // 2), 1)
        return 0.5**cycle * reference("cosine", peak, total // 2, warmup, floor, step - cycle * (total // 2))
    t = min(step + 1, total)
    if t <= warmup:
        return peak * t / warmup
    decay_steps = (total - warmup) // 2 if name == "stable_decay" else total - warmup
    left = min(total - t, decay_steps) / decay_steps
    # (1 + cos(pi * progress)) / 2, which would cancel near the end.
    shape = math.sin(math.pi / 2 * left) ** 2 if name == "cosine" else left
    return peak * (floor + (1 - floor) * shape)


def test_cosine_golden():
    """3 warm-up steps in 10, floor 0.1; the rate stays at the floor after the end."""
    rates = [float(warmup_cosine(1.0, 10, 3, 0.1)(step)) for step in range(12)]
    golden = [THIRD, 2 * THIRD, 1.0, *(0.1 + 0.9 * x for x in COSINE_7), 0.1, 0.1, 0.1]
    np.testing.assert_allclose(rates, golden, rtol=1e-6)


def test_linear_golden():
    rates = [float(warmup_linear(2.0, 6, 2, 0.5)(step)) for step in range(8)]
    np.testing.assert_allclose(rates, [1.0, 2.0, 1.75, 1.5, 1.25, 1.0, 1.0, 1.0], rtol=1e-6)


def test_stable_decay_golden():
    rates = [float(warmup_stable_decay(1.0, 10, 2, 4)(step)) for step in range(12)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0], rtol=1e-6)


def test_sgdr_golden():
    """Each cycle warms up again, to a peak that decays; the floor is a fraction of that peak."""
    cycle = [0.5, 1.0, 0.775, 0.325, 0.1]
    cycle[2:4] = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 3)) / 2 for k in (1, 2)]
    rates = [float(sgdr(4.0, 5, 2, 3, decay=0.5)(step)) for step in range(17)]
    expected = [4 * x for x in cycle] + [2 * x for x in cycle] + [x for x in cycle] + [0.1, 0.1]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_constant_golden():
    rates = [float(warmup_constant(3.0, 3)(step)) for step in (0, 1, 2, 3, 1000)]
    np.testing.assert_allclose(rates, [1, 2, 3, 3, 3], rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_corners_are_exact(name):
    """Step 1 has a rate above 0, the peak occurs once, and the last step and all later ones are at the floor."""
    peak, total, warmup, floor = 3e-4, 200, 7, 0.1
    rates = np.asarray(jax.jit(every_schedule(peak, total, warmup, floor)[name])(jnp.arange(2 * total)))
    last = np.float32(peak * floor)
    if name == "sgdr":
        assert rates[total // 2 - 1] == last
        last = np.float32(peak * 0.5 * floor)
    peak = np.float32(peak)
    assert rates[0] > 0
    assert rates[warmup - 1] == peak
    assert rates.max() == peak
    if name in ("cosine", "linear", "sgdr"):
        assert (rates == peak).sum() == 1
    if name == "constant":
        assert (rates[warmup - 1 :] == peak).all()
    else:
        assert rates[total - 2] > rates[total - 1] == last
        assert (rates[total:] == last).all()


def test_stable_decay_holds_the_peak():
    rates = np.asarray(warmup_stable_decay(1e-3, 100, 10, 20)(jnp.arange(100)))
    assert (rates[9:80] == np.float32(1e-3)).all()
    assert rates[80] < rates[79]
    assert rates[-1] == 0


@pytest.mark.parametrize("name", NAMES)
def test_no_warm_up(name):
    """Decay starts with the first step, except on a plateau."""
    first = float(every_schedule(1.0, 20, 0, 0.0)[name](0))
    assert first == 1.0 if name in ("constant", "stable_decay") else 0.8 < first < 1.0


@pytest.mark.parametrize("make", [warmup_cosine, warmup_linear])
def test_one_step_of_decay(make):
    np.testing.assert_allclose(make(1.0, 5, 4, 0.25)(jnp.arange(6)), [0.25, 0.5, 0.75, 1.0, 0.25, 0.25])


@pytest.mark.parametrize("name", NAMES)
def test_monotone_after_the_warm_up(name):
    """Over every step of a run; within each cycle for sgdr."""
    rates = np.asarray(jax.jit(every_schedule(1e-3, 20_000, 500, 0.1)[name])(jnp.arange(20_000)))
    runs = np.split(rates, 2) if name == "sgdr" else [rates]
    for run in runs:
        assert (np.diff(run[:500]) > 0).all()
        assert (np.diff(run[499:]) <= 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("floor", [0.1, 0.0])
def test_float32_accuracy_far_into_a_run(name, floor):
    """Steps around ten million and above 2**24, where float32 no longer counts."""
    peak, total, warmup = 6e-4, 20_000_000, 2_000_000
    if name == "sgdr":
        total *= 2
    steps = np.unique(
        np.concatenate([middle + np.arange(-3, 4) for middle in (5, warmup, 10_000_000, 2**24, 19_000_000, total - 5)])
    )
    rates = jax.jit(every_schedule(peak, total, warmup, floor)[name])(jnp.asarray(steps, jnp.int32))
    expected = [reference(name, peak, total, warmup, floor, int(step)) for step in steps]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_neighbouring_steps_differ_above_two_to_the_24():
    """A float32 step would give the same rate to two or more steps."""
    rates = np.asarray(warmup_linear(1.0, 2**24 + 8, 2**24, 0.0)(2**24 + jnp.arange(-1, 8)))
    np.testing.assert_allclose(rates, np.arange(8, -1, -1) / 8)


@pytest.mark.parametrize("name", NAMES)
def test_jit_changes_the_last_places_at_most(name):
    """3 units of them, measured for the cosine; the corners are the same bits."""
    schedule = every_schedule(3e-4, 60, 7, 0.1)[name]
    steps = jnp.arange(70)
    jitted = np.asarray(jax.jit(schedule)(steps))
    plain = np.array([schedule(step) for step in range(70)])
    assert jitted.dtype == plain.dtype == np.float32
    np.testing.assert_array_max_ulp(jitted, plain, maxulp=3)
    corners = [6, 59, 60, 69]
    np.testing.assert_array_equal(jitted[corners], plain[corners])


@pytest.mark.parametrize("name", NAMES)
def test_kinds_of_steps(name):
    """Python, numpy and traced integers, scalars, arrays and vmap."""
    plain = every_schedule(3e-4, 60, 7, 0.1)[name]
    schedule = jax.jit(plain)
    steps = jnp.array([[0, 6, 7], [40, 59, 80]])
    rates = schedule(steps)
    assert (rates.shape, rates.dtype) == ((2, 3), jnp.float32)
    np.testing.assert_array_max_ulp(jax.jit(jax.vmap(jax.vmap(schedule)))(steps), rates, maxulp=3)
    for before in (np.int32(-1), np.int64(-5)):
        assert schedule(before) == rates[0, 0]
    for kind in (int, np.int32, np.int64, np.uint16, np.uint32):
        # A scalar and an array go through different cosines in XLA; the corner at 59 is exact.
        np.testing.assert_array_max_ulp(schedule(kind(40)), rates[1, 0], maxulp=3)
        assert schedule(kind(59)) == rates[1, 1]
    for far in (2**40, 2**70, np.int64(2**40), np.uint64(2**63), np.array(2**40)):
        assert plain(far) == plain(2**31 - 2)
    assert plain(-(2**40)) == plain(0)


@pytest.mark.parametrize("name", NAMES)
def test_is_an_optax_schedule(name):
    schedule = every_schedule(0.5, 12, 3, 0.1)[name]
    transform = optax.scale_by_schedule(schedule)
    state, update = transform.init(None), jax.jit(transform.update)
    for step in range(4):
        updates, state = update(jnp.ones(2), state)
        np.testing.assert_allclose(updates, schedule(step), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: warmup_cosine(0.0, 10, 3), "peak must be above 0, a learning rate, got 0.0"),
        (lambda: warmup_cosine(math.nan, 10, 3), "peak"),
        (lambda: warmup_cosine(True, 10, 3), "peak .* got True"),
        (lambda: warmup_linear(math.inf, 10, 3), "peak"),
        (lambda: sgdr(-1.0, 10, 3, 1), "peak .* got -1.0"),
        (lambda: warmup_constant(0.0, 3), "peak"),
        (lambda: warmup_cosine(1.0, 10, 3, -0.1), r"floor must be in \[0, 1\], a fraction of the peak, got -0.1"),
        (lambda: warmup_stable_decay(1.0, 10, 3, 2, 1.1), "floor .* got 1.1"),
        (lambda: sgdr(1.0, 10, 3, 1, floor=2.0), "floor"),
        (lambda: warmup_cosine(1.0, 10, -1), "warmup_steps must be a whole number .* got -1"),
        (lambda: warmup_cosine(1.0, 10, 2.5), "warmup_steps .* got 2.5"),
        (lambda: warmup_linear(1.0, 2**31, 3), "total_steps .* got 2147483648"),
        (lambda: warmup_constant(1.0, 2**31 - 1), "warmup_steps"),
        (lambda: warmup_cosine(1.0, 10, 10), "total_steps 10 must hold warmup_steps 10 and at least one step of decay"),
        (lambda: warmup_cosine(1.0, 0, 0), "total_steps 0"),
        (lambda: warmup_stable_decay(1.0, 10, 6, 5), r"total_steps 10 .* warmup_steps 6 .* \(decay_steps 5\)"),
        (lambda: warmup_stable_decay(1.0, 10, 6, 0), "decay_steps 0"),
        (lambda: sgdr(1.0, 10, 3, 0), "cycles must be a whole number from 1 .* got 0"),
        (lambda: sgdr(1.0, 10, 3, 2, decay=0.0), r"decay must be in \(0, 1\], got 0.0"),
        (lambda: sgdr(1.0, 10, 3, 2, decay=1.5), "decay"),
        (lambda: sgdr(1.0, 10, 10, 2), "cycle_steps 10 must hold warmup_steps 10"),
        *(
            (functools.partial(make, **{**counts, name: value}), f"{name} must be a whole number .*{value}")
            for make, counts in COUNTS.items()
            for name in counts
            for value in (1e2, 2.5, "3", None, True)
            if not (name == "decay_steps" and value is None)
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
