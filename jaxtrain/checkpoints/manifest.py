"""What makes a checkpoint one to trust: a manifest of its leaves and files, written last and checked before it is read.

manifest.json: `format`, `version`, `step`, `leaves` {path: {shape, dtype}}, `files` {name: {bytes, sha256}}, and
`checksum`, the SHA-256 of all the rest.
"""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxtrain.runtime.files import read_json, sha256_file, sync_folder, write_json

MANIFEST = "manifest.json"
_FORMAT, _VERSION = "jaxtrain-checkpoint", 1
_NUM_THREADS = 8  # hashing lets go of the interpreter, and reading waits for the disk


class Damaged(ValueError):
    """A checkpoint is not what was written; the message names the file."""


def describe(tree: Any, name: str) -> dict[str, dict[str, Any]]:
    """Shape and dtype of every array (or jax.ShapeDtypeStruct) in a tree, by its path under `name`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}": {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
        }
        for path, leaf in leaves
    }


def seal(folder: Path, step: int, leaves: dict[str, dict[str, Any]], progress: Callable[[], None]) -> None:
    """Flushes all files of a checkpoint to the disk and writes its manifest.

    Args:
      folder: the checkpoint.
      step: of the state in it.
      leaves: what `describe` says of it.
      progress: called after each file.
    """

    def look(path: Path) -> dict[str, Any]:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        found = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        progress()
        return found

    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != f"{MANIFEST}.tmp"]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        files = {str(path.relative_to(folder)): found for path, found in zip(paths, pool.map(look, paths), strict=True)}
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    manifest = {"format": _FORMAT, "version": _VERSION, "step": step, "leaves": leaves, "files": files}
    write_json(folder / MANIFEST, manifest | {"checksum": _checksum(manifest)})


def verify(folder: Path, parts: tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads every byte of a checkpoint and compares it with the manifest.

    Args:
      folder: the checkpoint.
      parts: only the files in these subfolders, and those beside them; (): all.

    Returns:
      The manifest.

    Raises:
      Damaged: what is wrong with the first file that is not what was written.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict):
        what = "is not readable" if (folder / MANIFEST).exists() else "is missing"
        raise Damaged(f"{MANIFEST} {what}")
    if manifest.get("format") != _FORMAT or manifest.get("version") != _VERSION:
        raise Damaged(f"{MANIFEST} is not of format {_FORMAT}, version {_VERSION}")
    checked = manifest.pop("checksum", None) == _checksum(manifest) and _has_form(manifest)
    if not checked or str(manifest["step"]) != folder.name:
        raise Damaged(f"{MANIFEST} is not what was written")

    def problem(item: tuple[str, dict[str, Any]]) -> str:
        name, wanted = item
        try:
            if not (folder / name).is_file():  # nor a device, which has no end
                return f"{name} is missing"
            size = (folder / name).stat().st_size
            if size != wanted["bytes"]:
                return f"{name} has {size} bytes, its manifest says {wanted['bytes']}"
            if sha256_file(folder / name) != wanted["sha256"]:
                return f"{name} has other bytes than were written"
        except OSError as error:
            return f"{name} cannot be read: {error}"
        return ""

    files = [(n, f) for n, f in manifest["files"].items() if not parts or "/" not in n or n.split("/")[0] in parts]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for text in pool.map(problem, files):
            if text:
                raise Damaged(text)
    return manifest


def compare(saved: dict[str, dict[str, Any]], wanted: dict[str, dict[str, Any]]) -> list[str]:
    """What differs between the leaves of a checkpoint and those of a run, a line a leaf."""
    problems = [f"{path}: missing from the checkpoint" for path in wanted if path not in saved]
    problems += [f"{path}: in the checkpoint, not in the run" for path in saved if path not in wanted]
    for path in wanted:
        if path in saved and saved[path] != wanted[path]:
            ours, theirs = (f"{leaf['dtype']}{leaf['shape']}" for leaf in (wanted[path], saved[path]))
            problems.append(f"{path}: {theirs} in the checkpoint, {ours} in the run")
    return problems


def _has_form(manifest: dict[str, Any]) -> bool:
    """Whether it has all that is read of it: anybody can make a right checksum."""
    form = {"leaves": {"shape": list, "dtype": str}, "files": {"bytes": int, "sha256": str}}
    return "step" in manifest and all(
        isinstance(manifest.get(part), dict)
        and all(
            isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
            for entry in manifest[part].values()
        )
        for part, kinds in form.items()
    )


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
