"""Asynchronous saves: a checkpoint is complete or absent, and a failed save is reported.

A checkpoint `checkpoints/STEP/` holds the parameters (params/), the other leaves of the TrainState (rest/, so that
evaluation reads no optimizer state), the run's fingerprint (record/metadata, JSON) and manifest.json, by which every
byte is checked (manifest.py). A save writes `.STEP.partial`, flushes it, seals it with the manifest and renames it to
`STEP`: the checkpoint counts from that rename.
"""

import contextlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.leaves import NotFinite, describe_leaves, not_finite
from jaxtrain.checkpoints.manifest import FINGERPRINT, hash_files, list_files, seal, share_of
from jaxtrain.runtime import processes
from jaxtrain.runtime.files import sync_folder, write_json
from jaxtrain.runtime.stop import abandon
from jaxtrain.step import TrainState

# Stages of a save, in order: a crash at each leaves another state on the disk.
STAGES = ("begin", "arrays", "unsealed", "sealed", "committed", "deleting")


_MARK = "drops_closed_loop_errors"  # attribute of our `sys.unraisablehook`
_MAX_FAILURES = 2  # in a row
_CLEAR_SECONDS = 5.0  # for the threads of a failed save to end
_PATIENCE = 4  # times the time-out for other processes: a file system may pause for longer


class RunDirectoryGone(OSError):
    """The run directory was moved or deleted while the run was training."""


