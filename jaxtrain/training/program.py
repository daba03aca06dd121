"""What a config compiles to on a mesh: the model, its state and its steps, none of it made or compiled yet."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jaxtrain.config import Config, ModelConfig
from jaxtrain.models.kernels import cudnn
from jaxtrain.models.kernels.attention import check_kernel, choose_kernel
from jaxtrain.models.layout import logical_axes
from jaxtrain.models.masters import with_masters
from jaxtrain.models.parallel import Parallel
from jaxtrain.models.transformer import Transformer, init_params, make_loss_fn
from jaxtrain.monitoring.packing import PackedMetrics, pack
from jaxtrain.runtime.mesh import (
    by_rows,
    check_batch,
    map_gradients,
    map_loss,
    num_row_shards,
    partition_spec,
    replicated,
)
from jaxtrain.step import Batch, TrainState, make_eval_step, make_train_step
from jaxtrain.training import components
from jaxtrain.training.faults import abstract_faults, inject

# Up to this many layers a program without a loop is worth its longer compilation, by platform. Without a loop the four
# layers of BENCHMARKS.md's smallest model take 0.95 of their time in one (--model.scan-unroll); GPUs are not measured.
_UNROLLED = {"cpu": 12, "gpu": 24}


class Program(NamedTuple):
    """A run without its data.

    `model` is whole, for use outside the steps. `abstract_state` and `abstract_batch` have the shapes, dtypes and
    shardings of what `train_step` takes; `init_state()` makes the first state, born where it belongs. The steps are
    jitted; `train_step` takes its state's memory and packs its metrics.
    """

    model: Transformer
    mesh: Mesh
    abstract_state: TrainState
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    init_state: Callable[[], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, PackedMetrics]]
    eval_step: Callable


def make_program(config: Config, mesh: Mesh, vocab_size: int) -> Program:
    """Puts a program together.

    Args:
      config: the run.
      mesh: where it runs; the devices may be a description of some that are not there (`jaxtrain plan`).
      vocab_size: tokens of the data's vocabulary.

    Raises:
      ValueError: sizes that do not divide over the mesh, a vocabulary that does not fit.
    """
    settings = config.train
    check_batch(settings.batch_size, settings.accumulate, mesh)
    parallel = Parallel(mesh.shape["fsdp"], mesh.shape["tensor"])
    model = Transformer(_resolve(config, mesh, vocab_size))
    check_parts(model.config, mesh)
    optimizer, policy = components.make_optimizer(config), components.make_policy(config)
    scaling = components.make_loss_scaling(config, num_row_shards(mesh))

    def init() -> TrainState:
        params = init_params(model, jax.random.key(config.seed))
        return TrainState.create(params, optimizer, scaling and scaling.init())

    shapes = jax.eval_shape(init)
    specs = jax.tree.map(lambda leaf, axes: partition_spec(axes), shapes.params, logical_axes(shapes.params))
    shardings = _state_shardings(shapes, specs, optimizer, mesh)
    local = Transformer(model.config, parallel)
    chunk_size = settings.loss_chunk
    loss_fn = make_loss_fn(
        local, z_loss=settings.z_loss, label_smoothing=settings.label_smoothing, chunk_size=chunk_size
    )
    late = parallel.fsdp > 1 and settings.precision != "float32"  # cast where the weights are gathered
    wrap = map_gradients(mesh, specs)
    step = make_train_step(
        inject(loss_fn) if config.faults.in_batch else loss_fn,
        optimizer,
        accumulate=settings.accumulate,
        policy=None if late else policy,
        loss_scaling=scaling,
        map_gradients=(lambda f: wrap(with_masters(f, settings.precision) if late else f)) if mesh.size > 1 else None,
        diagnose=components.make_diagnose(config),
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, PackedMetrics]:
        state, metrics = step(state, batch)
        return state, pack(metrics)

    eval_loss = make_loss_fn(local, chunk_size=chunk_size)
    if mesh.size > 1:
        eval_loss = map_loss(eval_loss, mesh, specs)
    everywhere = replicated(mesh)
    return Program(
        model=model,
        mesh=mesh,
        abstract_state=jax.tree.map(_abstract, shapes, shardings),
        abstract_batch=_abstract_batch(config, mesh),
        init_state=jax.jit(init, out_shardings=shardings),
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, everywhere)),
        eval_step=jax.jit(make_eval_step(eval_loss, policy=policy), out_shardings=everywhere),
    )


def _resolve(config: Config, mesh: Mesh, vocab_size: int) -> ModelConfig:
    """The model with what its config leaves open filled in."""
    size = config.model.vocab_size or vocab_size
    if size < vocab_size:
        raise ValueError(
            f"model.vocab_size {size} is smaller than the {vocab_size} tokens of the data: set it to None (none on the "
            "command line) to take those"
        )
    return dataclasses.replace(
        config.model, vocab_size=size, attention=_kernel(config, mesh), scan_unroll=_scan_unroll(config, mesh)
    )


def _scan_unroll(config: Config, mesh: Mesh) -> int | Literal["all"]:
    """How many layers an iteration of the loop over them runs; "all": there is no loop."""
    model = config.model
    if model.scan_unroll != "auto":
        return model.scan_unroll
    # What is computed again, or gathered layer by layer, is to be no sooner than it is needed: a loop keeps it there.
    loops = model.remat != "none" or mesh.shape["fsdp"] > 1
    return 1 if loops or model.num_layers > _UNROLLED.get(mesh.devices.flat[0].platform, 0) else "all"


def _kernel(config: Config, mesh: Mesh) -> str:
    """The attention kernel of the train step; one that is named and cannot do what it must is a ValueError."""
    model, device = config.model, mesh.devices.flat[0]
    asked = {
        "dtype": config.train.precision,
        "seq_len": config.train.seq_len,
        "head_dim": model.channels_per_head,
        "softcap": model.attention_softcap or 0.0,
        "capability": cudnn.capability(device),
    }
    if model.attention == "auto":
        return choose_kernel(device.platform, **asked)
    check_kernel(model.attention, **asked)
    return model.attention


def check_parts(c: ModelConfig, mesh: Mesh) -> None:
    """Raises a ValueError if a dimension of the model does not divide over the mesh."""
    sizes = {
        "fsdp": {"d_model": c.d_model},
        "tensor": {"num_heads": c.num_heads, "num_kv_heads": c.kv_heads, "d_ff": c.d_ff},
    }
    for axis, dims in sizes.items():
        for name, size in dims.items():
            if size % mesh.shape[axis]:
                raise ValueError(
                    f"model.{name} {size} is not divisible by mesh.{axis} {mesh.shape[axis]}: change one of them"
                )
    if c.vocab_rows % mesh.shape["tensor"]:
        raise ValueError(
            f"a vocabulary of {c.vocab_rows} rows is not divisible by mesh.tensor {mesh.shape['tensor']}: set "
            "model.vocab_multiple, which adds rows that are masked, to a multiple of it (128 suits all hardware)"
        )


def _state_shardings(shapes: TrainState, specs: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Parameters by their specs, moments like their parameters, and scalars everywhere."""
    params = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    everywhere = replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        shapes.opt_state,
        params,
        transform_non_params=lambda _: everywhere,
    )
    loss_scale = jax.tree.map(lambda _: everywhere, shapes.loss_scale)
    return shapes.replace(step=everywhere, params=params, opt_state=opt_state, loss_scale=loss_scale)


def _abstract(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (config.train.batch_size, config.train.seq_len)
    dtypes = {"inputs": jnp.int32, "labels": jnp.int32, "where": jnp.bool_}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=by_rows(mesh)) for name, dtype in dtypes.items()}
    return batch | (abstract_faults(batch["inputs"]) if config.faults.in_batch else {})
