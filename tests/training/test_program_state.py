"""The state of a program on a mesh: its shards, its memory, and any optimizer's copies of the parameters."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from program_helpers import MODELS, ONE, VOCAB, batch_of, host_state, make_config, moments, program_of, relative

from jaxtrain.runtime.mesh import make_mesh, replicated
from jaxtrain.training.program import make_program

# The part of each parameter that a device of data 2 x fsdp 2 x tensor 2 holds: embed over fsdp; heads, hidden and
# vocabulary (264 rows) over tensor; the layers' number, norms, positions and biases of the residual stream whole.
PARTS = {
    "gpt2": {"embedding": (132, 16), "positions": (16, 32), "query/kernel": (2, 16, 16), "key/kernel": (2, 16, 16)}
    | {"value/kernel": (2, 16, 16), "out/kernel": (2, 16, 16), "up/kernel": (2, 16, 64), "down/kernel": (2, 64, 16)}
    | {"query/bias": (2, 16), "key/bias": (2, 16), "value/bias": (2, 16), "out/bias": (2, 32), "up/bias": (2, 64)}
    | {"down/bias": (2, 32), "final_norm/scale": (32,), "final_norm/bias": (32,)}
    | {f"{norm}_norm/{leaf}": (2, 32) for norm in ("attention", "feed_forward") for leaf in ("scale", "bias")},
    "llama": {"embedding": (132, 16), "head": (16, 132), "query/kernel": (2, 16, 16), "key/kernel": (2, 16, 8)}
    | {"value/kernel": (2, 16, 8), "out/kernel": (2, 16, 16), "up/kernel": (2, 16, 24), "gate/kernel": (2, 16, 24)}
    | {"down/kernel": (2, 24, 16), "query_norm/scale": (2, 8), "key_norm/scale": (2, 8), "final_norm/scale": (32,)}
    | {"attention_norm/scale": (2, 32), "feed_forward_norm/scale": (2, 32)},
}


def test_a_device_holds_its_part_of_each_parameter():
    shapes = program_of(make_config("gpt2", (2, 2, 2))).abstract_state.params
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    parts = {"/".join(key.key for key in path[-2:]): leaf for path, leaf in leaves}
    assert {name: leaf.sharding.shard_shape(leaf.shape) for name, leaf in parts.items()} == PARTS["gpt2"]


@pytest.mark.parametrize(("style", "accumulate"), [("llama", 2), pytest.param("gpt2", 1, marks=pytest.mark.slow)])
def test_state_is_born_in_its_parts_and_stays_there(style, accumulate):
    """The same numbers as on one device; each device holds its shard alone, and the program compiles once."""
    program = program_of(make_config(style, (2, 2, 2), accumulate))
    state = program.init_state()
    for leaf, reference in zip(jax.tree.leaves(state), jax.tree.leaves(host_state(style)), strict=True):
        np.testing.assert_array_equal(leaf, reference)
    for tree in (state.params, *moments(state)):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        parts = {"/".join(key.key for key in path[-2:]): leaf for path, leaf in leaves}
        assert {name: leaf.addressable_shards[0].data.shape for name, leaf in parts.items()} == PARTS[style]
        assert all(len(leaf.addressable_shards) == 8 for leaf in parts.values())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    first = state
    for step in range(2):
        state, _ = jax.block_until_ready(program.train_step(state, batch_of(program, step)))
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((first.params, moments(first))))
    assert program.train_step._cache_size() == 1


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2), (2, 2, 2)], ids=str)
def test_state_takes_twelve_bytes_a_parameter_over_the_devices(sizes):
    """Norm scales are replicated; in a wide model they are a small share."""
    wide = dataclasses.replace(MODELS["llama"], d_model=512, d_ff=1536)
    program = program_of(dataclasses.replace(make_config("llama", sizes), model=wide))
    state = program.abstract_state
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    np.testing.assert_allclose(held, 12 * num_params / (sizes[1] * sizes[2]), rtol=0.01)


def by_rank(params):
    return jax.tree.map(lambda leaf: "matrix" if len(leaf.shape) > 2 else "other", params)


OPTIMIZERS = {
    "lion": optax.lion(1e-3),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=8),
    "partitioned": optax.partition({"matrix": optax.adam(1e-3), "other": optax.sgd(1e-3, momentum=0.9)}, by_rank),
    "in steps": optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
    "with hyperparameters": optax.inject_hyperparams(optax.adam)(1e-3),
    "schedule-free": optax.contrib.schedule_free_adamw(1e-3),
    "a flat vector": optax.flatten(optax.adam(1e-3)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_state_of_an_optimizer_is_sharded_like_the_parameters_it_repeats(optimizer):
    config = make_config("llama", (2, 2, 2))
    program = make_program(config, make_mesh(config.mesh), VOCAB, optimizer=optimizer)
    params = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(program.abstract_state.params)
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.abstract_state.opt_state):
        name = jax.tree_util.keystr(path)
        repeated = [p for suffix, p in params.items() if name.endswith(suffix) and p.shape == leaf.shape]
        expected = repeated[0].sharding if repeated else replicated(program.mesh)
        assert leaf.sharding == expected, name


@pytest.mark.slow  # quick sibling: test_own_model.py
def test_a_partitioned_optimizer_trains_on_a_mesh():
    """The step equals that on one device, and every leaf keeps its sharding."""
    states = {}
    for sizes in (ONE, (2, 2, 2)):
        config = make_config("llama", sizes)
        program = make_program(config, make_mesh(config.mesh), VOCAB, optimizer=OPTIMIZERS["partitioned"])
        put = lambda leaf, like: jax.device_put(np.copy(leaf), like.sharding)  # noqa: E731
        state = program.init_state()
        state = state.replace(params=jax.tree.map(put, host_state("llama").params, program.abstract_state.params))
        with jax.numpy_dtype_promotion("standard"):  # optax is not written for the strict mode of the tests
            states[sizes], _ = program.train_step(state, batch_of(program))
        assert jax.tree.map(lambda leaf: leaf.sharding, states[sizes]) == jax.tree.map(
            lambda leaf: leaf.sharding, program.abstract_state
        )
    assert relative(jax.device_get(states[2, 2, 2].params), jax.device_get(states[ONE].params)) < 1e-5
