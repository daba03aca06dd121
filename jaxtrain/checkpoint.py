"""Checkpoints of a run with Orbax: asynchronous to write, strict to read.

A checkpoint `checkpoints/STEP/` holds the parameters, the rest of the TrainState (apart, so that evaluation reads no
optimizer state) and a JSON record of what the run was made with.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxtrain.step import TrainState


class Checkpoints:
    """The checkpoints in one folder; a context manager that waits for the last write.

    Args:
      folder: where they are; made if need be.
      keep: how many of the newest are kept.
    """

    def __init__(self, folder: str | Path, *, keep: int = 3):
        self.folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
            # Named here, so that what is saved can be listed before it is read.
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "rest": ocp.StandardCheckpointHandler(),
                "record": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """The newest step that was written whole; None: there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """The steps that were written whole, in ascending order."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, record: dict[str, Any]) -> None:
        """Copies the state to the host and writes it in the background; a step that is there already is left alone.

        Args:
          state: may be donated to the next train step as soon as this returns.
          record: JSON values, given back by `restore`.

        Raises:
          Exception: what went wrong with the previous save, if anything did.
        """
        step = int(state.step)
        self._manager.check_for_errors()
        if self._manager.latest_step() == step:
            return
        rest = state.replace(params=None)
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            rest=ocp.args.StandardSave(rest),
            record=ocp.args.JsonSave(record),
        )
        self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Waits until everything is on disk; raises what went wrong."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """Reads a TrainState and its record.

        Args:
          like: a tree of `jax.ShapeDtypeStruct` with shardings: what the state must be, and where it goes.
          step: which checkpoint; None: the newest.

        Raises:
          ValueError: no such checkpoint, or one with missing, extra, misshapen or mistyped leaves, by path.
        """
        step = self._pick(step)
        rest = like.replace(params=None)
        self._check(step, "params", like.params)
        self._check(step, "rest", rest)
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(like.params),
            rest=ocp.args.StandardRestore(rest),
            record=ocp.args.JsonRestore(),
        )
        restored = self._manager.restore(step, args=args)
        return restored.rest.replace(params=restored.params), restored.record

    def restore_params(self, like: Any, step: int | None = None) -> tuple[Any, int]:
        """Reads the parameters alone; returns them and the step. Arguments and errors as for `restore`."""
        step = self._pick(step)
        self._check(step, "params", like)
        args = ocp.args.Composite(params=ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=args).params, step

    def _pick(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise ValueError(f"no checkpoint in {self.folder}: train first, or give another run directory")
        if step is None:
            return steps[-1]
        if step not in steps:
            raise ValueError(f"no checkpoint of step {step} in {self.folder}; there are {steps}")
        return step

    def _check(self, step: int, item: str, like: Any) -> None:
        saved = _describe(self._manager.item_metadata(step)[item].tree)
        wanted = _describe(like)
        problems = [f"{path}: missing from the checkpoint" for path in wanted if path not in saved]
        problems += [f"{path}: in the checkpoint, not in the run" for path in saved if path not in wanted]
        problems += [
            f"{path}: {saved[path]} in the checkpoint, {wanted[path]} in the run"
            for path in wanted
            if path in saved and saved[path] != wanted[path]
        ]
        if problems:
            listed = "\n  ".join(problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else []))
            raise ValueError(
                f"checkpoint {self.folder / str(step)} does not fit this run; restore it with the config that wrote "
                f"it ({item}):\n  {listed}"
            )


def _describe(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }
