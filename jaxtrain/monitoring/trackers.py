"""Experiment trackers for `--track NAME ...`: each receives a run's steps in order, each step once.

The usual variables of each tracker apply, such as WANDB_PROJECT, WANDB_MODE=offline, MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME, TRACKIO_DIR and TRACKIO_SPACE_ID; without that one Trackio is local. TensorBoard writes to
RUN/tensorboard/ID.
"""

import importlib.util
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtrain.fields import check_choice

_PARAMS = 100  # parameters of one request to MLflow
_LONGEST = 500  # characters of a parameter, which older servers of MLflow refuse beyond


class TrackedRun(NamedTuple):
    """Facts of a run for its tracker."""

    folder: Path
    title: str  # name for people
    id: str  # identity of the run with the tracker; letters and digits
    is_new: bool  # False if the tracker has received this id before
    config: dict[str, Any]  # value of each field by its dotted path
    commit: str | None  # git commit of the working directory; None without one


class Tracker:
    """Interface of a tracker: made with a TrackedRun, it receives steps in order, each once."""

    def __init__(self, run: TrackedRun):
        """Starts or resumes the run of this id."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Receives the metrics of a logged step, as `train/nll`, or of an evaluation, as `validation/nll`."""

    def note(self, step: int, name: str, text: str) -> None:
        """Receives an event with its text for people."""

    def close(self) -> None:
        """Ends the record."""


class TensorBoard(Tracker):
    """Writes one folder of event files per id; see `Tracker`."""

    def __init__(self, run: TrackedRun):
        from tensorboardX import SummaryWriter

        # Files are named by the second: a run that is resumed within it would overwrite its file.
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


class WeightsAndBiases(Tracker):
    """Logs to one wandb run per id; see `Tracker`. The x axis is the metric `step`, which survives a resume."""

    def __init__(self, run: TrackedRun):
        import wandb

        self._alert_level = wandb.AlertLevel.WARN
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jaxtrain"),
            id=run.id,
            name=run.title,
            dir=str(run.folder),
            config=run.config | {"commit": run.commit},
            resume="allow",
            settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({**values, "step": step})

    def note(self, step: int, name: str, text: str) -> None:
        """Sends a finding as an alert; other events have no place in wandb."""
        if name == "finding":
            self._run.alert(title=f"step {step}", text=text, level=self._alert_level)

    def close(self) -> None:
        self._run.finish()


class MLflow(Tracker):
    """Logs to one MLflow run per id, which it finds again by the tag `jaxtrain.id`; see `Tracker`."""

    def __init__(self, run: TrackedRun):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "jaxtrain")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        earlier = self._client.search_runs([experiment], f"tags.`jaxtrain.id` = '{run.id}'", max_results=1)
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"jaxtrain.id": run.id, "mlflow.source.git.commit": str(run.commit)}
        self._id = self._client.create_run(experiment, tags=tags, run_name=run.title).info.run_id
        params = [Param(key, str(value)[:_LONGEST]) for key, value in run.config.items()]
        for start in range(0, len(params), _PARAMS):
            self._client.log_batch(self._id, params=params[start : start + _PARAMS])

    def log(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [self._metric(key, value, now, step) for key, value in values.items()])

    def note(self, step: int, name: str, text: str) -> None:
        """Keeps the last event of each name as a tag."""
        self._client.set_tag(self._id, f"event.{name}", f"step {step}: {text}"[:_LONGEST])

    def close(self) -> None:
        """Ends the run; a resumed run reopens it."""
        self._client.set_terminated(self._id)


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


# Trackers by name: package, and the class that receives the run.
TRACKERS: dict[str, tuple[str, Callable[[TrackedRun], Tracker]]] = {
    "tensorboard": ("tensorboardX", TensorBoard),
    "wandb": ("wandb", WeightsAndBiases),
    "mlflow": ("mlflow", MLflow),
    "trackio": ("trackio", Trackio),
}


def check_trackers(names: Sequence[str]) -> None:
    """Raises a ValueError for an unknown tracker, and an ImportError that names the extra if one is not installed."""
    for name in names:
        package, _ = TRACKERS[check_choice(name, TRACKERS, "--track")]
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"--track {name} needs {package}: pip install 'jaxtrain[{name}]'")
