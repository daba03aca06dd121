"""Trackio, local unless TRACKIO_SPACE_ID names a Space; TRACKIO_DIR and its other variables apply."""

import os

from jaxtrain.monitoring.tracked import TrackedRun, Tracker


class Trackio(Tracker):
    """Logs to one Trackio run per id; see `Tracker`."""

    def __init__(self, run: TrackedRun):
        import trackio

        self._alert, self._level = trackio.alert, trackio.AlertLevel.WARN
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "jaxtrain"),
            name=f"{run.title}-{run.id}",
            config=run.config | {"commit": run.commit},
            resume="allow",
            embed=False,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def note(self, step: int, name: str, text: str) -> None:
        """Sends a finding as an alert; other events have no place in Trackio."""
        if name == "finding":
            self._alert(title=f"step {step}", text=text, level=self._level)

    def close(self) -> None:
        """Finishes the run, once all rows are stored."""
        self._run.finish()
