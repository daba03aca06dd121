"""Restores checkpoints: chooses the newest whole one, verifies its bytes and its leaves, reads it onto the devices."""

import contextlib
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import chex
import jax
import orbax.checkpoint as ocp

from jaxtrain.checkpoints.folder import CheckpointFolder, require_readable_path
from jaxtrain.checkpoints.leaves import NotFinite, compare, describe_leaves, not_finite
from jaxtrain.checkpoints.manifest import FINGERPRINT, Damaged, verify
from jaxtrain.runtime import processes

if TYPE_CHECKING:  # it imports optax, which reading parameters does not need
    from jaxtrain.step import TrainState

_LISTED = 20  # differing leaves named in an error


def restore(
    folder: CheckpointFolder,
    like: "TrainState",
    step: int | None = None,
    *,
    last: int | None = None,
    repair: bool = False,
) -> tuple["TrainState", dict[str, Any]]:
    """Reads a TrainState and its fingerprint.

    Args:
      like: a tree of `jax.ShapeDtypeStruct` with shardings: the expected leaves, and where they go.
      step: which checkpoint. None chooses the newest whole one; damaged ones are reported.
      last: ignores later steps; None ignores none.
      repair: rename newer damaged checkpoints to STEP.damaged, so that their steps can be saved again.

    Raises:
      Damaged: the checkpoint is damaged, or no checkpoint is whole.
      ValueError: no checkpoint, or one with missing, extra, misshapen, mistyped or non-finite leaves (named by path).
    """
    rest = like.replace(params=None)
    step = choose(folder, {"params": like.params, "rest": rest}, step, last=last, repair=repair)
    restored = _read(folder.checkpoint(step), {"params": like.params, "rest": rest})
    state = restored["rest"].replace(params=restored["params"])
    _require_finite(folder.checkpoint(step), {"params": state.params, "opt_state": state.opt_state})
    return state, _fingerprint(folder.checkpoint(step))


def restore_params(
    folder: CheckpointFolder, like: chex.ArrayTree, step: int | None = None
) -> tuple[chex.ArrayTree, dict[str, Any], int]:
    """Reads the parameters alone; returns them, the fingerprint and the step. See `restore` for the arguments."""
    step = choose(folder, {"params": like}, step)
    params = _read(folder.checkpoint(step), {"params": like})["params"]
    _require_finite(folder.checkpoint(step), {"params": params})
    return params, _fingerprint(folder.checkpoint(step)), step


def find_fingerprint(folder: CheckpointFolder, last: int | None = None) -> tuple[dict[str, Any], int] | None:
    """Returns the fingerprint and step of the newest checkpoint, not after `last`, whose fingerprint is whole, or None.

    Reports nothing, and no other process takes part.
    """
    for step in reversed([step for step in folder.steps() if last is None or step <= last]):
        with contextlib.suppress(Damaged):
            verify(folder.checkpoint(step), ("record",))
            return _fingerprint(folder.checkpoint(step)), step
    return None


def choose(
    folder: CheckpointFolder,
    like: dict[str, Any],
    step: int | None = None,
    *,
    last: int | None = None,
    repair: bool = False,
    gather: Callable[[str, Any], list | None] = processes.gather_on_lead,
) -> int:
    """Returns the step of the newest whole checkpoint. Each process verifies a share of the files.

    Args:
      like: trees that the checkpoint's parts must fit, by name of the part; other parts need not be whole.
      step: the only candidate. None tries all, from the newest on.
      last: ignores later steps; None ignores none.
      repair: rename damaged checkpoints that are newer than the chosen one.
      gather: returns the values of all processes on the lead.

    Raises:
      ValueError: as for `restore`.
    """
    steps = processes.broadcast_from_lead("find the checkpoints", lambda: folder.require(step))
    steps = [found for found in steps if last is None or found <= last]
    damaged: dict[int, str] = {}
    for candidate in reversed(steps) if step is None else [step]:
        problem, leaves, num_bytes = _verify_all(folder.checkpoint(candidate), tuple(like), gather)
        if problem:
            damaged[candidate] = problem
            continue
        _require_fit(folder.checkpoint(candidate), leaves, like)
        report = functools.partial(_report_damaged, folder, damaged, candidate, repair)
        processes.run_on_lead("report damaged checkpoints", report)
        folder.report("verified", "", step=candidate, bytes_hashed=num_bytes)
        return candidate
    listed = "; ".join(f"checkpoint {number} is damaged: {problem}" for number, problem in damaged.items())
    others = [other for other in steps if other != step] if step is not None else []
    remedy = f"try another step: there are {others}" if others else "restore the files from a copy"
    raise Damaged(f"{listed} (in {folder.path}): {remedy}")


def _verify_all(path: Path, parts: tuple[str, ...], gather: Callable) -> tuple[str, dict[str, Any], list[int]]:
    """Returns the first problem ("" if whole), the leaves, and the bytes hashed by each process."""
    problem, num_bytes = "", 0
    leaves: dict[str, Any] = {}
    try:
        leaves, num_bytes = verify(path, parts, process=jax.process_index(), count=jax.process_count())
    except Damaged as error:
        problem = str(error)
    shares = gather("verify the checkpoint", [problem, num_bytes])
    shares = processes.broadcast_from_lead("verify the checkpoint", lambda: shares)
    problem = next((problem for problem, _ in shares if problem), "")
    return problem, leaves, [num_bytes for _, num_bytes in shares]


def _report_damaged(folder: CheckpointFolder, damaged: dict[int, str], chosen: int, repair: bool) -> None:
    for number, problem in damaged.items():
        text = f"checkpoint {number} is damaged: {problem}; going back to step {chosen}"
        folder.report("checkpoint_damaged", text, step=number, problem=problem, back_to=chosen)
        if repair:
            try:
                folder.retire(number, "damaged")
            except OSError as error:
                folder.warn(folder.checkpoint(number), f"this damaged checkpoint could not be renamed: {error}")


def _require_finite(path: Path, tree: chex.ArrayTree) -> None:
    if bad := not_finite(tree):
        raise NotFinite(f"checkpoint {path} holds NaN or infinities in {bad}: use an earlier checkpoint")


def _require_fit(path: Path, leaves: dict[str, Any], like: dict[str, Any]) -> None:
    for part, tree in like.items():
        saved = {name: leaf for name, leaf in leaves.items() if name.split("/")[0] == part}
        if problems := compare(saved, describe_leaves(tree, part)):
            more = [f"and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
            listed = "\n  ".join(problems[:_LISTED] + more)
            raise ValueError(f"checkpoint {path} does not fit this run: give its config ({part}):\n  {listed}")


def _read(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    require_readable_path(path)
    handlers = {part: ocp.StandardCheckpointHandler() for part in like}
    args = {part: ocp.args.StandardRestore(tree) for part, tree in like.items()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers)) as reader:
        restored = reader.restore(path, args=ocp.args.Composite(**args))
    parts = {part: restored[part] for part in like}
    chex.assert_trees_all_equal_shapes_and_dtypes(parts, like)
    return parts


def _fingerprint(path: Path) -> dict[str, Any]:
    return json.loads((path / FINGERPRINT).read_bytes())
