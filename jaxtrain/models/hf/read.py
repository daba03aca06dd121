"""Reads models of transformers: safetensors files straight onto a mesh.

The host holds one tensor at a time: one layer of a stacked parameter, not all of them.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jaxtrain.config import ModelConfig
from jaxtrain.models.hf.config_json import from_hf_config
from jaxtrain.models.hf.families import Tensor, tensors_of
from jaxtrain.models.model import TransformerModel
from jaxtrain.runtime.extras import import_extra
from jaxtrain.runtime.files import read_json, read_object
from jaxtrain.trees import named_leaves, path_names

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Tensors without weights that old checkpoints hold: causal masks and rotary frequencies.
_BUFFERS = ("attn.bias", "attn.masked_bias", "rotary_emb.inv_freq")


class _Stored(NamedTuple):
    """Tensor in a file, under the name that the file gives it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    file_bytes: int

    def open(self, source: Any) -> Any:
        """Returns the slices of the tensor in the open file; a ValueError if the file is shorter or gone.

        The library maps the file into memory, where reading past its end would end the process (SIGBUS).
        """
        size = self.file.stat().st_size if self.file.exists() else 0
        if size != self.file_bytes:
            raise ValueError(f"{self.file} changed while it was read: it has {size:,} bytes, not {self.file_bytes:,}")
        return source.get_slice(self.name)


def is_pretrained(folder: str | Path) -> bool:
    """Returns True if a folder holds a model of transformers, whole or not, rather than a run."""
    return "model_type" in read_object(Path(folder) / CONFIG)


