"""TensorBoard, through tensorboardX: event files in RUN/tensorboard/ID."""

import json
import time

from jaxtrain.monitoring.tracked import TrackedRun, Tracker


class TensorBoard(Tracker):
    """Writes one folder of event files per id; see `Tracker`."""

    def __init__(self, run: TrackedRun):
        from tensorboardX import SummaryWriter

        # Files are named by the second: a run that is resumed within it would overwrite its own.
        suffix = f".{time.time_ns()}"
        self._writer = SummaryWriter(str(run.folder / "tensorboard" / run.id), filename_suffix=suffix)
        if run.is_new:
            self._writer.add_text("config", f"```\n{json.dumps(run.config, indent=1)}\n```", 0)
            self._writer.add_text("commit", str(run.commit), 0)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars, and flushes them to the file."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def note(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._writer.close()
