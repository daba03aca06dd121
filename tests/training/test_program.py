"""The program on every mesh: equal numbers, the expected shardings, and errors before anything is compiled."""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest
from program_helpers import (
    MESHES,
    ONE,
    ROWS,
    STEPS,
    TOKENS,
    VOCAB,
    batch_of,
    first_state,
    host_batch,
    host_state,
    make_config,
    moments,
    program_of,
    relative,
)

from jaxtrain.config import Config, DataConfig, MeshConfig, TrainConfig, llama
from jaxtrain.losses import LossSums
from jaxtrain.models.model import TransformerModel
from jaxtrain.models.parallel import Parallel
from jaxtrain.runtime.mesh import make_mesh, map_loss
from jaxtrain.step import TrainState, pmap_train_step, replicate
from jaxtrain.training import components
from jaxtrain.training.program import make_program


@functools.cache
def trained(style, sizes, accumulate=1):
    """Returns the parameters after twenty steps on a mesh, and the metrics of every step."""
    program = program_of(make_config(style, sizes, accumulate))
    state, history = first_state(program, style), []
    for step in range(STEPS):
        # Waited for: on a loaded machine the CPU's all-reduce of eight devices can hang behind what is queued next.
        state, metrics = jax.block_until_ready(program.train_step(state, batch_of(program, step)))
        history.append(metrics.unpack())
    return jax.device_get(state.params), history


def test_another_learning_rate_length_threshold_or_decay_is_the_same_program():
    """And gives the numbers of a program that holds the values as constants."""
    config = make_config("llama")
    rate = {"peak_lr": 1e-3, "warmup_steps": 5, "floor": 0.2, "schedule": "linear", "clip_norm": 0.1}
    changed = [
        dataclasses.replace(
            config,
            optim=dataclasses.replace(config.optim, weight_decay=decay, **fields),
            train=dataclasses.replace(config.train, steps=steps),
        )
        for decay, steps, fields in ((0.3, 300, rate), (0, STEPS, {}))
    ]
    programs = [program_of(one) for one in (config, *changed)]
    texts = set()
    for program in programs:
        scalars = jax.eval_shape(program.scalars, program.abstract_state.step)
        texts.add(program.train_step.lower(program.abstract_state, program.abstract_batch, scalars).as_text())
    assert len(texts) == 1
    program = programs[0]
    compiled = program.compile(program.abstract_state, program.abstract_batch, pytest.fail)
    assert "learning_rate" in trained("llama", ONE)[1][0]
    state = first_state(program, "llama")
    for step in range(4):
        state, metrics = compiled(state, batch_of(program, step))
        constants = trained("llama", ONE)[1][step]
        for name in ("loss", "learning_rate", "clip_factor", "update_norm"):
            np.testing.assert_allclose(metrics.unpack()[name], constants[name], rtol=1e-6)


def test_an_optimizer_of_the_caller_takes_no_scalars():
    program = make_program(make_config("gpt2"), make_mesh(MeshConfig(*ONE)), VOCAB, optimizer=optax.sgd(0.1))
    assert program.scalars is None


def assert_same_run(actual, expected):
    """Tolerance: float32 sums in another order, amplified by twenty steps of Adam."""
    (params, history), (expected_params, expected_history) = actual, expected
    for metrics, reference in zip(history, expected_history, strict=True):
        np.testing.assert_allclose(metrics["loss"], reference["loss"], rtol=1e-6)
        for name in ("grad_norm", "clip_factor"):
            np.testing.assert_allclose(metrics[name], reference[name], rtol=5e-6)
        assert metrics["tokens"] == reference["tokens"]
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(expected_params), strict=True)
    for (path, leaf), reference in leaves:
        if [key.key for key in path][-2:] == ["key", "bias"]:
            # It adds the same to all scores of a query, so its true gradient is 0: Adam steps by the sign of noise.
            assert np.abs(leaf).max() < STEPS * 3e-3
        else:
            assert relative(leaf, reference) < 1e-5, path


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("style", "sizes", "accumulate"),
    [("llama", (2, 2, 2), 2), slow("gpt2", (2, 2, 2), 1)]
    + [slow("llama", sizes, 1) for sizes in MESHES]
    + [slow("gpt2", sizes, 2) for sizes in MESHES],
)
def test_twenty_steps_are_the_same_on_every_mesh(style, sizes, accumulate):
    assert_same_run(trained(style, sizes, accumulate), trained(style, ONE))


