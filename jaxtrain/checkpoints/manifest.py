"""Manifest of a checkpoint: the leaves and the SHA-256 of every file, written last and checked before each read.

manifest.json: `format`, `version`, `step`, `leaves` {path: {shape, dtype}}, `files` {name: {bytes, sha256}}, and
`checksum`, the SHA-256 of all the rest.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxtrain.runtime.files import checksum, read_json, sha256_file, sync_folder, write_sealed_json
from jaxtrain.runtime.remote import MANIFEST, checkpoint_fetcher

FINGERPRINT = "record/metadata"  # JSON, at the path where Orbax's JSON handler wrote it in earlier checkpoints
_WRITTEN_BY = re.compile(r"ocdbt\.process_(\d+)/")
_FORMAT, _VERSION = "jaxtrain-checkpoint", 1
_NUM_THREADS = 8  # hashing releases the interpreter lock, and reading waits for the disk


class Damaged(ValueError):
    """A checkpoint differs from what was written; the message names the file."""


def list_files(folder: Path) -> list[str]:
    """Returns the names of all files of a checkpoint that a manifest lists, in order."""
    paths = sorted(folder.rglob("*"))
    return [str(p.relative_to(folder)) for p in paths if p.is_file() and p.name not in (MANIFEST, f"{MANIFEST}.tmp")]


def hash_files(folder: Path, names: Iterable[str], progress: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Flushes files to the disk and returns their entries of the manifest; calls `progress` after each file."""

    def entry(name: str) -> dict[str, Any]:
        with open(folder / name, "rb") as stream:
            os.fsync(stream.fileno())
        found = {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        progress()
        return found

    names = list(names)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return dict(zip(names, pool.map(entry, names), strict=True))


def seal(folder: Path, step: int, leaves: dict[str, dict[str, Any]], files: dict[str, Any]) -> None:
    """Flushes the folders of a checkpoint to the disk and writes its manifest.

    Args:
      folder: the checkpoint.
      step: step of the state in it.
      leaves: the result of `leaves.describe_leaves`.
      files: the result of `hash_files`; files that it lacks are hashed here.
    """
    files = files | hash_files(folder, [name for name in list_files(folder) if name not in files])
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
    manifest = {"format": _FORMAT, "version": _VERSION, "step": step, "leaves": leaves, "files": files}
    write_sealed_json(folder / MANIFEST, manifest)


def share_of(names: Iterable[str], process: int, count: int) -> list[str]:
    """Returns the files that one of `count` processes hashes: those that it wrote, and an even part of the others.

    Orbax writes the data of process N to folders named ocdbt.process_N.
    """

    def owner(index: int, name: str) -> int:
        written_by = _WRITTEN_BY.search(name)
        return (int(written_by[1]) if written_by else index) % count

    return [name for index, name in enumerate(sorted(names)) if owner(index, name) == process]


def verify(
    folder: Path, parts: tuple[str, ...] = (), *, process: int = 0, count: int = 1
) -> tuple[dict[str, dict[str, Any]], int]:
    """Compares the files of a checkpoint with its manifest, byte for byte.

    In the local copy of a run at a URL, missing and damaged files are downloaded, by every process.

    Args:
      folder: the checkpoint.
      parts: subfolders to verify; files beside them and the fingerprint are always verified. () verifies all.
      process, count: verify the share of one of `count` processes.

    Returns:
      The description of the leaves (`leaves.describe_leaves`), and the number of bytes hashed.

    Raises:
      Damaged: the first file that differs from what was written, and how.
    """
    manifest = _read_manifest(folder)
    tops = (*parts, FINGERPRINT.split("/")[0])
    files = {n: f for n, f in manifest["files"].items() if not parts or "/" not in n or n.split("/")[0] in tops}
    fetch = checkpoint_fetcher(folder)
    names = sorted(files) if fetch else share_of(files, process, count)

    def problem_of(name: str) -> str:
        problem = _problem(folder / name, name, files[name])
        if problem and fetch:
            fetch(name)
            problem = _problem(folder / name, name, files[name])
        return problem

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for problem in pool.map(problem_of, names):
            if problem:
                raise Damaged(problem)
    if FINGERPRINT not in files:
        raise Damaged(f"{FINGERPRINT} is not listed in {MANIFEST}")
    if not _is_fingerprint(read_json(folder / FINGERPRINT)):
        raise Damaged(f"{FINGERPRINT} is not what was written")
    return manifest["leaves"], sum(files[name]["bytes"] for name in names)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a checkpoint and verifies its checksum and form.

    Raises:
      Damaged: the manifest is missing or differs from what was written.
    """
    file = folder / MANIFEST
    manifest = read_json(file) if file.is_file() else None
    if not isinstance(manifest, dict):
        raise Damaged(f"{MANIFEST} {'is not readable' if os.path.lexists(file) else 'is missing'}")
    if manifest.get("format") != _FORMAT or manifest.get("version") != _VERSION:
        raise Damaged(f"{MANIFEST} is not of format {_FORMAT}, version {_VERSION}")
    written = manifest.pop("checksum", None) == checksum(manifest) and _has_form(manifest)
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


def _is_fingerprint(values: Any) -> bool:
    """Returns True if a fingerprint has the types that are read, see `training.run.fingerprint`."""
    form = {"config": dict, "data": dict | str | None, "tokenizer": str | None, "decay_mask": list | None}
    return isinstance(values, dict) and all(isinstance(values[key], form[key]) for key in form.keys() & values.keys())


def _has_form(manifest: dict[str, Any]) -> bool:
    """Returns True if the manifest has every entry that is read; a valid checksum proves no form."""
    form: dict[str, dict[str, type]] = {"leaves": {"shape": list, "dtype": str}, "files": {"bytes": int, "sha256": str}}
    return isinstance(manifest.get("step"), int) and all(
        isinstance(manifest.get(part), dict)
        and all(
            isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
            for entry in manifest[part].values()
        )
        for part, kinds in form.items()
    )
