"""A run: its config, directory, token store and program; and what is derived from these four."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxtrain.checkpoints import restore
from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.save import Saver
from jaxtrain.config import Config, MeshConfig, load, parse_ranges
from jaxtrain.data.loader import Batches, TrainBatches, global_batch
from jaxtrain.data.store import TokenStore
from jaxtrain.data.tokenizer import FILE_NAME as TOKENIZER_FILE
from jaxtrain.monitoring.report import write_report
from jaxtrain.monitoring.tables import format_bytes
from jaxtrain.optim import decay_mask
from jaxtrain.runtime.files import sha256_file
from jaxtrain.runtime.mesh import by_rows, check_batch, make_mesh
from jaxtrain.training import components
from jaxtrain.training.program import Program, make_program


def _unchanged(x: Any) -> Any:
    return x


class Hooks(NamedTuple):
    """Replaceable parts of a run, for tests and for callers with other needs.

    Attributes:
      make_program: builds the program; see `program.make_program`.
      wrap_loss: wraps the training loss `(params, batch) -> LossSums`; None leaves it as it is.
      wrap_batches: wraps the training batches.
      wrap_step: wraps the compiled train step `(state, batch) -> (state, metrics)`.
      make_saver: constructs the writer of checkpoints.
      write_report: writes the report when the run ends, and returns its path.
    """

    make_program: Callable[..., Program] = make_program
    wrap_loss: Callable[[Callable], Callable] | None = None
    wrap_batches: Callable[[Batches], Batches] = _unchanged
    wrap_step: Callable[[Callable], Callable] = _unchanged
    make_saver: Callable[[CheckpointFolder], Saver] = Saver
    write_report: Callable[[Path], Any] = write_report


NO_HOOKS = Hooks()


class Run(NamedTuple):
    """A config in a run directory, with its data and its program."""

    config: Config
    folder: Path
    store: TokenStore
    program: Program
    hooks: Hooks


def assemble(config: Config, folder: Path, store: TokenStore, hooks: Hooks = NO_HOOKS) -> Run:
    """Builds a run; allocates and compiles nothing.

    Raises:
      ValueError: sizes that do not divide over the mesh, or a vocabulary that does not fit.
    """
    program = hooks.make_program(config, make_mesh(config.mesh), store.vocab_size, wrap_loss=hooks.wrap_loss)
    return Run(config, folder, store, program, hooks)


def open_run(folder: str | Path, hooks: Hooks = NO_HOOKS) -> Run:
    """Opens an existing run on the devices of this machine, which need not be those of the training.

    Raises:
      ValueError: no run in the folder.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no run directory (no config.json): give the --run-dir of `jaxtrain train`")
    config = load(folder / "config.json")
    config = dataclasses.replace(config, mesh=_mesh_for(config, len(jax.devices())))
    return assemble(config, folder, components.open_data(config, folder), hooks)


def _mesh_for(config: Config, num_devices: int) -> MeshConfig:
    """Returns the mesh of the run or, if it does not fit the devices, one that the rows of a micro-batch divide."""
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
    """Returns the training batches of a run; step i + 1 reads batch i."""
    config = run.config
    return TrainBatches(
        run.store.train,
        seed=config.seed,
        batch_size=config.train.batch_size,
        seq_len=config.train.seq_len,
        vocab_size=run.program.vocab_size,
        skip=parse_ranges(config.data.skip),
    )


def batch_source(run: Run) -> Callable[[int], dict[str, jax.Array]]:
    """Returns `index -> batch`: training batches, placed on the devices."""
    batches = run.hooks.wrap_batches(train_batches(run))
    return functools.partial(global_batch, batches, sharding=by_rows(run.program.mesh))


def restore_params(run: Run, step: int | None = None) -> tuple[Any, int]:
    """Restores the parameters of a checkpoint; None takes the newest. Returns them with the step.

    Raises:
      ValueError: no such checkpoint, or one that does not fit the run.
    """
    if not (run.folder / "checkpoints").is_dir():
        raise ValueError(f"no checkpoint in {run.folder}: train first, or give another run directory")
    like = run.program.abstract_state.params
    return restore.restore_params(CheckpointFolder(run.folder / "checkpoints"), like, step)


def start_table(run: Run) -> list[tuple[str, str]]:
    """Returns the rows of the table that a run prints when it starts."""
    config, c, split = run.config, run.program.model.config, run.store.train
    state, mesh, settings = run.program.abstract_state, run.program.mesh, config.train
    devices = mesh.devices.flatten()
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    tokens = settings.batch_size * settings.seq_len
    batch = f"{tokens:,} = {settings.batch_size} sequences x {settings.seq_len}"
    if settings.accumulate > 1:
        batch += f", in {settings.accumulate} micro-batches"
    parameters, optimizer = (format_bytes(_bytes_per_device(x)) for x in (state.params, state.opt_state))
    memory = f"parameters {parameters}, gradients {parameters}, optimizer {optimizer}"
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    skipped = [("skipped batches", " ".join(config.data.skip))] if config.data.skip else []
    return [
        ("model", f"{c.num_layers} layers, d_model {c.d_model}, {c.num_heads} heads, {c.vocab_size:,} tokens"),
        ("parameters", f"{num_params:,}, computing in {settings.precision}"),
        ("memory per device", memory),
        ("devices", f"{len(devices)} x {devices[0].device_kind}" + (f": {axes}" if axes else "")),
        ("data", f"{split.num_tokens:,} tokens of {split.num_documents:,} documents in {run.store.path}"),
        *skipped,
        ("tokens per step", batch),
        ("epochs", f"{tokens * settings.steps / split.num_tokens:.2f} in {settings.steps:,} steps"),
        ("learning rate", components.describe_schedule(config)),
    ]


def _bytes_per_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def tokenizer_hash(store: TokenStore) -> str:
    """Returns the SHA-256 (hex) of the tokenizer of a store."""
    return sha256_file(store.path / TOKENIZER_FILE)


def fingerprint(run: Run) -> dict[str, Any]:
    """Returns what a resumed run must share with its checkpoint: config, data, tokenizer and decay mask."""
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(run.program.abstract_state.params))
    return {
        "config": dataclasses.asdict(run.config),
        "data": run.store.fingerprint,
        "tokenizer": tokenizer_hash(run.store),
        "decay_mask": [jax.tree_util.keystr(path, simple=True, separator="/") for path, decays in mask if decays],
    }
