"""Run directory at a URL: the run works in a local folder, whose files are uploaded after each save.

An upload puts the records first, then each checkpoint, its manifest last, and then deletes the checkpoints that the
local folder no longer has. A checkpoint at the URL counts once it has its manifest. `.lease.N.json` objects keep
other processes from the run (runtime/lease.py); `.origin.json` in the local folder lists the leases during which it was
the newest state of the run. Under several processes the lead uploads for all.
"""

import contextlib
import json
import posixpath
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.manifest import MANIFEST, list_files
from jaxtrain.fields import is_url, require_local
from jaxtrain.runtime import processes
from jaxtrain.runtime.files import empty_folder, locked, read_object, write_json
from jaxtrain.runtime.lease import Lease, LeaseLost
from jaxtrain.runtime.remote import ORIGIN, copy_folder, fetch_records, open_filesystem, put
from jaxtrain.runtime.terminal import echo

_NUM_THREADS = 8
_ATTEMPTS, _PAUSE_SECONDS = 3, 2.0  # of the last upload of a run


@contextlib.contextmanager
def working_folder(run_dir: str | Path, *, lock: bool = True) -> Iterator[tuple[Path, "Mirror | None"]]:
    """Yields the folder in which a run works, and the mirror that uploads it (on the lead, for a URL; else None).

    Args:
      run_dir: a path, which is the folder, or a URL, whose run is fetched unless the folder is newer.
      lock: False takes no lock on the folder. A URL always has its lease.

    Raises:
      ValueError: another process trains there, or the URL cannot be read.
      OSError: the last upload has failed, or the lease was lost.
    """
    if not is_url(run_dir):
        require_local(run_dir, "--run-dir")
        yield Path(run_dir).expanduser(), None
        return
    url = str(run_dir).rstrip("/")
    folder = copy_folder("runs", url)
    with contextlib.ExitStack() as stack:
        mirror = processes.run_on_lead("open the run directory", lambda: _open(url, folder, stack, lock))
        processes.agree(
            "the working folder of the run",
            {"leases": " ".join(_leases(folder))},
            remedy="set XDG_CACHE_HOME to a folder on a file system that they share",
        )
        try:
            yield folder, mirror
        except BaseException as error:
            if mirror is not None and not isinstance(error, LeaseLost):
                try:
                    mirror.close()
                except OSError as problem:  # the first error is the one to raise
                    echo(f"warning: {problem}", file=sys.stderr)
            raise
        if mirror is not None:
            mirror.close()


def _open(url: str, folder: Path, stack: contextlib.ExitStack, lock: bool) -> "Mirror":
    """Locks a run at a URL and its working folder, and fetches the run unless the folder is its newest state."""
    lease = Lease(url)
    lease.require_free(own=_leases(folder) if lock else ())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        stack.enter_context(locked(folder, lock=lock))
    except ValueError:
        lease.require_free()  # names the owner
        raise
    if known := _leases(folder):  # a kill may follow `acquire` at once
        write_json(folder / ORIGIN, read_object(folder / ORIGIN) | {"leases": [*known, lease.token]})
    previous = lease.acquire(own=known if lock else ())
    stack.callback(lease.release)
    if previous not in known:  # another host has trained since, or none ever
        (folder / ORIGIN).unlink(missing_ok=True)
        empty_folder(folder)
        fetch_records(url, folder)
    write_json(folder / ORIGIN, {"url": url, "files": {}} | read_object(folder / ORIGIN) | {"leases": [lease.token]})
    echo(f"{url}: working in {folder}, uploaded after each save", file=sys.stderr)
    return Mirror(url, folder, lease)


def _leases(folder: Path) -> tuple[str, ...]:
    """Returns the tokens of the leases during which a working folder was the newest state of its run."""
    return tuple(read_object(folder / ORIGIN).get("leases", ()))


