"""LoRA (arXiv:2106.09685): trainable low-rank additions to frozen projections, beside them in the parameter tree.

A projection `query` with kernel W [I, O] gains `query_lora` with A [I, R] and B [R, O], and computes
x W + (alpha / R) x A B. B starts at 0, so that a run starts with the function of its frozen weights.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxtrain.config import ModelConfig
from jaxtrain.models.kernels.linear import linear
from jaxtrain.models.parallel import enter_tensor

_SUFFIX = "_lora"


def uses_lora(model: Any) -> bool:
    """Returns True for the config of a transformer with LoRA matrices."""
    return isinstance(model, ModelConfig) and model.lora_rank is not None


class Lora(nn.Module):
    """The addition (alpha / R) x A B. I and O count this device's channels.

    Attributes:
      config: the model.
      features: O.
      num_shards: devices of the mesh axis `tensor`.
      row: True if they shard I, as in `out` and `down`; False if they shard O.
    """

    config: ModelConfig
    features: int
    num_shards: int
    row: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rank = self.config.lora_rank
        assert rank is not None
        uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        a = self.param("a", uniform, (x.shape[-1], rank))
        b = self.param("b", nn.initializers.zeros, (rank, self.features))
        a = a if self.row else enter_tensor(a, self.num_shards)
        return linear(linear(x, (a, None), self.num_shards if self.row else 1), (b, None)) * _scale(self.config)


def add_lora(config: ModelConfig, name: str, x: jax.Array, y: jax.Array, num_shards: int, row: bool) -> jax.Array:
    """Adds the LoRA product of x to the result y of projection `name`, if it has one. For use in a compact module.

    x and y are `[B, T, ...]`: channels, or heads and their channels.
    """
    if config.lora_rank is None or name not in config.lora_targets:
        return y
    lora = Lora(config, math.prod(y.shape[2:]), num_shards, row, name=name + _SUFFIX)
    return y + lora(x.reshape(*x.shape[:2], -1)).reshape(y.shape)


def without_lora(tree: Any) -> Any:
    """Returns parameters, or a tree like them, without the LoRA matrices; or a `ModelConfig` without LoRA."""
    if isinstance(tree, ModelConfig):
        return dataclasses.replace(tree, lora_rank=None)
    return unflatten_dict({path: leaf for path, leaf in flatten_dict(tree).items() if not _in_lora(path)})


def with_base(params: Any, base: Any) -> Any:
    """Returns parameters with the leaves of `base`, which lacks the LoRA matrices, in place of their own."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(base))


def merge_lora(params: Any, model: Any) -> Any:
    """Returns the parameters of `without_lora(model)` with the same function; parameters of other models unchanged."""
    if not uses_lora(model):
        return params
    leaves, merged = flatten_dict(params), flatten_dict(without_lora(params))
    for path, a in leaves.items():
        if _in_lora(path) and path[-1] == "a":
            kernel = (*path[:-2], path[-2].removesuffix(_SUFFIX), "kernel")
            merged[kernel] += _scale(model) * jnp.matmul(a, leaves[*path[:-1], "b"], precision="highest")
    return unflatten_dict(merged)


def _in_lora(path: tuple[str, ...]) -> bool:
    return len(path) > 1 and path[-2].endswith(_SUFFIX)


def _scale(config: ModelConfig) -> float:
    assert config.lora_rank is not None
    return config.lora_alpha / config.lora_rank
