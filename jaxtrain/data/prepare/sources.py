"""Finds the files of a corpus: paths, folders, globs, URLs, and the running Python's standard library."""

import glob
import hashlib
import os
import stat
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtrain.data import remote
from jaxtrain.data.prepare.formats import find_format
from jaxtrain.data.prepare.streams import naming
from jaxtrain.fields import is_url, require_local
from jaxtrain.runtime.files import read_object, sha256_file
from jaxtrain.runtime.terminal import one_line

PYTHON_STDLIB = "python-stdlib"
# Tests and other files outside the library itself; `lib2to3/tests` goes with `tests`.
_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

_REPEATED = "under another name already"

LeftOut = dict[str, list[str]]  # reason: paths


@dataclass(frozen=True)
class SourceFile:
    """One input file, with its size and version at the time it was found."""

    path: str  # absolute, or a URL
    key: str  # decides the document's split; "": the text does
    size: int  # bytes on disk
    version: str  # changes with the content: nanoseconds of the last change, or an object store's tag
    format: str  # key in FORMATS
    source: str = ""  # through which it was found, as the user named it
    split: str = ""  # "train" or "validation"; "": `documents.SplitRule` decides


def find_sources(sources: Sequence[str], validation: Sequence[str] = ()) -> tuple[list[SourceFile], LeftOut]:
    """Lists the files of the sources in the order of their names, sorted within a folder or glob.

    Symbolic links are followed, to folders too. A file that is found under two names, links of both kinds included, is
    listed once.

    Args:
      sources: files, folders, globs, fsspec URLs or `python-stdlib`.
      validation: the same, for files that make the validation split; they are left out of the training split.

    Returns:
      The files, and the paths that were left out by reason (hidden, empty, not regular files, links).

    Raises:
      ValueError: a source without files, a broken link, or a folder that cannot be read.
    """
    if isinstance(sources, str) or not sources:
        raise ValueError(f"sources must be a list of files, folders, globs or {PYTHON_STDLIB}; got {sources!r}")
    left_out: LeftOut = {}
    files = _find(sources, left_out)
    held_out = _find(validation, left_out)
    if doubled := [file.path for key, file in files.items() if key in held_out]:
        left_out["in the validation files"] = doubled
    found = [replace(file, split="train" if held_out else "") for key, file in files.items() if key not in held_out]
    found += [replace(file, split="validation") for file in held_out.values()]
    if empty := [file.path for file in found if file.size == 0]:
        left_out["empty"] = empty
    return found, left_out


def _find(sources: Sequence[str], left_out: LeftOut) -> dict[str, SourceFile]:
    files: dict[str, SourceFile] = {}
    for source in sources:
        if source == PYTHON_STDLIB:
            found = _stdlib_files(Path(sysconfig.get_path("stdlib")))
        elif is_url(source):
            found = [_source_file(url) for url in remote.find_files(source, left_out)]
        else:
            require_local(source, "a source")
            found = [_source_file(str(path)) for path in _paths(source, left_out)]
        for file in found:
            first = files.setdefault(_identity(file.path), replace(file, source=source))
            if file.path not in (first.path, *left_out.get(_REPEATED, ())):
                left_out.setdefault(_REPEATED, []).append(file.path)
    return files


def _identity(path: str) -> str:
    """Returns a text that all names of a file share: symbolic links and hard links."""
    if is_url(path):
        return path
    status = os.stat(path)
    return f"{status.st_dev}:{status.st_ino}" if status.st_nlink > 1 else os.path.realpath(path)


def file_version(path: str) -> tuple[int, str]:
    """Returns the size in bytes of a file or URL, and a text that changes with its content."""
    if is_url(path):
        return remote.url_version(path)
    status = os.stat(path)
    return status.st_size, str(status.st_mtime_ns)


def content_hash(path: str) -> str:
    """Returns the SHA-256 (hex) of a file; of a URL, the version, which needs no second download."""
    return remote.url_version(path)[1] if is_url(path) else sha256_file(Path(path))


def describe_left_out(counts: dict[str, int], names: LeftOut) -> str:
    """Returns one line such as `left out: 3 hidden (.git, .env, a/.x), 1 empty (b.txt)`; "" if nothing is left out."""
    parts = []
    for reason, count in counts.items():
        examples = [one_line(os.path.basename(path)) for path in names.get(reason, [])[:3]]
        more = ", ..." if count > len(examples) else ""
        parts.append(f"{count:,} {reason}" + (f" ({', '.join(examples)}{more})" if examples else ""))
    return f"left out: {', '.join(parts)}" if parts else ""


def _paths(source: str, left_out: LeftOut) -> list[Path]:
    path = Path(source).expanduser()
    if os.path.lexists(path) or not glob.has_magic(source):
        found = [path]
    else:
        found = sorted(Path(name) for name in set(_expand(str(path))))
        if not found:
            raise ValueError(f"the glob {source!r} matches no file: check it (a `**` spans folders)")
    files = []
    for entry in found:
        if entry.is_dir():
            inside = [entry / name for name in _walk(entry, lambda name: name.startswith("."), left_out)]
            if not inside and len(found) == 1:
                raise ValueError(f"the folder {entry} holds no files (hidden ones are skipped): name one with text")
            files += inside
        elif _is_regular(entry):
            files.append(entry)
        else:
            raise ValueError(f"{entry} is neither a regular file nor a folder: write the text to a file first")
    return files


