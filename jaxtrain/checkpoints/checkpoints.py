"""Checkpoints of a run: written in the background, whole or not there at all, and verified before they are read.

A checkpoint `checkpoints/STEP/` holds the parameters, the rest of the TrainState (apart, so that evaluation reads no
optimizer state) and a JSON record of what the run was made with, written by Orbax; and `manifest.json`, by which every
byte is checked (manifest.py). A save goes through these names:

  .STEP.partial...   Orbax writes the arrays; then they are flushed, and the manifest is added
  STEP               the same folder, renamed: this is the moment from which it counts
  .STEP.deleting     an older one that is on its way out
  STEP.damaged       what was found damaged, set aside; STEP.rewound: what a rewind has set aside
"""

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.checkpoints.manifest import Damaged, compare, describe, seal, verify
from jaxtrain.runtime import processes
from jaxtrain.runtime.files import read_json, sync_folder, write_json
from jaxtrain.runtime.stop import leave_behind
from jaxtrain.step import TrainState

# The moments of a save at which a crash leaves something else behind; tests end the process at each.
POINTS = ("begin", "arrays", "unsealed", "sealed", "committed", "deleting")

_SCORES = "scores.json"
_LEFTOVER = re.compile(r"\.\d+\.(partial|deleting)")
_CLEAR_SECONDS = 5.0  # for the threads of a save that failed to end
_NOTICE_SECONDS = 30.0  # how often waiting for a save is mentioned
_PATIENCE = 4  # times the time-out for other processes: a file system may pause for longer


class NotFinite(ValueError):
    """A state with NaN or infinities in it, which is not saved."""


def _at(point: str) -> None:
    """A moment of a save, one of POINTS."""


def kept(
    steps: list[int], scores: Mapping[int, float], keep: int, keep_every: int | None, keep_best: int | None
) -> set[int]:
    """Which checkpoints stay: the union of three sets that know nothing of each other.

    Args:
      steps: those that there are.
      scores: validation loss by step, of some of them.
      keep: how many of the newest, 1 or more: the very newest always stays.
      keep_every: multiples of this many steps stay for good; None: none.
      keep_best: how many of those with the least validation loss; None: none.
    """
    stay = set(sorted(steps)[-keep:])
    if keep_every:
        stay |= {step for step in steps if step % keep_every == 0}
    ranked = sorted((scores[step], step) for step in steps if step in scores and np.isfinite(scores[step]))
    return stay | {step for _, step in ranked[: keep_best or 0]}


