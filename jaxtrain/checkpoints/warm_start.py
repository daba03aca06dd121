"""Starting a run from the weights of another: step 0, a fresh optimizer. Going on with a run is another thing."""

from pathlib import Path
from typing import Any

from jaxtrain.checkpoints.checkpoints import Checkpoints


def find(source: str, run_dir: Path) -> tuple[Path, int | None]:
    """The run and the step that a path names; None: the newest.

    Args:
      source: RUN or RUN/checkpoints/STEP.
      run_dir: the folder of the run that is to start.

    Raises:
      ValueError: no such checkpoint, or one of the run itself.
    """
    path, step = Path(source), None
    if path.parent.name == "checkpoints" and path.name.isdigit():
        path, step = path.parent.parent, int(path.name)
    if path.resolve() == run_dir.resolve():
        raise ValueError(
            f"train.init_from {source} is the run's own folder: to go on with a run leave train.init_from out; "
            "to start another from its weights give another --run-dir"
        )
    steps = Checkpoints(path / "checkpoints").steps()
    if not steps or (step is not None and step not in steps):
        there = f"its checkpoints are {steps}" if steps else "it has no checkpoint"
        raise ValueError(f"train.init_from {source}: no such checkpoint, {there}; give RUN or RUN/checkpoints/STEP")
    return path, step


def read(source: str, run_dir: Path, like: Any, tokenizer: str) -> tuple[Any, int]:
    """The parameters of another run's checkpoint and its step.

    Args:
      source: RUN or RUN/checkpoints/STEP.
      run_dir: the folder of the run that is to start.
      like: a tree of `jax.ShapeDtypeStruct` with shardings, which the parameters must fit.
      tokenizer: SHA-256 (hex) of the tokenizer that the new run reads.

    Raises:
      ValueError: no such checkpoint, a damaged one, leaves that do not fit, by path, or another tokenizer.
    """
    path, step = find(source, run_dir)
    with Checkpoints(path / "checkpoints") as checkpoints:
        params, step = checkpoints.restore_params(like, step)
        theirs = checkpoints.read_record(step).get("tokenizer")
    if theirs != tokenizer:
        raise ValueError(
            f"train.init_from {source}: its weights were trained with another tokenizer ({str(theirs)[:12]}..., this "
            f"run has {tokenizer[:12]}...): prepare the data with that run's tokenizer"
        )
    return params, step
