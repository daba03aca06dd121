"""MLflow. MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and the other variables of MLflow apply."""

import os
import time

from jaxtrain.monitoring.tracked import TrackedRun, Tracker

_PARAMS = 100  # of one request
_LONGEST = 500  # characters of a parameter, which older servers refuse beyond


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
