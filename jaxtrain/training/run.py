"""Run: its config, directory, token store and program, and values derived from them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from jaxtrain.checkpoints import restore
from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.run_config import read_config
from jaxtrain.checkpoints.save import Saver
from jaxtrain.config import Config, MeshConfig, ModelConfig, parse_ranges, to_dict
from jaxtrain.data.loader import Batches, TrainBatches, global_batch
from jaxtrain.data.store import Split, TokenStore, open_store
from jaxtrain.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from jaxtrain.fields import is_url
from jaxtrain.monitoring.report import write_report
from jaxtrain.monitoring.sinks import Sink
from jaxtrain.monitoring.tables import format_bytes
from jaxtrain.optim import decay_mask
from jaxtrain.runtime.files import sha256_file, write_bytes
from jaxtrain.runtime.mesh import by_rows, check_batch, make_mesh
from jaxtrain.runtime.processes import compile_together
from jaxtrain.runtime.watchdog import Watchdog
from jaxtrain.step import TrainState
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
      make_watchdog: constructs the watchdog of the loop.
      write_report: writes the report when the run ends, and returns its path.
      sinks: further receivers of steps and events.
    """

    make_program: Callable[..., Program] = make_program
    wrap_loss: Callable[[Callable], Callable] | None = None
    wrap_batches: Callable[[Batches], Batches] = _unchanged
    wrap_step: Callable[[Callable], Callable] = _unchanged
    make_saver: Callable[..., Saver] = Saver
    make_watchdog: Callable[..., Watchdog] = Watchdog
    write_report: Callable[[Path], Any] = write_report
    sinks: Sequence[Sink] = ()


NO_HOOKS = Hooks()


class Run(NamedTuple):
    """A config in a run directory, with its data and its program."""

    config: Config
    folder: Path
    store: TokenStore | None  # None: opened without its data
    program: Program
    hooks: Hooks

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data; the run directory has a copy. A ValueError if token files came without one."""
        if self.store is None and not (self.folder / TOKENIZER_FILE).is_file():
            raise ValueError(f"{self.folder} has no {TOKENIZER_FILE}: copy that of its tokens there")
        return self.store.tokenizer if self.store is not None else load_tokenizer(self.folder)


def assemble(config: Config, folder: Path, store: TokenStore, hooks: Hooks = NO_HOOKS) -> Run:
    """Builds a run; allocates and compiles nothing.

    Raises:
      ValueError: sizes that do not divide over the mesh, or a vocabulary that does not fit.
    """
    return Run(config, folder, store, _make_program(config, store.vocab_size, hooks), hooks)


def _make_program(config: Config, vocab_size: int, hooks: Hooks) -> Program:
    return hooks.make_program(config, make_mesh(config.mesh), vocab_size, wrap_loss=hooks.wrap_loss)


def open_run(
    folder: str | Path, hooks: Hooks = NO_HOOKS, *, store: str | None = None, model: Any = None, data: bool = True
) -> Run:
    """Opens an existing run on the devices of this machine, which need not be those of the training.

    Args:
      folder: the run directory.
      hooks: replaces parts of the run.
      store: path of the token store; None takes that of the config.
      model: the model of the config file, for a run whose config file defines its own.
      data: False opens no token store where the run directory has the tokenizer.

    Raises:
      ValueError: no run in the folder, another model, or no token store where the config says.
    """
    folder = Path(folder)
    config = read_config(folder, model)
    if store is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, store=store))
    config = dataclasses.replace(config, mesh=_mesh_for(config, len(jax.devices())))
    has_tokenizer = (folder / TOKENIZER_FILE).is_file()
    vocab_size = load_tokenizer(folder).vocab_size if has_tokenizer else getattr(config.model, "vocab_size", None)
    if not data and vocab_size:
        return Run(config, folder, None, _make_program(config, vocab_size, hooks), hooks)
    return assemble(config, folder, open_data(config, folder), hooks)


def open_data(config: Config, folder: Path) -> TokenStore:
    """Opens the token store of a run: `data.store`, or the one in the run directory."""
    data = config.data
    if data.store is None:
        return open_store(folder / "data", verify=data.verify)
    path = Path(data.store).expanduser()
    if not (is_url(data.store) or path.exists() or Path(f"{path}.idx").exists()):
        raise ValueError(f"no token store at {path.absolute()}: if it was moved, give its path with --data.store")
    return open_store(
        data.store,
        verify=data.verify,
        vocab_size=getattr(config.model, "vocab_size", None),
        validation=data.validation,
        validation_fraction=data.validation_fraction,
    )


def save_tokenizer(run: Run) -> None:
    """Copies the tokenizer, if there is one, into the run directory, so that generating text needs no token store."""
    source, copy = run.store.tokenizer_file, run.folder / TOKENIZER_FILE
    if source and (not copy.is_file() or copy.read_bytes() != source.read_bytes()):
        write_bytes(copy, source.read_bytes())


def _mesh_for(config: Config, num_devices: int) -> MeshConfig:
    """Returns the mesh of the run or, if it does not fit the devices, one that the rows of a micro-batch divide."""
    try:
        mesh = make_mesh(config.mesh)
        check_batch(config.train.batch_size, config.train.accumulate, mesh)
        return config.mesh
    except ValueError:
        num_rows = math.gcd(config.train.batch_size // config.train.accumulate, num_devices)
        divisible = isinstance(config.model, ModelConfig) and config.model.d_model % num_rows == 0
        return MeshConfig(data=1, fsdp=num_rows) if config.mesh.fsdp != 1 and divisible else MeshConfig(data=num_rows)


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


def init_state(run: Run) -> TrainState:
    """Initializes the state of a run, on every process."""
    compile_together(run.program.init_state)
    return run.program.init_state()


def environment(run: Run) -> dict[str, Any]:
    """Returns the software and the devices, on which the last bits of a run's numbers depend."""
    return {
        "jax": jax.__version__,
        "processes": jax.process_count(),
        "devices": run.program.mesh.size,
        "device": run.program.mesh.devices.flat[0].device_kind,
    }