@pytest.mark.parametrize(("style", "accumulate"), [slow("llama", 2), slow("gpt2", 1)])
def test_twenty_steps_are_the_same_under_pmap(style, accumulate):
    """Its quick sibling, of two steps, is in tests/core/test_step.py."""
    config = make_config(style, vocab_size=VOCAB)
    train = config.train
    model = TransformerModel(config.model, z_loss=train.z_loss, label_smoothing=train.label_smoothing)
    optimizer = components.make_optimizer(config)
    train_step = pmap_train_step(model.loss, optimizer, accumulate=accumulate)
    state, history = replicate(TrainState.create(host_state(style).params, optimizer)), []
    for step in range(STEPS):
        batch = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), host_batch(step))
        state, metrics = jax.block_until_ready(train_step(state, batch))
        history.append(jax.tree.map(lambda x: x[0], metrics))
    params = jax.tree.map(lambda x: x[0], state.params)
    assert_same_run(jax.device_get((params, history)), trained(style, ONE))


def test_the_twenty_steps_clip_some_gradients_and_not_others():
    factors = [metrics["clip_factor"] for metrics in trained("llama", ONE)[1]]
    assert min(factors) < 0.95
    assert max(factors) == 1


@pytest.mark.parametrize("sizes", [(2, 2, 2), *map(slow, MESHES[:3])], ids=str)
def test_evaluation_gives_the_same_sums_on_every_mesh(sizes):
    params = trained("llama", ONE)[0]

    def evaluate(sizes):
        program = program_of(make_config("llama", sizes))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state.params)
        return jax.device_get(program.eval_step(jax.device_put(params, shardings), batch_of(program)))

    actual, expected = evaluate(sizes), evaluate(ONE)
    np.testing.assert_allclose(actual.nll, expected.nll, rtol=1e-6)
    assert actual.weight == expected.weight == host_batch(0)["where"].sum()
    assert actual.z_loss == actual.smoothing == 0


@functools.cache
def first_gradient(sizes, precision="float32", remat="none"):
    """Returns loss and gradient of the first step; the gradient is read from Adam's first moment."""
    config = make_config("llama", sizes, precision=precision, remat=remat)
    program = program_of(config)
    state, metrics = program.train_step(first_state(program, "llama"), batch_of(program))
    metrics = metrics.unpack()
    scale = (1 - config.optim.b1) * float(metrics["clip_factor"])
    return float(metrics["loss"]), jax.tree.map(lambda leaf: np.asarray(leaf) / scale, moments(state)[0])


@pytest.mark.parametrize("remat", [*map(slow, ["minimal", "none", "full", "offload"])])
def test_rematerialization_changes_no_number(remat):
    """tests/models compares them on one device."""
    loss, gradient = first_gradient((1, 8, 1), remat=remat)
    expected_loss, expected = first_gradient(ONE)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert relative(gradient, expected) < 2e-6


@pytest.mark.slow
def test_bfloat16_gradients_lose_little_by_being_reduced_as_such():
    """fsdp adds bfloat16 gradients where data adds float32 ones: less than a rounding apart (0.0016 of 0.0039).

    From the float32 gradient both are 0.006 away.
    """
    _, exact = first_gradient(ONE)
    _, data = first_gradient((8, 1, 1), "bfloat16")
    _, fsdp = first_gradient((1, 8, 1), "bfloat16")
    assert 0 < relative(fsdp, data) < 2**-8
    assert relative(fsdp, exact) < 1.1 * relative(data, exact) < 0.01


def residuals(remat, fsdp):
    """Returns the shapes of the residuals on one device."""
    config = make_config("llama", (1, fsdp, 1), vocab_size=VOCAB, remat=remat)
    program = program_of(config)
    model = TransformerModel(dataclasses.replace(config.model, attention="xla"), Parallel(fsdp=fsdp))
    shapes = []

    def watch(params, batch):
        sums, pullback = jax.vjp(lambda params: model.loss(params, batch).nll, params)
        shapes.extend(leaf.shape for leaf in jax.tree.leaves(pullback))
        return LossSums(sums, sums, sums, sums)

    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, program.abstract_state.params)
    jax.eval_shape(map_loss(watch, program.mesh, specs), program.abstract_state.params, program.abstract_batch)
    return shapes


