"""Writes models for transformers: config.json and safetensors files, straight from the devices, a tensor at a time."""

import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain.config import ModelConfig
from jaxtrain.models.hf.config_json import to_hf_config
from jaxtrain.models.hf.families import Tensor, tensors_of
from jaxtrain.models.hf.read import CONFIG, DTYPES, INDEX, SINGLE, leaf_shapes
from jaxtrain.runtime.files import write_json
from jaxtrain.trees import path_names

SHARD_BYTES = 5 * 10**9


def write_model(
    folder: Path,
    config: ModelConfig,
    params: Any,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    more: dict[str, Any] | None = None,
) -> None:
    """Writes a model into a folder.

    Args:
      config: the model, with its vocabulary.
      params: its parameters, on any devices of this process.
      dtype: float32, float16 or bfloat16.
      shard_bytes: bytes above which a file gets no further tensor.
      more: further values of config.json.

    Raises:
      ValueError: no architecture of transformers computes the model.
    """
    family, values = to_hf_config(config)
    leaves = {"/".join(path_names(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert config.vocab_size is not None
    tensors = tensors_of(family, leaf_shapes(params), config.vocab_size)
    shards = _split(tensors, dtype, shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        _write_file(folder / name, shard, leaves, dtype)
    if len(shards) > 1:
        total = sum(_num_bytes(tensor, dtype) for tensor in tensors.values())
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / CONFIG, values | {"torch_dtype": dtype} | (more or {}))


def _split(tensors: dict[str, Tensor], dtype: str, shard_bytes: int) -> list[dict[str, Tensor]]:
    """Distributes tensors over files, in order."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + _num_bytes(tensor, dtype) > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += _num_bytes(tensor, dtype)
    return shards


def _num_bytes(tensor: Tensor, dtype: str) -> int:
    return math.prod(tensor.shape) * jnp.dtype(dtype).itemsize


def _write_file(file: Path, tensors: dict[str, Tensor], leaves: dict[str, jax.Array], dtype: str) -> None:
    """Writes a safetensors file: length of the head, head (JSON), tensors. The library needs all tensors at once."""
    code = next(code for code, name in DTYPES.items() if name == dtype)
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + _num_bytes(tensor, dtype)
        head[name] = {"dtype": code, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            parts = [leaves[leaf] for leaf in tensor.leaves]
            array = np.asarray(_assemble(parts, tensor.index, tensor.shape, tensor.transposed, dtype))
            stream.write(array.reshape(-1).view(np.uint8).data)
            del array  # before the next one is assembled


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _assemble(
    parts: list[jax.Array], index: tuple[jax.Array, ...], shape: tuple[int, ...], transposed: bool, dtype: str
) -> jax.Array:
    """Returns a tensor as the file has it: the parts at `index`, concatenated, without padding, cast."""
    whole = jnp.concatenate([part[index] for part in parts], axis=-1)
    ours = shape[::-1] if transposed else shape
    whole = whole[tuple(slice(size) for size in ours)].astype(dtype)
    return whole.T if transposed else whole
