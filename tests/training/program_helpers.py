"""Configs, batches and states of the programs that several files compare; each program is compiled once a file."""

import dataclasses
import functools

import jax
import numpy as np
import optax

from jaxtrain.config import Config, DataConfig, MeshConfig, OptimConfig, TrainConfig, gpt2, llama
from jaxtrain.runtime.mesh import by_rows, make_mesh
from jaxtrain.training.program import make_program

STEPS, ROWS, TOKENS, VOCAB = 20, 16, 16, 257


MODELS = {
    "gpt2": gpt2(num_layers=2, num_heads=4, d_model=32, max_seq_len=TOKENS, vocab_multiple=8),
    "llama": llama(
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        d_model=32,
        d_ff=48,
        max_seq_len=TOKENS,
        qk_norm=True,
        logit_softcap=5.0,
        vocab_multiple=8,
    ),
}


ONE = (1, 1, 1)


MESHES = [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)]  # data, fsdp, tensor


def make_config(style, sizes=ONE, accumulate=1, precision="float32", **model):
    return Config(
        data=DataConfig(store="unused"),
        model=dataclasses.replace(MODELS[style], **{"scan_unroll": 1, **model}),  # one program on every mesh
        optim=OptimConfig(peak_lr=3e-3, warmup_steps=3, clip_norm=0.68),
        train=TrainConfig(
            steps=STEPS,
            batch_size=ROWS,
            seq_len=TOKENS,
            accumulate=accumulate,
            precision=precision,
            z_loss=1e-3,
            label_smoothing=0.1,
        ),
        mesh=MeshConfig(*sizes),
    )


@functools.cache
def program_of(config):
    """Returns one program for all tests that need the same: compiling it takes seconds."""
    return make_program(config, make_mesh(config.mesh), VOCAB)


@functools.cache
def host_batch(step):
    """Masks tokens, fewer in later rows, so that devices have very unequal weights."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, VOCAB, (ROWS, TOKENS + 1)).astype(np.int32)
    where = rng.random((ROWS, TOKENS)) < np.linspace(0.05, 1, ROWS)[:, None]
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "where": where}


def batch_of(program, step=0):
    return jax.device_put(host_batch(step), by_rows(program.mesh))


@functools.cache
def host_state(style):
    """Makes the first state on one device; compiling it for each mesh takes seconds."""
    return jax.device_get(program_of(make_config(style)).init_state())


def first_state(program, style):
    put = lambda leaf, like: jax.device_put(np.copy(leaf), like.sharding)  # noqa: E731
    return jax.tree.map(put, host_state(style), program.abstract_state)


def relative(actual, expected):
    """Returns the norm of the difference of two trees, relative to the norm of the second."""
    square = lambda tree: sum(float(np.sum(np.square(x, dtype=np.float64))) for x in jax.tree.leaves(tree))  # noqa: E731
    return (square(jax.tree.map(np.subtract, actual, expected)) / square(expected)) ** 0.5


def moments(state):
    return [optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu")]