class Mirror:
    """Uploads of a working folder, on a thread: a failed one is reported, and the next save retries it.

    Args:
      url: the run directory.
      folder: the working folder.
      lease: acquired lease of the URL.
    """

    def __init__(self, url: str, folder: Path, lease: Lease):
        self._url, self._folder, self._lease = url, folder, lease
        self._system, self._root = open_filesystem(url)
        self._sent: dict[str, Any] = {}  # file -> size and time of change, as uploaded
        self._steps: list[int] = []  # at the begin of the last upload
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failing = False

    def poll(self, checkpoints: CheckpointFolder) -> None:
        """Reports how the last upload ended, and begins one if there is a new checkpoint; returns immediately.

        Raises:
          LeaseLost: another process trains in the run now.
        """
        self._lease.require_known()
        if self._thread is not None:
            if self._thread.is_alive():
                return
            self._thread = None
            if self._error is None:
                checkpoints.report("uploaded", "", steps=self._steps)
            elif not self._failing:
                problem = _text(self._error)
                text = f"the upload to {self._url} failed: {problem}; the next save is the retry"
                checkpoints.report("upload_failed", text, problem=problem)
            self._failing, checkpoints.pinned = self._error is not None, None
        steps = checkpoints.steps()
        if steps and steps != self._steps:
            self._steps, checkpoints.pinned = steps, steps[-1]  # others may be pruned meanwhile
            self._thread = threading.Thread(target=self._try_upload, name="mirror", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Uploads what is left; waits for it, and retries twice.

        Raises:
          OSError: the upload has failed, or the lease was lost.
        """
        if not (self._folder / "config.json").exists():
            return  # the run was refused before it began
        if self._thread is not None:
            self._thread.join()
        for attempt in range(_ATTEMPTS):
            time.sleep(_PAUSE_SECONDS if attempt else 0)
            self._try_upload()
            if self._error is None or isinstance(self._error, LeaseLost):
                break
        if isinstance(self._error, LeaseLost):
            raise self._error
        if self._error is not None:
            raise OSError(
                f"the upload to {self._url} failed: {_text(self._error)}; the run is whole in {self._folder}: start it "
                "again on this machine to upload it"
            )

    def _try_upload(self) -> None:
        try:
            self._lease.require()
            local = CheckpointFolder(self._folder / "checkpoints")
            for name in self._records():
                self._put(name)
            for step in reversed(local.steps()):  # the newest is worth the most
                self._put_checkpoint(step)
            self._lease.require()
            gone = [step for step in self._steps_there() if step not in local.steps()]
            for step in sorted(gone, reverse=True):  # so that a crash leaves no gap
                self._delete_checkpoint(step)
            self._error = None
        except Exception as error:  # every file system has its own
            self._error = error

    def _steps_there(self) -> list[int]:
        """Returns the steps of the checkpoints at the URL, complete or not."""
        self._system.invalidate_cache()
        try:
            names = map(posixpath.basename, self._system.ls(posixpath.join(self._root, "checkpoints"), detail=False))
        except FileNotFoundError:
            return []
        return [int(name) for name in names if name.isdigit()]

    def _records(self) -> list[str]:
        """Returns the names of all files outside checkpoints; the manifest of a token store comes last."""
        names = [path.relative_to(self._folder) for path in self._folder.rglob("*") if path.is_file()]
        names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
        names = [name for name in names if name.parts[0] != "checkpoints" or name.parts[1:] == ("scores.json",)]
        names = [name for name in names if name.suffix != ".tmp" and str(name) != "lock"]
        return [name.as_posix() for name in sorted(names, key=lambda name: (name.name == MANIFEST, name))]

    def _put(self, name: str) -> None:
        """Uploads a file unless its present contents are uploaded."""
        path = self._folder / name
        try:
            status = path.stat()
            if self._sent.get(name) == (version := (status.st_size, status.st_mtime_ns)):
                return
            target = posixpath.join(self._root, name)
            if "/" in name:
                put(self._system, target, lambda: self._system.put_file(str(path), target))
            else:
                data = path.read_bytes()  # metrics.jsonl may grow meanwhile
                put(self._system, target, lambda: self._system.pipe_file(target, data))
        except FileNotFoundError:
            if path.exists():
                raise
            return  # deleted meanwhile
        self._sent[name] = version

    def _put_checkpoint(self, step: int) -> None:
        source, name = self._folder / "checkpoints" / str(step), f"checkpoints/{step}"
        manifest = source / MANIFEST
        if not manifest.is_file() or self._sent.get(name) == (sealed := manifest.read_bytes()):
            return
        try:
            there = self._system.cat_file(posixpath.join(self._root, name, MANIFEST))
        except FileNotFoundError:
            there = None
        if there != sealed:
            if there is not None:  # of an attempt before a rewind
                self._delete_checkpoint(step)
            files = list(json.loads(sealed)["files"])
            with ThreadPoolExecutor(_NUM_THREADS) as pool:
                list(pool.map(self._put, [f"{name}/{file}" for file in files]))
            if not set(files) <= set(list_files(source)):
                return  # deleted meanwhile
            self._lease.require()
            self._system.pipe_file(posixpath.join(self._root, name, MANIFEST), sealed)
        self._sent[name] = sealed

    def _delete_checkpoint(self, step: int) -> None:
        path = posixpath.join(self._root, "checkpoints", str(step))
        self._sent = {
            name: sent for name, sent in self._sent.items() if not f"{name}/".startswith(f"checkpoints/{step}/")
        }
        with contextlib.suppress(FileNotFoundError):
            self._system.rm_file(posixpath.join(path, MANIFEST))
        with contextlib.suppress(FileNotFoundError):
            self._system.rm(path, recursive=True)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
