"""Run directory: its lock, its config.json, and which of its settings a resumed run may change."""

import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtrain.checkpoints.folder import require_writable_path
from jaxtrain.checkpoints.run_config import lost_config
from jaxtrain.config import Config
from jaxtrain.data.order import skip_to
from jaxtrain.fields import is_url, parse_ranges
from jaxtrain.mixture import parse_stores
from jaxtrain.monitoring.metrics import read_metrics
from jaxtrain.runtime.config_files import flat_fields, load_config, to_json
from jaxtrain.runtime.files import flock, sync_folder, write_bytes, write_json, write_text
from jaxtrain.runtime.remote import ORIGIN
from jaxtrain.runtime.stop import Stopped
from jaxtrain.runtime.terminal import echo
from jaxtrain.training import components

Changes = dict[str, tuple[Any, Any]]  # field -> old and new value

# Fields that change neither the parameters nor the order of the data. The data is compared by its fingerprint when a
# checkpoint is restored, so its path is free; `check_skip` guards data.skip.
_FREE = ("data.prefetch", "data.skip", "data.verify", "data.max_epochs", "mesh.", "train.log_every", "train.eval_")
_FREE += ("train.stop_after", "train.stall_minutes", "train.sample_", "train.replay_check", "train.diagnose_every")
_FREE += ("checkpoint.", "train.tune_compiler")
# Fields that select the data: free where data.store or data.stores is given.
_DATA = ("data.store", "data.sources", "data.tokenizer", "data.eot", "data.validation")  # and its fraction
_DATA += ("data.text_field",)
_PATHS = ("data.store", "data.sources", "data.validation", "train.init_from")
# Fields that keep the shapes of the state: a run resumes with other values under --allow-change.
_CHANGEABLE = ("data.mixture", "data.mask_documents", "data.restart_positions", "data.packing", "train.", "optim.")
_CHANGEABLE += ("guard.", "loss_scale.", "model.attention", "model.remat", "model.scan_unroll")
_FIXED = ("train.init_from", "optim.frozen", "optim.mu_dtype", "guard.window")
# Values that give the state other arrays: a field changes neither to them nor from them.
_RESHAPING = {"optim.clipping": "zclip", "train.precision": "float16"}
_LENGTH = {"train.steps", "optim.decay_steps"}

_LOCK = "lock"


@contextlib.contextmanager
def run_lock(folder: Path, *, lock: bool = True) -> Iterator[None]:
    """Creates a run directory if it is missing, and keeps other processes from training in it.

    The lock ends with the block or with the process; `lock` False takes none. Directories created here are removed if
    they are still empty. Raises a ValueError, and touches nothing, if another process trains there, if the directory
    holds something else, or if its file system has no locks.
    """
    _refuse_foreign(folder)
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in absent:
        sync_folder(path.parent)
    try:
        with _lock_file(folder) if lock else contextlib.nullcontext():
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty: it holds a run
            for path in absent:
                path.rmdir()


@contextlib.contextmanager
def _lock_file(folder: Path) -> Iterator[None]:
    """Holds the lock file of a run directory, which names its owner."""
    file = folder / _LOCK
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            mine = flock(descriptor, folder)
        except BaseException:  # no locks here: the file is nobody's
            file.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        if not mine:
            owner = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ValueError(f"{folder} is being trained in by {owner}: wait for it, stop it or give another --run-dir")
        # The previous owner may have deleted the file after it was opened here: then lock the new file of that name.
        if file.exists() and os.path.samestat(os.fstat(descriptor), os.stat(file)):
            break
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _refuse_foreign(folder: Path) -> None:
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
        raise ValueError(f"{folder} is a file or lies below one: give another --run-dir")
    for name, is_right in {"checkpoints": Path.is_dir, "metrics.jsonl": Path.is_file, _LOCK: Path.is_file}.items():
        if os.path.lexists(folder / name) and not is_right(folder / name):
            kind = "folder" if is_right is Path.is_dir else "regular file"
            raise ValueError(f"{folder / name} is no {kind}: move it away, or give another --run-dir")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    ours = {"data", ".data.partial", ORIGIN, _LOCK}
    foreign = sorted(name for name in names - ours if not name.startswith(("config.json", ".config.json")))
    if "config.json" not in names and foreign:
        raise ValueError(f"{folder} is no run directory, it holds {', '.join(foreign[:3])}: give another --run-dir")


def recover_config(folder: Path) -> None:
    """Writes config.json from the newest whole checkpoint if a power cut has lost or torn the file; renames it then."""
    if lost := lost_config(folder):
        (values, step), file, kept = lost, folder / "config.json", ""
        if os.path.lexists(file):
            file.rename(file.with_suffix(".json.damaged"))
            kept = "; what was there is now config.json.damaged"
        write_json(file, values)
        echo(f"{file} was lost: restored from the checkpoint of step {step}{kept}", file=sys.stderr)


