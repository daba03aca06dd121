"""Reads and writes configs: Python files, which are executed, and config.json, which is not."""

import contextlib
import dataclasses
import importlib
import json
import runpy
import sys
import traceback
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxtrain.config import Config, ModelConfig, SavedModel, to_dict
from jaxtrain.fields import check_value, nearest, require_local, suggest
from jaxtrain.runtime.terminal import one_line

# Values of older versions that are no longer allowed, with their replacements.
_ZERO_WAS_NONE = (
    *("model.vocab_size", "model.num_kv_heads", "model.head_dim", "model.attention_window", "model.logit_softcap"),
    *("model.attention_softcap", "guard.sigmas", "optim.decay_steps", "train.loss_chunk", "train.diagnose_every"),
    *("train.eval_every", "train.eval_batches", "train.replay_check", "train.stop_after", "train.sample_tokens"),
    *("checkpoint.keep_every", "checkpoint.keep_best"),
)
_RENAMED: dict[tuple[str, Any], Any] = {("model.scan_unroll", -1): "auto", ("model.scan_unroll", 0): "all"}
_RENAMED |= {("data.store", ""): None, ("train.init_from", ""): None} | {(path, 0): None for path in _ZERO_WAS_NONE}
_REMOVED = ("faults", "checkpoint.retries")


def load_config(path: str | Path) -> Config:
    """Reads a config from a `.py` file (executed: it is the user's own code) or a `.json` file (not executed).

    A `.py` file may import modules of its folder. Raises a ValueError that names the line if there is no valid config.
    """
    path, given = Path(path).expanduser(), path
    if not path.is_file():
        require_local(given, "the config file")
        raise ValueError(f"no config file {path}: {_config_near(path)}")
    if path.suffix == ".json":
        try:
            return from_json(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}; correct it, or give another config") from None
    if path.suffix != ".py":
        raise ValueError(f"config {path} must end in .py or .json")
    try:
        with _neighbours_importable(path) as module:
            function = (runpy.run_module(module) if module else runpy.run_path(str(path))).get("config")
            if not callable(function):
                raise ValueError("there is no function config() that returns a Config")
            result = function()
        if not isinstance(result, Config):
            raise ValueError(f"config() returned {type(result).__name__}, not a Config")
        return result
    except (Exception, SystemExit) as error:
        text = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
        text = text if type(error) is ValueError else f"{type(error).__name__}: {text}"
        raise ValueError(f"{path}{_line_in(path, error)}: {text}; correct the config") from error


def _config_near(path: Path) -> str:
    if (path / "config.json").is_file():
        return f"that is a run, which `jaxtrain train {path}/config.json --run-dir {path}` resumes"
    there = sorted(file.name for file in path.parent.glob("*") if file.suffix in (".py", ".json"))
    near = f"{path.name}.py" if f"{path.name}.py" in there else nearest(path.name, there)
    return f"did you mean {path.parent / near}?" if near else "give a .py file with config(), or a config.json"


def load_run_config(run_dir: str | Path) -> Config:
    """Reads the config.json of a run directory; raises a ValueError if it is missing or not valid."""
    run_dir = Path(run_dir)
    if (run_dir / "config.json").is_file():
        return load_config(run_dir / "config.json")
    if (run_dir / "checkpoints").is_dir():
        remedy = f"`jaxtrain train CONFIG --run-dir {run_dir}` restores it from a checkpoint"
        raise ValueError(f"{run_dir} has lost its config.json: {remedy}")
    raise ValueError(
        f"{run_dir} is no run directory (no config.json): give the --run-dir of `jaxtrain train`"
        " (to eval, generate and load, a folder of transformers serves as well)"
    )


