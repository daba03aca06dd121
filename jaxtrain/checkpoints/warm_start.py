"""Warm start: a new run that begins at step 0 with the weights of another run and a fresh optimizer."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import chex

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.restore import choose, restore_params
from jaxtrain.runtime.remote import local_run


def find(source: str, run_dir: Path) -> tuple[Path, int | None]:
    """Splits a source into the run directory and the step that it names; step None is the newest.

    Args:
      source: RUN or RUN/checkpoints/STEP; RUN may be a URL, of which a local copy is made.
      run_dir: directory of the run that is to start.

    Raises:
      ValueError: no such checkpoint, or the source is the run itself.
    """
    run, _, name = source.rstrip("/").rpartition("/checkpoints/")
    path, step = (local_run(run), int(name)) if run and name.isdigit() else (local_run(source), None)
    if path.resolve() == run_dir.resolve():
        raise ValueError(f"train.init_from {source} is the run's own folder: leave it out, or give another --run-dir")
    steps = CheckpointFolder(path / "checkpoints").steps()
    if not steps or (step is not None and step not in steps):
        there = f"its checkpoints are {steps}" if steps else "it has no checkpoint"
        raise ValueError(f"train.init_from {source}: no such checkpoint, {there}; give RUN or RUN/checkpoints/STEP")
    return path, step


def check(source: str, run_dir: Path, like: chex.ArrayTree) -> None:
    """Verifies the checkpoint that `read` would read, and that it fits. Arguments and errors: see `read`."""
    path, step = find(source, run_dir)
    with _naming_lora(source):
        choose(CheckpointFolder(path / "checkpoints"), {"params": like}, step)


@contextlib.contextmanager
def _naming_lora(source: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if "_lora/" not in str(error):
            raise
        raise ValueError(
            f"train.init_from {source}: that run has LoRA matrices: `jaxtrain export` merges them into its weights, "
            "and `jaxtrain import` makes a run of the result"
        ) from None


def read(source: str, run_dir: Path, like: chex.ArrayTree, tokenizer: str | None) -> tuple[chex.ArrayTree, int]:
    """Reads the parameters of another run's checkpoint; returns them and the step.

    Args:
      source: RUN or RUN/checkpoints/STEP.
      run_dir: directory of the run that is to start.
      like: a tree of `jax.ShapeDtypeStruct` with shardings, which the parameters must fit.
      tokenizer: SHA-256 (hex) of the new run's tokenizer; None if it has none.

    Raises:
      ValueError: the checkpoint is missing or damaged, leaves do not fit (named by path), or the tokenizer differs.
    """
    path, step = find(source, run_dir)
    with _naming_lora(source):
        params, fingerprint, step = restore_params(CheckpointFolder(path / "checkpoints"), like, step)
    theirs = fingerprint.get("tokenizer")
    if theirs and tokenizer and theirs != tokenizer:
        raise ValueError(
            f"train.init_from {source}: its weights were trained with another tokenizer ({str(theirs)[:12]}..., this "
            f"run has {tokenizer[:12]}...): prepare the data with that run's tokenizer"
        )
    return params, step
