"""Weights & Biases. WANDB_PROJECT, WANDB_MODE=offline and the other variables of wandb apply."""

import os

from jaxtrain.monitoring.tracked import TrackedRun, Tracker


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
