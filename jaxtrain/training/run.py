"""All the pieces that a config makes: data, mesh, model, state shapes, compiled-to-be steps; and a run's batches."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxtrain.checkpoints.checkpoints import Checkpoints
from jaxtrain.config import Config, FaultConfig, MeshConfig, load, parse_ranges
from jaxtrain.data.loader import TrainBatches, global_batch
from jaxtrain.data.store import TokenStore
from jaxtrain.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from jaxtrain.models.transformer import Transformer
from jaxtrain.optim import decay_mask
from jaxtrain.runtime.files import sha256_file
from jaxtrain.runtime.mesh import by_rows, check_batch, make_mesh
from jaxtrain.step import TrainState
from jaxtrain.training import components
from jaxtrain.training.faults import FaultyBatches
from jaxtrain.training.program import make_program


class Run(NamedTuple):
    """What a run is made of.

    `abstract_state` has the shapes, dtypes and shardings of the state that `init_state()` makes, born where it belongs.
    `train_step` and `eval_step` are jitted; the first takes its state's memory.
    """

    config: Config
    folder: Path
    store: TokenStore
    mesh: Mesh
    model: Transformer
    abstract_state: TrainState
    init_state: Callable[[], TrainState]
    train_step: Callable
    eval_step: Callable


def assemble(config: Config, folder: Path, store: TokenStore) -> Run:
    """Puts a run together; makes no arrays and compiles nothing.

    Raises:
      ValueError: sizes that do not divide over the mesh, a vocabulary that does not fit.
    """
    program = make_program(config, make_mesh(config.mesh), store.vocab_size)
    return Run(
        config=config,
        folder=folder,
        store=store,
        mesh=program.mesh,
        model=program.model,
        abstract_state=program.abstract_state,
        init_state=program.init_state,
        train_step=program.train_step,
        eval_step=program.eval_step,
    )


def open_run(folder: str | Path) -> Run:
    """The run in a folder, as it was trained, on the devices there are now.

    Raises:
      ValueError: no run there.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no run directory (no config.json): give the --run-dir of `jaxtrain train`")
    config = load(folder / "config.json")
    config = dataclasses.replace(config, mesh=_mesh_for(config, len(jax.devices())))
    return assemble(config, folder, components.open_data(config, folder))


def _mesh_for(config: Config, num_devices: int) -> MeshConfig:
    """A mesh to evaluate and generate on: the run's, or if there are other devices now, as many as its rows fill."""
    try:
        mesh = make_mesh(config.mesh)
        check_batch(config.train.batch_size, config.train.accumulate, mesh)
        return config.mesh
    except ValueError:
        num_rows = math.gcd(config.train.batch_size // config.train.accumulate, num_devices)
        if config.mesh.fsdp == 1 or config.model.d_model % num_rows:
            return MeshConfig(data=num_rows)
        return MeshConfig(data=1, fsdp=num_rows)


def train_batches(run: Run) -> TrainBatches:
    """The batches that a run trains on: batch i is what step i + 1 reads."""
    config = run.config
    return TrainBatches(
        run.store.train,
        seed=config.seed,
        batch_size=config.train.batch_size,
        seq_len=config.train.seq_len,
        vocab_size=run.model.config.vocab_size,
        skip=parse_ranges(config.data.skip),
    )


def batch_source(run: Run) -> Callable[[int], dict[str, jax.Array]]:
    """What a train step is given: `index -> batch`, on the devices, with the faults that the config asks for."""
    batches = train_batches(run)
    if run.config.faults.in_batch:
        batches = FaultyBatches(batches, run.config.faults)
    return functools.partial(global_batch, batches, sharding=by_rows(run.mesh))


def restore_params(run: Run, step: int | None = None) -> tuple[Any, int]:
    """The parameters of a run's checkpoint and its step; None: the newest.

    Raises:
      ValueError: no such checkpoint, or one that does not fit the run.
    """
    if not (run.folder / "checkpoints").is_dir():
        raise ValueError(f"no checkpoint in {run.folder}: train first, or give another run directory")
    with Checkpoints(run.folder / "checkpoints") as checkpoints:
        return checkpoints.restore_params(run.abstract_state.params, step)


def describe(run: Run) -> list[tuple[str, str]]:
    """What a run prints at its start, as rows of a table."""
    config, c, split = run.config, run.model.config, run.store.train
    devices, settings = run.mesh.devices.flatten(), config.train
    num_params = sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state.params))
    tokens = settings.batch_size * settings.seq_len
    batch = f"{tokens:,} = {settings.batch_size} sequences x {settings.seq_len}"
    if settings.accumulate > 1:
        batch += f", in {settings.accumulate} micro-batches"
    parameters, optimizer = (_bytes_per_device(x) for x in (run.abstract_state.params, run.abstract_state.opt_state))
    memory = f"parameters {_size(parameters)}, gradients {_size(parameters)}, optimizer {_size(optimizer)}"
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items() if size > 1)
    faults = dataclasses.asdict(config.faults).items() - dataclasses.asdict(FaultConfig()).items()
    deliberate = [("deliberate faults", ", ".join(f"{k} {v:g}" for k, v in sorted(faults)))] if faults else []
    skipped = [("skipped batches", " ".join(config.data.skip))] if config.data.skip else []
    return [
        ("model", f"{c.num_layers} layers, d_model {c.d_model}, {c.num_heads} heads, {c.vocab_size:,} tokens"),
        ("parameters", f"{num_params:,}, computing in {settings.precision}"),
        ("memory per device", memory),
        ("devices", f"{len(devices)} x {devices[0].device_kind}" + (f": {mesh}" if mesh else "")),
        ("data", f"{split.num_tokens:,} tokens of {split.num_documents:,} documents in {run.store.path}"),
        *skipped,
        *deliberate,
        ("tokens per step", batch),
        ("epochs", f"{tokens * settings.steps / split.num_tokens:.2f} in {settings.steps:,} steps"),
        ("learning rate", components.describe_schedule(config)),
    ]


def _bytes_per_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.4g} TB"


def tokenizer_hash(store: TokenStore) -> str:
    """SHA-256 (hex) of a store's tokenizer."""
    return sha256_file(store.path / TOKENIZER_FILE)


def record(run: Run) -> dict[str, Any]:
    """What a checkpoint must agree with, beside the shapes of its arrays."""
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(run.abstract_state.params))
    return {
        "config": dataclasses.asdict(run.config),
        "data": run.store.fingerprint,
        "tokenizer": tokenizer_hash(run.store),
        "decay_mask": [jax.tree_util.keystr(path, simple=True, separator="/") for path, decays in mask if decays],
    }
