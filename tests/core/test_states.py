"""States of every transformation: distinct buffers, stable dtypes, fields found by type; odd parameters."""

import functools
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.clipping import clip_adaptively, clip_by_global_norm, zclip
from jaxtrain.guard import NOT_FINITE, skip_bad_steps
from jaxtrain.losses import LossSums
from jaxtrain.optim import OPTIMIZERS, clipped_adamw, decay_mask, scale_by_adam, scale_by_learning_rate
from jaxtrain.precision import LossScaling
from jaxtrain.schedules import SCHEDULES, warmup_cosine
from jaxtrain.step import TrainState, make_train_step
from jaxtrain.trees import global_norm

SCHEDULE = warmup_cosine(0.1, 20, 2)
MAKERS = {
    "clip_by_global_norm": lambda: clip_by_global_norm(1.0),
    "measuring": lambda: clip_by_global_norm(None),
    "zclip": lambda: zclip(max_norm=1.0),
    "clip_adaptively": clip_adaptively,
    "scale_by_adam": lambda: scale_by_adam(0.9, 0.95, 1e-8),
    "scale_by_learning_rate": lambda: scale_by_learning_rate(SCHEDULE),
    "clipped_adamw": lambda: clipped_adamw(SCHEDULE),
    "narrow moments": lambda: clipped_adamw(0.1, mu_dtype=jnp.bfloat16),
    "guard": lambda: skip_bad_steps(clipped_adamw(SCHEDULE), clip_norm=1.0),
    "guard without sigmas": lambda: skip_bad_steps(clipped_adamw(SCHEDULE, clip=zclip()), sigmas=None),
    "guard of optax": lambda: skip_bad_steps(optax.sgd(0.1, momentum=0.9)),
    "guard of a guard": lambda: skip_bad_steps(skip_bad_steps(clipped_adamw(SCHEDULE))),
    "injected": lambda: optax.inject_hyperparams(clipped_adamw)(0.1),
}


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax's own transformations need it
        yield


def make_params():
    return {"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}


def square_loss(params, batch):
    total = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))
    zero = jnp.zeros((), jnp.float32)
    return LossSums(nll=total * jnp.mean(batch), z_loss=zero, smoothing=zero, weight=zero + 1)


def pointers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def describe(tree):
    return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype).name, x.weak_type), tree)


@pytest.mark.parametrize("name", MAKERS)
def test_every_leaf_is_a_separate_buffer(name):
    """A fresh state, made eagerly, can be donated."""
    optimizer, params = MAKERS[name](), make_params()
    state = optimizer.init(params)
    assert len(set(pointers(state))) == len(pointers(state))
    update = jax.jit(lambda state, grads: optimizer.update(grads, state, make_params())[1], donate_argnums=0)
    update(state, make_params())


def test_a_train_state_is_donated_whatever_the_optimizer_holds():
    """Tied parameters, and optimizers whose state holds the parameters or one array twice."""

    def hold(params):
        zero = jnp.zeros(3)
        return {"params": params, "first": zero, "second": zero}

    holder = optax.GradientTransformation(hold, lambda updates, state, params=None: (updates, state))
    for optimizer in (holder, skip_bad_steps(clipped_adamw(SCHEDULE))):
        table = jnp.ones((2, 2))
        state = TrainState.create({"in": table, "out": table}, optimizer, LossScaling().init())
        assert len(set(pointers(state))) == len(pointers(state))
        step = jax.jit(make_train_step(square_loss, optimizer), donate_argnums=0)
        state, _ = step(step(state, jnp.ones(2))[0], jnp.ones(2))
        assert state.step == 2


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
def test_an_update_keeps_every_dtype_of_the_state(name, x64):
    """Also weak types: otherwise the second step is compiled again, or a cond or scan refuses the state."""
    with jax.enable_x64(x64):
        optimizer, params = MAKERS[name](), make_params()
        state = jax.eval_shape(optimizer.init, params)
        _, after = jax.eval_shape(optimizer.update, params, state, params)
        assert describe(after) == describe(state)


def test_loss_scaling_keeps_its_dtypes():
    scaling = LossScaling()
    with jax.enable_x64(True):
        assert describe(jax.eval_shape(scaling.update, scaling.init(), jnp.bool_(True))) == describe(scaling.init())


