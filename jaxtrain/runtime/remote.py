"""File systems behind URLs (`gs://`, `s3://`, any fsspec URL), and local copies of run directories there.

fsspec is in the extra `remote`; a scheme may need a package of its own, such as gcsfs or s3fs. Their usual environment
variables and files give the credentials. A copy of a run has all small files; the arrays of a checkpoint are downloaded
when they are verified (checkpoints/manifest.py). `.origin.json` in it names the URL and the versions of its files.
"""

import contextlib
import fcntl
import hashlib
import os
import posixpath
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtrain.fields import is_url
from jaxtrain.runtime.files import cache_folder, checksum, read_object, write_json

MANIFEST = "manifest.json"  # of a checkpoint, which is complete once it has one
ORIGIN = ".origin.json"


@contextlib.contextmanager
def reaching(url: str, verb: str = "read") -> Iterator[None]:
    """Turns the errors of a remote file system into one line: the URL cannot be read, or cannot be `verb`."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{url} needs fsspec and its package for this scheme: {error}") from None
    except FileNotFoundError:
        raise ValueError(f"no file or folder {url}: check the URL") from None
    except Exception as error:  # every file system has its own
        raise ValueError(f"{url} cannot be {verb}: {type(error).__name__}: {error}") from None


def open_filesystem(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL and the path in it."""
    try:
        import fsspec
    except ImportError:
        raise ImportError("pip install 'jaxtrain[remote]'") from None
    return fsspec.core.url_to_fs(url)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Creates a folder and keeps other processes of this machine from filling it at the same time."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # no locks: both download, and each replaces whole files
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def put(system: Any, path: str, write: Callable[[], None]) -> None:
    """Calls a function that writes a file; creates the folder of the file first if its file system needs that."""
    try:
        write()
    except FileNotFoundError:
        system.makedirs(posixpath.dirname(path), exist_ok=True)
        write()


def fetch_file(system: Any, path: str, target: Path) -> None:
    """Downloads a file, which appears under its name once it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        system.get_file(path, str(partial))
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def copy_folder(kind: str, url: str) -> Path:
    """Returns the path in the cache for the files of a URL."""
    return cache_folder(kind) / hashlib.sha256(url.encode()).hexdigest()[:32]


def is_run(path: str | Path) -> bool:
    """Returns True if a folder or URL has a config.json."""
    if not is_url(path):
        return Path(path, "config.json").is_file()
    with reaching(str(path)):
        system, root = open_filesystem(str(path))
        return system.isfile(posixpath.join(root, "config.json"))


def local_run(run: str | Path) -> Path:
    """Returns the path of a run directory or of a folder of them; for a URL, that of an updated local copy.

    Raises a ValueError if the URL has no files, or cannot be read.
    """
    if not is_url(run):
        return Path(run).expanduser()
    url = str(run).rstrip("/")
    folder = copy_folder("copies", url)
    with exclusive(folder):
        if not fetch_records(url, folder):
            raise ValueError(f"no file or folder {url}: check the URL")
    return folder


def fetch_records(url: str, folder: Path) -> int:
    """Makes a folder a copy of a run (or a folder of runs) at a URL, without arrays and token stores.

    Returns the number of files at the URL that belong to the copy.
    """
    with reaching(url):
        system, root = open_filesystem(url)
        system.invalidate_cache()
        entries = system.find(root, detail=True)
        found = {posixpath.relpath(path, root): entry for path, entry in entries.items()}
        wanted = {name: checksum(found[name], default=str) for name in found if _is_record(name)}
        before = read_object(folder / ORIGIN).get("files", {})
        for name, version in before.items():
            if wanted.get(name) != version:
                (folder / name).unlink(missing_ok=True)
                if posixpath.basename(name) == MANIFEST:  # its arrays are of another checkpoint, if there is one
                    shutil.rmtree((folder / name).parent, ignore_errors=True)
        for name, version in wanted.items():
            if before.get(name) != version or not (folder / name).is_file():
                fetch_file(system, posixpath.join(root, name), folder / name)
        if wanted != before:
            write_json(folder / ORIGIN, {"url": url, "files": wanted})
        return len(wanted)


def _is_record(name: str) -> bool:
    """Returns True for a file that a copy holds from the start. Names with `..` are hidden ones, too."""
    *folders, base = name.split("/")
    if any(part.startswith(".") for part in (*folders, base)) or "data" in folders:
        return False
    if "checkpoints" not in folders:
        return True
    inside = folders[folders.index("checkpoints") + 1 :]
    return (len(inside), base) in ((0, "scores.json"), (1, MANIFEST))


def checkpoint_fetcher(checkpoint: Path) -> Callable[[str], None] | None:
    """Returns a function that downloads a file of a checkpoint by its name; None outside of copies.

    A file that is missing at the URL is not downloaded.
    """
    origin = read_object(checkpoint.parent.parent / ORIGIN)
    if not origin:
        return None
    url = f"{origin['url']}/checkpoints/{checkpoint.name}"
    with reaching(url):
        system, root = open_filesystem(url)

    def fetch(name: str) -> None:
        target = checkpoint / name
        if ".." in target.parts or not target.is_relative_to(checkpoint):
            return  # no manifest of ours names it
        with reaching(url), contextlib.suppress(FileNotFoundError):
            fetch_file(system, posixpath.join(root, name), target)

    return fetch


def token_store_of(folder: Path) -> Path | str:
    """Returns the path of the token store in a run directory, or its URL if a copy of the run lacks it."""
    origin = {} if (folder / "data").exists() else read_object(folder / ORIGIN)
    return f"{origin['url']}/data" if origin else folder / "data"
