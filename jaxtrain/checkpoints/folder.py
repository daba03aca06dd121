"""Checkpoint folder of a run: complete checkpoints, retention and discarded checkpoints.

Names below `checkpoints/`:

  STEP               a complete checkpoint: params/, rest/, record/ and manifest.json
  .STEP.partial...   a save in progress
  .STEP.deleting     an old checkpoint that is being deleted
  STEP.damaged       a damaged checkpoint, moved out of the way; STEP.rewound: one that a rewind moved
  scores.json        validation loss by step, for `keep_best`
"""

import contextlib
import math
import os
import re
import shutil
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from orbax.checkpoint import checkpoint_managers as policies

from jaxtrain.runtime import processes
from jaxtrain.runtime.files import read_json, sync_folder, write_json
from jaxtrain.runtime.terminal import echo

_SCORES = "scores.json"
_LEFTOVER = re.compile(r"\.\d+\.(partial|deleting)")


def report_to_stderr(event: str, text: str, **fields: Any) -> None:
    """Prints the text of an event, if it has one."""
    del event, fields
    if text:
        echo(text, file=sys.stderr)


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

    def chosen(policy: policies.PreservationPolicy, steps: list[int]) -> set[int]:
        checkpoints: list[Any] = [SimpleNamespace(step=step, metrics=scores.get(step)) for step in steps]
        stays = policy.should_preserve(checkpoints, context=policies.PreservationContext())
        return {step for step, stay in zip(steps, stays, strict=True) if stay}

    stay = chosen(policies.LatestN(keep), sorted(steps))
    if keep_every:
        stay |= chosen(policies.EveryNSteps(keep_every), sorted(steps))
    if keep_best:
        # Later steps first: of equal losses the last in BestN's order stay, which are the earlier steps.
        scored = [step for step in sorted(steps, reverse=True) if math.isfinite(scores.get(step, math.nan))]
        stay |= chosen(policies.BestN(get_metric_fn=float, reverse=True, n=keep_best), scored)
    return stay


def require_writable_path(path: Path) -> None:
    r"""Raises a ValueError if Orbax cannot save below a path that holds `*`, `?`, `[`, `\` or bytes that are not UTF-8.

    Orbax 0.12.8 takes `*`, `?` and `[` for patterns. Its save then omits the manifest of the arrays without an error,
    and no restore can read the checkpoint. It takes a folder named `gs:` for a bucket.
    """
    text = str(Path(path).absolute())
    bad = _unusable(text, "*?[\\") + (["'gs:/'"] if "gs:/" in f"{text}/" else [])
    if bad:
        raise ValueError(f"checkpoints cannot be saved in {text!r} with {' '.join(bad)}: give another --run-dir")


def require_readable_path(path: Path) -> None:
    r"""Raises a ValueError if Orbax cannot restore from a path that holds `\` or bytes that are not UTF-8."""
    text = str(Path(path).absolute())
    if bad := _unusable(text, "\\"):
        raise ValueError(f"checkpoints cannot be read from {text!r} with {' '.join(bad)}: rename the folder")


def _unusable(text: str, characters: str) -> list[str]:
    return [repr(char) for char in text if char in characters or "\ud800" <= char <= "\udfff"]


