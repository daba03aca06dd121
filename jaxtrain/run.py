"""A run directory and all the pieces that its config makes: data, mesh, model, state shapes, compiled-to-be steps."""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxtrain import build
from jaxtrain.checkpoint import Checkpoints
from jaxtrain.config import Config, MeshConfig, differences, from_json, load, to_json
from jaxtrain.data.store import TokenStore
from jaxtrain.models.transformer import Transformer
from jaxtrain.optim import decay_mask
from jaxtrain.program import make_program
from jaxtrain.sharding import check_batch, make_mesh
from jaxtrain.step import TrainState

# Fields that change neither the parameters nor the order of the data, so that a run may go on with other values.
_FREE = ("data.prefetch", "data.verify", "mesh.", "train.log_every", "train.eval_", "train.stop_after")
_FREE += ("train.diagnose_every", "train.sample_", "checkpoint.")


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


def claim(folder: Path, config: Config) -> None:
    """Makes the run's folder, or checks that the run in it is this one.

    Raises:
      ValueError: a folder of something else, or of a run that has begun with another config.
    """
    file = folder / "config.json"
    if (folder / "metrics.jsonl").exists() and file.exists():
        changed = [line for line in differences(from_json(file.read_text()), config) if not line.startswith(_FREE)]
        if changed:
            raise ValueError(
                f"{folder} holds a run with another config: repeat that one's, or give another --run-dir\n  "
                + "\n  ".join(changed)
            )
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in folder.iterdir()}
    if not file.exists() and (foreign := sorted(names - {"data", ".data.partial", "config.json.tmp"})):
        raise ValueError(f"{folder} is no run directory, it holds {', '.join(foreign[:3])}: give another --run-dir")
    temporary = folder / "config.json.tmp"  # a power cut may not leave half a config
    temporary.write_text(to_json(config))
    os.replace(temporary, file)


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
    return assemble(config, folder, build.open_data(config, folder))


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


def restore_params(run: Run, step: int | None = None) -> tuple[Any, int]:
    """The parameters of a run's checkpoint and its step; None: the newest.

    Raises:
      ValueError: no such checkpoint, or one that does not fit the run.
    """
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
    return [
        ("model", f"{c.num_layers} layers, d_model {c.d_model}, {c.num_heads} heads, {c.vocab_size:,} tokens"),
        ("parameters", f"{num_params:,}, computing in {settings.precision}"),
        ("memory per device", memory),
        ("devices", f"{len(devices)} x {devices[0].device_kind}" + (f": {mesh}" if mesh else "")),
        ("data", f"{split.num_tokens:,} tokens of {split.num_documents:,} documents in {run.store.path}"),
        ("tokens per step", batch),
        ("epochs", f"{tokens * settings.steps / split.num_tokens:.2f} in {settings.steps:,} steps"),
        ("learning rate", build.describe_schedule(config)),
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


def record(run: Run) -> dict[str, Any]:
    """What a checkpoint must agree with, beside the shapes of its arrays."""
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(run.abstract_state.params))
    return {
        "config": dataclasses.asdict(run.config),
        "data": run.store.fingerprint,
        "decay_mask": [jax.tree_util.keystr(path, simple=True, separator="/") for path, decays in mask if decays],
    }
