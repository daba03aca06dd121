"""Finds the files a corpus is made of: paths, folders, globs, and the running Python's standard library."""

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

PYTHON_STDLIB = "python-stdlib"
# Tests, and what is not part of the library itself; `lib2to3/tests` goes with `tests`.
_STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class SourceFile:
    """One input file as it was when it was found."""

    path: str  # absolute
    key: str  # what decides the document's split; "": its text
    size: int  # bytes on disk
    mtime_ns: int  # last change, nanoseconds since 1970

    @property
    def is_gzip(self) -> bool:
        """Whether the file is compressed with gzip, by its name."""
        return self.path.endswith(".gz")

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a document, by the file's name."""
        return self.path.endswith((".jsonl", ".jsonl.gz"))


def find_sources(sources: Sequence[str]) -> list[SourceFile]:
    """Lists the files behind source names, in the order of the names and sorted within a folder or glob.

    A file that two sources name is listed once. A name that matches no file is a ValueError.
    """
    if isinstance(sources, str) or not sources:
        raise ValueError(f"sources must be a list of files, folders, globs or {PYTHON_STDLIB}; got {sources!r}")
    files: dict[str, SourceFile] = {}
    for source in sources:
        if source == PYTHON_STDLIB:
            found = _stdlib_files(Path(sysconfig.get_path("stdlib")))
        else:
            found = [_source_file(path) for path in _paths(source)]
        for file in found:
            files.setdefault(file.path, file)
    return list(files.values())


def _paths(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [path / name for name in _walk(path, lambda name: name.startswith("."))]
        if not found:
            raise ValueError(f"the folder {path} holds no files (hidden ones are skipped): name a folder with text")
        return found
    if path.exists():
        raise ValueError(f"{path} is neither a regular file nor a folder: write the text to a file first")
    if not glob.has_magic(source):
        raise ValueError(f"no file or folder {path}: check the path, or name a glob or {PYTHON_STDLIB}")
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if os.path.isfile(name))
    if not found:
        raise ValueError(f"the glob {source!r} matches no file: check it (a `**` spans folders)")
    return found


def _walk(folder: Path, skip: Callable[[str], bool]) -> list[str]:
    """Relative paths of the regular files under a folder, sorted; `skip` is told each file's and folder's own name.

    Links to folders are not followed.
    """
    paths = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not skip(name)]
        paths += [os.path.join(root, name) for name in files if not skip(name)]
    return sorted(Path(path).relative_to(folder).as_posix() for path in paths if os.path.isfile(path))


def _source_file(path: Path, key: str = "") -> SourceFile:
    status = path.stat()
    return SourceFile(os.path.abspath(path), key, status.st_size, status.st_mtime_ns)


def _stdlib_files(folder: Path) -> list[SourceFile]:
    """The standard library's own modules: no tests, no copies, UTF-8 only; the split goes by relative path."""
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