class PretrainedFolder:
    """Model in a folder with config.json and safetensors files, as `save_pretrained` of transformers writes it.

    Making one reads config.json and the heads of the files, and checks the shape and dtype of every tensor.

    Attributes:
      path: the folder.
      values: the values of config.json.
      family: architecture of the model.
      config: the model.
      dtype: dtype of its embedding: float32, float16 or bfloat16.

    Raises:
      ValueError: no model, one that the decoder does not compute, or damaged files; names the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.values = read_json(self.path / CONFIG)
        try:
            if not isinstance(self.values, dict):
                raise ValueError(_no_model(self.path))
            self.family, self.config = from_hf_config(self.values)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path / CONFIG}: {error}") from None
        self._shapes = leaf_shapes(abstract_params(self.config))
        self._tensors = tensors_of(self.family, self._shapes, self.config.vocab_rows)
        self._stored = self._match(_list_tensors(self.path))
        self.dtype = DTYPES[self._stored[self.family.names["embedding"]].dtype]

    def read_params(self, like: Any) -> Any:
        """Reads the parameters onto devices.

        Args:
          like: a tree of `jax.ShapeDtypeStruct` with shardings, the parameters of `config`. Each process reads the
            shards of its own devices.

        Returns:
          A tree of arrays with these dtypes and shardings.
        """
        opened = functools.cache(_open)
        places: dict[str, list[tuple[str, Tensor]]] = {leaf: [] for leaf in self._shapes}
        for name, tensor in self._tensors.items():
            for leaf in tensor.leaves:
                places[leaf].append((name, tensor))

        def read(path: Any, spec: jax.ShapeDtypeStruct) -> jax.Array:
            leaf, array = "/".join(path_names(path)), None
            for name, tensor in places[leaf]:
                stored = self._stored[name]
                source = stored.open(opened(stored.file))
                before = tensor.leaves[: tensor.leaves.index(leaf)]  # that the tensor holds too
                piece = _read_piece(source, spec, tensor, sum(self._shapes[other][-1] for other in before))
                array = _place(array, spec, piece, tensor)
            assert array is not None
            return array

        return jax.tree_util.tree_map_with_path(read, like)

    def _match(self, found: dict[str, _Stored]) -> dict[str, _Stored]:
        """Returns the stored tensors by the names of the family.

        Raises:
          ValueError: a tensor is missing, unknown, or has another shape or dtype.
        """
        # A model saved without its head has names without the first part: `wte.weight` for `transformer.wte.weight`.
        embedding = self.family.names["embedding"]
        prefix = "" if embedding in found else embedding.split(".")[0] + "."
        names = {name: name.removeprefix(prefix) for name in self._tensors}
        if missing := [name for name in names.values() if name not in found]:
            where = self.path / (INDEX if (self.path / INDEX).exists() else SINGLE)
            raise ValueError(f"{where} has no tensor {missing[0]}, which a {self.family.architecture} needs")
        matched = {name: found.pop(stored) for name, stored in names.items()}
        for name, stored in matched.items():
            if stored.dtype not in DTYPES:
                raise ValueError(
                    f"{stored.file}: {stored.name} has dtype {stored.dtype}, and only {', '.join(DTYPES)} are read: "
                    "give a model that is not quantized"
                )
            if stored.shape != self._tensors[name].shape:
                wanted, got = list(self._tensors[name].shape), list(stored.shape)
                raise ValueError(f"{stored.file}: {stored.name} has shape {got}, and {CONFIG} makes it {wanted}")
        for name, stored in found.items():
            tied = self.config.tie_embeddings and name == self.family.names["head"]
            if not tied and not name.endswith(_BUFFERS):
                raise ValueError(f"{stored.file}: tensor {name} is not part of a {self.family.architecture}")
        return matched


def _no_model(path: Path) -> str:
    """Returns why a path without a config.json that can be read is no folder of transformers, and what is."""
    if not path.exists():
        return "missing; a model of the Hugging Face Hub is downloaded with `hf download MODEL --local-dir HF_FOLDER`"
    if path.is_file():
        return "missing, as HF_FOLDER is a file: give a folder with config.json and safetensors files"
    if (path / "adapter_config.json").exists():
        return "missing, as HF_FOLDER holds an adapter: save the model with it merged in (merge_and_unload of peft)"
    if found := sorted(path.glob(f"snapshots/*/{CONFIG}")):
        return f"missing; give the folder of a snapshot: {found[-1].parent}"
    return "missing, or not a JSON object"


def abstract_params(config: ModelConfig) -> Any:
    """Returns the parameters of a model as a tree of `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(TransformerModel(config).init, jax.random.key(0))


def leaf_shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of parameters by path, such as "layers/attention/query/kernel"."""
    return {"/".join(names): shape for names, shape in named_leaves(params).items()}


def _list_tensors(folder: Path) -> dict[str, _Stored]:
    """Returns the tensors of a folder by name, from the heads of its files.

    Raises:
      ValueError: no safetensors files, a damaged index, or a file that is missing or damaged.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise ValueError(f"{folder} has neither {SINGLE} nor {INDEX}: save the model with safe_serialization=True")
        return _list_file(folder / SINGLE)
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) and "/" not in name for name in names.values()):
        raise ValueError(f"{index} is damaged: it has no weight_map of file names")
    found: dict[str, _Stored] = {}
    for name in dict.fromkeys(names.values()):
        found |= _list_file(folder / name)
    for name, file in names.items():
        if name not in found or found[name].file.name != file:
            raise ValueError(f"{folder / file} has no tensor {name}, which {INDEX} places there")
    return found


def _list_file(file: Path) -> dict[str, _Stored]:
    source = _open(file)
    slices, size = {name: source.get_slice(name) for name in source.keys()}, file.stat().st_size  # noqa: SIM118
    return {name: _Stored(file, name, tuple(part.get_shape()), part.get_dtype(), size) for name, part in slices.items()}


def _open(file: Path) -> Any:
    safetensors = import_extra("safetensors", "hf", "models of transformers need safetensors")
    try:
        return safetensors.safe_open(file, framework="np")
    except FileNotFoundError:
        raise ValueError(f"{file} is missing") from None
    except safetensors.SafetensorError as error:
        if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
            raise ValueError(f"{file} is a pointer of git LFS: run `git lfs pull` in {file.parent}") from None
        raise ValueError(f"{file} is damaged: {error}") from None


def _read_piece(source: Any, spec: jax.ShapeDtypeStruct, tensor: Tensor, start: int) -> jax.Array:
    """Reads a parameter, or one layer of a stacked one, as the file has it, sharded like the parameter.

    Args:
      source: slices of the tensor in the file.
      spec: shape, dtype and sharding of the parameter.
      start: column of the tensor at which the parameter begins.
    """
    leading, step = len(tensor.index), -1 if tensor.transposed else 1
    shape = spec.shape[leading:][::step]
    sharding: Sharding = spec.sharding
    if isinstance(sharding, NamedSharding):
        axes = (*sharding.spec, *[None] * (len(spec.shape) - len(sharding.spec)))
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*axes[leading:][::step]))

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        *rows, columns = [slice(*part.indices(size)[:2]) for part, size in zip(slices, shape, strict=True)]
        return source[(*rows, slice(columns.start + start, columns.stop + start))]  # start is 0 in a transposed tensor

    return jax.make_array_from_callback(shape, sharding, read)


def _place(array: jax.Array | None, spec: jax.ShapeDtypeStruct, piece: jax.Array, tensor: Tensor) -> jax.Array:
    """Returns the parameter with a piece of it in place.

    Args:
      array: the parameter so far, which is donated; None before its first piece.
      spec: shape, dtype and sharding of the parameter.
    """
    if array is None:
        array = jax.jit(lambda: jnp.zeros(spec.shape, spec.dtype), out_shardings=spec.sharding)()
    array = _updater(spec.sharding, tensor.transposed)(array, piece, tensor.index)
    return jax.block_until_ready(array)  # otherwise the pieces of many layers would be alive


@functools.lru_cache
def _updater(sharding: Sharding, transposed: bool) -> Any:
    def update(array: jax.Array, piece: jax.Array, index: tuple[jax.Array, ...]) -> jax.Array:
        return array.at[index].set((piece.T if transposed else piece).astype(array.dtype))

    return jax.jit(update, donate_argnums=0, out_shardings=sharding)