class CheckpointFolder:
    """Checkpoints of one run on disk. Reads names and deletes; saving and restoring are in save.py and restore.py.

    Args:
      path: the folder, in the run directory; the first save creates it.
      keep, keep_every, keep_best: which checkpoints stay, see `retained`.
      report: `(event, text, **fields)`, called with everything that a user should know.
      delete: deletes a folder with all that is in it.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        keep_best: int | None = None,
        report: Callable[..., None] = report_to_stderr,
        delete: Callable[[Path], None] = shutil.rmtree,
    ):
        self._rule: dict[str, Any] = {"keep": keep, "keep_every": keep_every, "keep_best": keep_best}
        if wrong := {name: count for name, count in self._rule.items() if count is not None and count < 1}:
            raise ValueError(f"{wrong} of a checkpoint folder must be above 0; None disables keep_every and keep_best")
        self.path = Path(path).absolute()
        self._run_directory: int | None = None  # open, so that no other directory can get its inode
        with contextlib.suppress(OSError):
            self._run_directory = os.open(self.path.parent, os.O_RDONLY)
            weakref.finalize(self, os.close, self._run_directory)
        self.report, self._delete_folder = report, delete
        self.pinned: int | None = None  # step that `prune` leaves, while it is uploaded
        self._warned: set[Path] = set()
        self._unwritten: dict[int, float] | None = None  # scores whose file could not be written

    def has_run_directory(self) -> bool:
        """Returns False if the run directory was moved, deleted or replaced since this object was made."""
        with contextlib.suppress(OSError):
            return self._run_directory is not None and os.path.samestat(
                os.fstat(self._run_directory), os.stat(self.path.parent)
            )
        return False

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

    def warn(self, path: Path, problem: object) -> None:
        """Reports a file or folder that could not be written, read or deleted, once for each path."""
        if path not in self._warned:
            self._warned.add(path)
            self.report("checkpoint_warning", f"{path}: {problem}", path=str(path), problem=str(problem))

    def clean(self) -> None:
        """Deletes the leftovers of a crash (`.STEP.partial`, `.STEP.deleting`). The caller must hold the run's lock."""
        for path in list(self.path.iterdir()) if self.path.is_dir() else []:
            if _LEFTOVER.match(path.name):
                self._delete(path, self.warn)

    def retire(self, step: int, suffix: str) -> None:
        """Renames a checkpoint to STEP.suffix (or STEP.suffix.2, ...), so that its step can be saved again."""
        aside, number = self.path / f"{step}.{suffix}", 1
        while aside.exists():
            number += 1
            aside = self.path / f"{step}.{suffix}.{number}"
        os.rename(self.checkpoint(step), aside)
        sync_folder(self.path)

    def rewind(self, step: int) -> list[int]:
        """Renames all checkpoints after a step to STEP.rewound; returns their steps."""
        later = [other for other in self.steps() if other > step]
        for other in reversed(later):  # so that a crash leaves no gap
            self.retire(other, "rewound")
        if scores := self._scores(self.warn):
            self._write_scores({other: nll for other, nll in scores.items() if other <= step})
        return later

    def score(self, step: int, nll: float) -> None:
        """Records the validation loss of a step, for `keep_best`."""
        if self._rule["keep_best"] and processes.is_lead():
            self._write_scores({**self._scores(self.warn), step: float(nll)})

    def prune(
        self, *, before_delete: Callable[[], None] = lambda: None, warn: Callable[[Path, object], None] | None = None
    ) -> None:
        """Deletes the checkpoints that need not stay. One that can't be deleted is a warning.

        Args:
          before_delete: called once a checkpoint has lost its name.
          warn: takes the warnings; None reports them.
        """
        warn = warn or self.warn
        steps = self.steps()
        stay = retained(steps, self._scores(warn), **self._rule) | {self.pinned}
        for step in steps:
            if step not in stay:
                doomed = self.path / f".{step}.deleting"
                try:
                    os.rename(self.checkpoint(step), doomed)
                except OSError as error:
                    warn(self.checkpoint(step), f"this old checkpoint could not be deleted: {error}")
                    continue
                before_delete()
                self._delete(doomed, warn)

    def _write_scores(self, scores: dict[int, float]) -> None:
        file = self.path / _SCORES
        if not self.has_run_directory():
            return  # the next save ends the run
        try:
            self.path.mkdir(exist_ok=True)
            write_json(file, scores)
            self._unwritten = None
        except OSError as error:
            self._unwritten = scores
            self.warn(file, f"the validation losses for checkpoint.keep_best could not be written: {error}")

    def _scores(self, warn: Callable[[Path, object], None]) -> dict[int, float]:
        file = self.path / _SCORES
        if self._unwritten is not None:
            return self._unwritten
        if not os.path.lexists(file):
            return {}
        try:
            found: Any = read_json(file) if file.is_file() else None
            return {int(step): float(nll) for step, nll in found.items()}
        except (AttributeError, TypeError, ValueError, OverflowError):
            warn(
                file,
                "this is no record of validation losses, and is ignored: checkpoint.keep_best counts from now on",
            )
            return {}

    def _delete(self, path: Path, warn: Callable[[Path, object], None]) -> None:
        try:
            self._delete_folder(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            warn(path, f"this leftover could not be deleted, and takes room: {error}")