def environment_changes(run: Run, events: Sequence[dict[str, Any]], step: int) -> dict[str, tuple[Any, Any]]:
    """Compares the environment with that of the attempt which made `step`; returns old and new values that differ."""
    begun = [event for event in events if event["event"] in ("start", "resume") and event["step"] < step]
    old = begun[-1] if begun else {}
    return {name: (old[name], now) for name, now in environment(run).items() if old.get(name, now) != now}


def restore_params(run: Run, step: int | None = None) -> tuple[Any, int]:
    """Restores the parameters of a checkpoint; None takes the newest. Returns them with the step.

    Raises:
      ValueError: no such checkpoint, or one that does not fit the run.
    """
    if not (run.folder / "checkpoints").is_dir():
        raise ValueError(f"no checkpoint in {run.folder}: train first, or give another run directory")
    checkpoints = CheckpointFolder(run.folder / "checkpoints")
    params, saved, step = restore.restore_params(checkpoints, run.program.abstract_state.params, step)
    check_fingerprint(run, saved, step)
    return params, step


def start_table(run: Run) -> list[tuple[str, str]]:
    """Returns the rows of the table that a run prints when it starts."""
    config, model, split = run.config, run.program.model, run.store.train
    state, mesh, settings = run.program.abstract_state, run.program.mesh, config.train
    devices = mesh.devices.flatten()
    name = type(model).__name__
    if isinstance(config.model, ModelConfig):
        c = model.config
        name = f"{c.num_layers} layers, d_model {c.d_model}, {c.num_heads} heads, {c.vocab_size:,} tokens"
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
        ("model", name),
        ("parameters", f"{num_params:,}, computing in {settings.precision}"),
        ("memory per device", memory),
        ("devices", f"{len(devices)} x {devices[0].device_kind}" + (f": {axes}" if axes else "")),
        ("data", f"{split.num_tokens:,} tokens{_documents(split)} in {run.store.path}"),
        *skipped,
        ("tokens per step", batch),
        ("epochs", f"{tokens * settings.steps / split.num_tokens:.2f} in {settings.steps:,} steps"),
        ("learning rate", components.describe_schedule(config)),
    ]


def _documents(split: Split) -> str:
    return "" if split.num_documents is None else f" of {split.num_documents:,} documents"


def _bytes_per_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def tokenizer_hash(run: Run) -> str | None:
    """Returns the SHA-256 (hex) of the tokenizer of a run; None for token files without one."""
    file = run.store.tokenizer_file if run.store is not None else run.folder / TOKENIZER_FILE
    return sha256_file(file) if file and file.is_file() else None


def fingerprint(run: Run, state: TrainState | None = None) -> dict[str, Any]:
    """Returns the facts that a resumed run must share with its checkpoint: data, tokenizer and decay mask.

    The config and, given a state, its number of skipped steps are stored with it.
    """
    values = {
        "config": to_dict(run.config),
        "data": run.store.fingerprint if run.store is not None else None,
        "tokenizer": tokenizer_hash(run),
        "decay_mask": _decayed(run),
    }
    accepted = None if state is None else optax.tree_utils.tree_get(state.opt_state, "accepted")
    return values if accepted is None else values | {"skipped_steps": int(state.step) - int(accepted)}


def _decayed(run: Run) -> list[str]:
    """Returns the paths of the parameters that decay; another optimizer than AdamW has no mask."""
    if run.config.optim.name != "adamw":
        return []
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(run.program.abstract_state.params))
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, decays in mask if decays]


def check_fingerprint(run: Run, saved: dict[str, Any], step: int) -> None:
    """Raises a ValueError if a checkpoint was made with other data, another tokenizer or another decay mask."""
    now = fingerprint(run)
    for key in ("data", "tokenizer", "decay_mask"):
        if now[key] is not None and saved.get(key) != now[key]:
            if key == "decay_mask":
                moved = sorted(set(saved.get(key) or ()) ^ set(now[key]))
                what, remedy = f"another decay mask (it differs for {', '.join(moved)})", "use the code of that run"
            else:
                was, now_is = (str(value)[:12] for value in (saved.get(key), now[key]))
                where = f" than {run.store.path} holds" if run.store is not None else ""
                what = (
                    f"{'other data' if key == 'data' else 'another tokenizer'}{where} (fingerprint {was}, not {now_is})"
                )
                remedy = "give the path of its token store with --data.store"
            raise ValueError(f"the checkpoint of step {step} was made with {what}: {remedy}")