FIELDS = ("learning_rate", "skipped", "grad_norm", "clip_factor", "count", "mu", "skip_reason", "give_up")


class Fields(NamedTuple):
    learning_rate: Any
    skipped: Any
    hyperparams: Any
    w: Any


@pytest.mark.parametrize("wrap", [optax.masked, lambda o, mask: optax.multi_transform({True: o, False: o}, mask)])
def test_parameters_may_be_named_tuples_of_which_some_are_trained(wrap):
    """The moments of some of the parameters are a named tuple of the same class, with fields left out."""
    seven = jnp.float32(7)
    params = Fields(seven, seven, {"learning_rate": seven}, jnp.ones((2, 2)))
    mask = jax.tree.map(lambda leaf: leaf.ndim == 0, params)
    optimizer = skip_bad_steps(wrap(clipped_adamw(SCHEDULE), mask))
    step = jax.jit(make_train_step(square_loss, optimizer))
    state, metrics = step(TrainState.create(params, optimizer), jnp.ones(2))
    assert (metrics["learning_rate"], metrics["skipped"]) == (np.float32(0.05), 0)
    bad, metrics = step(state, jnp.full(2, jnp.nan))
    assert metrics["skipped"] == 1
    before, after = (jax.tree_util.tree_leaves_with_path(s.opt_state.inner) for s in (state, bad))
    moments = [(a, b) for (path, a), (_, b) in zip(before, after, strict=True) if ".mu" in jax.tree_util.keystr(path)]
    assert len(moments) >= 3
    assert all(np.array_equal(a, b) for a, b in moments)


def test_double_precision_parameters_stay_so():
    with jax.enable_x64(True):
        params = {"w": jnp.full(2, 1 + 1e-10, jnp.float64)}
        state, _ = make_train_step(square_loss, optax.sgd(1e-12))(
            TrainState.create(params, optax.sgd(1e-12)), jnp.ones(2)
        )
        np.testing.assert_allclose(state.params["w"] - 1, 1e-10 - 2e-12, rtol=1e-3)


@pytest.mark.parametrize("wrap", ["dict", "hyperparams"])
def test_parameters_may_have_the_names_of_state_fields(wrap):
    """Such parameters are skipped like any other and give no metric."""
    optimizer = skip_bad_steps(clipped_adamw(SCHEDULE))
    params = {name: jnp.float32(7) for name in FIELDS}
    params = params if wrap == "dict" else {"hyperparams": params, "w": jnp.ones((2, 2))}
    step = jax.jit(make_train_step(square_loss, optimizer))
    state, metrics = step(TrainState.create(params, optimizer), jnp.ones(2))
    assert (metrics["learning_rate"], metrics["skipped"]) == (np.float32(0.05), 0)
    assert 0 < metrics["clip_factor"] < 1
    bad, metrics = step(state, jnp.full(2, jnp.nan))
    assert (metrics["skipped"], metrics["skip_reason"]) == (1, NOT_FINITE)
    before, after = (optax.tree_utils.tree_get(s.opt_state.inner[1], "nu", filtering=lambda p, _: len(p) == 1)
                     for s in (state, bad))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, after, before)


def test_inject_hyperparams_as_it_stands():
    """Every number but the narrow dtype is injected; the rate can be changed and is found once."""
    optimizer = optax.inject_hyperparams(clipped_adamw)(learning_rate=0.1, weight_decay=0.0)
    params = make_params()
    state = jax.jit(optimizer.init)(params)
    assert {"b1", "b2", "eps", "weight_decay", "clip_norm"} < state.hyperparams.keys()
    plain = clipped_adamw(0.1, weight_decay=0.0)
    expected, _ = plain.update(params, plain.init(params), params)
    updates, state = jax.jit(optimizer.update)(params, state, params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), updates, expected)
    assert optax.tree_utils.tree_get(state, "learning_rate") == np.float32(0.1)
    train_step = jax.jit(make_train_step(square_loss, optimizer))
    assert train_step(TrainState.create(params, optimizer), jnp.ones(2))[1]["learning_rate"] == np.float32(0.1)


