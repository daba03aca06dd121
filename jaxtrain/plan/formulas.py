"""Formulas for a run's memory per device, FLOPs, time and cost. Nothing is compiled or allocated.

The formulas follow the layout (parameters, moments and gradients sharded over `fsdp` and `tensor`) and the
rematerialization policy. What the compiler makes of a program is the subject of `jaxtrain.plan.compiler`.

Symbols: B sequences, T tokens each, D d_model, F d_ff, V vocabulary, L layers.
"""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, NamedSharding

from jaxtrain.config import Config, ModelConfig
from jaxtrain.data.store import open_store
from jaxtrain.data.tokenizer import ByteTokenizer
from jaxtrain.losses import CARRY_LIMIT, default_chunk
from jaxtrain.mixture import parse_stores
from jaxtrain.models.kernels.attention import choose_kernel
from jaxtrain.models.layout import logical_axes
from jaxtrain.models.model import TransformerModel
from jaxtrain.models.size import active_params, flops_per_token, matrices_per_layer
from jaxtrain.plan.traffic import Traffic, expected_traffic
from jaxtrain.runtime.chips import Chip
from jaxtrain.runtime.memory import ARENA_BYTES
from jaxtrain.runtime.mesh import AXES, check_batch, mesh_shape, partition_spec
from jaxtrain.training.frozen import frozen_mask
from jaxtrain.training.program import check_parts


class Memory(NamedTuple):
    """Estimated bytes per device."""

    parameters: int  # float32 masters
    optimizer: int  # both moments of Adam, of the parameters that are not frozen
    # sharded like the parameters; in the compute dtype, or in float32 if they are accumulated or reduced
    gradients: int
    # parameters cast to the compute dtype once per step. 0 in float32, and with `fsdp` above 1, where layers are cast
    # one at a time.
    compute_copy: int
    gathered: int  # gradient of the head; with `fsdp` above 1 also the gathered head and the weights of two layers
    activations: int  # residuals of all layers, saved for the backward pass
    layer: int  # working memory of one layer's backward pass
    logits: int  # one chunk of float32 logits and its gradient

    @property
    def state(self) -> int:
        """Parameters and optimizer state, which live from step to step."""
        return self.parameters + self.optimizer

    @property
    def peak(self) -> int:
        """Sum of all parts: an upper bound, because not all parts exist at the same time."""
        return sum(self)


class Cost(NamedTuple):
    """Time and money at an assumed MFU. `price` is None if no price per chip-hour was given."""

    mfu: float
    tokens_per_second: float
    step_seconds: float
    days: float
    chip_hours: float
    price: float | None


class Plan(NamedTuple):
    """Estimates for a config on a number of chips."""

    num_params: int
    num_active: int  # parameters that one token uses: all, but for experts
    num_devices: int
    mesh: dict[str, int]
    tokens_per_step: int
    tokens: int
    flops_per_step: float
    memory: Memory
    traffic: list[Traffic]
    cost: Cost | None


def make_plan(
    config: Config,
    vocab_size: int,
    num_devices: int,
    chip: Chip | None = None,
    *,
    mfu: float = 0.4,
    price: float | None = None,
) -> Plan:
    """Plans a run.

    Args:
      chip: kind of the devices. None, or a compute dtype without a known peak (float32), gives no time and cost.
      mfu: assumed share of the peak that the model's FLOPs reach, from 0 to 1. Recomputation does not count.

    Raises:
      ValueError: a model of the user's own, or a mesh or batch that does not fit.
    """
    if not isinstance(config.model, ModelConfig):
        raise ValueError(f"{type(config.model).__name__} has no formulas: `plan` knows the built-in transformer only")
    mesh = AbstractMesh(mesh_shape(config.mesh, num_devices), AXES)
    check_batch(config.train.batch_size, config.train.accumulate, mesh)
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    check_parts(model, mesh)
    tokens_per_step = config.train.batch_size * config.train.seq_len
    flops = tokens_per_step * flops_per_token(model, config.train.seq_len)
    total, local, trained = _num_params(config, model, mesh)
    return Plan(
        num_params=total,
        num_active=active_params(model, total),
        num_devices=mesh.size,
        mesh=dict(mesh.shape),
        tokens_per_step=tokens_per_step,
        tokens=config.train.steps * tokens_per_step,
        flops_per_step=flops,
        memory=_memory(config, model, mesh, local, trained, chip),
        traffic=expected_traffic(config, model, mesh, local),
        cost=_cost(config, flops, mesh.size, chip, mfu, price),
    )


def plan_vocab(config: Config) -> int:
    """Returns the vocabulary size of a config without preparing its data; a ValueError if only the data has it."""
    data = config.data
    if getattr(config.model, "vocab_size", None):
        return config.model.vocab_size
    store = next(iter(parse_stores(data.stores).values()), data.store)
    if store and (Path(store).exists() or Path(f"{store}.idx").exists()):
        return open_store(store, verify=False, validation=data.validation).vocab_size
    if not store and data.tokenizer == "byte":
        return ByteTokenizer.vocab_size
    raise ValueError("the vocabulary size depends on data that is not here: give it with --model.vocab-size")


