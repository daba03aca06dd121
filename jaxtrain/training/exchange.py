"""Import of a model of transformers into a run directory, and export of a run into a folder of transformers."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jax
import optax

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.save import Saver
from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from jaxtrain.inference.load import find_step, is_imported, read_mean
from jaxtrain.inference.pretrained import copy_companions, read_tokenizer, write_tokenizer
from jaxtrain.models.hf.config_json import to_hf_config
from jaxtrain.models.hf.read import PretrainedFolder
from jaxtrain.models.hf.write import SHARD_BYTES, write_model
from jaxtrain.models.lora import without_lora
from jaxtrain.runtime.files import sync_folder
from jaxtrain.step import TrainState
from jaxtrain.training.run import Run, fingerprint, open_run, tokenizer_hash
from jaxtrain.training.run_folder import absolute_paths, run_lock, write_config

_SEQ_LEN, _BATCH_SIZE = 1024, 8  # of the config of an import


def import_model(folder: str | Path, run_dir: str | Path) -> Run:
    """Makes a run directory from a model of transformers: config.json, tokenizer, and a checkpoint of step 0.

    `--train.init-from` trains it further in another run directory. Its config computes in the dtype of the weights,
    bfloat16 or float32; the parameters are float32. Raises a ValueError for a model that is missing or that the decoder
    does not compute, and for a run directory that is not empty.
    """
    model = PretrainedFolder(folder)
    tokenizer = read_tokenizer(model)
    path = Path(run_dir).expanduser()
    _require_empty(path)
    config = absolute_paths(_config_of(model, path), path)
    with run_lock(path), _emptied_on_error(path):
        write_config(path, config)
        tokenizer.save(path)
        copy_companions(model.path, path)
        run = open_run(path, data=False)
        # No optimizer state: the checkpoint is only ever a source of weights.
        state = TrainState.create(model.read_params(run.program.abstract_state.params), optax.identity())
        with Saver(CheckpointFolder(path / "checkpoints")) as saver:
            saver.finish(state, fingerprint(run))
    return run


def _config_of(model: PretrainedFolder, run_dir: Path) -> Config:
    c = model.config
    return Config(
        data=DataConfig(store=str(run_dir / "data")),  # there is none: eval and train name theirs
        model=c,
        train=TrainConfig(
            batch_size=_BATCH_SIZE,
            seq_len=min(_SEQ_LEN, c.max_seq_len),
            precision="bfloat16" if model.dtype == "bfloat16" else "float32",
        ),
        mesh=MeshConfig(data=1, fsdp=-1 if c.d_model % len(jax.devices()) == 0 else 1),
    )


def export_model(
    run: Run,
    folder: str | Path,
    *,
    step: int | Literal["best"] | None = None,
    average: int = 1,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Writes the model of a run as a folder of transformers. Returns the step of its checkpoint.

    Args:
      run: the run, as `open_run(folder, data=False)` opens it.
      folder: the new folder; empty or absent. It appears when it is complete.
      step, average: see `inference.load.load`.
      dtype: float32 keeps every bit of the parameters; float16 or bfloat16.

    Raises:
      ValueError: no such checkpoint, a folder that is not empty, or no architecture of transformers that computes the
        model.
    """
    if not isinstance(run.config.model, ModelConfig):
        name = type(run.config.model).__name__
        raise ValueError(f"{name} has no format in transformers: write its parameters yourself")
    model = run.program.model.config
    to_hf_config(model)
    path = Path(folder).expanduser()
    _require_empty(path)
    like = run.program.abstract_state.params
    params, step = read_mean(run.folder, like, find_step(run.folder, step), average, tokenizer_hash(run), model)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with _emptied_on_error(partial):
        tokens = {}
        if tokenizer_hash(run) is not None:
            tokens = write_tokenizer(partial, run.folder, run.tokenizer, begins=not is_imported(run.folder, step))
        write_model(partial, without_lora(model), params, dtype=dtype, shard_bytes=shard_bytes, more=tokens)
        os.replace(partial, path)
        sync_folder(path.parent)
    return step


def _require_empty(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--out {path} is a file or holds something: give another folder")


@contextlib.contextmanager
def _emptied_on_error(path: Path) -> Iterator[None]:
    """Deletes what the block has left in a folder if the block fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
