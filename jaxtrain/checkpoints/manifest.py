"""Manifest of a checkpoint: the leaves and the SHA-256 of every file, written last and checked before each read.

manifest.json: `format`, `version`, `step`, `leaves` {path: {shape, dtype}}, `files` {name: {bytes, sha256}}, and
`checksum`, the SHA-256 of all the rest.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxtrain.runtime.files import read_json, sha256_file, sync_folder, write_json

MANIFEST = "manifest.json"
FINGERPRINT = "record/metadata"  # JSON; the name is that of Orbax's JSON handler, which wrote earlier checkpoints
_FORMAT, _VERSION = "jaxtrain-checkpoint", 1
_NUM_THREADS = 8  # hashing releases the interpreter lock, and reading waits for the disk


class Damaged(ValueError):
    """A checkpoint differs from what was written; the message names the file."""


def seal(folder: Path, step: int, leaves: dict[str, dict[str, Any]], progress: Callable[[], None]) -> None:
    """Flushes all files of a checkpoint to the disk and writes its manifest.

    Args:
      folder: the checkpoint.
      step: step of the state in it.
      leaves: the result of `leaves.describe`.
      progress: called after each file.
    """

    def entry(path: Path) -> dict[str, Any]:
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
        found = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        progress()
        return found

    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != f"{MANIFEST}.tmp"]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        files = {
            str(path.relative_to(folder)): found for path, found in zip(paths, pool.map(entry, paths), strict=True)
        }
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    manifest = {"format": _FORMAT, "version": _VERSION, "step": step, "leaves": leaves, "files": files}
    write_json(folder / MANIFEST, manifest | {"checksum": _checksum(manifest)})


def verify(folder: Path, parts: tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads every byte of a checkpoint and compares it with the manifest.

    Args:
      folder: the checkpoint.
      parts: subfolders to verify; files beside them and the fingerprint are always verified. () verifies all.

    Returns:
      The manifest.

    Raises:
      Damaged: the first file that differs from what was written, and how.
    """
    manifest = _read_manifest(folder)
    names = [
        name for name in manifest["files"] if not parts or "/" not in name or name.split("/")[0] in (*parts, "record")
    ]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for problem in pool.map(lambda name: _problem(folder / name, name, manifest["files"][name]), names):
            if problem:
                raise Damaged(problem)
    if FINGERPRINT not in names:
        raise Damaged(f"{FINGERPRINT} is not listed in {MANIFEST}")
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a checkpoint and verifies its own checksum and form.

    Raises:
      Damaged: the manifest is missing or differs from what was written.
    """
    file = folder / MANIFEST
    manifest = read_json(file) if file.is_file() else None
    if not isinstance(manifest, dict):
        raise Damaged(f"{MANIFEST} {'is not readable' if os.path.lexists(file) else 'is missing'}")
    if manifest.get("format") != _FORMAT or manifest.get("version") != _VERSION:
        raise Damaged(f"{MANIFEST} is not of format {_FORMAT}, version {_VERSION}")
    written = manifest.pop("checksum", None) == _checksum(manifest) and _has_form(manifest)
    if not written or str(manifest["step"]) != folder.name:
        raise Damaged(f"{MANIFEST} is not what was written")
    return manifest


def _problem(path: Path, name: str, wanted: dict[str, Any]) -> str:
    """Compares a file with its entry in the manifest; returns "" if it is whole."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a device or a FIFO may have no end
            return f"{name} is not a regular file"
        if status.st_size != wanted["bytes"]:
            return f"{name} has {status.st_size} bytes, its manifest says {wanted['bytes']}"
        if sha256_file(path) != wanted["sha256"]:
            return f"{name} has other bytes than were written"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"{name} cannot be read: {error}"
    return ""


def _has_form(manifest: dict[str, Any]) -> bool:
    """Returns True if the manifest has every entry that is read: anybody can make a valid checksum."""
    form = {"leaves": {"shape": list, "dtype": str}, "files": {"bytes": int, "sha256": str}}
    return isinstance(manifest.get("step"), int) and all(
        isinstance(manifest.get(part), dict)
        and all(
            isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
            for entry in manifest[part].values()
        )
        for part, kinds in form.items()
    )


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
