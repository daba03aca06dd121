"""Jitted train and eval steps of a config on a mesh, with the abstract state. Allocates and compiles nothing."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jaxtrain.config import Config, ModelConfig, SavedModel
from jaxtrain.fields import check_divisible
from jaxtrain.gradients import takes_key
from jaxtrain.losses import default_chunk
from jaxtrain.models.kernels import cudnn
from jaxtrain.models.kernels.attention import choose_kernel
from jaxtrain.models.masters import cast_per_layer
from jaxtrain.models.model import Model, TransformerModel, axes_of
from jaxtrain.models.parallel import Parallel
from jaxtrain.monitoring.metrics import PackedMetrics, pack
from jaxtrain.precision import Policy
from jaxtrain.runtime.compile_options import compile_for_chip
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
from jaxtrain.training.frozen import freeze_gradients

# Largest number of layers that is unrolled by default, by platform: compilation takes longer. Unrolled, the four layers
# of the smallest model of the benchmarks take 0.95 of the time of the loop (--model.scan-unroll). GPUs: not measured.
_UNROLLED = {"cpu": 12, "gpu": 24}


class Program(NamedTuple):
    """Jitted steps of a run, with the shapes, dtypes and shardings of their arguments; holds no data."""

    model: Any  # the model for use outside the steps, not sharded
    vocab_size: int  # token ids of the model
    mesh: Mesh  # devices of the steps; abstract devices serve `jaxtrain plan`
    abstract_state: TrainState  # shapes, dtypes and shardings of the state
    abstract_batch: dict[str, jax.ShapeDtypeStruct]  # shapes, dtypes and shardings of a batch
    init_state: Callable[[], TrainState]  # makes the first state, sharded from the start
    # `(state, batch, scalars=None) -> (state, packed metrics)`; donates the state. Without scalars the program holds
    # the learning rate and the clip threshold as constants.
    train_step: Callable[..., tuple[TrainState, PackedMetrics]]
    # `step -> Scalars` of a step counted from 0; None for an optimizer that is not the config's
    scalars: Callable[[jax.Array], Any] | None
    tune_compiler: bool  # see `TrainConfig`
    eval_step: Callable  # `(params, batch) -> LossSums`

    def compile(
        self, state: TrainState, batch: Batch, report: Callable[[str], None], *, traced: bool = False
    ) -> "CompiledStep":
        """Compiles the train step for the shapes of a state and a batch, with the options of the chip.

        `report` receives a line for each option that the compiler refuses; `traced` is for a profiler.
        """
        more = () if self.scalars is None else (jax.eval_shape(self.scalars, state.step),)
        everywhere = replicated(self.mesh)
        more = jax.tree.map(lambda scalar: _abstract(scalar, everywhere), more)
        lowered = self.train_step.lower(state, batch, *more)
        options = {"tune": self.tune_compiler, "report": report, "traced": traced}
        compiled = compile_for_chip(lowered, self.mesh.devices, **options)
        return CompiledStep(compiled, self.scalars)


class CompiledStep(NamedTuple):
    """Train step `(state, batch) -> (state, packed metrics)` that never compiles again; donates the state."""

    executable: jax.stages.Compiled
    scalars: Callable[[jax.Array], Any] | None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, PackedMetrics]:
        return self.executable(state, batch, *(() if self.scalars is None else (self.scalars(state.step),)))


def make_program(
    config: Config,
    mesh: Mesh,
    vocab_size: int,
    *,
    wrap_loss: Callable[[Callable], Callable] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    diagnose: Callable | None = None,
    micro_batch_terms: bool = False,
) -> Program:
    """Builds the program of a config.

    Args:
      mesh: devices of the steps, or abstract devices.
      wrap_loss: wraps the training loss `(params, batch) -> LossSums`.
      optimizer: any optax transformation; None takes the optimizer of the config.
      diagnose, micro_batch_terms: see `make_train_step`; None takes the diagnostics of the config.

    Raises:
      ValueError: sizes that do not divide over the mesh, or a vocabulary that does not fit.
    """
    check_batch(config.train.batch_size, config.train.accumulate, mesh)
    model = _model(config, mesh, vocab_size)
    policy = Policy(compute=config.train.precision)
    scaling = components.make_loss_scaling(config, num_row_shards(mesh))

    def init() -> TrainState:
        params = model.init(jax.random.key(config.seed))
        return TrainState.create(params, optimizer or components.make_optimizer(config), scaling and scaling.init())

    shapes = jax.eval_shape(init)
    specs = jax.tree.map(lambda leaf, axes: partition_spec(axes), shapes.params, axes_of(model, shapes.params))
    shardings = state_shardings(shapes, specs, mesh)
    make_losses = _sharded_losses if isinstance(model, TransformerModel) else _global_losses
    losses = make_losses(config, model, mesh, shapes.params, specs)
    train_loss = freeze_gradients(losses.train_loss, config.frozen) if config.frozen else losses.train_loss
    train_step = _make_step(
        config,
        mesh.devices.flat[0].platform,
        wrap_loss(train_loss) if wrap_loss else train_loss,
        optimizer,
        policy=None if losses.cast_per_layer else policy,
        loss_scaling=scaling,
        map_gradients=losses.map_gradients,
        diagnose=diagnose or components.make_diagnose(config),
        micro_batch_terms=micro_batch_terms,
    )
    make_scalars = jax.jit(functools.partial(components.make_scalars, config), out_shardings=replicated(mesh))
    return Program(
        model=model,
        vocab_size=getattr(model, "vocab_size", vocab_size),
        mesh=mesh,
        abstract_state=jax.tree.map(_abstract, shapes, shardings),
        abstract_batch=_abstract_batch(config, mesh),
        init_state=jax.jit(init, out_shardings=shardings),
        train_step=jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, replicated(mesh))),
        scalars=None if optimizer else make_scalars,
        tune_compiler=config.train.tune_compiler,
        eval_step=jax.jit(make_eval_step(losses.eval_loss, policy=policy), out_shardings=replicated(mesh)),
    )


def _make_step(
    config: Config,
    platform: str,
    train_loss: Callable,
    optimizer: optax.GradientTransformation | None,
    **options: Any,
) -> Callable[..., tuple[TrainState, PackedMetrics]]:
    """Returns the function of `Program.train_step`; takes the options of `make_train_step`."""

    def train_step(state: TrainState, batch: Batch, scalars: Any = None) -> tuple[TrainState, PackedMetrics]:
        step = make_train_step(
            train_loss,
            optimizer or components.make_optimizer(config, platform, scalars, state.step),
            accumulate=config.train.accumulate,
            seed=config.seed,
            **options,
        )
        state, metrics = step(state, batch)
        return state, pack(metrics)

    return train_step


def state_shardings(state: TrainState, specs: Any, mesh: Mesh) -> TrainState:
    """Shards a state: parameters by `specs`, and the optimizer's copies of a parameter like the parameter.

    A leaf of the optimizer state is such a copy if its path ends with the path of the parameter and both have the same
    shape, whichever transformation it belongs to. All other leaves are replicated.
    """
    shardings = jax.tree.map(lambda leaf, spec: NamedSharding(mesh, spec), state.params, specs)
    params = jax.tree_util.tree_leaves_with_path(state.params)
    pairs = zip(params, jax.tree.leaves(shardings), strict=True)
    by_path = {path: (leaf.shape, sharding) for (path, leaf), sharding in pairs}
    everywhere = replicated(mesh)

    def sharding_of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        for start in range(len(path) + 1):
            shape, sharding = by_path.get(path[start:], (None, everywhere))
            if shape == leaf.shape:
                return sharding
        return everywhere

    others = jax.tree_util.tree_map_with_path(sharding_of, state.replace(params=None))
    return others.replace(params=shardings)


class _Losses(NamedTuple):
    """Loss functions of a model on a mesh, as `make_train_step` and `make_eval_step` take them."""

    train_loss: Callable
    eval_loss: Callable
    map_gradients: Callable[[Callable], Callable] | None = None
    cast_per_layer: bool = False  # each layer casts the float32 masters where it gathers them


def _sharded_losses(config: Config, model: TransformerModel, mesh: Mesh, params: Any, specs: Any) -> _Losses:
    """Losses of the built-in transformer: each device computes on its shards, in `jax.shard_map` if there are several.

    Evaluation measures plain cross-entropy, without z-loss, label smoothing and the losses of routers.
    """
    del params  # `check_parts` has checked their sizes
    settings = config.train
    parallel = Parallel(**mesh.shape)
    chunk_size = settings.loss_chunk or default_chunk(mesh.devices.flat[0].platform)
    local = TransformerModel(model.config, parallel, chunk_size=chunk_size)
    extra = ("z_loss", "label_smoothing", "balance_loss", "router_z_loss")
    train = dataclasses.replace(local, **{name: getattr(settings, name) for name in extra})
    if mesh.size == 1:
        return _Losses(train.loss, local.loss)
    per_layer = mesh.shape["fsdp"] > 1 and settings.precision != "float32"
    over_mesh = map_gradients(mesh, specs)

    def map_per_device(gradients: Callable) -> Callable:
        return over_mesh(cast_per_layer(gradients, settings.precision) if per_layer else gradients)

    return _Losses(train.loss, map_loss(local.loss, mesh, specs), map_per_device, per_layer)


def _global_losses(config: Config, model: Model, mesh: Mesh, params: Any, specs: Any) -> _Losses:
    """Losses of a user's model, which are written for whole arrays and sharded by XLA.

    Raises a ValueError for a setting that only the built-in transformer supports, axes that do not divide a parameter,
    or a loss that needs a key in evaluation.
    """
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(specs), strict=True)
    for (path, leaf), spec in leaves:
        try:
            NamedSharding(mesh, spec).shard_shape(leaf.shape)
        except ValueError:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            problem = f"{type(model).__name__}.axes shards {where} {leaf.shape} as {spec}"
            remedy = f"over a mesh of {dict(mesh.shape)}, which does not divide it: change the axes or the mesh"
            raise ValueError(f"{problem} {remedy}") from None
    ignored = ("z_loss", "label_smoothing", "loss_chunk")
    if changed := [name for name in ignored if getattr(config.train, name)]:
        reason = f"has no effect on {type(model).__name__}, which computes its own loss"
        raise ValueError(f"train.{changed[0]} {reason}: leave it out")
    if takes_key(model.loss):
        _check_without_key(model, params, _abstract_batch(config, mesh))
    return _Losses(model.loss, model.loss)


def _check_without_key(model: Any, params: Any, batch: Any) -> None:
    """Raises a ValueError if a loss works with a key but not with None: at the start, not only after the training."""
    try:
        jax.eval_shape(lambda params, batch: model.loss(params, batch, None), params, batch)
    except Exception as error:
        jax.eval_shape(model.loss, params, batch, jax.random.key(0))  # raises an error that has nothing to do with keys
        problem = f"{type(model).__name__}.loss fails where its key is None, as in evaluation"
        text = f"{problem}: {type(error).__name__}: {error}; leave out dropout if the key is None"
        raise ValueError(text) from error


def _model(config: Config, mesh: Mesh, vocab_size: int) -> Model:
    """Returns the user's model, or the built-in transformer with vocabulary, kernel and unroll factor filled in."""
    model = config.model
    if isinstance(model, SavedModel):
        raise ValueError(f"the model {model.custom} is defined in a config file: give that file as CONFIG.py")
    size = getattr(model, "vocab_size", None) or vocab_size
    if size < vocab_size:
        problem = f"model.vocab_size {size} is smaller than the {vocab_size} tokens of the data"
        raise ValueError(f"{problem}: set it to None (none on the command line) to take those")
    if not isinstance(model, ModelConfig):
        return model
    kernel, unroll = _kernel(config, mesh), _scan_unroll(config, mesh)
    resolved = dataclasses.replace(model, vocab_size=size, attention=kernel, scan_unroll=unroll)
    check_parts(resolved, mesh)
    return TransformerModel(resolved)


