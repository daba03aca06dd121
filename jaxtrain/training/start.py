"""Start of a run: its data, then its state, which is resumed, warm-started or fresh."""

import contextlib
import math
import platform
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxtrain.checkpoints import warm_start as weights
from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.mirror import Mirror
from jaxtrain.checkpoints.restore import find_fingerprint, restore
from jaxtrain.checkpoints.save import Saver
from jaxtrain.config import Config, ModelConfig, to_dict
from jaxtrain.data.packing import PackedWindows
from jaxtrain.data.prepare.prepare import prepare
from jaxtrain.data.store import TokenStore
from jaxtrain.data.tokenizer import ByteTokenizer, parse_spec, read_hf
from jaxtrain.mixture import describe_mixture
from jaxtrain.models.lora import uses_lora, without_lora
from jaxtrain.monitoring.recorder import Recorder
from jaxtrain.monitoring.tables import format_bytes
from jaxtrain.runtime import processes
from jaxtrain.runtime.files import git_commit
from jaxtrain.runtime.mesh import replicated
from jaxtrain.runtime.stop import Stop
from jaxtrain.runtime.watchdog import Watchdog
from jaxtrain.step import TrainState
from jaxtrain.training import components
from jaxtrain.training import run as runs
from jaxtrain.training.batches import check_mixture, train_batches
from jaxtrain.training.run import Hooks, Run
from jaxtrain.training.run_folder import Changes, check_or_write_config, check_skip, has_begun, recover_config, run_lock
from jaxtrain.version import __version__


class Session(NamedTuple):
    """An opened run, with the collaborators of its loop."""

    run: Run
    recorder: Recorder
    stop: Stop
    checkpoints: CheckpointFolder
    saver: Saver
    watchdog: Watchdog
    changes: Changes  # fields whose value differs from that of the earlier steps
    mirror: Mirror | None = None  # uploads the run directory, if that is a URL


class Event(NamedTuple):
    """An event of metrics.jsonl, with the text that the console shows."""

    name: str
    text: str
    fields: dict[str, Any]


def prepare_data(
    config: Config,
    folder: Path,
    stack: contextlib.ExitStack,
    hooks: Hooks,
    *,
    rewind: int | None,
    allow_change: bool,
    lock: bool,
) -> tuple[TokenStore, Changes]:
    """Opens the token store of a run. Before that, the lead process locks and prepares the run directory.

    `stack` releases the lock when it closes. Returns the store and, on the lead process, the fields that differ from
    those of the earlier steps.

    Raises:
      ValueError: a config that does not fit the run, text that cannot be read, or processes that disagree.
    """
    processes.agree(
        "the run",
        to_dict(config) | {"jax": jax.__version__, "jaxtrain": __version__, "allow_change": allow_change},
        remedy="start them with the same command and the same versions",
    )

    def begin() -> Changes:
        if config.train.init_from and not has_begun(folder):
            weights.find(config.train.init_from, folder)
        if uses_lora(config.model) and not config.train.init_from:
            raise ValueError("model.lora_rank trains additions to given weights: give them with train.init_from RUN")
        if rewind is not None:
            CheckpointFolder(folder / "checkpoints").require(rewind)
        recover_config(folder)
        stack.enter_context(run_lock(folder, lock=lock))
        step = rewind or CheckpointFolder(folder / "checkpoints").latest_step() or 0
        changes = check_or_write_config(folder, config, step, allow_change=allow_change)
        prepares = config.data.store is None and not config.data.stores
        if prepares and not (folder / "metrics.jsonl").exists():  # later the text may be gone
            names = ("tokenizer", "eot", "validation", "validation_fraction", "text_field")
            options = {name: getattr(config.data, name) for name in names}
            prepare(config.data.sources, folder / "data", lock=lock, **options)
        return changes

    check_before_data(config, folder, hooks)
    changes = processes.run_on_lead("prepare the data", begin) or {}
    processes.agree(
        "the run directory",
        {"config.json": "exists" if (folder / "config.json").exists() else "is missing"},
        remedy="--run-dir must be on a file system that they share",
    )
    store = runs.open_data(config, folder)
    processes.agree(
        "the data", {"fingerprint": store.fingerprint}, remedy="give each the same store, or one that they share"
    )
    return store, changes


