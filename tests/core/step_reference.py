"""The smallest language model, its batches, and two steps of it on one or many devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxtrain.losses import LossSums, linear_cross_entropy
from jaxtrain.optim import clipped_adamw
from jaxtrain.step import TrainState, make_train_step, pmap_train_step, replicate

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
    # Waited for: on a loaded machine the CPU's all-reduce of eight devices can hang behind what is queued next.
    state, first = jax.block_until_ready(step(state, batch))
    state, second = step(state, batch)
    result = jax.tree.map(np.asarray, ((first, second), state.params))
    if road == "pmap":
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), result)
        result = jax.tree.map(lambda x: x[0], result)
    return result


@functools.cache
def one_batch_one_device():
    return two_steps("jit", 1, 1)


def sums_of(nll, weight=1.0):
    zero = jnp.zeros((), jnp.float32)
    return LossSums(nll=nll, z_loss=zero, smoothing=zero, weight=jnp.asarray(weight, jnp.float32))
