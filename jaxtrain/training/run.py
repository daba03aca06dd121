"""Run: its config, directory, token store and program, and values derived from them."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from jaxtrain.checkpoints import warm_start
from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.restore import restore_params
from jaxtrain.checkpoints.run_config import read_config
from jaxtrain.checkpoints.save import Saver
from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig, to_dict
from jaxtrain.data.chat import TEMPLATE_FILES
from jaxtrain.data.joined import join_stores
from jaxtrain.data.loader import Batches
from jaxtrain.data.store import TokenStore, open_store
from jaxtrain.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from jaxtrain.fields import is_url
from jaxtrain.inference.pretrained import read_tokenizer
from jaxtrain.mixture import parse_stores
from jaxtrain.models.hf.read import PretrainedFolder, is_pretrained
from jaxtrain.models.lora import uses_lora, with_base, without_lora
from jaxtrain.monitoring.report import write_report
from jaxtrain.monitoring.sinks import Sink
from jaxtrain.optim import decay_mask
from jaxtrain.runtime.files import sha256_file, write_bytes
from jaxtrain.runtime.mesh import check_batch, make_mesh
from jaxtrain.runtime.processes import compile_together
from jaxtrain.runtime.remote import local_run, token_store_of
from jaxtrain.runtime.watchdog import Watchdog
from jaxtrain.step import TrainState
from jaxtrain.training.program import Program, make_program
from jaxtrain.trees import leaf_paths


class Hooks(NamedTuple):
    """Replaceable parts of a run, for tests and for callers with other needs."""

    make_program: Callable[..., Program] = make_program
    # wraps the training loss `(params, batch) -> LossSums`; None leaves it as it is
    wrap_loss: Callable[[Callable], Callable] | None = None
    wrap_batches: Callable[[Batches], Batches] = lambda batches: batches
    # wraps the compiled train step `(state, batch) -> (state, metrics)`
    wrap_step: Callable[[Callable], Callable] = lambda step: step
    make_saver: Callable[..., Saver] = Saver
    make_watchdog: Callable[..., Watchdog] = Watchdog
    write_report: Callable[[Path], Any] = write_report  # writes the report when the run ends, and returns its path
    sinks: Sequence[Sink] = ()  # further receivers of steps and events


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
            raise ValueError(f"{self.folder} has no {TOKENIZER_FILE}: copy the tokenizer of its data there")
        if self.store is not None:
            return self.store.tokenizer
        pretrained = is_pretrained(self.folder)
        return read_tokenizer(PretrainedFolder(self.folder)) if pretrained else load_tokenizer(self.folder)


def assemble(
    config: Config, folder: Path, store: TokenStore | None, hooks: Hooks = NO_HOOKS, vocab_size: int | None = None
) -> Run:
    """Builds a run; allocates and compiles nothing. `vocab_size` serves a run without data.

    Raises as `make_program` does.
    """
    size = store.vocab_size if store else vocab_size
    return Run(config, folder, store, make_run_program(config, size, hooks), hooks)


def make_run_program(config: Config, vocab_size: int | None, hooks: Hooks) -> Program:
    """Builds the program of a run on the devices of this machine; raises as `make_program` does."""
    return hooks.make_program(config, make_mesh(config.mesh), vocab_size, wrap_loss=hooks.wrap_loss)


def open_run(
    folder: str | Path, hooks: Hooks = NO_HOOKS, *, store: str | None = None, model: Any = None, data: bool = True
) -> Run:
    """Opens an existing run on the devices of this machine, which may differ from the devices of the training.

    Args:
      folder: the run directory, or its URL.
      store: path of the token store; None takes the path in the config.
      model: the model of the config file, for a run whose config file defines one.
      data: False opens no token store where the run directory has the tokenizer.

    Raises:
      ValueError: no run in the folder, another model, or no token store where the config says.
    """
    folder = local_run(folder)
    config = read_config(folder, model)
    if store is not None:
        moved = dataclasses.replace(config.data, store=store, stores=(), mixture=None)
        config = dataclasses.replace(config, data=moved)
    config = dataclasses.replace(config, mesh=_mesh_for(config, len(jax.devices())))
    has_tokenizer = (folder / TOKENIZER_FILE).is_file()
    vocab_size = load_tokenizer(folder).vocab_size if has_tokenizer else getattr(config.model, "vocab_size", None)
    if not data and vocab_size:
        return assemble(config, folder, None, hooks, vocab_size)
    return assemble(config, folder, open_data(config, folder), hooks)


def open_pretrained(folder: str | Path) -> tuple[Run, Any]:
    """Opens a folder of transformers as a run without data; returns it with the parameters."""
    model = PretrainedFolder(folder)
    rows = len(jax.devices())
    settings = TrainConfig(batch_size=8 * rows, seq_len=min(model.config.max_seq_len, 1024))
    config = Config(data=DataConfig(sources=(str(folder),)), model=model.config, train=settings)
    run = assemble(config, model.path, None, NO_HOOKS, read_tokenizer(model).vocab_size)
    return run, model.read_params(run.program.abstract_state.params)


def open_data(config: Config, folder: Path) -> TokenStore:
    """Opens the token store of a run: `data.store`, `data.stores` joined, or the one in the run directory.

    Raises a ValueError for a store that is missing, damaged, or tokenized differently than the others.
    """
    data, vocab_size = config.data, getattr(config.model, "vocab_size", None)
    options = {"verify": data.verify, "vocab_size": vocab_size, "validation_fraction": data.validation_fraction}
    if data.stores:
        return join_stores({name: open_store(path, **options) for name, path in parse_stores(data.stores).items()})
    if data.store is None:
        return open_store(token_store_of(folder), verify=data.verify)
    path = Path(data.store).expanduser()
    if not (is_url(data.store) or path.exists() or Path(f"{path}.idx").exists()):
        raise ValueError(f"no token store at {path.absolute()}: if it was moved, give its path with --data.store")
    return open_store(data.store, validation=data.validation, **options)


def save_tokenizer(run: Run) -> None:
    """Copies the tokenizer and its chat template into the run directory, so that generating text needs no store."""
    if run.store.tokenizer_file is None:
        return
    for name in (TOKENIZER_FILE, *TEMPLATE_FILES):
        source, copy = run.store.tokenizer_file.with_name(name), run.folder / name
        if source.is_file() and (not copy.is_file() or copy.read_bytes() != source.read_bytes()):
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
    """Compares the environment with the attempt that made `step`; returns the old and new values that differ."""
    begun = [event for event in events if event["event"] in ("start", "resume") and event["step"] < step]
    old = begun[-1] if begun else {}
    return {name: (old[name], now) for name, now in environment(run).items() if old.get(name, now) != now}


def restore_run_params(run: Run, step: int | None = None) -> tuple[Any, int]:
    """Restores the parameters of a checkpoint; None takes the newest. Returns them with the step.

    Raises a ValueError if there is no such checkpoint, or if it does not fit the run.
    """
    if not (run.folder / "checkpoints").is_dir():
        raise ValueError(f"no checkpoint in {run.folder}: train first, or give another run directory")
    checkpoints = CheckpointFolder(run.folder / "checkpoints")
    params, saved, step = restore_params(checkpoints, run.program.abstract_state.params, step)
    check_fingerprint(run, saved, step)
    return params, step


def read_weights(run: Run, state: TrainState, source: str) -> tuple[TrainState, int]:
    """Returns an initial state with the weights of another run's checkpoint, and its step; see `warm_start.read`.

    LoRA matrices keep their initial values.
    """
    like = run.program.abstract_state.params
    if not uses_lora(run.config.model):
        params, step = warm_start.read(source, run.folder, like, tokenizer_hash(run))
    else:
        base, step = warm_start.read(source, run.folder, without_lora(like), tokenizer_hash(run))
        params = with_base(state.params, base)
    return state.replace(params=params), step


def tokenizer_hash(run: Run) -> str | None:
    """Returns the SHA-256 (hex) of the tokenizer of a run; None for token files without one."""
    file = run.store.tokenizer_file if run.store is not None else run.folder / TOKENIZER_FILE
    return sha256_file(file) if file and file.is_file() else None


def fingerprint(run: Run, state: TrainState | None = None) -> dict[str, Any]:
    """Returns the facts that a resumed run must share with its checkpoint: data, tokenizer and decay mask.

    The config and, given a state, its number of skipped steps are stored with it.
    """
    decayed = []  # another optimizer than AdamW has no mask
    if run.config.optim.name == "adamw":
        mask = decay_mask(run.program.abstract_state.params)
        decayed = [path for path, decays in zip(leaf_paths(mask), jax.tree.leaves(mask), strict=True) if decays]
    values = {
        "config": to_dict(run.config),
        "data": None if run.store is None else identity(run.store),
        "tokenizer": tokenizer_hash(run),
        "decay_mask": decayed,
    }
    accepted = None if state is None else optax.tree_utils.tree_get(state.opt_state, "accepted")
    return values if accepted is None else values | {"skipped_steps": int(state.step) - int(accepted)}


def identity(store: TokenStore) -> str | dict[str, str]:
    """Returns the fingerprint of a store, or those of its sources by name."""
    return {name: source.fingerprint for name, source in store.sources.items()} or store.fingerprint


def by_name(identity: str | dict[str, str]) -> dict[str, str]:
    """Returns the fingerprints of sources by name; the source of a single store is named ""."""
    return identity if isinstance(identity, dict) else {"": identity}


def check_fingerprint(run: Run, saved: dict[str, Any], step: int) -> None:
    """Raises a ValueError if a checkpoint was made with other data, another tokenizer or another decay mask."""
    now, problem = fingerprint(run), f"the checkpoint of step {step} was made with"
    what, old, new = "other data", saved.get("data"), now["data"]  # an imported model has none; a run may add sources
    same = old is None or new is None or set(by_name(old).values()) <= set(by_name(new).values())
    if same:
        what, old, new = "another tokenizer", saved.get("tokenizer"), now["tokenizer"]
    if not same or new not in (None, old):
        where = f" than {run.store.path} holds" if run.store is not None else ""
        raise ValueError(
            f"{problem} {what}{where} (fingerprint {str(old)[:12]}, not {str(new)[:12]}): give the path of its token "
            "store with --data.store, or all of a mixture with --data.stores"
        )
    if moved := sorted(set(saved.get("decay_mask") or ()) ^ set(now["decay_mask"])):
        raise ValueError(f"{problem} another decay mask (it differs for {', '.join(moved)}): use the code of that run")
