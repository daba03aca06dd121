"""Jitted train and eval steps of a config on a mesh, with the abstract state. Allocates and compiles nothing."""

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

# Largest number of layers that is unrolled by default, by platform: compilation takes longer. Unrolled, the four layers
# of the smallest model of the benchmarks take 0.95 of the time of the loop (--model.scan-unroll). GPUs: not measured.
_UNROLLED = {"cpu": 12, "gpu": 24}


class Program(NamedTuple):
    """Jitted steps of a run, with the shapes, dtypes and shardings of their arguments; holds no data.

    Attributes:
      model: the model for use outside the steps, not sharded.
      vocab_size: number of tokens that the model knows.
      mesh: devices of the steps; abstract devices serve `jaxtrain plan`.
      abstract_state: shapes, dtypes and shardings of the state.
      abstract_batch: shapes, dtypes and shardings of a batch.
      init_state: makes the first state; every leaf is born with its sharding.
      train_step: `(state, batch) -> (state, packed metrics)`; donates the state.
      eval_step: `(params, batch) -> LossSums`.
    """

    model: Any
    vocab_size: int
    mesh: Mesh
    abstract_state: TrainState
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    init_state: Callable[[], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, PackedMetrics]]
    eval_step: Callable


def make_program(
    config: Config,
    mesh: Mesh,
    vocab_size: int,
    *,
    wrap_loss: Callable[[Callable], Callable] | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Program:
    """Builds the program of a config.

    Args:
      config: the run.
      mesh: devices of the steps, or abstract devices.
      vocab_size: number of tokens in the vocabulary of the data.
      wrap_loss: wraps the training loss `(params, batch) -> LossSums`; None leaves it as it is.
      optimizer: any optax transformation; None takes that of the config.

    Raises:
      ValueError: sizes that do not divide over the mesh, or a vocabulary that does not fit.
    """
    settings = config.train
    check_batch(settings.batch_size, settings.accumulate, mesh)
    adapter = _adapt(config, mesh, vocab_size)
    optimizer = optimizer or components.make_optimizer(config)
    policy = components.make_policy(config)
    scaling = components.make_loss_scaling(config, num_row_shards(mesh))

    def init() -> TrainState:
        params = adapter.init(jax.random.key(config.seed))
        return TrainState.create(params, optimizer, scaling and scaling.init())

    shapes = jax.eval_shape(init)
    specs = jax.tree.map(lambda leaf, axes: partition_spec(axes), shapes.params, adapter.axes(shapes.params))
    shardings = state_shardings(shapes, specs, mesh)
    train_loss = adapter.train_loss()
    step = make_train_step(
        wrap_loss(train_loss) if wrap_loss else train_loss,
        optimizer,
        accumulate=settings.accumulate,
        policy=None if adapter.casts_per_layer else policy,
        loss_scaling=scaling,
        map_gradients=adapter.map_gradients(specs),
        diagnose=components.make_diagnose(config),
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, PackedMetrics]:
        state, metrics = step(state, batch)
        return state, pack(metrics)

    everywhere = replicated(mesh)
    return Program(
        model=adapter.model,
        vocab_size=adapter.vocab_size,
        mesh=mesh,
        abstract_state=jax.tree.map(_abstract, shapes, shardings),
        abstract_batch=_abstract_batch(config, mesh),
        init_state=jax.jit(init, out_shardings=shardings),
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, everywhere)),
        eval_step=jax.jit(make_eval_step(adapter.eval_loss(specs), policy=policy), out_shardings=everywhere),
    )


def state_shardings(state: TrainState, specs: Any, mesh: Mesh) -> TrainState:
    """Shards a state: parameters by `specs`, and the optimizer's copies of a parameter like the parameter.

    A leaf of the optimizer state is such a copy if its path ends with the path of the parameter and both have the same
    shape, whichever transformation it belongs to. All other leaves are replicated.

    Args:
      state: shapes of all leaves.
      specs: PartitionSpec of each parameter.
      mesh: the devices.
    """
    shardings = jax.tree.map(lambda leaf, spec: NamedSharding(mesh, spec), state.params, specs)
    by_path = {
        tuple(path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(shardings), strict=True
        )
    }
    everywhere = replicated(mesh)

    def sharding_of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        for start in range(len(path) + 1):
            shape, sharding = by_path.get(tuple(path[start:]), (None, everywhere))
            if shape == leaf.shape:
                return sharding
        return everywhere

    others = jax.tree_util.tree_map_with_path(sharding_of, state.replace(params=None))
    return others.replace(params=shardings)