def absolute_paths(config: Config, run_dir: str | Path) -> Config:
    """Returns the config with absolute paths, so that config.json serves from any working directory.

    Raises a ValueError for a run directory below which Orbax cannot write.
    """
    require_writable_path(Path(run_dir))
    store, init_from = _normalized(config.data.store), _normalized(config.train.init_from)
    validation = tuple(map(_normalized, config.data.validation)) if store else config.data.validation
    stores = tuple(f"{name}={_normalized(path)}" for name, path in parse_stores(config.data.stores).items())
    data = dataclasses.replace(config.data, store=store, stores=stores, validation=validation)
    settings = dataclasses.replace(config.train, init_from=init_from)
    return dataclasses.replace(config, data=data, train=settings)


def has_begun(folder: Path) -> bool:
    """Returns True if the directory holds a logged step or a checkpoint, which another config would invalidate."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    saved = checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())
    return saved or (metrics.exists() and bool(read_metrics(metrics)[0]))


def check_or_write_config(folder: Path, config: Config, step: int, *, allow_change: bool = False) -> Changes:
    """Writes config.json into a new run directory. In an existing run, rejects a config that would change its results.

    Args:
      folder: the run directory; the caller holds its lock.
      step: step to resume from; up to there the config must have the same effect.
      allow_change: accept other values after that step, where the state keeps its shapes.

    Returns the fields that change the results after `step`, with old and new value. Raises a ValueError that names the
    fields that differ, and the remedy.
    """
    _refuse_foreign(folder)
    file = folder / "config.json"
    if not (file.exists() and has_begun(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, config)
        return {}
    old = load_config(file)
    changed = _changes(old, config)
    fixed = {
        field: values
        for field, values in changed.items()
        if not field.startswith(_CHANGEABLE) or field in _FIXED or (field in _RESHAPING and _RESHAPING[field] in values)
    }
    extends = set(changed) <= _LENGTH and config.train.steps >= step
    if changed and extends:  # the learning rates of the past stay the same
        before, after = (jax.vmap(components.make_schedule(c))(jnp.arange(max(step, 1))) for c in (old, config))
        extends = bool((before == after).all())
    if fixed or not (allow_change or extends or not changed):
        lines = [f"{key}: {before!r} -> {after!r}" for key, (before, after) in (fixed or changed).items()]
        remedy = "repeat its config" + ("" if fixed else ", change it from this step on with --allow-change")
        remedy += ", or give another --run-dir (from the weights of this run: --train.init-from)"
        raise ValueError(f"{folder} holds a run with another config: {remedy}\n  " + "\n  ".join(lines))
    return changed


def _changes(old: Config, new: Config) -> Changes:
    """Returns the fields that differ, without those that a resumed run is free to change."""
    before, after = flat_fields(old), flat_fields(new)
    free = _FREE + (_DATA if new.data.store or new.data.stores else ())
    changed = {}
    for key in sorted(before.keys() | after.keys()):
        values = before.get(key), after.get(key)
        compared = [_normalized(value) if key in _PATHS else value for value in values]
        if compared[0] != compared[1] and not key.startswith(free):
            changed[key] = values
    stated = [(c.optim.warmup_steps, c.optim.warmup_fraction) for c in (old, new)]
    if stated[0] == stated[1]:
        changed.pop("optim.warmup_steps", None)  # follows from train.steps, which is listed
    return changed


def _normalized(path: Any) -> Any:
    """Returns an absolute path without `.` and `..`, for one path or a list of them."""
    if isinstance(path, list):
        return [_normalized(each) for each in path]
    return os.path.abspath(os.path.expanduser(path)) if path and not is_url(path) else path


def write_config(folder: Path, config: Config) -> None:
    """Writes config.json."""
    write_text(folder / "config.json", to_json(config))


@contextlib.contextmanager
def rollback_refused(folder: Path) -> Iterator[None]:
    """Restores config.json and removes a new log if the block fails; a token store that was prepared meanwhile stays.

    A signal (`Stopped`) refuses nothing.
    """
    file, log = folder / "config.json", folder / "metrics.jsonl"
    before, had_log = file.read_bytes() if file.is_file() else None, log.exists()
    try:
        yield
    except Stopped:
        raise
    except BaseException:
        with contextlib.suppress(OSError):
            if not had_log:
                log.unlink()
        with contextlib.suppress(OSError):
            if before is None:
                file.unlink()
            elif file.read_bytes() != before:
                write_bytes(file, before)
        raise


def check_skip(old: Sequence[str], new: Sequence[str], step: int) -> None:
    """Raises a ValueError if other ranges in data.skip change what the first `step` steps of a run have read."""
    before, after = parse_ranges(old), parse_ranges(new)
    end = skip_to(step - 1, before) + 1 if step else 0  # batches read or skipped so far
    if [(a, min(b, end)) for a, b in before if a < end] == [(a, min(b, end)) for a, b in after if a < end]:
        return
    shown = " -> ".join(" ".join(texts) or "(nothing)" for texts in (old, new))
    raise ValueError(
        f"data.skip {shown} changes what the first {step} steps have read: only batches from {skip_to(step, before)} "
        "on can be left out now; for others go back first, with --rewind STEP"
    )