def test_every_number_may_be_traced():
    """A search over hyperparameters under vmap equals one optimizer after the other."""
    grid = {
        "learning_rate": [0.1, 0.2],
        "b1": [0.9, 0.0],
        "b2": [0.95, 0.999],
        "eps": [1e-8, 1e-2],
        "weight_decay": [0.1, 0.0],
        "clip_norm": [1.0, 0.5],
    }
    params = make_params()

    def after_two(numbers):
        optimizer = skip_bad_steps(clipped_adamw(**numbers), clip_norm=numbers["clip_norm"])
        state = optimizer.init(params)
        for scale in (1.0, 2.0):
            grads = jax.tree.map(lambda p, scale=scale: scale * (p + 1), params)
            updates, state = optimizer.update(grads, state, params)
        return updates

    together = jax.jit(jax.vmap(after_two))({name: jnp.array(values) for name, values in grid.items()})
    for i in range(2):
        one = after_two({name: values[i] for name, values in grid.items()})
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5), together, one)


def run_step(params, **options):
    optimizer = skip_bad_steps(clipped_adamw(0.1))
    step = jax.jit(make_train_step(square_loss, optimizer, **options), donate_argnums=0)
    return step(TrainState.create(params, optimizer), jnp.ones(2))


@pytest.mark.parametrize("params", [{}, {"w": 2.0, "b": 1.0}, {"w": np.ones((2, 2), np.float32)}, 3.0], ids=str)
def test_odd_trees_train(params):
    state, metrics = run_step(params)
    assert all(np.isfinite(value) for value in metrics.values())
    assert state.step == 1
    assert metrics["skipped"] == 0


ODD = {
    "complex": (jnp.ones(2, jnp.complex64), "w is complex64, and only float arrays are trained"),
    "integer": (jnp.ones(2, jnp.int32), "w is int32"),
    "Python integer": (1, "w is int"),
    "Python complex": (1j, "w is complex"),
    "float0": (np.zeros(2, jax.dtypes.float0), "w is .*only float arrays"),
    "key": (jax.random.key(0), r"w is .*nnx\.split\(model, nnx\.Param, \.\.\.\)"),
    "function": (jax.nn.relu, r"eqx\.partition\(model, eqx\.is_inexact_array\)"),
}


@pytest.mark.parametrize("name", ODD)
def test_untrainable_leaves_are_refused_at_init(name):
    leaf, message = ODD[name]
    for init in (clipped_adamw(0.1).init, lambda params: TrainState.create(params, optax.sgd(0.1))):
        with pytest.raises(ValueError, match=message):
            init({"w": leaf, "b": jnp.ones(2)})


def test_norm_and_clipping_of_complex_numbers():
    grads = {"z": jnp.array([3 + 4j])}
    assert global_norm(grads) == 5
    clipped, _ = clip_by_global_norm(1.0).update(grads, None)
    np.testing.assert_allclose(clipped["z"], [0.6 + 0.8j], rtol=1e-6)


def test_debug_nans_passes_on_a_healthy_step():
    with jax.debug_nans(True):
        for _ in range(2):
            run_step(make_params(), accumulate=2)
        plain = optax.adam(0.1)
        make_train_step(square_loss, plain)(TrainState.create(make_params(), plain), jnp.ones(2))


@pytest.mark.parametrize("make", ["reduce_on_plateau", "polyak_sgd", "momo", "sam"])
def test_optimizers_that_take_the_loss_by_optaxs_name(make):
    factories = {
        "reduce_on_plateau": lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)),
        "polyak_sgd": lambda: optax.polyak_sgd(max_learning_rate=0.1),
        "momo": lambda: optax.contrib.momo(learning_rate=0.1),
        "sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.01)),  # takes no extra argument but its own
    }
    for optimizer in (factories[make](), skip_bad_steps(factories[make]())):
        state = TrainState.create(make_params(), optimizer)
        step, losses = jax.jit(make_train_step(square_loss, optimizer)), []
        for _ in range(4):
            state, metrics = step(state, jnp.ones(2))
            losses.append(float(metrics["loss"]))
        assert losses[-1] < losses[0]


