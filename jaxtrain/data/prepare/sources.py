"""Finds the files of a corpus: paths, folders, globs, and the running Python's standard library."""

import glob
import hashlib
import os
import stat
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtrain.data.prepare.formats import find_format
from jaxtrain.data.prepare.streams import naming
from jaxtrain.fields import require_local

PYTHON_STDLIB = "python-stdlib"
# Tests and other files outside the library itself; `lib2to3/tests` goes with `tests`.
_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

LeftOut = dict[str, list[str]]  # reason: paths


@dataclass(frozen=True)
class SourceFile:
    """One input file, with its size and date at the time it was found."""

    path: str  # absolute
    key: str  # decides the document's split; "": the text does
    size: int  # bytes on disk
    mtime_ns: int  # last change, nanoseconds since 1970
    format: str  # key in FORMATS


def find_sources(sources: Sequence[str]) -> tuple[list[SourceFile], LeftOut]:
    """Lists the files of the sources in the order of their names, sorted within a folder or glob.

    Symbolic links are followed, to folders too. A file that is found under two names is listed once.

    Returns:
      The files, and the paths that were left out by reason (hidden, empty, not regular files).

    Raises:
      ValueError: a source without files or with a `scheme://`, a broken link, or a folder that cannot be read.
    """
    if isinstance(sources, str) or not sources:
        raise ValueError(f"sources must be a list of files, folders, globs or {PYTHON_STDLIB}; got {sources!r}")
    files: dict[str, SourceFile] = {}
    left_out: LeftOut = {}
    for source in sources:
        require_local(source, "a source")
        if source == PYTHON_STDLIB:
            found = _stdlib_files(Path(sysconfig.get_path("stdlib")))
        else:
            found = [_source_file(path) for path in _paths(source, left_out)]
        for file in found:
            files.setdefault(os.path.realpath(file.path), file)
    if empty := [file.path for file in files.values() if file.size == 0]:
        left_out["empty"] = empty
    return list(files.values()), left_out


def describe_left_out(counts: dict[str, int], names: LeftOut) -> str:
    """Returns one line such as `left out: 3 hidden (.git, .env, a/.x), 1 empty (b.txt)`; "" if nothing is left out."""
    parts = []
    for reason, count in counts.items():
        examples = [os.path.basename(path) for path in names.get(reason, [])[:3]]
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
                raise ValueError(
                    f"the folder {entry} holds no files (hidden ones are skipped): name a folder with text"
                )
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


def _walk(folder: Path, skip: Callable[[str], bool], left_out: LeftOut | None = None) -> list[str]:
    """Returns the relative paths of the regular files under a folder, sorted; `skip` gets the name of each entry.

    A folder that was visited before, such as a link to a parent, is not visited again.
    """
    paths, visited = [], {os.path.realpath(folder)}
    left_out = {} if left_out is None else left_out
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_refuse_unreadable):
        skipped = [name for name in folders + files if skip(name)]
        real = {name: os.path.realpath(os.path.join(root, name)) for name in folders if name not in skipped}
        folders[:] = [name for name in real if real[name] not in visited]
        visited.update(real.values())
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


def _refuse_unreadable(error: OSError) -> None:
    raise ValueError(f"the folder {error.filename} cannot be read: {error.strerror}; make it readable or move it away")


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if path.is_symlink():
            why = f"{path} is a link to {os.readlink(path)}, which cannot be opened: fetch the file or remove the link"
            raise ValueError(why) from None
        if not os.path.lexists(path):
            raise ValueError(f"no file or folder {path}: check the path, or name a glob or {PYTHON_STDLIB}") from None
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _source_file(path: Path, key: str = "") -> SourceFile:
    status = path.stat()
    with naming(str(path)):
        name = "" if key or not status.st_size else find_format(str(path))
    return SourceFile(os.path.abspath(path), key, status.st_size, status.st_mtime_ns, name)


def _stdlib_files(folder: Path) -> list[SourceFile]:
    """Lists the standard library's own modules: no tests, no copies, UTF-8 only; the key is the relative path."""
    files, seen = [], set()
    for name in _walk(folder, lambda name: name in _STDLIB_SKIPPED):
        if not name.endswith(".py") or name.startswith("ensurepip/_bundled/"):
            continue
        data = (folder / name).read_bytes()
        digest = hashlib.sha256(data).digest()
        if data and digest not in seen and _is_utf8(data):
            files.append(_source_file(folder / name, key=name))
            seen.add(digest)
    if not files:
        raise ValueError(
            f"{PYTHON_STDLIB}: no .py files under {folder}: this Python ships its standard library without sources; "
            "use another Python, or name text files instead"
        )
    return files


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