@contextlib.contextmanager
def _neighbours_importable(path: Path) -> Iterator[str]:
    """Puts the folder of a config, and that of its package, on `sys.path`; yields its name in the package, or "".

    A file in a folder with `__init__.py` is in a package. Afterwards the modules that were imported from these folders
    are forgotten, but not those of a virtual environment there.
    """
    file = path.resolve()
    root, module = file.parent, ""
    while "." not in file.stem and (root / "__init__.py").is_file():
        module, root = f"{root.name}.{module or file.stem}", root.parent
    before, inside = set(sys.modules), [entry for entry in map(Path, sys.path) if root in entry.resolve().parents]
    importlib.invalidate_caches()
    added = list(dict.fromkeys(map(str, (file.parent, root))))
    sys.path[:0] = added
    try:
        yield module
    finally:
        for entry in added:
            sys.path.remove(entry)
        for name in set(sys.modules) - before:
            parents = Path(getattr(sys.modules[name], "__file__", None) or "/").resolve().parents
            if root in parents and not any(entry.resolve() in parents for entry in inside):
                del sys.modules[name]


def _line_in(path: Path, error: BaseException) -> str:
    """Returns ` line N`, the last line of the file that led to an error; empty if none did."""
    files = {str(path), str(path.resolve())}
    if isinstance(error, SyntaxError) and error.filename in files:
        return f" line {error.lineno}"
    numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    return f" line {numbers[-1]}" if numbers else ""


def to_json(config: Config) -> str:
    """Returns a config as JSON text, with a key for each field; see `config.to_dict` for a custom model."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str | bytes) -> Config:
    """Reads a config from the text of `to_json`, of this or an older version. A custom model becomes a SavedModel.

    Raises a ValueError that names an unknown key, a missing one, or one with a wrong value.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    return _build(Config, _migrate(values), "")


def _migrate(values: Any) -> Any:
    """Replaces what older versions wrote into config.json by its form of today."""
    if not isinstance(values, dict):
        return values
    migrated = {section: fields for section, fields in values.items() if section not in _REMOVED}
    for section, fields in migrated.items():
        if isinstance(fields, dict):
            paths = {f"{section}.{name}": name for name in fields}
            kept = {name: (path, fields[name]) for path, name in paths.items() if path not in _REMOVED}
            migrated[section] = {name: _today(*pair) for name, pair in kept.items()}
    return migrated


def _today(path: str, value: Any) -> Any:
    return value if isinstance(value, bool | list | dict) else _RENAMED.get((path, value), value)


def _build(cls: Any, values: Any, prefix: str) -> Any:
    """Makes a dataclass from JSON values; `prefix` is the dotted path of its keys."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'config'}: expected an object, got {values!r}")
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in values.keys() - hints.keys():
        raise ValueError(f"unknown config key {prefix}{one_line(key)}; {suggest(key, list(hints), prefix)}")
    made = {}
    for item in dataclasses.fields(cls):
        hint, value = hints[item.name], values.get(item.name)
        if item.name == "model" and cls is Config:
            hint = SavedModel if isinstance(value, dict) and "custom" in value else ModelConfig
        if item.name not in values:
            if item.default is item.default_factory:  # both MISSING
                raise ValueError(f"config key {prefix}{item.name} is missing: give at least that one")
        elif dataclasses.is_dataclass(hint):
            made[item.name] = _build(hint, value, f"{prefix}{item.name}.")
        else:
            made[item.name] = check_value(hint, value, f"{prefix}{item.name}")
    return cls(**made)


def differences(old: Config, new: Config) -> list[str]:
    """Returns a line `key: old -> new` for every field that differs in effect."""
    before, after = flat_fields(old), flat_fields(new)
    keys = dict.fromkeys([*before, *after])
    return [f"{k}: {before.get(k)!r} -> {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]


def flat_fields(config: Config) -> dict[str, Any]:
    """Returns the JSON value of every field by its dotted path, with the warm-up in steps however it is stated."""
    values = json.loads(to_json(config))
    values["optim"] |= {"warmup_steps": config.warmup_steps, "warmup_fraction": None}
    return flatten(values)


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested dicts by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
