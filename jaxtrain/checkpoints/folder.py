"""Checkpoint folder of a run: which steps it holds, which of them stay, and what is discarded.

Names below `checkpoints/`:

  STEP               a complete checkpoint: params/, rest/, record/ and manifest.json
  .STEP.partial...   a save in progress
  .STEP.deleting     an old checkpoint that is being deleted
  STEP.damaged       a damaged checkpoint, moved out of the way; STEP.rewound: one that a rewind moved
  scores.json        validation loss by step, for `keep_best`
"""

import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxtrain.checkpoints.manifest import Damaged, verify
from jaxtrain.runtime import processes
from jaxtrain.runtime.files import read_json, sync_folder, write_json

_SCORES = "scores.json"
_LEFTOVER = re.compile(r"\.\d+\.(partial|deleting)")


def report_to_stderr(event: str, text: str, **fields: Any) -> None:
    """Prints the text of an event, if it has one."""
    del event, fields
    if text:
        print(text, file=sys.stderr)


def retained(
    steps: list[int], scores: dict[int, float], *, keep: int, keep_every: int | None, keep_best: int | None
) -> set[int]:
    """Returns the steps that stay: the union of the newest, the multiples and the best.

    Args:
      steps: steps of the existing checkpoints.
      scores: validation loss by step, for some of them.
      keep: number of newest checkpoints that stay, at least 1.
      keep_every: multiples of this many steps stay for good. None disables this set.
      keep_best: number of checkpoints with the least finite validation loss that stay. None disables this set.
    """
    stay = set(sorted(steps)[-keep:])
    if keep_every:
        stay |= {step for step in steps if step % keep_every == 0}
    if keep_best:
        ranked = sorted((scores[step], step) for step in steps if step in scores and math.isfinite(scores[step]))
        stay |= {step for _, step in ranked[:keep_best]}
    return stay


class CheckpointFolder:
    """Checkpoints of one run on disk. Reads names and deletes; saving and restoring are in save.py and restore.py.

    Args:
      path: the folder; the first save creates it.
      keep, keep_every, keep_best: which checkpoints stay, see `retained`.
      report: `(event, text, **fields)`, called with everything that a user should know.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        keep_best: int | None = None,
        report: Callable[..., None] = report_to_stderr,
    ):
        if keep < 1 or (keep_every or 0) < 0 or (keep_best or 0) < 0:
            raise ValueError(f"keep must be 1 or more, the others 0 or more: {keep}, {keep_every}, {keep_best}")
        self.path = Path(path).absolute()
        self.report = report
        self._rule = {"keep": keep, "keep_every": keep_every, "keep_best": keep_best}

    def steps(self) -> list[int]:
        """Returns the steps of the complete checkpoints, in order."""
        names = [path.name for path in self.path.iterdir()] if self.path.is_dir() else []
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None if there is no checkpoint."""
        return max(self.steps(), default=None)

    def require(self, step: int | None = None) -> list[int]:
        """Returns the steps of the complete checkpoints.

        Raises:
          ValueError: there is no checkpoint, or none of `step`.
        """
        steps = self.steps()
        if not steps:
            raise ValueError(f"no checkpoint in {self.path}: train first, or give another run directory")
        if step is not None and step not in steps:
            raise ValueError(f"no checkpoint of step {step} in {self.path}; there are {steps}")
        return steps

    def checkpoint(self, step: int) -> Path:
        """Returns the path of a complete checkpoint."""
        return self.path / str(step)

    def partial(self, step: int) -> Path:
        """Returns the path that a checkpoint has while it is written."""
        return self.path / f".{step}.partial"

    def clean(self) -> None:
        """Deletes the leftovers of a crash (`.STEP.partial`, `.STEP.deleting`). The caller must hold the run's lock."""
        for path in list(self.path.iterdir()) if self.path.is_dir() else []:
            if _LEFTOVER.match(path.name):
                shutil.rmtree(path)

    def set_aside(self, step: int, suffix: str) -> None:
        """Renames a checkpoint to STEP.suffix (or STEP.suffix.2, ...), so that its step can be saved again."""
        aside, number = self.path / f"{step}.{suffix}", 1
        while aside.exists():
            number += 1
            aside = self.path / f"{step}.{suffix}.{number}"
        os.rename(self.checkpoint(step), aside)
        sync_folder(self.path)

    def rewind(self, step: int) -> list[int]:
        """Sets aside all checkpoints after a step; returns their steps.

        Raises:
          ValueError: the checkpoint of `step` is missing or damaged.
        """
        self.require(step)
        try:
            verify(self.checkpoint(step))
        except Damaged as problem:
            raise ValueError(f"checkpoint {self.checkpoint(step)} is damaged: {problem}") from None
        later = [other for other in self.steps() if other > step]
        for other in reversed(later):  # so that a crash leaves no gap
            self.set_aside(other, "rewound")
        if scores := self._scores():
            write_json(self.path / _SCORES, {other: nll for other, nll in scores.items() if other <= step})
        return later

    def score(self, step: int, nll: float) -> None:
        """Records the validation loss of a step, for `keep_best`."""
        if self._rule["keep_best"] and processes.is_lead():
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / _SCORES, {**self._scores(), step: float(nll)})

    def prune(self, before_delete: Callable[[], None] = lambda: None) -> None:
        """Deletes the checkpoints that need not stay; calls `before_delete` once a checkpoint has lost its name."""
        steps = self.steps()
        stay = retained(steps, self._scores(), **self._rule)
        for step in steps:
            if step not in stay:
                doomed = self.path / f".{step}.deleting"
                os.rename(self.checkpoint(step), doomed)
                before_delete()
                shutil.rmtree(doomed)

    def _scores(self) -> dict[int, float]:
        return {int(step): nll for step, nll in (read_json(self.path / _SCORES) or {}).items()}