def check_before_data(config: Config, folder: Path, hooks: Hooks) -> None:
    """Raises a ValueError for a program or weights that do not fit, before the sources are tokenized."""
    data, is_ready = config.data, lambda: (folder / "data").exists()
    if data.store or data.stores or processes.broadcast_from_lead("find the data", is_ready):
        return
    kind, argument = parse_spec(data.tokenizer)
    tokenizer = None if kind == "bpe" else read_hf(argument, data.eot) if kind == "hf" else ByteTokenizer()
    vocab_size = tokenizer.vocab_size if tokenizer else int(argument)
    like = runs.make_run_program(config, vocab_size, hooks).abstract_state.params
    if source := config.train.init_from:
        weights.check(source, folder, without_lora(like) if uses_lora(config.model) else like)


def check_resume(run: Run, rewind: int | None) -> None:
    """Raises a ValueError if data, tokenizer, decay mask or data.skip do not fit the checkpoint to resume from."""

    def check() -> None:
        if found := find_fingerprint(CheckpointFolder(run.folder / "checkpoints"), rewind):
            _check_saved(run, *found)

    processes.run_on_lead("check the checkpoint", check)


def _check_saved(run: Run, saved: dict[str, Any], step: int) -> None:
    runs.check_fingerprint(run, saved, step)
    old = saved.get("config", {}).get("data")
    if not isinstance(old, dict):
        raise ValueError(f"the checkpoint of step {step} does not record the config of its data: use an earlier one")
    check_skip(old.get("skip", ()), run.config.data.skip, step)
    check_mixture(run, saved, step)


def start(session: Session, rewind: int | None) -> TrainState:
    """Makes the state of the first step of this attempt, and records how.

    1. A run with checkpoints resumes from the newest valid one, as if it had never stopped.
    2. Otherwise `train.init_from` gives the weights.
    3. Otherwise they come from the seed.
    """
    checkpoints, recorder = session.checkpoints, session.recorder
    processes.agree(
        "the checkpoint to resume from",
        {"newest step": checkpoints.latest_step(), "rewind": rewind},
        remedy="--run-dir must be on a file system that they share, and the command the same",
    )
    processes.run_on_lead("clean the checkpoints", checkpoints.clean)
    state, event = resume(session, rewind) or warm_start(session) or fresh(session)
    if rewind is not None:
        later = processes.broadcast_from_lead("rewind", lambda: checkpoints.rewind(rewind))
        text = f"rewinding to step {rewind}: renamed the checkpoints of steps {later} to STEP.rewound"
        recorder.event("rewind", text, step=rewind, renamed=later)
    step = int(state.step)
    environment = runs.environment_changes(session.run, recorder.begun, step)
    recorder.event(event.name, event.text, step=step, **event.fields, **_about(session))
    rounding = ["equal numbers up to rounding only"]
    _record_changes(recorder, step, "environment_change", "another environment", environment, rounding)
    resized = {"train.batch_size", "train.seq_len"} & session.changes.keys()
    order = ["step i reads the batch that it would have read with the new size from the start"] if resized else []
    _record_changes(recorder, step, "config_change", "changed", session.changes, order)
    if event.name == "resume" and recorder.last_line < step:
        text = f"metrics.jsonl ends at step {recorder.last_line}: the lines up to step {step} are lost"
        recorder.event("log_lost", text, step=step, last_line=recorder.last_line)
    return state


def resume(session: Session, rewind: int | None) -> tuple[TrainState, Event] | None:
    """Restores the newest valid checkpoint, or that of step `rewind`; returns None if there is no checkpoint.

    Raises a ValueError if the checkpoint was made with other data, another tokenizer or another decay mask.
    """
    run, checkpoints = session.run, session.checkpoints
    if processes.broadcast_from_lead("find the checkpoints", checkpoints.latest_step) is None:
        return None
    with session.recorder.pause("restoring"):
        state, saved = session.stop.run(lambda: restore(checkpoints, run.program.abstract_state, rewind, repair=True))
    step = int(state.step)
    _check_saved(run, saved, step)  # it may be older than the one that `check_resume` has read
    return state, Event("resume", f"resumed from step {step}", {})