class Saver:
    """Writes checkpoints in the background, one at a time; a context manager that waits for the last one.

    A failed save is reported (event `save_failed`), and the next save is the retry. Two failures in a row are an
    OSError. Under several processes the first failure is an OSError, because the other processes do not know of it.

    Events: `save` when a save begins, `saved` with the bytes that each process hashed, `save_failed`, `save_slow`.

    Args:
      folder: where checkpoints go, in a run directory that exists.
      log: the run's log, flushed to the disk before a checkpoint counts, so that it covers the checkpoint's steps.
      fsync: flushes the log, given as a file descriptor.
      on_stage: called with each of STAGES as a save reaches it (most of them on the writing thread). Tests kill the
        process, raise or wait there.
      notice_seconds: how often waiting for a save is reported.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        *,
        log: Path | None = None,
        fsync: Callable[[int], None] = os.fsync,
        on_stage: Callable[[str], None] = lambda stage: None,
        notice_seconds: float = 30.0,
    ):
        self._folder, self._log, self._on_stage, self._notice_seconds = folder, log, on_stage, notice_seconds
        self._fsync = fsync
        self._directories = {path: path.stat().st_ino for path in folder.path.parents if path.is_dir()}
        self._limit = _PATIENCE * processes.time_limit()
        handlers = {part: ocp.StandardCheckpointHandler() for part in ("params", "rest")}
        options = ocp.AsyncOptions(timeout_secs=int(self._limit) + 1)
        self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers), async_options=options)
        self._key = processes.new_key("save")
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None  # of the save on the thread
        self._warnings: list[tuple[Path, object]] = []  # of the thread, which reports nothing itself
        self._saved: dict[str, Any] = {}  # fields of the event `saved`
        self._step: int | None = None  # saved last, or being saved
        self._failures = 0  # since the last save that succeeded
        self._failed_steps: set[int] = set()
        self._progress_at = 0.0  # time.monotonic() of the last sign of progress

    def __enter__(self) -> "Saver":
        _drop_closed_loop_errors()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if self._thread is not None and processes.is_lost(error):
            abandon(self._thread)  # the save waits for a process that is gone
            return
        try:
            self.wait()
        except Exception:  # reported
            if error is None:
                raise
        if self._thread is None:
            self._writer.close()
        if self._failed_steps:
            self._sweep()
            for thread in threading.enumerate():
                if type(thread).__module__.startswith("orbax."):  # waits for a folder that was not made
                    abandon(thread)

    def begin(self, state: TrainState, fingerprint: dict[str, Any]) -> bool:
        """Waits for the previous save, copies the state to the host and writes it in the background.

        Args:
          state: may be donated to the next train step as soon as this returns.
          fingerprint: JSON values that `restore` returns.

        Returns:
          True if a save has begun; False if this step is saved already, or if the save failed at once.

        Raises:
          NotFinite: the parameters or the optimizer state hold NaN or infinities; nothing is written.
          OSError: two saves in a row have failed.
          TimeoutError: the previous save makes no progress.
        """
        self.wait()
        step = int(state.step)
        saved = processes.broadcast_from_lead("find the checkpoint", lambda: step in self._folder.steps())
        if step == self._step or saved:
            return False
        if bad := not_finite({"params": state.params, "opt_state": state.opt_state}):
            last = self._folder.latest_step()
            newest = "there is no checkpoint" if last is None else f"the newest checkpoint is of step {last}"
            raise NotFinite(f"the state of step {step} is not finite and is not saved: {bad}; {newest}")
        rest = state.replace(params=None)
        leaves = describe_leaves(state.params, "params") | describe_leaves(rest, "rest")
        args = ocp.args.Composite(params=ocp.args.StandardSave(state.params), rest=ocp.args.StandardSave(rest))
        self._step = step
        self._progress()
        try:
            self._on_stage("begin")
            self._require_run_directory()
            if processes.is_lead():
                self._folder.path.mkdir(exist_ok=True)
                # If Orbax can make no folder (a file system that became read-only), its threads wait for one: up to
                # its time-out, which delays the end of the process.
                probe = self._folder.path / f".{step}.partial.probe"
                probe.mkdir()
                probe.rmdir()
            self._writer.save(self._folder.partial(step), args=args)
        except Exception as error:  # a full disk raises one of TensorStore's exceptions
            self._clear(step)
            self._failed(error)
            return False
        written = (step, leaves, fingerprint)
        self._thread = threading.Thread(target=self._commit, args=written, name="checkpoint", daemon=True)
        self._thread.start()
        self._folder.report("save", "", step=step)
        return True

    def poll(self) -> None:
        """Reports how the pending save ended, if it has; returns at once. An OSError after two failures in a row."""
        if self._thread is None or self._thread.is_alive():
            return
        self._thread = None
        error, self._error = self._error, None
        warnings, self._warnings = self._warnings, []
        for path, problem in warnings:
            self._folder.warn(path, problem)
        if error is None:
            self._failures = 0
            self._folder.report("saved", "", step=self._step, **self._saved)
        else:
            self._failed(error)

    def wait(self) -> None:
        """Waits until the pending save has ended and reports how.

        Raises:
          OSError: two saves in a row have failed.
          TimeoutError: the save makes no progress.
        """
        begin = notice = time.monotonic()
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.2)
            now = time.monotonic()
            if now - notice >= self._notice_seconds:
                notice = now
                text = f"waiting for the checkpoint of step {self._step} to be written, for {now - begin:.0f} s so far"
                self._folder.report("save_slow", text, step=self._step, seconds=now - begin)
            if now - self._progress_at >= self._limit:
                abandon(self._thread)
                raise TimeoutError(
                    f"the checkpoint of step {self._step} has made no progress for {self._limit:g} s: check that "
                    f"{self._folder.path} can be written to, or give more time with JAXTRAIN_TIMEOUT"
                )
        self.poll()

    def finish(self, state: TrainState, fingerprint: dict[str, Any]) -> None:
        """Saves the last state and waits until it is on the disk; a failed save is retried at once.

        Raises:
          NotFinite, OSError, TimeoutError: as for `begin`.
        """
        while True:
            self.begin(state, fingerprint)
            self.wait()
            if not self._failures:
                return

    def _failed(self, error: Exception) -> None:
        """Reports a failed save. Raises an OSError for the second in a row, or under several processes."""
        problem = _reason(error)
        text = f"the checkpoint of step {self._step} could not be saved: {problem}"
        self._failures += 1
        gone = isinstance(error, RunDirectoryGone)
        last = gone or self._failures >= _MAX_FAILURES or jax.process_count() > 1
        after = "the run ends" if last else "the next save is the retry"
        self._folder.report("save_failed", f"{text}; {after}", step=self._step, problem=problem)
        self._step = None
        if last:
            remedy = "move it back" if gone else "free some space or fix the permissions"
            raise OSError(f"{text}: {remedy}, and start the run again") from error

    def _commit(self, step: int, leaves: dict[str, Any], fingerprint: dict[str, Any]) -> None:
        """Runs on the thread: waits for Orbax, seals the folder, renames it and deletes old checkpoints."""
        folder, partial = self._folder, self._folder.partial(step)
        try:
            self._on_stage("arrays")
            self._writer.wait_until_finished()
            self._progress()
            if processes.is_lead():
                self._on_stage("unsealed")
            shares = self._hash(step, fingerprint)
            if processes.is_lead():
                seal(partial, step, leaves, {name: entry for share in shares for name, entry in share.items()})
                self._on_stage("sealed")
                self._require_run_directory()
                self._flush_log()
                os.rename(partial, folder.checkpoint(step))
                sync_folder(folder.path)
                self._saved = {"bytes_hashed": [sum(entry["bytes"] for entry in share.values()) for share in shares]}
                self._on_stage("committed")
                folder.prune(
                    before_delete=lambda: self._on_stage("deleting"),
                    warn=lambda path, problem: self._warnings.append((path, problem)),
                )
        except Exception as error:
            with contextlib.suppress(Exception):  # threads of Orbax may still be writing
                self._writer.wait_until_finished()
            self._clear(step)
            self._error = error

    def _hash(self, step: int, fingerprint: dict[str, Any]) -> list[dict[str, Any]]:
        """Hashes the files that this process wrote; returns the entries of every process on the lead, else []."""
        partial, share, problem = self._folder.partial(step), {}, ""
        key = f"{self._key}/{step}"

        def complete() -> list[str]:
            (partial / FINGERPRINT).parent.mkdir()
            write_json(partial / FINGERPRINT, fingerprint)
            return list_files(partial)

        try:
            # The lead alone lists the files: the others might do so while it still writes some.
            names = processes.broadcast_from_lead("complete the checkpoint", complete, key=key)
            names = share_of(names, jax.process_index(), jax.process_count())
            share = hash_files(partial, names, self._progress)
        except (OSError, ValueError) as error:
            problem = f"{error}"
        shares = processes.gather_on_lead("seal the checkpoint", [problem, share], key=key) or []
        if problem := problem or next((problem for problem, _ in shares if problem), ""):
            raise OSError(problem)
        return [share for _, share in shares]

    def _flush_log(self) -> None:
        if self._log is not None:
            try:
                with open(self._log, "rb") as stream:
                    self._fsync(stream.fileno())
                sync_folder(self._log.parent)  # also makes a new `checkpoints` folder durable
            except OSError as error:
                self._warnings.append((self._log, f"the log could not be flushed to the disk: {error}"))

    def _require_run_directory(self) -> None:
        if processes.is_lead() and not self._folder.has_run_directory():
            raise RunDirectoryGone(f"the run directory {self._folder.path.parent} was moved or deleted")

    def _clear(self, step: int) -> None:
        """Deletes the partial checkpoint of a failed save. Under several processes the next start deletes it."""
        if jax.process_count() > 1:
            return
        self._failed_steps.add(step)
        deadline = time.monotonic() + _CLEAR_SECONDS
        while self._sweep() and time.monotonic() < deadline:  # a thread of Orbax may still be writing there
            time.sleep(0.01)

    def _sweep(self) -> bool:
        """Deletes the leftovers of failed saves; returns True if there were any.

        In place of a run directory that was moved or deleted, Orbax makes directories, which are deleted if empty.
        """
        left = [path for step in self._failed_steps for path in self._folder.path.glob(f".{step}.partial*")]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        if not self._folder.has_run_directory():
            with contextlib.suppress(OSError):
                self._folder.path.rmdir()
                for path, known in self._directories.items():
                    if path == self._folder.path.parent or path.stat().st_ino != known:
                        path.rmdir()
        return bool(left)

    def _progress(self) -> None:
        self._progress_at = time.monotonic()


def _reason(error: Exception) -> str:
    """Returns the message of an error; of TensorStore's many lines only what the system said and the file."""
    if code := re.search(r"\[os_error_code='(\d+)'", str(error)):
        path = re.search(r'Failed \w+: "([^"]+)"', str(error)) or re.search(r'file "([^"]+)"', str(error))
        return str(OSError(int(code[1]), os.strerror(int(code[1])), *([path[1]] if path else [])))
    return str(error)


def _drop_closed_loop_errors() -> None:
    """Keeps quiet about the writes that a failed save abandons.

    Orbax closes its event loop after the first error; TensorStore then shows a traceback for each other pending write.
    """
    hook = sys.unraisablehook
    if getattr(hook, _MARK, False):
        return

    def filtered(unraisable: Any) -> None:
        if not (unraisable.exc_type is RuntimeError and "Event loop is closed" in str(unraisable.exc_value)):
            hook(unraisable)

    setattr(filtered, _MARK, True)
    sys.unraisablehook = filtered