class Checkpoints:
    """The checkpoints in one folder; a context manager that waits for the last write.

    Args:
      folder: where they are; made by the first save.
      keep, keep_every, keep_best: which of them stay, see `kept`.
      report: `(event, text, **fields)`, told what a user should know; None: standard error.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        keep_best: int | None = None,
        report: Callable[..., None] | None = None,
    ):
        if not all(number is None or number > 0 for number in (keep, keep_every, keep_best)):
            raise ValueError(f"keep, keep_every and keep_best must be above 0: {keep}, {keep_every}, {keep_best}")
        self.folder = Path(folder).absolute()
        self._rule = {"keep": keep, "keep_every": keep_every, "keep_best": keep_best}
        self._report = report or (lambda event, text, **fields: print(text, file=sys.stderr))
        self._bound = _PATIENCE * processes.time_limit()
        self._writer = ocp.AsyncCheckpointer(
            # Named here, so that an item can be read alone.
            ocp.CompositeCheckpointHandler(
                params=ocp.StandardCheckpointHandler(),
                rest=ocp.StandardCheckpointHandler(),
                record=ocp.JsonCheckpointHandler(),
            ),
            async_options=ocp.AsyncOptions(timeout_secs=int(self._bound) + 1),
        )
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._step: int | None = None  # saved last, or being saved
        self.committed: int | None = None  # the step of the last save that went well
        self._moved = 0.0  # when the save was last seen to get on

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        try:
            self.wait()
        except Exception as problem:
            if error is None:
                raise
            self._report("save_failed", f"the last checkpoint could not be saved either: {problem}", step=self._step)
        if self._thread is None:
            self._writer.close()

    def steps(self) -> list[int]:
        """The steps that were written whole, in order."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))

    def latest_step(self) -> int | None:
        """The newest step that was written whole; None: there is none."""
        return max(self.steps(), default=None)

    def clean(self) -> None:
        """Deletes what a process that died has left half written or half deleted; only by whom the run belongs to."""
        for path in list(self.folder.iterdir()) if self.folder.is_dir() else []:
            if _LEFTOVER.match(path.name):
                shutil.rmtree(path)

    def save(self, state: TrainState, record: dict[str, Any]) -> bool:
        """Copies the state to the host and writes it in the background; a step that is there already is left alone.

        Args:
          state: may be donated to the next train step as soon as this returns.
          record: JSON values, given back by `restore`.

        Returns:
          Whether a save has begun.

        Raises:
          NotFinite: a parameter or the optimizer state has NaN or infinities; nothing is written.
          Exception: what went wrong with the previous save, if anything did.
        """
        step = int(state.step)
        self.wait()
        if step == self._step or processes.broadcast_from_lead("look for the checkpoint", lambda: step in self.steps()):
            return False
        self._refuse_not_finite(state)
        rest = state.replace(params=None)
        leaves = describe(state.params, "params") | describe(rest, "rest")
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            rest=ocp.args.StandardSave(rest),
            record=ocp.args.JsonSave(record),
        )
        _at("begin")
        if processes.is_lead():
            self.folder.mkdir(parents=True, exist_ok=True)
        self._progress()
        try:
            self._writer.save(self._partial(step), args=args)
        except Exception:
            self._clear(step)
            raise
        self._step = step
        self._thread = threading.Thread(target=self._commit, args=(step, leaves), name="checkpoint", daemon=True)
        self._thread.start()
        return True

    def failure(self) -> Exception | None:
        """What went wrong with the last save, as soon as it is known and only once; does not wait."""
        if self.busy():
            return None
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self._step = None
        return error

    def busy(self) -> bool:
        """Whether a save is on its way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Waits until everything is on disk; raises what went wrong.

        Raises:
          TimeoutError: the save does not get on any more.
        """
        begin = notice = time.monotonic()
        while self.busy():
            self._thread.join(0.2)
            now = time.monotonic()
            if now - notice >= _NOTICE_SECONDS:
                notice = now
                text = f"waiting for the checkpoint of step {self._step} to be written, for {now - begin:.0f} s so far"
                self._report("save_slow", text, step=self._step, seconds=now - begin)
            if now - self._moved >= self._bound:
                leave_behind(self._thread)
                raise TimeoutError(
                    f"the checkpoint of step {self._step} has not got on for {self._bound:g} s: see whether "
                    f"{self.folder} can be written to, or give more time with JAXTRAIN_TIMEOUT"
                )
        error = self.failure()
        if error is not None:
            raise error

    def restore(
        self, like: TrainState, step: int | None = None, *, repair: bool = False
    ) -> tuple[TrainState, dict[str, Any]]:
        """Reads a TrainState and its record.

        Args:
          like: a tree of `jax.ShapeDtypeStruct` with shardings: what the state must be, and where it goes.
          step: which checkpoint; None: the newest that is not damaged. What is, is reported.
          repair: set aside the damaged ones that are newer, so that their steps can be saved again.

        Raises:
          ValueError: no such checkpoint, or a damaged one that was asked for by its step, or none that is whole, or one
            with missing, extra, misshapen or mistyped leaves, by path.
        """
        rest = like.replace(params=None)
        step = self._choose(step, {"params": like.params, "rest": rest}, repair)
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(like.params),
            rest=ocp.args.StandardRestore(rest),
            record=ocp.args.JsonRestore(),
        )
        restored = self._writer.restore(self.folder / str(step), args=args)
        return restored["rest"].replace(params=restored["params"]), restored["record"]

    def restore_params(self, like: Any, step: int | None = None) -> tuple[Any, int]:
        """Reads the parameters alone; returns them and the step. Arguments and errors as for `restore`."""
        step = self._choose(step, {"params": like}, False)
        args = ocp.args.Composite(params=ocp.args.StandardRestore(like))
        return self._writer.restore(self.folder / str(step), args=args)["params"], step

    def read_record(self, step: int) -> dict[str, Any]:
        """The record of a checkpoint."""
        return self._writer.restore(self.folder / str(step), args=ocp.args.Composite(record=ocp.args.JsonRestore()))[
            "record"
        ]

    def score(self, step: int, nll: float) -> None:
        """Notes the validation loss of a step, for `keep_best`."""
        if self._rule["keep_best"] and processes.is_lead():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / _SCORES, {**self._scores(), step: float(nll)})

    def rewind(self, step: int) -> list[int]:
        """Sets aside all checkpoints after a step, which must be whole; returns their steps.

        Raises:
          ValueError: no such checkpoint, or a damaged one.
        """
        self._require(step)
        try:
            verify(self.folder / str(step))
        except Damaged as problem:
            raise ValueError(f"checkpoint {self.folder / str(step)} is damaged: {problem}") from None
        later = [other for other in self.steps() if other > step]
        for other in reversed(later):  # so that a crash leaves no gap
            self._set_aside(other, "rewound")
        if scores := self._scores():
            write_json(self.folder / _SCORES, {other: nll for other, nll in scores.items() if other <= step})
        return later

    def prune(self) -> None:
        """Deletes the checkpoints that are not to stay."""
        steps = self.steps()
        stay = kept(steps, self._scores(), **self._rule)
        for step in steps:
            if step not in stay:
                doomed = self.folder / f".{step}.deleting"
                os.rename(self.folder / str(step), doomed)
                _at("deleting")
                shutil.rmtree(doomed)

    def _commit(self, step: int, leaves: dict[str, Any]) -> None:
        """On a thread: waits for Orbax, seals the folder, gives it its name, and deletes what is too old."""
        try:
            _at("arrays")
            self._writer.wait_until_finished()
            self._progress()
            if processes.is_lead():
                _at("unsealed")
                seal(self._partial(step), step, leaves, self._progress)
                _at("sealed")
                os.rename(self._partial(step), self.folder / str(step))
                sync_folder(self.folder)
                _at("committed")
                self.prune()
            self.committed = step
        except Exception as error:
            self._clear(step)
            self._error = error

    def _clear(self, step: int) -> None:
        """Makes room again after a save that failed; under several processes the run ends, and its next start does."""
        if jax.process_count() > 1:
            return
        deadline = time.monotonic() + _CLEAR_SECONDS
        while (left := list(self.folder.glob(f".{step}.partial*"))) and time.monotonic() < deadline:
            for path in left:  # a thread of Orbax may still be writing there
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.01)

    def _progress(self) -> None:
        self._moved = time.monotonic()

    def _partial(self, step: int) -> Path:
        return self.folder / f".{step}.partial"

    def _scores(self) -> dict[int, float]:
        return {int(step): nll for step, nll in (read_json(self.folder / _SCORES) or {}).items()}

    def _require(self, step: int | None) -> list[int]:
        steps = self.steps()
        if not steps:
            raise ValueError(f"no checkpoint in {self.folder}: train first, or give another run directory")
        if step is not None and step not in steps:
            raise ValueError(f"no checkpoint of step {step} in {self.folder}; there are {steps}")
        return steps

    def _choose(self, step: int | None, like: dict[str, Any], repair: bool) -> int:
        """The step to read, found by process 0 for all."""

        def choose() -> int:
            steps = self._require(step)
            damaged: dict[int, Damaged] = {}
            for candidate in reversed(steps) if step is None else [step]:
                try:
                    manifest = verify(self.folder / str(candidate), tuple(like))
                except Damaged as problem:
                    damaged[candidate] = problem
                    continue
                self._check(candidate, manifest["leaves"], like)
                for number, problem in damaged.items():
                    text = f"checkpoint {number} is damaged: {problem}; going back to step {candidate}"
                    self._report("checkpoint_damaged", text, step=number, problem=str(problem), back_to=candidate)
                    if repair:
                        self._set_aside(number, "damaged")
                return candidate
            listed = "; ".join(f"checkpoint {number} is damaged: {problem}" for number, problem in damaged.items())
            others = [other for other in steps if other != step] if step is not None else []
            remedy = f"try another step: there are {others}" if others else "restore the files from a copy"
            raise ValueError(f"{listed} (in {self.folder}): {remedy}")

        return processes.broadcast_from_lead("verify the checkpoint", choose)

    def _check(self, step: int, leaves: dict[str, Any], like: dict[str, Any]) -> None:
        for part, tree in like.items():
            saved = {path: leaf for path, leaf in leaves.items() if path.split("/")[0] == part}
            problems = compare(saved, describe(tree, part))
            if problems:
                listed = "\n  ".join(problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else []))
                raise ValueError(
                    f"checkpoint {self.folder / str(step)} does not fit this run; restore it with the config that "
                    f"wrote it ({part}):\n  {listed}"
                )

    def _set_aside(self, step: int, why: str) -> None:
        aside, number = self.folder / f"{step}.{why}", 1
        while aside.exists():
            number += 1
            aside = self.folder / f"{step}.{why}.{number}"
        os.rename(self.folder / str(step), aside)
        sync_folder(self.folder)

    def _refuse_not_finite(self, state: TrainState) -> None:
        tree = {"params": state.params, "opt_state": state.opt_state}
        found = jax.tree_util.tree_leaves_with_path(tree)
        leaves = {path: leaf for path, leaf in found if jnp.issubdtype(leaf.dtype, jnp.inexact)}
        if not leaves:
            return
        sharding = next(iter(leaves.values())).sharding
        everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
        finite = np.asarray(jax.jit(_are_finite, out_shardings=everywhere)(list(leaves.values())))
        if not finite.all():
            bad = [
                jax.tree_util.keystr(path, simple=True, separator="/")
                for path, ok in zip(leaves, finite, strict=True)
                if not ok
            ]
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            last = self.latest_step()
            raise NotFinite(
                f"the state of step {int(state.step)} is not finite and is not saved: {', '.join(bad[:5])}{more}; "
                + (f"the newest checkpoint is that of step {last}" if last is not None else "there is no checkpoint")
            )


def _are_finite(leaves: list[jax.Array]) -> jax.Array:
    """bool [number of leaves]"""
    # x - x is 0 or NaN, and a sum is vectorized where a reduction of bools is not: a third of the time on CPUs.
    return jnp.stack([jnp.sum(leaf - leaf) == 0 for leaf in leaves])