def _scan_unroll(config: Config, mesh: Mesh) -> int | Literal["all"]:
    """Chooses how many layers an iteration of the loop over layers runs; "all" makes no loop."""
    model = config.model
    if model.scan_unroll != "auto":
        return model.scan_unroll
    # Only a loop keeps the compiler from gathering or recomputing a layer's weights long before they are needed.
    loops = model.remat != "none" or mesh.shape["fsdp"] > 1
    return 1 if loops or model.num_layers > _UNROLLED.get(mesh.devices.flat[0].platform, 0) else "all"


def _kernel(config: Config, mesh: Mesh) -> str:
    """Chooses the attention kernel; raises a ValueError if the config names one that cannot serve this model."""
    model, device = config.model, mesh.devices.flat[0]
    return choose_kernel(
        model.attention,
        device.platform,
        config.train.precision,
        config.train.seq_len,
        model.channels_per_head,
        softcap=model.attention_softcap,
        segments=config.data.mask_documents,
        capability=cudnn.capability(device),
    )


def check_parts(c: ModelConfig, mesh: Mesh) -> None:
    """Raises a ValueError if a dimension of the model does not divide over the mesh."""
    check_divisible("model.d_model", c.d_model, "mesh.fsdp", mesh.shape["fsdp"])
    for name, size in {"num_heads": c.num_heads, "num_kv_heads": c.kv_heads, "d_ff": c.d_ff}.items():
        check_divisible(f"model.{name}", size, "mesh.tensor", mesh.shape["tensor"])
    if c.qk_norm == "projection" and mesh.shape["tensor"] > 1:
        raise ValueError("model.qk_norm projection normalizes over heads that mesh.tensor shards: set mesh.tensor to 1")
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
    documents = {"segment_ids": config.data.mask_documents, "positions": config.data.restart_positions}
    dtypes |= {name: jnp.int32 for name, given in documents.items() if given}
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=by_rows(mesh)) for name, dtype in dtypes.items()}