@dataclasses.dataclass(frozen=True)
class _Transformer:
    """The built-in transformer: each device computes on its shards, inside `jax.shard_map` if there are several."""

    config: Config
    mesh: Mesh
    model: Transformer

    @property
    def vocab_size(self) -> int:
        """Number of tokens, without the padding of the tables."""
        return self.model.config.vocab_size

    @property
    def casts_per_layer(self) -> bool:
        """True if each layer casts the float32 masters where it gathers them, instead of one cast per step."""
        return self.mesh.shape["fsdp"] > 1 and self.config.train.precision != "float32"

    @property
    def _local(self) -> Transformer:
        return Transformer(self.model.config, Parallel(self.mesh.shape["fsdp"], self.mesh.shape["tensor"]))

    def init(self, key: jax.Array) -> Any:
        """Initializes whole parameters."""
        return init_params(self.model, key)

    def axes(self, params: Any) -> Any:
        """Returns the logical axes of each parameter."""
        return logical_axes(params)

    def train_loss(self) -> Callable:
        """Returns the loss of one device's shards."""
        settings = self.config.train
        return make_loss_fn(
            self._local,
            z_loss=settings.z_loss,
            label_smoothing=settings.label_smoothing,
            chunk_size=settings.loss_chunk or None,
        )

    def eval_loss(self, specs: Any) -> Callable:
        """Returns the plain cross-entropy over the whole mesh."""
        loss_fn = make_loss_fn(self._local, chunk_size=self.config.train.loss_chunk or None)
        return map_loss(loss_fn, self.mesh, specs) if self.mesh.size > 1 else loss_fn

    def map_gradients(self, specs: Any) -> Callable[[Callable], Callable] | None:
        """Returns the wrapper that differentiates on each device and adds up; None on one device."""
        if self.mesh.size == 1:
            return None
        over_mesh, precision = map_gradients(self.mesh, specs), self.config.train.precision
        return lambda f: over_mesh(with_masters(f, precision) if self.casts_per_layer else f)


def _adapt(config: Config, mesh: Mesh, vocab_size: int) -> _Transformer:
    model = Transformer(_resolve(config, mesh, vocab_size))
    check_parts(model.config, mesh)
    return _Transformer(config, mesh, model)


def _resolve(config: Config, mesh: Mesh, vocab_size: int) -> ModelConfig:
    """Fills in what the model config leaves open: vocabulary, attention kernel and unroll factor."""
    size = config.model.vocab_size or vocab_size
    if size < vocab_size:
        raise ValueError(
            f"model.vocab_size {size} is smaller than the {vocab_size} tokens of the data: set it to None (none on the "
            "command line) to take those"
        )
    return dataclasses.replace(
        config.model, vocab_size=size, attention=_kernel(config, mesh), scan_unroll=_scan_unroll(config, mesh)
    )


def _scan_unroll(config: Config, mesh: Mesh) -> int:
    """Chooses how many layers an iteration of the loop over layers runs; 0 unrolls all of them."""
    model = config.model
    if model.scan_unroll != "auto":
        return model.scan_unroll
    # Only a loop keeps the compiler from gathering or recomputing a layer's weights long before they are needed.
    loops = model.remat != "none" or mesh.shape["fsdp"] > 1
    return 1 if loops or model.num_layers > _UNROLLED.get(mesh.devices.flat[0].platform, 0) else "all"


def _kernel(config: Config, mesh: Mesh) -> str:
    """Chooses the attention kernel; raises a ValueError if the config names one that cannot serve this model."""
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


def _abstract(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (config.train.batch_size, config.train.seq_len)
    dtypes = {"inputs": jnp.int32, "labels": jnp.int32, "where": jnp.bool_}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=by_rows(mesh)) for name, dtype in dtypes.items()}