def has_large_matrix(config: Config) -> bool:
    """Returns True if the embedding takes over `ARENA_BYTES` in float32; False if its size is not known yet."""
    with contextlib.suppress(ValueError, OSError):
        return 4 * plan_vocab(config) * getattr(config.model, "d_model", 0) > ARENA_BYTES
    return False


def _cost(
    config: Config, flops: float, num_devices: int, chip: Chip | None, mfu: float, price: float | None
) -> Cost | None:
    if chip is None or config.train.precision != "bfloat16":
        return None
    seconds = flops / (num_devices * chip.peak_flops * mfu)
    hours = config.train.steps * seconds / 3600
    return Cost(
        mfu=mfu,
        tokens_per_second=config.train.batch_size * config.train.seq_len / seconds,
        step_seconds=seconds,
        days=hours / 24,
        chip_hours=hours * num_devices,
        price=None if price is None else price * hours * num_devices,
    )


def _num_params(config: Config, model: ModelConfig, mesh: AbstractMesh) -> tuple[int, int, int]:
    """Returns the number of parameters of the model, of one device's shards, and of those that are not frozen."""
    shapes = jax.eval_shape(TransformerModel(model).init, jax.random.key(0))

    def local(leaf, axes):
        return math.prod(NamedSharding(mesh, partition_spec(axes)).shard_shape(leaf.shape))

    shards = jax.tree.map(local, shapes, logical_axes(shapes))
    frozen = jax.tree.leaves(frozen_mask(shapes, config.frozen))
    trained = sum(size for size, is_frozen in zip(jax.tree.leaves(shards), frozen, strict=True) if not is_frozen)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)), sum(jax.tree.leaves(shards)), trained


def _memory(
    config: Config, model: ModelConfig, mesh: AbstractMesh, num_local: int, num_trained: int, chip: Chip | None
) -> Memory:
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    settings = config.train
    width = 2 if settings.precision == "bfloat16" else 4  # bytes of the compute dtype
    rows = settings.batch_size // (settings.accumulate * mesh.shape["data"] * fsdp)
    kept, layer = _activations(model, fsdp, tensor)
    platform, kernel = chip.platform if chip else "cpu", model.attention
    if kernel == "auto":
        kernel = choose_kernel(
            kernel,
            platform,
            settings.precision,
            settings.seq_len,
            model.channels_per_head,
            softcap=model.attention_softcap,
            capability=chip.capability if chip else None,
        )
    # Float32 scores and weights; kernels that work in blocks hold neither.
    scores = 8 * rows * settings.seq_len**2 * model.num_heads // tensor if kernel == "xla" else 0
    num_kept = model.num_layers if model.remat == "none" and fsdp == 1 else 1
    head = model.d_model * model.vocab_rows // tensor
    two_layers = 2 * matrices_per_layer(model, tensor=tensor)
    # The gradient of a matrix of all experts is summed in float32, see models/kernels/grouped.py.
    grouped = 4 * (model.num_experts or 0) * model.d_model * model.d_ff // tensor if platform != "tpu" else 0
    chunk = min(settings.loss_chunk or default_chunk(platform), rows * settings.seq_len)
    per_layer = fsdp > 1 and width < 4  # casts, see models/masters.py
    summed = mesh.shape["data"] > 1 or settings.accumulate > 1
    head_gradient = (width if 4 * head > CARRY_LIMIT else 4) * head
    return Memory(
        parameters=4 * num_local,
        optimizer=(4 + (2 if config.optim.mu_dtype == "bfloat16" else 4)) * num_trained,
        gradients=(4 if summed else width) * num_local + (width * num_local if settings.accumulate > 1 else 0),
        compute_copy=width * num_local if width < 4 and not per_layer else 0,
        gathered=head_gradient + (width * (head + two_layers) if fsdp > 1 else 0),
        activations=width * rows * settings.seq_len * model.num_layers * kept + scores * (num_kept - 1),
        layer=2 * width * rows * settings.seq_len * layer + scores + grouped,
        logits=(4 + width) * chunk * model.vocab_rows // tensor,
    )


def _activations(model: ModelConfig, fsdp: int, tensor: int) -> tuple[int, int]:
    """Returns the channels per token that a layer saves for the backward pass, and all channels of a layer."""
    heads = (2 * model.num_heads + 2 * model.kv_heads) * model.channels_per_head // tensor  # query, mixture, key, value
    chosen = model.experts_per_token if model.num_experts else 1
    hidden = chosen * model.d_ff // tensor
    num_up = 2 if model.gated else 1
    router = 2 * (model.num_experts or 0)  # float32
    products = heads + model.d_model + router + num_up * hidden  # see PRODUCTS in models/remat.py
    num_norms = 4 if model.norm_order == "both" else 2
    # Norms, residual stream, activations of up and gate.
    every = products + (2 + num_norms) * model.d_model + num_up * hidden
    if model.num_experts:  # probabilities, and the inputs and outputs of the experts
        every += router + 2 * chosen * model.d_model
    match model.remat:
        case "full":
            return model.d_model, every
        case "offload":
            return 0, every
        case "none" if fsdp == 1:
            return every, every
        case _:
            return model.d_model + products, every
