"""Asynchronous saves: a checkpoint is complete or absent, and a failed save is reported.

A checkpoint `checkpoints/STEP/` holds the parameters (params/), the other leaves of the TrainState (rest/, so that
evaluation reads no optimizer state), the run's fingerprint (record/metadata, JSON) and manifest.json, by which every
byte is checked (manifest.py). A save writes `.STEP.partial`, flushes it, seals it with the manifest and renames it to
`STEP`: the checkpoint counts from that rename.
"""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.leaves import NotFinite, describe, not_finite
from jaxtrain.checkpoints.manifest import FINGERPRINT, seal
from jaxtrain.runtime import processes
from jaxtrain.runtime.files import sync_folder, write_json
from jaxtrain.runtime.stop import leave_behind
from jaxtrain.step import TrainState

# Stages of a save, in order: a crash at each leaves something else on the disk.
STAGES = ("begin", "arrays", "unsealed", "sealed", "committed", "deleting")


_MAX_FAILURES = 2  # in a row
_CLEAR_SECONDS = 5.0  # for the threads of a failed save to end
_PATIENCE = 4  # times the time-out for other processes: a file system may pause for longer


def require_finite(state: TrainState, folder: CheckpointFolder) -> None:
    """Checks the parameters and the optimizer state before a save.

    Raises:
      NotFinite: a leaf holds NaN or infinities; the error names it and the newest checkpoint.
    """
    if bad := not_finite({"params": state.params, "opt_state": state.opt_state}):
        last = folder.latest_step()
        raise NotFinite(
            f"the state of step {int(state.step)} is not finite and is not saved: {bad}; "
            + (f"the newest checkpoint is that of step {last}" if last is not None else "there is no checkpoint")
        )


class Saver:
    """Writes checkpoints in the background, one at a time; a context manager that waits for the last one.

    A failed save is reported (event `save_failed`), and the next save is the retry. Two failures in a row are an
    OSError. Under several processes the first failure is an OSError, because the other processes do not know of it.

    Args:
      folder: where checkpoints go. Its `report` gets the events `save`, `save_failed` and `save_slow`.
      on_stage: called with each of STAGES as a save reaches it (most of them on the writing thread). Tests kill the
        process, raise or wait there.
      notice_seconds: how often waiting for a save is reported.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        *,
        on_stage: Callable[[str], None] = lambda stage: None,
        notice_seconds: float = 30.0,
    ):
        self._folder, self._on_stage, self._notice_seconds = folder, on_stage, notice_seconds
        self._limit = _PATIENCE * processes.time_limit()
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                params=ocp.StandardCheckpointHandler(), rest=ocp.StandardCheckpointHandler()
            ),
            async_options=ocp.AsyncOptions(timeout_secs=int(self._limit) + 1),
        )
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None  # of the save on the thread
        self._step: int | None = None  # saved last, or being saved
        self._failures = 0  # since the last save that succeeded
        self._progress_at = 0.0  # time.monotonic() of the last sign of progress

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        try:
            self.wait()
        except Exception:  # reported
            if error is None:
                raise
        if self._thread is None:
            self._writer.close()

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
        saved = processes.broadcast_from_lead("look for the checkpoint", lambda: step in self._folder.steps())
        if step == self._step or saved:
            return False
        require_finite(state, self._folder)
        rest = state.replace(params=None)
        leaves = describe(state.params, "params") | describe(rest, "rest")
        args = ocp.args.Composite(params=ocp.args.StandardSave(state.params), rest=ocp.args.StandardSave(rest))
        self._step = step
        self._progress()
        try:
            self._on_stage("begin")
            if processes.is_lead():
                self._folder.path.mkdir(parents=True, exist_ok=True)
            self._writer.save(self._folder.partial(step), args=args)
        except Exception as error:  # TensorStore has exceptions of its own for a full disk
            self._clear(step)
            self._failed(error)
            return False
        self._thread = threading.Thread(
            target=self._commit, args=(step, leaves, fingerprint), name="checkpoint", daemon=True
        )
        self._thread.start()
        self._folder.report("save", "", step=step)
        return True

    def poll(self) -> None:
        """Reports how the pending save ended, if it has ended; returns immediately.

        Raises:
          OSError: two saves in a row have failed.
        """
        if self._thread is None or self._thread.is_alive():
            return
        self._thread = None
        error, self._error = self._error, None
        if error is None:
            self._failures = 0
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
                leave_behind(self._thread)
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
        """Reports a failed save.

        Raises:
          OSError: it is the second in a row, or there are several processes.
        """
        text = f"the checkpoint of step {self._step} could not be saved: {error}"
        self._failures += 1
        last = self._failures >= _MAX_FAILURES or jax.process_count() > 1
        after = "the run ends" if last else "the next save is the retry"
        self._folder.report("save_failed", f"{text}; {after}", step=self._step, problem=str(error))
        self._step = None
        if last:
            raise OSError(f"{text}: free some space or fix the permissions, and start the run again") from error

    def _commit(self, step: int, leaves: dict[str, Any], fingerprint: dict[str, Any]) -> None:
        """Runs on the thread: waits for Orbax, seals the folder, renames it and deletes old checkpoints."""
        folder, partial = self._folder, self._folder.partial(step)
        try:
            self._on_stage("arrays")
            self._writer.wait_until_finished()
            self._progress()
            if processes.is_lead():
                self._on_stage("unsealed")
                (partial / FINGERPRINT).parent.mkdir()
                write_json(partial / FINGERPRINT, fingerprint)
                seal(partial, step, leaves, self._progress)
                self._on_stage("sealed")
                os.rename(partial, folder.checkpoint(step))
                sync_folder(folder.path)
                self._on_stage("committed")
                folder.prune(lambda: self._on_stage("deleting"))
        except Exception as error:
            with contextlib.suppress(Exception):  # threads of Orbax may still be writing
                self._writer.wait_until_finished()
            self._clear(step)
            self._error = error

    def _clear(self, step: int) -> None:
        """Deletes what a failed save has written. Under several processes the next start deletes it."""
        if jax.process_count() > 1:
            return
        deadline = time.monotonic() + _CLEAR_SECONDS
        while (left := list(self._folder.path.glob(f".{step}.partial*"))) and time.monotonic() < deadline:
            for path in left:  # a thread of Orbax may still be writing there
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.01)

    def _progress(self) -> None:
        self._progress_at = time.monotonic()
