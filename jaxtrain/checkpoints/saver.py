"""Saves of a running loop: what fails in the background is noticed at the next step and tried again, for a while."""

import time

import jax

from jaxtrain.checkpoints.checkpoints import Checkpoints, NotFinite
from jaxtrain.monitoring.recorder import Recorder
from jaxtrain.step import TrainState
from jaxtrain.training.run import Run, fingerprint

PAUSES = (0.0, 10.0, 60.0)  # seconds before the second attempt, the third, and any later one; training goes on


class Saver:
    """Saves the state of a run; a save that fails is tried again with the state of then, `checkpoint.retries` times."""

    def __init__(self, run: Run, checkpoints: Checkpoints, recorder: Recorder):
        self._run, self._checkpoints, self._recorder = run, checkpoints, recorder
        self._failures = 0  # since the last save that went well
        self._again_at: float | None = None  # time.monotonic() of the next attempt; None: the last one has not failed
        self._step: int | None = None  # of the last attempt

    def save(self, state: TrainState) -> None:
        """Begins a save; returns once the state may be donated. While one is to be tried again, that is left to `look`.

        Raises:
          NotFinite: the state is not to be saved.
          OSError: it failed too often.
        """
        if self._again_at is None:
            self._attempt(state)

    def look(self, state: TrainState) -> None:
        """Looks, without waiting, how the last save is doing, and tries a failed one again when it is time.

        Args:
          state: what is saved then.

        Raises:
          NotFinite, OSError: as for `save`.
        """
        if self._step is None:
            return
        error = self._checkpoints.failure()
        if error is not None:
            self._failed(error)
        if self._again_at is not None and time.monotonic() >= self._again_at:
            self._attempt(state)

    def finish(self, state: TrainState) -> None:
        """Saves the last state and waits until it is on disk, trying again like `look`; may be called again.

        Raises:
          NotFinite, OSError: as for `save`.
        """
        while True:
            if self._again_at is not None:
                time.sleep(max(0.0, self._again_at - time.monotonic()))
            self._attempt(state)
            if self._again_at is not None:
                continue
            try:
                self._checkpoints.wait()
                return
            except Exception as error:
                self._failed(error)

    def _attempt(self, state: TrainState) -> None:
        self._again_at = None
        with self._recorder.pause():
            try:
                self._checkpoints.wait()  # for the previous one
                if self._step is not None and self._checkpoints.committed == self._step:
                    self._failures = 0
                self._step = int(state.step)
                begun = self._checkpoints.save(state, fingerprint(self._run))
            except NotFinite:
                raise
            except Exception as error:  # TensorStore has its own for what the disk says
                self._failed(error)
                return
        if begun:
            self._recorder.event("save", "", step=self._step)

    def _failed(self, error: Exception) -> None:
        """Notes a failure and when to try again.

        Raises:
          OSError: it is not to be tried again.
        """
        if isinstance(error, TimeoutError):
            raise error
        self._failures += 1
        text = f"the checkpoint of step {self._step} could not be saved: {error}"
        # Where several processes save together, the others do not know of it: the run ends, and its next start is tidy.
        last = self._failures > self._run.config.checkpoint.retries or jax.process_count() > 1
        pause = PAUSES[min(self._failures, len(PAUSES)) - 1]
        after = "the run ends" if last else f"trying again in {pause:g} s" if pause else "trying again"
        self._recorder.event("save_failed", f"{text}; {after}", step=self._step, problem=str(error))
        if last:
            times = f" ({self._failures} attempts)" if self._failures > 1 else ""
            raise OSError(f"{text}{times}: make room or mend the permissions, and start the run again") from error
        self._again_at = time.monotonic() + pause
