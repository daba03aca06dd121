"""Config of an existing run: read, or recovered from a checkpoint if a crash has lost the file."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jaxtrain.checkpoints.folder import CheckpointFolder
from jaxtrain.checkpoints.restore import find_fingerprint
from jaxtrain.config import Config, ModelConfig, SavedModel
from jaxtrain.runtime.config_files import differences, from_json, load_run_config
from jaxtrain.runtime.files import read_json
from jaxtrain.runtime.terminal import echo


def lost_config(folder: Path) -> tuple[dict[str, Any], int] | None:
    """Returns the config in the newest whole checkpoint and its step, if config.json is missing or no valid config.

    Returns None too if the config in the checkpoint is not valid, as after a run of a later version.
    """
    if _is_valid(read_json(folder / "config.json")):
        return None
    found = find_fingerprint(CheckpointFolder(folder / "checkpoints"))
    return (found[0]["config"], found[1]) if found and _is_valid(found[0].get("config")) else None


def _is_valid(values: Any) -> bool:
    try:
        from_json(json.dumps(values))
    except ValueError:
        return False
    return True


def read_config(folder: Path, model: Any = None) -> Config:
    """Reads the config of a run; a lost or torn config.json is replaced by the config in a checkpoint. Writes nothing.

    `model` is the model of the config file, for a run whose config file defines one.

    Raises:
      ValueError: no run in the folder, a config that is not valid, or another model.
    """
    if lost := lost_config(folder):
        values, step = lost
        echo(f"{folder / 'config.json'} is lost: reading the config in the checkpoint of step {step}", file=sys.stderr)
        config = from_json(json.dumps(values))
    else:
        config = load_run_config(folder)
    if isinstance(config.model, SavedModel) and model is None:
        raise ValueError(f"{folder} has the custom model {config.model.custom}: give --config CONFIG.py, or `model`")
    # The sizes of the built-in transformer are in config.json; the config file then serves for its schedule.
    if model is not None and not (isinstance(model, ModelConfig) and isinstance(config.model, ModelConfig)):
        saved, config = config, dataclasses.replace(config, model=model)
        if changed := differences(saved, config):
            raise ValueError(f"{folder} has another model than the file of --config\n  " + "\n  ".join(changed))
    return config