def _expand(pattern: str) -> list[str]:
    """Returns the paths that a glob matches; unlike `glob.glob`, `**` visits each folder once, links included."""
    if pattern.endswith("/**"):
        return _expand(pattern.removesuffix("/**"))
    head, _, tail = f"./{pattern}".partition("/**/") if pattern.startswith("**/") else pattern.partition("/**/")
    if not tail:
        return glob.glob(pattern)
    folders = [folder for start in _expand(head) for folder in _folders(start)]
    return [path for folder in folders for path in _expand(os.path.join(glob.escape(folder), tail))]


def _folders(folder: str) -> list[str]:
    """Returns a folder and the folders below it that are not hidden, each once."""
    found, visited = [], set()
    for root, inner, _ in os.walk(folder, followlinks=True, onerror=_refuse_unreadable):
        if os.path.realpath(root) in visited:
            inner.clear()
            continue
        visited.add(os.path.realpath(root))
        inner[:] = [name for name in inner if not name.startswith(".")]
        found.append(root)
    return found


def _walk(folder: Path, skip: Callable[[str], bool], left_out: LeftOut) -> list[str]:
    """Returns the relative paths of the regular files under a folder, sorted; `skip` gets the name of each entry.

    A folder that was visited before, such as a link to a parent, is not visited again.
    """
    paths, visited = [], {os.path.realpath(folder)}
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_unreadable):
        skipped = [name for name in folders + files if skip(name)]
        if parts := _dataset_files(root, files):
            others = [os.path.join(root, name) for name in sorted(set(files) - parts)]
            left_out.setdefault("beside the records of a dataset", []).extend(others)
            files = sorted(parts)
        names, folders[:] = [name for name in folders if name not in skipped], []
        for name in names:
            real = os.path.realpath(os.path.join(root, name))
            if real in visited:
                left_out.setdefault(_REPEATED, []).append(os.path.join(root, name))
            else:
                visited.add(real)
                folders.append(name)
        for name in files:
            if name not in skipped:
                path = os.path.join(root, name)
                if _is_regular(Path(path)):
                    paths.append(path)
                else:
                    left_out.setdefault("not regular", []).append(path)
        if skipped:
            left_out.setdefault("hidden", []).extend(os.path.join(root, name) for name in sorted(skipped))
    return sorted(Path(path).relative_to(folder).as_posix() for path in paths)


def _dataset_files(folder: str, files: Sequence[str]) -> set[str]:
    """Returns the data files of a folder that `datasets.save_to_disk` wrote; empty for other folders.

    Raises:
      ValueError: a folder of several splits, of which one must be named, or one that lacks a data file.
    """
    if "dataset_dict.json" in files:
        splits = _items(folder, "dataset_dict.json", "splits", str) or ["SPLIT"]
        raise ValueError(
            f"{folder} is a dataset with the splits {', '.join(splits)}: name one of their folders, such as "
            f"{os.path.join(folder, splits[0])} (and another for validation)"
        )
    if not {"state.json", "dataset_info.json"} <= set(files):
        return set()
    parts = {str(part.get("filename")) for part in _items(folder, "state.json", "_data_files", dict)}
    if not parts or parts - set(files):
        missing = ", ".join(parts - set(files)) or "data files in state.json"
        raise ValueError(f"the dataset {one_line(str(folder))} is damaged: it lacks {missing}; save it again")
    return parts


def _items(folder: str, name: str, key: str, kind: type) -> list[Any]:
    """Returns the items of a type in a list of a JSON file; none if the file is damaged."""
    items = read_object(Path(folder, name)).get(key)
    return [item for item in items if isinstance(item, kind)] if isinstance(items, list) else []


def _refuse_unreadable(error: OSError) -> None:
    raise ValueError(f"the folder {one_line(error.filename)} cannot be read: {error.strerror}; make it readable")


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        shown = one_line(str(path))
        if path.is_symlink():
            target = one_line(os.readlink(path))
            why = f"{shown} is a link to {target}, which cannot be opened: fetch the file or remove the link"
            raise ValueError(why) from None
        if not os.path.lexists(path):
            raise ValueError(f"no file or folder {shown}: check the path, or name a glob or {PYTHON_STDLIB}") from None
        raise ValueError(f"{shown} cannot be read: {error.strerror}") from None


def _source_file(path: str, key: str = "") -> SourceFile:
    size, version = file_version(path)
    with naming(path):
        name = "" if key or not size else find_format(path)
    return SourceFile(path if is_url(path) else os.path.abspath(path), key, size, version, name)


def _stdlib_files(folder: Path) -> list[SourceFile]:
    """Lists the standard library's own modules: no tests, no copies, UTF-8 only; the key is the relative path."""
    files, seen = [], set()
    for name in _walk(folder, lambda name: name in _STDLIB_SKIPPED, {}):
        if not name.endswith(".py") or name.startswith("ensurepip/_bundled/"):
            continue
        data = (folder / name).read_bytes()
        digest = hashlib.sha256(data).digest()
        if data and digest not in seen and data == data.decode("utf-8", "replace").encode():
            files.append(_source_file(str(folder / name), key=name))
            seen.add(digest)
    if not files:
        raise ValueError(f"{PYTHON_STDLIB}: no .py files under {folder}: use a Python with sources, or name text files")
    return files
