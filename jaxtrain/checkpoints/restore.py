"""Restores checkpoints: chooses the newest whole one, verifies its bytes and its leaves, reads it onto the devices."""

import json
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.leaves import compare, describe
from jaxtrain.checkpoints.manifest import FINGERPRINT, Damaged, verify
from jaxtrain.runtime import processes
from jaxtrain.step import TrainState

_LISTED = 20  # differing leaves named in an error


def restore(
    folder: CheckpointFolder, like: TrainState, step: int | None = None, *, repair: bool = False
) -> tuple[TrainState, dict[str, Any]]:
    """Reads a TrainState and its fingerprint.

    Args:
      folder: the run's checkpoints.
      like: a tree of `jax.ShapeDtypeStruct` with shardings: the expected leaves, and where they go.
      step: which checkpoint. None chooses the newest whole one; damaged ones are reported.
      repair: set aside the damaged checkpoints that are newer, so that their steps can be saved again.

    Raises:
      ValueError: the checkpoint is missing or damaged, or no checkpoint is whole, or the checkpoint has missing, extra,
        misshapen or mistyped leaves (named by path).
    """
    rest = like.replace(params=None)
    step = choose(folder, {"params": like.params, "rest": rest}, step, repair=repair)
    restored = _read(folder.checkpoint(step), {"params": like.params, "rest": rest})
    state = restored["rest"].replace(params=restored["params"])
    return state, _fingerprint(folder.checkpoint(step))


def restore_params(folder: CheckpointFolder, like: Any, step: int | None = None) -> tuple[Any, int]:
    """Reads the parameters alone; returns them and the step. Arguments and errors are those of `restore`."""
    step = choose(folder, {"params": like}, step)
    return _read(folder.checkpoint(step), {"params": like})["params"], step


def read_fingerprint(folder: CheckpointFolder, step: int | None = None) -> tuple[dict[str, Any], int]:
    """Reads the fingerprint of a checkpoint alone; returns it and the step.

    Args:
      folder: the run's checkpoints.
      step: which checkpoint. None chooses the newest one whose fingerprint is whole.

    Raises:
      ValueError: the checkpoint is missing or damaged.
    """
    step = choose(folder, {}, step)
    return _fingerprint(folder.checkpoint(step)), step


def choose(folder: CheckpointFolder, like: dict[str, Any], step: int | None = None, *, repair: bool = False) -> int:
    """Returns the step of the newest whole checkpoint, chosen by the lead process for all processes.

    Args:
      folder: the run's checkpoints.
      like: trees that the checkpoint's parts must fit, by name of the part; other parts need not be whole.
      step: the only candidate. None tries all, from the newest on.
      repair: set aside damaged checkpoints that are newer than the chosen one.

    Raises:
      ValueError: as for `restore`.
    """

    def chosen() -> int:
        steps = folder.require(step)
        damaged: dict[int, Damaged] = {}
        for candidate in reversed(steps) if step is None else [step]:
            try:
                manifest = verify(folder.checkpoint(candidate), tuple(like) or ("record",))
            except Damaged as problem:
                damaged[candidate] = problem
                continue
            _require_fit(folder.checkpoint(candidate), manifest["leaves"], like)
            for number, problem in damaged.items():
                text = f"checkpoint {number} is damaged: {problem}; going back to step {candidate}"
                folder.report("checkpoint_damaged", text, step=number, problem=str(problem), back_to=candidate)
                if repair:
                    folder.set_aside(number, "damaged")
            return candidate
        listed = "; ".join(f"checkpoint {number} is damaged: {problem}" for number, problem in damaged.items())
        others = [other for other in steps if other != step] if step is not None else []
        remedy = f"try another step: there are {others}" if others else "restore the files from a copy"
        raise ValueError(f"{listed} (in {folder.path}): {remedy}")

    return processes.broadcast_from_lead("verify the checkpoint", chosen)


def _require_fit(path: Path, leaves: dict[str, Any], like: dict[str, Any]) -> None:
    for part, tree in like.items():
        saved = {name: leaf for name, leaf in leaves.items() if name.split("/")[0] == part}
        if problems := compare(saved, describe(tree, part)):
            more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
            listed = "\n  ".join(problems[:_LISTED] + more)
            raise ValueError(
                f"checkpoint {path} does not fit this run; restore it with the config that wrote it ({part}):\n"
                f"  {listed}"
            )


def _read(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    handlers = {part: ocp.StandardCheckpointHandler() for part in like}
    args = {part: ocp.args.StandardRestore(tree) for part, tree in like.items()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as reader:
        restored = reader.restore(path, args=ocp.args.Composite(**args))
    return {part: restored[part] for part in like}


def _fingerprint(path: Path) -> dict[str, Any]:
    return json.loads((path / FINGERPRINT).read_bytes())