@pytest.mark.parametrize("fsdp", [1, 8])
def test_each_policy_saves_the_documented_residuals(fsdp):
    """Residuals of every layer, `[2, ...]` for both. Sharded parameters are residuals, gathered ones never."""
    rows = (2, ROWS // fsdp, TOKENS)
    # Queries; keys and values; input and attention's output; up and gate.
    products = sorted([(*rows, 4, 8), *[(*rows, 2, 8)] * 2, *[(*rows, 32)] * 2, *[(*rows, 48)] * 2])
    attention = [(2, ROWS // fsdp, 2, 2, TOKENS, last) for last in (1, 8)]  # logarithms of its sums, and its mixture
    kept = {remat: residuals(remat, fsdp) for remat in ("none", "minimal", "full")}
    activations = {remat: sorted(s for s in shapes if s[:3] == rows) for remat, shapes in kept.items()}
    assert activations["full"] == [(*rows, 32)]
    assert activations["minimal"] == products
    assert [kept["minimal"].count(shape) for shape in attention] == [1, 1]
    assert not set(attention) & set(kept["full"])
    if fsdp == 1:
        assert len(activations["none"]) > len(products)
    else:
        assert activations["none"] == products
        whole = {(2, 32, 32), (2, 32, 16), (2, 32, 48), (2, 48, 32)}
        parts = {(2, 32 // fsdp, 32), (2, 32 // fsdp, 16), (2, 32 // fsdp, 48), (2, 48, 32 // fsdp)}
        for shapes in kept.values():
            assert not whole & set(shapes)
            assert parts <= set(shapes)


@pytest.mark.parametrize(
    ("style", "sizes", "model", "message"),
    [
        ("gpt2", (1, 8, 1), {"d_model": 36}, "model.d_model 36 is not divisible by mesh.fsdp 8: change one of them"),
        ("gpt2", (1, 1, 4), {"num_heads": 2}, "model.num_heads 2 is not divisible by mesh.tensor 4"),
        ("llama", (1, 1, 4), {}, "model.num_kv_heads 2 is not divisible by mesh.tensor 4"),
        ("gpt2", (2, 1, 4), {"d_ff": 30}, "model.d_ff 30 is not divisible by mesh.tensor 4"),
        ("llama", (1, 1, 2), {"vocab_multiple": 1}, "a vocabulary of 257 rows is not divisible by mesh.tensor 2: set"),
        ("llama", (1, 1, 2), {"vocab_multiple": 1}, "model.vocab_multiple, which adds rows that are masked"),
        ("llama", ONE, {"vocab_size": 256}, "model.vocab_size 256 is smaller than the 257 tokens of the data"),
    ],
)
def test_sizes_that_do_not_divide_are_errors_with_the_remedy(style, sizes, model, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        program_of(make_config(style, sizes, **model))


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"batch_size 16 is not divisible by train\.accumulate 4 x 8 devices"):
        program_of(make_config("llama", (4, 2, 1), accumulate=4))


@pytest.mark.parametrize(
    ("sizes", "model", "unroll"),
    [
        (ONE, {}, "all"),
        ((8, 1, 1), {}, "all"),
        (ONE, {"num_layers": 12}, "all"),
        (ONE, {"num_layers": 13}, 1),  # compiling takes too long
        (ONE, {"remat": "minimal"}, 1),
        ((1, 8, 1), {}, 1),
        (ONE, {"scan_unroll": 2}, 2),
    ],
)
def test_layers_are_unrolled_where_that_pays(sizes, model, unroll):
    program = program_of(make_config("llama", sizes, **{"scan_unroll": "auto", **model}))
    assert program.model.config.scan_unroll == unroll


@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 2, "fsdp": 2}])
def test_the_steps_have_no_effects(sizes):
    """JAX has no fast dispatch for a program with effects, such as the checks that `checkify` finds."""
    config = Config(
        data=DataConfig(sources=("x",)),
        model=llama(num_layers=1, num_heads=2, d_model=16, d_ff=32, max_seq_len=16),
        train=TrainConfig(batch_size=8, seq_len=16),
        mesh=MeshConfig(**sizes),
    )
    program = make_program(config, make_mesh(config.mesh), 32)
    state, batch = program.abstract_state, program.abstract_batch
    assert not program.train_step.trace(state, batch).jaxpr.effects
    assert not program.eval_step.trace(state.params, batch).jaxpr.effects