def warm_start(session: Session) -> tuple[TrainState, Event] | None:
    """Initializes a state with the weights of the run in `train.init_from`; returns None without that option."""
    run, source = session.run, session.run.config.train.init_from
    if not source:
        return None
    state = _initial_state(session)
    with session.recorder.pause("reading the weights"):
        state, step = session.stop.run(lambda: runs.read_weights(run, state, source))
    text = f"starting from the weights of {source}, step {step}, with fresh moments"
    return state, Event("start", text, {"source": source, "source_step": step})


def fresh(session: Session) -> tuple[TrainState, Event]:
    """Initializes a state from the seed."""
    return _initial_state(session), Event("start", "", {})


def _initial_state(session: Session) -> TrainState:
    with session.recorder.pause("initializing"):  # its program is compiled, too
        return session.stop.run(lambda: runs.init_state(session.run))


def _about(session: Session) -> dict[str, Any]:
    """Returns facts of this attempt for its first event."""
    run, stores = session.run, session.run.store.sources
    skip = {"skip": list(run.config.data.skip)} if run.config.data.skip else {}
    return skip | {
        "attempt": session.recorder.attempt,
        **runs.environment(run),
        "jaxtrain": __version__,
        "python": platform.python_version(),
        "commit": git_commit(Path.cwd()),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.program.abstract_state.params)),
        "data": _paths(run),
        "tokenizer": next(iter(stores.values()), run.store).manifest.get("tokenizer", {}).get("spec"),
        "vocab_size": run.program.vocab_size,
        "train_tokens": run.store.train.num_tokens,
    }


def _record_changes(
    recorder: Recorder, step: int, name: str, what: str, changes: Changes, consequences: list[str]
) -> None:
    if changes:
        lines = [f"{key}: {before!r} -> {after!r}" for key, (before, after) in changes.items()]
        text = f"{what} from step {step + 1} on: " + "; ".join([*lines, *consequences])
        pairs = {key: {"old": before, "new": after} for key, (before, after) in changes.items()}
        recorder.event(name, text, step=step, changes=pairs)


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
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    batches = train_batches(run)
    documents = "" if split.num_documents is None else f" of {split.num_documents:,} documents"
    packed = [f"{source.padding:.1%}" for source in batches.sources if isinstance(source, PackedWindows)]
    epochs = f"{tokens * settings.steps / split.num_tokens:.2f}"
    if batches.mixture is not None:
        seen, sizes = batches.tokens_seen(settings.steps), run.store.sources
        epochs = ", ".join(f"{name} {seen[name] / sizes[name].train.num_tokens:.2f}" for name in seen)
    rate = ""
    if run.program.scalars:  # the program of the steps, so nothing more is compiled
        last = run.program.scalars(jax.device_put(np.int32(settings.steps - 1), replicated(mesh))).learning_rate
        rate = components.describe_schedule(config, float(last))
    rows = {
        "model": name,
        "parameters": f"{num_params:,}, computing in {settings.precision}",
        "memory per device": f"parameters {parameters}, gradients {parameters}, optimizer {optimizer}",
        "devices": f"{len(devices)} x {devices[0].device_kind}" + (f": {axes}" if axes else ""),
        "data": f"{split.num_tokens:,} tokens{documents} in {_paths(run)}",
        "mixture": batches.mixture and describe_mixture(batches.mixture),
        "packing": packed and f"best fit, padding {' '.join(packed)}",
        "skipped batches": " ".join(config.data.skip),
        "tokens per step": batch,
        "epochs": f"{epochs} in {settings.steps:,} steps",
        "learning rate": rate,
    }
    return [(name, text) for name, text in rows.items() if text]


def _paths(run: Run) -> str:
    return " ".join(f"{name}={store.path}" for name, store in run.store.sources.items()) or str(run.store.path)


def _bytes_per_device(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