def test_a_skip_by_one_of_several_guards_is_a_skip():
    """A guard for each group of parameters, and one inside another, whose state the outer one takes back."""
    sick, params = skip_bad_steps(optax.sgd(0.1)), make_params()
    healthy = optax.GradientTransformation(sick.init, lambda grads, state, params: sick.update(params, state, params))
    groups = optax.partition({"w": healthy, "b": sick}, {"w": "w", "b": "b"})
    for optimizer in (skip_bad_steps(sick), groups, optax.partition({"w": sick, "b": healthy}, {"w": "w", "b": "b"})):
        step = make_train_step(square_loss, optimizer)
        metrics = step(TrainState.create(params, optimizer), jnp.full(2, jnp.nan))[1]
        assert (metrics["skipped"], metrics["skip_reason"]) == (1, NOT_FINITE)


def test_the_guard_watches_value_as_it_does_loss():
    optimizer, params = skip_bad_steps(optax.sgd(0.1)), make_params()
    _, state = optimizer.update(params, optimizer.init(params), params, value=jnp.nan)
    assert state.skip_reason == NOT_FINITE


def test_a_schedule_and_an_optimizer_from_outside():
    """A table entry needs a function and a description; the built-in entries match their descriptions."""
    optim = type("Optim", (), {
        "peak_lr": 0.5, "warmup_steps": 2, "decay_steps": 3, "floor": 0.1, "cycles": 2, "cycle_decay": 0.5,
        "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "mu_dtype": "float32",
    })  # fmt: skip
    for name, entry in SCHEDULES.items():
        optim.schedule = name
        if entry.check is not None:
            entry.check(optim, 12)
        assert entry.make(optim, 12)(1) == 0.5
        assert "{" not in entry.description.format_map(vars(optim))
        if name != "sgdr":
            with pytest.raises(ValueError, match=r"optim\.warmup_steps 2"):
                entry.check(optim, 1)
    optim.cycles = 5
    with pytest.raises(ValueError, match=r"optim\.cycles 5 must divide train\.steps 12"):
        SCHEDULES["sgdr"].check(optim, 12)
    optimizer = OPTIMIZERS["adamw"].make(optim, SCHEDULE, clip_by_global_norm(1.0))
    expected = clipped_adamw(SCHEDULE)
    params = make_params()
    first, second = (o.update(params, o.init(params), params)[0] for o in (optimizer, expected))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_spike_below_the_clip_threshold_is_no_spike():
    """Norms of 0.1 and one of 2: twenty deviations, and harmless behind a threshold of 1."""
    params = {"w": jnp.ones(2)}
    for clip_norm, skipped in ((None, [1, 1]), (1.0, [0, 1]), (0.01, [1, 1])):
        optimizer = skip_bad_steps(clipped_adamw(1e-3, clip_norm=clip_norm), window=8, clip_norm=clip_norm)
        state, found = optimizer.init(params), []
        for norm in [0.1] * 8 + [2.0, 20.0]:
            _, state = optimizer.update({"w": jnp.array([norm, 0.0])}, state, params, loss=1.0)
            found.append(float(state.skipped))
        assert found == [0] * 8 + skipped


def test_decay_mask_takes_python_numbers_and_empty_trees():
    assert decay_mask({"w": 1.0}) == {"w": False}
    assert decay_mask({}) == {}


@pytest.mark.parametrize("name", ["guard", "guard without sigmas", "zclip", "clip_adaptively", "injected"])
@pytest.mark.parametrize("scaling", [None, LossScaling()], ids=["plain", "scaled"])
def test_flax_writes_and_reads_the_state(name, scaling):
    """The bytes restore every leaf, the guard's window and the statistics of zclip included."""
    optimizer = MAKERS[name]()

    def create():
        return TrainState.create(make_params(), optimizer, scaling and scaling.init())

    state = create()
    gradient = jax.tree.map(lambda leaf: leaf + 0.5, state.params)
    _, opt_state = optimizer.update(
        gradient, state.opt_state, state.params, **({"loss": jnp.float32(1)} if "guard" in name else {})
    )
    state = state.replace(step=state.step + 1, opt_state=opt_state)
    restored = flax.serialization.from_bytes(create(), flax.serialization.to_bytes(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    other = {"w": jnp.ones((2, 2)), "more": jnp.zeros(2)}
    with pytest.raises(ValueError, match="params"):
        flax.serialization.from_bytes(create(), flax.serialization.to_bytes(state.replace(params=other)))
