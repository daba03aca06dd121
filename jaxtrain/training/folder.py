"""A run's folder: who may train in it, and which config it is of."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from jaxtrain.config import Config, differences, from_json, to_json
from jaxtrain.monitoring.metrics import read_metrics

# Fields that change neither the parameters nor the order of the data, so that a run may go on with other values.
# `data.skip` does, but `check_past` sees to it that what was trained keeps its order.
_FREE = ("data.prefetch", "data.skip", "data.verify", "mesh.", "train.log_every", "train.eval_", "train.stop_after")
_FREE += ("train.sample_", "train.replay_check", "train.diagnose_every", "checkpoint.")

_LOCK = "lock"  # while somebody trains in the folder


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Makes a run's folder and keeps other processes from training in it; the end of this process frees it too.

    Raises:
      ValueError: another process holds it, or it is the folder of something else; nothing was touched.
    """
    _refuse_foreign(folder)
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _LOCK
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise ValueError(
                f"{folder} is being trained in by {who}: wait for it or stop it, or give another --run-dir"
            ) from None
        # The one who held it before may have deleted the file meanwhile: what counts is the one with the name.
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
        with contextlib.suppress(OSError):  # not empty: there is a run in it now
            for path in absent:
                path.rmdir()


def _refuse_foreign(folder: Path) -> None:
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
        raise ValueError(f"{folder} is a file or lies below one: give another --run-dir")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    ours = {"data", ".data.partial", "config.json.tmp", _LOCK}
    if "config.json" not in names and (foreign := sorted(names - ours)):
        raise ValueError(f"{folder} is no run directory, it holds {', '.join(foreign[:3])}: give another --run-dir")


def has_begun(folder: Path) -> bool:
    """Whether a run has anything to lose there by another config: a step that was logged, or a checkpoint."""
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    saved = checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())
    return saved or (metrics.exists() and bool(read_metrics(metrics)[0]))


def claim(folder: Path, config: Config) -> None:
    """Gives a folder its config, or checks that the run in it is this one, which may still refuse to go on like this.

    Raises:
      ValueError: a folder of something else, or of a run that has begun with another config.
    """
    _refuse_foreign(folder)
    file = folder / "config.json"
    if not (file.exists() and has_begun(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, config)
        return
    changed = [line for line in differences(from_json(file.read_text()), config) if not line.startswith(_FREE)]
    if changed:
        raise ValueError(
            f"{folder} holds a run with another config: repeat that one's, or give another --run-dir\n  "
            + "\n  ".join(changed)
        )


def write_config(folder: Path, config: Config) -> None:
    """Writes a run's `config.json`, whole."""
    temporary = folder / "config.json.tmp"  # a power cut may not leave half a config
    temporary.write_text(to_json(config))
    os.replace(temporary, folder / "config.json")


@contextlib.contextmanager
def restored_if_refused(folder: Path) -> Iterator[None]:
    """Takes back what `claim` did to the config if what follows fails; a store that was prepared there stays."""
    file = folder / "config.json"
    before = file.read_bytes() if file.is_file() else None
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            if before is None:
                file.unlink()
            elif file.read_bytes() != before:
                file.write_bytes(before)
        raise
